// The element types that the kernels know, as an index into per-type tables.
#pragma once

#include <array>
#include <cstdint>

namespace fadiag {

enum ElementType : int { kHalf, kBFloat16, kFloat, kDouble, kNumElementTypes };
constexpr std::array<int64_t, kNumElementTypes> kElementSizes = {2, 2, 4, 8};

// Calls `function` with a null pointer of the element type that `type`, an ElementType, names: for
// the two half types as the compiler at hand knows them.
template <typename Half, typename BFloat16, typename Function>
auto with_element(int type, Function&& function) {
  switch (type) {
    case kHalf:
      return function(static_cast<Half*>(nullptr));
    case kBFloat16:
      return function(static_cast<BFloat16*>(nullptr));
    case kFloat:
      return function(static_cast<float*>(nullptr));
    default:
      return function(static_cast<double*>(nullptr));
  }
}

}  // namespace fadiag
