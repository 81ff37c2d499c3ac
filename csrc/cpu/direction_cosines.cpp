// direction_cosines on the CPU: dot products by column chunks, merged in a fixed order.
#include <cmath>
#include <vector>

#include "../accumulate.h"
#include "../checks.h"
#include "dispatch.h"

namespace fadiag {
namespace {

// 4096 columns of ten float32 directions are 160 KB: all pairs are formed from the L2 cache.
constexpr int64_t kChunkColumns = 4096;

Tensor direction_cosines(std::vector<Tensor> grad_means, int64_t num_batches, bool stacked) {
  const CosinesCall call = check_cosines_call(grad_means, num_batches, stacked);
  const int type = call.type;
  const auto num_groups = static_cast<int64_t>(call.columns.size());
  const int64_t pairs = num_batches * num_batches;

  std::vector<int64_t> first_chunk(num_groups + 1, 0);
  int64_t elements = 0;
  for (int64_t g = 0; g < num_groups; ++g) {
    first_chunk[g + 1] = first_chunk[g] + (call.columns[g] + kChunkColumns - 1) / kChunkColumns;
    elements += call.columns[g] * num_batches;
  }
  std::vector<double> scales(num_groups * num_batches, 1.0);
  if (type == kDouble) {
    run_tasks(num_groups * num_batches, elements, [&](int64_t v) {
      scales[v] = power_of_two_scale(
          cpu_kernels().largest_magnitude(type, call.directions[v], call.columns[v / num_batches]));
    });
  }

  std::vector<double> products(first_chunk[num_groups] * pairs);
  run_tasks(first_chunk[num_groups], elements * num_batches, [&](int64_t chunk) {
    const int64_t g =
        std::upper_bound(first_chunk.begin(), first_chunk.end(), chunk) - first_chunk.begin() - 1;
    const int64_t begin = (chunk - first_chunk[g]) * kChunkColumns;
    const int64_t end = std::min(call.columns[g], begin + kChunkColumns);
    cpu_kernels().dot_products(type, &call.directions[g * num_batches], &scales[g * num_batches],
                               num_batches, begin, end, &products[chunk * pairs]);
  });

  auto* cosines = static_cast<double*>(call.cosines.mutable_data_ptr());
  run_tasks(num_groups, num_groups * pairs, [&](int64_t g) {
    std::vector<double> total(pairs, 0.0);
    for (int64_t chunk = first_chunk[g]; chunk < first_chunk[g + 1]; ++chunk) {
      for (int64_t i = 0; i < num_batches; ++i) {
        for (int64_t j = i; j < num_batches; ++j) {
          total[i * num_batches + j] += products[chunk * pairs + i * num_batches + j];
        }
      }
    }
    for (int64_t i = 0; i < num_batches; ++i) {
      const double squares_i = total[i * num_batches + i];
      cosines[g * pairs + i * num_batches + i] = self_cosine(squares_i);
      for (int64_t j = i + 1; j < num_batches; ++j) {
        const double value =
            cosine(total[i * num_batches + j], squares_i, total[j * num_batches + j]);
        cosines[g * pairs + i * num_batches + j] = value;
        cosines[g * pairs + j * num_batches + i] = value;
      }
    }
  });
  return call.cosines;
}

}  // namespace
}  // namespace fadiag

STABLE_TORCH_LIBRARY_IMPL(fadiag, CPU, m) {
  m.impl("direction_cosines", TORCH_BOX(&fadiag::direction_cosines));
}
