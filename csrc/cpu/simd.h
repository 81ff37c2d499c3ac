// Eight elements of any supported type as eight doubles, exactly.
//
// Written with the compilers' vector extension: the same source compiles to SSE2, AVX2, AVX-512 or
// NEON, whichever the translation unit is built for, and gives the same bits on all of them.
#pragma once

#include <cstdint>
#include <cstring>

namespace fadiag {

constexpr int kLanes = 8;

using Double8 = double __attribute__((vector_size(64)));
using Float8 = float __attribute__((vector_size(32)));
using Word8 = uint32_t __attribute__((vector_size(32)));
using HalfWord8 = uint16_t __attribute__((vector_size(16)));

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

#define FADIAG_INLINE static inline __attribute__((always_inline))

template <typename To, typename From>
FADIAG_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename Vector, typename Element>
FADIAG_INLINE Vector load_vector(const Element* source) {
  Vector vector;
  std::memcpy(&vector, source, sizeof(vector));
  return vector;
}

FADIAG_INLINE Double8 load_doubles(const double* source) { return load_vector<Double8>(source); }

FADIAG_INLINE Double8 load_doubles(const float* source) {
  return __builtin_convertvector(load_vector<Float8>(source), Double8);
}

FADIAG_INLINE Double8 load_doubles(const BFloat16* source) {
  const auto words = __builtin_convertvector(load_vector<HalfWord8>(source), Word8);
  return __builtin_convertvector(bits_as<Float8>(words << 16), Double8);
}

FADIAG_INLINE Double8 load_doubles(const Half* source) {
  // Shifting exponent and mantissa into place leaves the value 2^112 too small, subnormals
  // included; only the exponent of infinities and NaNs has to be set by hand.
  const auto words = __builtin_convertvector(load_vector<HalfWord8>(source), Word8);
  const Word8 magnitude = (words & 0x7fffu) << 13;
  const Word8 scaled = bits_as<Word8>(bits_as<Float8>(magnitude) * 0x1p112f);
  const Word8 non_finite = bits_as<Word8>((words & 0x7c00u) == 0x7c00u);
  const Word8 exponent = non_finite & 0x7f800000u;
  return __builtin_convertvector(bits_as<Float8>(((words & 0x8000u) << 16) | scaled | exponent),
                                 Double8);
}

// The first `count` < 8 elements; zeros behind them.
template <typename Element>
FADIAG_INLINE Double8 load_doubles_partial(const Element* source, int64_t count) {
  Element padded[kLanes] = {};
  std::memcpy(padded, source, count * sizeof(Element));
  return load_doubles(padded);
}

// A fixed order, so that the sum does not depend on the instruction set.
FADIAG_INLINE double sum_lanes(Double8 v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

}  // namespace fadiag
