// layer_statistics for CUDA tensors: plans, workspace, launches, registration.
#include "glue.h"
#include "layer_statistics_kernel.cuh"
#include "small_layers_kernel.cuh"

namespace fadiag {
namespace {

// What all launches of a call share.
struct Target {
  const StatisticsCall& call;
  int multiprocessors;
  bool has_clusters;
  bool has_ring;
  cudaStream_t stream;
};

template <typename Element>
StatisticsEntry describe(const Layer& layer, int64_t rows) {
  StatisticsEntry entry{};
  entry.layer = layer;
  const int64_t hidden_stride = rows > 1 ? layer.hidden_row_stride : 0;
  const int64_t grad_stride = rows > 1 ? layer.grad_row_stride : 0;
  entry.aligned = is_aligned(layer.hidden, hidden_stride, sizeof(Element)) &&
                  is_aligned(layer.grad, grad_stride, sizeof(Element));
  entry.bulk = entry.aligned && layer.columns * sizeof(Element) % kVectorBytes == 0;
  return entry;
}

template <int kCapacity>
void point_at_outputs(const StatisticsCall& call, size_t count, StatisticsTable<kCapacity>& table) {
  table.count = static_cast<int>(count);
  table.rows = call.rows;
  table.norms[0] = call.norms[0];
  table.norms[1] = call.norms[1];
  table.means = call.means;
  table.workspace = nullptr;
}

// Launches for layers that fit a cluster each.
template <typename Element, int kCapacity>
void launch_small(const Target& target, const Layer* layers, size_t count) {
  StatisticsTable<kCapacity> table;
  point_at_outputs(target.call, count, table);
  constexpr int64_t kWarpWidth = kWarpSize * kVectorBytes / sizeof(Element);
  for (size_t i = 0; i < count; ++i) {
    StatisticsEntry& entry = table.entries[i];
    entry = describe<Element>(layers[i], target.call.rows);
    entry.warp_columns = 1;
    while (entry.warp_columns * kWarpWidth < layers[i].columns) entry.warp_columns *= 2;
  }
  STD_CUDA_CHECK((launch_small_layers<Element, kCapacity>(table, target.stream)));
}

// Launches for all others.
template <typename Element, int kCapacity>
void launch_large(const Target& target, const Layer* layers, size_t count) {
  using Sums = typename SumsOf<Element>::type;
  const int64_t rows = target.call.rows;
  StatisticsTable<kCapacity> table;
  point_at_outputs(target.call, count, table);
  int64_t num_units = 0;
  int64_t workspace_size = 0;
  for (size_t i = 0; i < count; ++i) {
    const Layer& layer = layers[i];
    const StatisticsPlan plan(rows, layer.columns, sizeof(Element), Sums::kSquareWords);
    StatisticsEntry& entry = table.entries[i];
    entry = describe<Element>(layer, rows);
    entry.first_unit = static_cast<int>(num_units);
    entry.num_tiles = static_cast<int>(plan.num_tiles);
    entry.num_splits = static_cast<int>(plan.num_splits);
    entry.rows_per_unit = static_cast<int16_t>(plan.rows_per_unit);
    entry.warp_columns = static_cast<int8_t>(plan.warp_columns);
    entry.packed_rows = plan.num_tiles == 1 && layer.hidden_row_stride == layer.columns &&
                        layer.grad_row_stride == layer.columns;
    entry.squares_offset = workspace_size;
    if (plan.num_tiles > 1) workspace_size += plan.num_tiles * 2 * rows * Sums::kSquareWords;
    entry.sums_offset = workspace_size;
    if (plan.num_splits > 1) {
      workspace_size += plan.num_splits * layer.columns * Sums::kColumnWords;
    }
    num_units += plan.num_tiles * plan.num_splits;
  }
  table.num_units = static_cast<int>(num_units);
  Tensor workspace;
  if (workspace_size > 0) {
    workspace = empty_on(TensorInfo(target.call.packed), {workspace_size}, ScalarType::Double);
    table.workspace = static_cast<double*>(workspace.mutable_data_ptr());
  }
  STD_CUDA_CHECK((launch_layer_statistics<Element, kCapacity>(
      table, target.has_ring, target.multiprocessors, target.stream)));
}

// Calls small(begin, count) or large(begin, count) for stretches that a kernel's table holds.
template <typename Small, typename Large>
void for_each_table(size_t total, Small&& small, Large&& large) {
  for (size_t begin = 0; begin < total;) {
    const size_t left = total - begin;
    const size_t count = std::min<size_t>(left, kLargeTable);
    left <= kSmallTable ? small(begin, left) : large(begin, count);
    begin += count;
  }
}

Tensor layer_statistics(std::vector<Tensor> hiddens, std::vector<Tensor> grads, bool stacked) {
  StatisticsCall call = check_statistics_call(hiddens, grads, stacked);
  const int32_t device = TensorInfo(hiddens[0]).device_index;
  const torch::stable::accelerator::DeviceGuard guard(device);
  int multiprocessors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  const int major = compiled_capability<small_layers_kernel<float, kSmallTable>>(device) / 10;
  int shared_bytes = 0;
  STD_CUDA_CHECK(
      cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const Target target{call, multiprocessors, major >= 9, has_room_for_ring(major, shared_bytes),
                      current_stream(device)};
  for (int type = 0; type < kNumElementTypes; ++type) {
    std::vector<Layer>& layers = call.layers[type];
    if (layers.empty()) continue;
    with_element(type, [&](auto* tag) {
      using Element = std::remove_pointer_t<decltype(tag)>;
      const auto first_large =
          std::stable_partition(layers.begin(), layers.end(), [&](const Layer& layer) {
            return target.has_clusters &&
                   fits_one_cluster(call.rows, layer.columns, sizeof(Element));
          });
      const Layer* small = layers.data();
      const Layer* large = small + (first_large - layers.begin());
      const size_t num_small = large - small;
      for_each_table(
          num_small,
          [&](size_t b, size_t n) { launch_small<Element, kSmallTable>(target, small + b, n); },
          [&](size_t b, size_t n) { launch_small<Element, kLargeTable>(target, small + b, n); });
      for_each_table(
          layers.size() - num_small,
          [&](size_t b, size_t n) { launch_large<Element, kSmallTable>(target, large + b, n); },
          [&](size_t b, size_t n) { launch_large<Element, kLargeTable>(target, large + b, n); });
    });
  }
  return call.packed;
}

}  // namespace
}  // namespace fadiag

STABLE_TORCH_LIBRARY_IMPL(fadiag, CUDA, m) {
  m.impl("layer_statistics", TORCH_BOX(&fadiag::layer_statistics));
}
