// Plain descriptions of the tensors of one call; passed to kernels by value.
#pragma once

#include <cstdint>

namespace fadiag {

constexpr int64_t kNoMean = -1;

// One layer of one network: `rows` samples of `columns` dense elements each.
struct Layer {
  const void* hidden;
  const void* grad;
  int64_t hidden_row_stride;  // in elements, like every stride here
  int64_t grad_row_stride;
  int64_t columns;
  int64_t mean_offset;  // of this layer's first element in the packed means; kNoMean: none wanted
  int64_t norm_offset;  // of this layer's first row in the hidden norms
};

}  // namespace fadiag
