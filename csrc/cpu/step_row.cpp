// step_row on the CPU: medians by selection, products by column chunks, merged in a fixed order.
#include "../step_row.h"

#include <cmath>
#include <vector>

#include "../accumulate.h"
#include "dispatch.h"

namespace fadiag {
namespace {

// A direction and one that is kept, in float32: 32 KB, in the L1 cache while they are multiplied.
constexpr int64_t kChunkColumns = 4096;

// The lower of the two middle values, like torch.nanmedian; NaN where there is none.
double median(std::vector<double>& values) {
  values.erase(std::remove_if(values.begin(), values.end(), [](double x) { return std::isnan(x); }),
               values.end());
  if (values.empty()) return std::numeric_limits<double>::quiet_NaN();
  const auto middle = values.begin() + (values.size() - 1) / 2;
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

void write_medians(const StepRowCall& call, double* row) {
  const int64_t samples = call.samples;
  const double* error = call.norms + (2 * call.states - 1) * samples;
  run_tasks(call.num_medians(), call.num_medians() * samples, [&](int64_t m) {
    const bool is_gain = m >= 2 * call.states;
    const double* norms = call.norms + (is_gain ? m - call.states : m) * samples;
    std::vector<double> values(norms, norms + samples);
    if (is_gain) {
      for (int64_t b = 0; b < samples; ++b) values[b] /= error[b];
    }
    row[m] = median(values);
  });
}

// Keeps the direction of one layer at `place`, and lets it enter the average where it has one.
template <typename Element>
void keep(const StepLayer& layer, int64_t window, int64_t place, bool enters, double weight) {
  const auto* direction = static_cast<const Element*>(layer.direction);
  auto* past = static_cast<Element*>(layer.kept) + place * layer.columns;
  auto* average = static_cast<Element*>(layer.kept) + window * layer.columns;
  std::copy(direction, direction + layer.columns, past);
  if (!enters) return;
  for (int64_t c = 0; c < layer.columns; ++c) {
    average[c] = moved_average<Element>(average[c], direction[c], weight);
  }
}

void compare_and_keep(const StepRowCall& call, int64_t place, double* cosines) {
  const auto num_layers = static_cast<int64_t>(call.layers.size());
  const int64_t num_kept = call.window + 1;
  const int64_t item = kElementSizes[call.type];
  std::vector<int64_t> first_chunk(num_layers + 1, 0);
  int64_t elements = 0;
  for (int64_t l = 0; l < num_layers; ++l) {
    const int64_t columns = call.layers[l].columns;
    first_chunk[l + 1] = first_chunk[l] + (columns + kChunkColumns - 1) / kChunkColumns;
    elements += columns * num_kept;
  }
  const auto kept_at = [&](int64_t l, int64_t k) {
    return static_cast<const char*>(call.layers[l].kept) + k * call.layers[l].columns * item;
  };
  // Of each layer: of what is kept, then of the direction itself.
  std::vector<double> scales(num_layers * (num_kept + 1), 1.0);
  if (call.type == kDouble) {
    run_tasks(num_layers * (num_kept + 1), elements, [&](int64_t v) {
      const int64_t l = v / (num_kept + 1);
      const int64_t k = v % (num_kept + 1);
      const void* vector = k < num_kept ? kept_at(l, k) : call.layers[l].direction;
      scales[v] = power_of_two_scale(
          cpu_kernels().largest_magnitude(call.type, vector, call.layers[l].columns));
    });
  }
  // Per chunk and kept vector: the direction's square, their product, the vector's square.
  std::vector<double> products(first_chunk[num_layers] * num_kept * 4);
  run_tasks(first_chunk[num_layers] * num_kept, elements, [&](int64_t task) {
    const int64_t chunk = task / num_kept;
    const int64_t k = task % num_kept;
    const int64_t l =
        std::upper_bound(first_chunk.begin(), first_chunk.end(), chunk) - first_chunk.begin() - 1;
    const int64_t begin = (chunk - first_chunk[l]) * kChunkColumns;
    const int64_t end = std::min(call.layers[l].columns, begin + kChunkColumns);
    const double* of_layer = &scales[l * (num_kept + 1)];
    const void* pair[2] = {call.layers[l].direction, kept_at(l, k)};
    const double pair_scales[2] = {of_layer[num_kept], of_layer[k]};
    cpu_kernels().dot_products(call.type, pair, pair_scales, 2, begin, end, &products[task * 4]);
  });
  run_tasks(num_layers, elements, [&](int64_t l) {
    double squares = 0.0;
    for (int64_t k = 0; k < num_kept; ++k) {
      double total[4] = {};
      for (int64_t chunk = first_chunk[l]; chunk < first_chunk[l + 1]; ++chunk) {
        for (int i = 0; i < 4; ++i) total[i] += products[(chunk * num_kept + k) * 4 + i];
      }
      squares = total[0];
      cosines[l * num_kept + k] = cosine(total[1], squares, total[3]);
    }
    const bool enters = self_cosine(squares) == 1.0;
    const double weight = 1.0 - call.decay;
    if (call.type == kDouble) {
      keep<double>(call.layers[l], call.window, place, enters, weight);
    } else {
      keep<float>(call.layers[l], call.window, place, enters, weight);
    }
  });
}

void step_row(Tensor norms, std::vector<Tensor> directions, std::vector<Tensor> kept, Tensor rows,
              Tensor places, double decay, std::vector<Tensor> extras) {
  const StepRowCall call =
      check_step_row_call(norms, directions, kept, rows, places, decay, extras);
  double* row = call.rows + call.places[0] * call.row_stride;
  write_medians(call, row);
  call.places[0] = (call.places[0] + 1) % call.num_rows;
  if (!call.layers.empty()) {
    compare_and_keep(call, call.places[1], row + call.cosines_at());
    call.places[1] = (call.places[1] + 1) % call.window;
  }
  double* next = row + call.extras_at();
  for (const StepRowCall::Extra& extra : call.extras) {
    next = std::copy(extra.values, extra.values + extra.count, next);
  }
}

}  // namespace
}  // namespace fadiag

STABLE_TORCH_LIBRARY_IMPL(fadiag, CPU, m) { m.impl("step_row", TORCH_BOX(&fadiag::step_row)); }
