// Turns a call of step_row into plain pointers, or says which argument is wrong and how.
#pragma once

#include "checks.h"

namespace fadiag {

// The direction of one layer and what is kept of it: K past ones and their average, [K + 1, D].
struct StepLayer {
  const void* direction;
  void* kept;
  int64_t columns;
};

struct StepRowCall {
  std::vector<StepLayer> layers;
  int type = kFloat;  // ElementType of directions: float32 or float64
  int64_t window = 0;
  double decay = 0.0;
  const double* norms = nullptr;  // [2, states, samples]
  int64_t states = 0;
  int64_t samples = 0;
  struct Extra {
    const double* values;
    int64_t count;
  };
  std::vector<Extra> extras;
  double* rows = nullptr;
  int64_t num_rows = 0;
  int64_t row_stride = 0;
  int64_t* places = nullptr;

  int64_t num_medians() const { return 3 * states - 1; }
  // Columns of a row, in this order: medians, cosines layer by layer, extras.
  int64_t cosines_at() const { return num_medians(); }
  int64_t extras_at() const {
    return num_medians() + static_cast<int64_t>(layers.size()) * (window + 1);
  }
};

inline StepRowCall check_step_row_call(const Tensor& norms, const std::vector<Tensor>& directions,
                                       const std::vector<Tensor>& kept, const Tensor& rows,
                                       const Tensor& places, double decay,
                                       const std::vector<Tensor>& extras) {
  constexpr const char* op = "step_row: ";
  const TensorInfo first(norms);
  // Rows may be part of wider ones; everything else lies in one piece.
  const auto check = [&](const std::string& name, const TensorInfo& info, int64_t dim,
                         ScalarType dtype, int64_t dense_from = 0) {
    if (info.dim != dim) {
      fail(op, name, ": expected ", dim, " dimensions, got shape ", info.shape_text());
    }
    if (info.dtype != static_cast<int32_t>(dtype)) {
      fail(op, name, ": expected ", dtype_name(dtype), ", got ",
           dtype_name(static_cast<ScalarType>(info.dtype)));
    }
    if (!info.same_device(first)) fail(op, name, ": expected the device of norms, got another");
    int64_t expected = 1;
    for (int64_t d = info.dim; d-- > dense_from;) {
      if (info.sizes[d] == 0) return;
      if (info.sizes[d] != 1 && info.strides[d] != expected) {
        fail(op, name, ": expected contiguous memory, got other strides");
      }
      expected *= info.sizes[d];
    }
  };
  check("norms", first, 3, ScalarType::Double);
  if (first.sizes[0] != 2 || first.sizes[1] < 1) {
    fail(op, "norms: expected [2, states, samples], got ", first.shape_text());
  }
  StepRowCall call;
  call.decay = decay;
  call.norms = reinterpret_cast<const double*>(data_of(norms));
  call.states = first.sizes[1];
  call.samples = first.sizes[2];

  if (directions.size() != kept.size()) {
    fail(op, "expected what is kept of each direction, got ", directions.size(), " directions and ",
         kept.size(), " kept");
  }
  for (size_t l = 0; l < directions.size(); ++l) {
    const TensorInfo direction(directions[l]);
    const TensorInfo held(kept[l]);
    const int type = element_type(direction.dtype);
    const std::string name = "direction " + std::to_string(l);
    if (l == 0) {
      call.type = type;
      call.window = held.dim == 2 ? held.sizes[0] - 1 : 0;
    }
    if ((type != kFloat && type != kDouble) || type != call.type) {
      fail(op, name, ": expected float32 or float64 in all layers, got ",
           dtype_name(static_cast<ScalarType>(direction.dtype)));
    }
    const auto dtype = static_cast<ScalarType>(direction.dtype);
    check(name, direction, 1, dtype);
    check("kept of " + name, held, 2, dtype);
    if (call.window < 1 || held.sizes[0] != call.window + 1 ||
        held.sizes[1] != direction.sizes[0]) {
      fail(op, "kept of ", name, ": expected [K + 1, ", direction.sizes[0],
           "] with K from 1 and the same in all layers, got ", held.shape_text());
    }
    call.layers.push_back(
        {data_of(directions[l]), const_cast<char*>(data_of(kept[l])), direction.sizes[0]});
  }

  int64_t width = call.extras_at();
  for (const Tensor& extra : extras) {
    const TensorInfo info(extra);
    check("extras", info, 1, ScalarType::Double);
    call.extras.push_back({reinterpret_cast<const double*>(data_of(extra)), info.sizes[0]});
    width += info.sizes[0];
  }
  const TensorInfo ring(rows);
  check("rows", ring, 2, ScalarType::Double, 1);
  if (ring.sizes[0] < 1 || ring.sizes[1] < width) {
    fail(op, "rows: expected at least one row of at least ", width, " numbers, got ",
         ring.shape_text());
  }
  call.rows = reinterpret_cast<double*>(const_cast<char*>(data_of(rows)));
  call.num_rows = ring.sizes[0];
  call.row_stride = ring.strides[0];
  const TensorInfo counters(places);
  check("places", counters, 1, ScalarType::Long);
  if (counters.sizes[0] != 3) fail(op, "places: expected [3], got ", counters.shape_text());
  call.places = reinterpret_cast<int64_t*>(const_cast<char*>(data_of(places)));
  return call;
}

}  // namespace fadiag
