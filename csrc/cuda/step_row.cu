// step_row for CUDA tensors: plans, workspace, launches, registration.
#include "../step_row.h"
#include "glue.h"
#include "step_row_kernel.cuh"

namespace fadiag {
namespace {

// Of the 48 KB that every chip has; the kernels have up to 4 KB of their own.
constexpr int64_t kMostSharedBytes = 44 << 10;

bool aligned_rows(const StepLayer& layer, int64_t element_size) {
  return is_aligned(layer.direction, 0, element_size) &&
         is_aligned(layer.kept, layer.columns, element_size);
}

// Describes layers [begin, begin + table.num_layers); returns the number of their chunks.
int64_t add_layers(const StepRowCall& call, int64_t begin, StepTable& table) {
  int64_t units = 0;
  for (int i = 0; i < table.num_layers; ++i) {
    const StepLayer& layer = call.layers[begin + i];
    StepEntry& entry = table.entries[i];
    entry.direction = layer.direction;
    entry.kept = layer.kept;
    entry.columns = layer.columns;
    entry.first_unit = static_cast<int>(units);
    // A direction of no columns has a chunk too: its cosines are NaN.
    entry.num_chunks = std::max(1, static_cast<int>((layer.columns + kStepChunk - 1) / kStepChunk));
    entry.aligned = aligned_rows(layer, kElementSizes[call.type]);
    units += entry.num_chunks;
  }
  return units;
}

template <typename Element>
void launch(const StepRowCall& call, const TensorInfo& norms, cudaStream_t stream) {
  const auto num_layers = static_cast<int64_t>(call.layers.size());
  const int64_t num_vectors = call.window + 2;
  const int warps = static_cast<int>(std::clamp<int64_t>(num_vectors, kCounted / 32, kStepWarps));
  const int threads = 32 * warps;
  const int64_t shared_bytes = 2 * num_vectors * static_cast<int64_t>(sizeof(double));
  int64_t begin = 0;
  do {
    StepTable table{};
    table.num_layers = static_cast<int>(std::min<int64_t>(num_layers - begin, kStepLayers));
    table.window = static_cast<int>(call.window);
    table.decay = call.decay;
    table.norms = call.norms;
    table.states = call.states;
    table.samples = call.samples;
    table.rows = call.rows;
    table.num_rows = call.num_rows;
    table.row_stride = call.row_stride;
    table.cosines_at = call.cosines_at() + begin * (call.window + 1);
    table.extras_at = call.extras_at();
    table.places = call.places;
    if (begin == 0) {
      table.num_medians = static_cast<int>(call.num_medians());
      table.num_extras = static_cast<int>(call.extras.size());
      for (int e = 0; e < table.num_extras; ++e) {
        table.extras[e] = call.extras[e].values;
        table.extra_counts[e] = static_cast<int>(call.extras[e].count);
      }
    }
    const int64_t units = add_layers(call, begin, table);
    const bool is_long = units > table.num_layers;
    const bool is_scaled = std::is_same_v<Element, double> && table.num_layers > 0;
    const int64_t sums_size = is_long ? 2 * units * num_vectors : 0;
    const int64_t scales_size = is_scaled ? table.num_layers * num_vectors : 0;
    Tensor workspace;
    if (sums_size + scales_size > 0) {
      workspace = empty_on(norms, {sums_size + scales_size}, ScalarType::Double);
      table.sums = static_cast<double*>(workspace.mutable_data_ptr());
      if (is_scaled) table.scales = table.sums + sums_size;
    }
    begin += table.num_layers;
    const bool is_last = begin == num_layers;
    table.moves_direction = num_layers > 0;
    if (is_scaled) {
      const dim3 grid(static_cast<unsigned>(num_vectors), table.num_layers);
      step_scales_kernel<<<grid, threads, 0, stream>>>(table, table.sums + sums_size);
    }
    table.closes = is_last && !is_long;
    const auto blocks = static_cast<unsigned>(table.num_medians + units);
    const bool waits = compiled_capability<step_row_kernel<Element>>(norms.device_index) >= 90;
    STD_CUDA_CHECK(launch_dependent(step_row_kernel<Element>, waits, dim3(blocks),
                                    dim3(static_cast<unsigned>(threads)), shared_bytes, stream,
                                    table));
    if (is_long) {
      table.closes = is_last;
      keep_directions_kernel<Element>
          <<<static_cast<unsigned>(units), threads, shared_bytes, stream>>>(table);
    }
    STD_CUDA_CHECK(cudaGetLastError());
  } while (begin < num_layers);
}

void step_row(Tensor norms, std::vector<Tensor> directions, std::vector<Tensor> kept, Tensor rows,
              Tensor places, double decay, std::vector<Tensor> extras) {
  const StepRowCall call =
      check_step_row_call(norms, directions, kept, rows, places, decay, extras);
  if (2 * (call.window + 2) * static_cast<int64_t>(sizeof(double)) > kMostSharedBytes) {
    fail("step_row: expected at most ", kMostSharedBytes / 16 - 2, " kept directions on CUDA, got ",
         call.window);
  }
  if (call.extras.size() > kStepExtras) {
    fail("step_row: expected at most ", kStepExtras, " extras, got ", call.extras.size());
  }
  const TensorInfo info(norms);
  const torch::stable::accelerator::DeviceGuard guard(info.device_index);
  const cudaStream_t stream = current_stream(info.device_index);
  if (call.type == kDouble) {
    launch<double>(call, info, stream);
  } else {
    launch<float>(call, info, stream);
  }
}

}  // namespace
}  // namespace fadiag

STABLE_TORCH_LIBRARY_IMPL(fadiag, CUDA, m) { m.impl("step_row", TORCH_BOX(&fadiag::step_row)); }
