// layer_statistics for CUDA tensors: plans, workspace, launches, registration.
#include "glue.h"
#include "layer_statistics_kernel.cuh"

namespace fadiag {
namespace {

// Launches layers [begin, begin + table.count) of one element type.
template <typename Element, int kCapacity>
void launch_chunk(const StatisticsCall& call, const std::vector<Layer>& layers, size_t begin,
                  size_t count, int multiprocessors, cudaStream_t stream) {
  using Sums = typename ElementTraits<Element>::Sums;
  StatisticsTable<kCapacity> table;
  table.count = static_cast<int>(count);
  table.rows = call.rows;
  table.norms[0] = static_cast<double*>(call.hidden_norm.mutable_data_ptr());
  table.norms[1] = static_cast<double*>(call.grad_norm.mutable_data_ptr());
  table.means = call.grad_mean.mutable_data_ptr();
  int64_t num_units = 0;
  int64_t workspace_size = 0;
  for (size_t i = 0; i < count; ++i) {
    const Layer& layer = layers[begin + i];
    const StatisticsPlan plan(call.rows, layer.columns, sizeof(Element), Sums::kSquareWords);
    StatisticsEntry& entry = table.entries[i];
    entry.layer = layer;
    entry.first_unit = static_cast<int>(num_units);
    entry.num_tiles = static_cast<int>(plan.num_tiles);
    entry.num_splits = static_cast<int>(plan.num_splits);
    entry.rows_per_unit = static_cast<int16_t>(plan.rows_per_unit);
    entry.warp_columns = static_cast<int8_t>(plan.warp_columns);
    const int64_t hidden_stride = call.rows > 1 ? layer.hidden_row_stride : 0;
    const int64_t grad_stride = call.rows > 1 ? layer.grad_row_stride : 0;
    entry.aligned = is_aligned(layer.hidden, hidden_stride, sizeof(Element)) &&
                    is_aligned(layer.grad, grad_stride, sizeof(Element));
    entry.bulk = entry.aligned && layer.columns * sizeof(Element) % kVectorBytes == 0;
    entry.squares_offset = workspace_size;
    if (plan.num_tiles > 1) workspace_size += plan.num_tiles * 2 * call.rows * Sums::kSquareWords;
    entry.sums_offset = workspace_size;
    if (plan.num_splits > 1) {
      workspace_size += plan.num_splits * layer.columns * Sums::kColumnWords;
    }
    num_units += plan.num_tiles * plan.num_splits;
  }
  table.num_units = static_cast<int>(num_units);
  Tensor workspace;
  table.workspace = nullptr;
  if (workspace_size > 0) {
    workspace = empty_on(TensorInfo(call.grad_mean), {workspace_size}, ScalarType::Double);
    table.workspace = static_cast<double*>(workspace.mutable_data_ptr());
  }
  STD_CUDA_CHECK((launch_layer_statistics<Element, kCapacity>(table, multiprocessors, stream)));
}

std::tuple<Tensor, Tensor, Tensor> layer_statistics(std::vector<Tensor> hiddens,
                                                    std::vector<Tensor> grads, bool stacked) {
  const StatisticsCall call = check_statistics_call(hiddens, grads, stacked);
  const int32_t device = TensorInfo(hiddens[0]).device_index;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  int multiprocessors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  for (int type = 0; type < kNumElementTypes; ++type) {
    const std::vector<Layer>& layers = call.layers[type];
    if (layers.empty()) continue;
    with_element(type, [&](auto* tag) {
      using Element = std::remove_pointer_t<decltype(tag)>;
      for (size_t begin = 0; begin < layers.size();) {
        const size_t left = layers.size() - begin;
        if (left <= kSmallTable) {
          launch_chunk<Element, kSmallTable>(call, layers, begin, left, multiprocessors, stream);
          begin += left;
        } else {
          const size_t count = std::min<size_t>(left, kLargeTable);
          launch_chunk<Element, kLargeTable>(call, layers, begin, count, multiprocessors, stream);
          begin += count;
        }
      }
    });
  }
  return {call.hidden_norm, call.grad_norm, call.grad_mean};
}

}  // namespace
}  // namespace fadiag

STABLE_TORCH_LIBRARY_IMPL(fadiag, CUDA, m) {
  m.impl("layer_statistics", TORCH_BOX(&fadiag::layer_statistics));
}
