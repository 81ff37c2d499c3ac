// direction_cosines for CUDA tensors: plans, workspace, launches, registration.
#include "direction_cosines_kernel.cuh"
#include "glue.h"

namespace fadiag {
namespace {

template <typename Element, int kVectors, int kGroups>
void launch_chunk(const CosinesCall& call, int64_t begin, int64_t count, cudaStream_t stream) {
  const int64_t num_batches = call.num_batches;
  const int64_t panels = (num_batches + kPanel - 1) / kPanel;
  CosineTable<kVectors, kGroups> table;
  table.num_groups = static_cast<int>(count);
  table.num_batches = static_cast<int>(num_batches);
  table.num_pairs = static_cast<int>(panels * (panels + 1) / 2);
  table.cosines =
      static_cast<double*>(call.cosines.mutable_data_ptr()) + begin * num_batches * num_batches;
  int64_t num_units = 0;
  for (int64_t g = 0; g < count; ++g) {
    CosineGroup& group = table.groups[g];
    group.columns = call.columns[begin + g];
    group.first_unit = static_cast<int>(num_units);
    group.num_chunks = static_cast<int>((group.columns + kCosineChunk - 1) / kCosineChunk);
    group.first_vector = static_cast<int>(g * num_batches);
    group.aligned = 1;
    for (int64_t k = 0; k < num_batches; ++k) {
      const void* vector = call.directions[(begin + g) * num_batches + k];
      table.vectors[group.first_vector + k] = vector;
      group.aligned = group.aligned && is_aligned(vector, 0, sizeof(Element));
    }
    num_units += static_cast<int64_t>(group.num_chunks) * table.num_pairs;
  }
  const bool scaled = std::is_same_v<Element, double>;
  const int64_t scales_size = scaled ? count * num_batches : 0;
  const int64_t products_size = num_units * kPanelProducts;
  Tensor workspace;
  double* data = nullptr;
  if (scales_size + products_size > 0) {
    workspace =
        empty_on(TensorInfo(call.cosines), {scales_size + products_size}, ScalarType::Double);
    data = static_cast<double*>(workspace.mutable_data_ptr());
  }
  table.products = data;
  double* scales = scaled ? data + products_size : nullptr;
  table.scales = scales;
  STD_CUDA_CHECK(
      (launch_direction_cosines<Element, kVectors, kGroups>(table, num_units, scales, stream)));
}

Tensor direction_cosines(std::vector<Tensor> grad_means, int64_t num_batches, bool stacked) {
  if (num_batches > kLargeVectors) {
    fail("direction_cosines: expected at most ", kLargeVectors, " batches on CUDA, got ",
         num_batches);
  }
  const CosinesCall call = check_cosines_call(grad_means, num_batches, stacked);
  const int32_t device = TensorInfo(grad_means[0]).device_index;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const auto num_groups = static_cast<int64_t>(call.columns.size());
  with_element<__half, __nv_bfloat16>(call.type, [&](auto* tag) {
    using Element = std::remove_pointer_t<decltype(tag)>;
    for (int64_t begin = 0; begin < num_groups;) {
      const int64_t left = num_groups - begin;
      if (left <= kSmallGroups && left * num_batches <= kSmallVectors) {
        launch_chunk<Element, kSmallVectors, kSmallGroups>(call, begin, left, stream);
        begin += left;
      } else {
        const int64_t count = std::min<int64_t>({left, kLargeGroups, kLargeVectors / num_batches});
        launch_chunk<Element, kLargeVectors, kLargeGroups>(call, begin, count, stream);
        begin += count;
      }
    }
  });
  return call.cosines;
}

}  // namespace
}  // namespace fadiag

STABLE_TORCH_LIBRARY_IMPL(fadiag, CUDA, m) {
  m.impl("direction_cosines", TORCH_BOX(&fadiag::direction_cosines));
}
