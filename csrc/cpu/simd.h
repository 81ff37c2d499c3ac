// Eight elements of any supported type as eight doubles, exactly.
//
// Written with the compilers' vector extension, in vectors as wide as the registers: compilers
// split wider ones by way of the stack. Widening is spelled with intrinsics where x86 has an
// instruction for it that GCC does not find. The lanes are the same eight on every instruction set
// and give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fadiag {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#else
// Without AVX a pair of registers: four words of 16 bits are the fewest that GCC widens well.
constexpr int kRegisterBytes = 32;
#endif
constexpr int kLanes = 8;
constexpr int kRegisterLanes = kRegisterBytes / 8;
constexpr int kParts = kLanes / kRegisterLanes;

using Register = double __attribute__((vector_size(kRegisterBytes)));
using Floats = float __attribute__((vector_size(kRegisterBytes / 2)));
using Words = uint32_t __attribute__((vector_size(kRegisterBytes / 2)));
using HalfWords = uint16_t __attribute__((vector_size(kRegisterBytes / 4)));

struct Double8 {
  Register part[kParts];
};

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

// The maskz intrinsics compile to the plain instructions; of the plain intrinsics' undefined
// registers GCC 12 warns.

FADIAG_INLINE Register widen(Floats x) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtps_pd(0xff, x);
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(x);
#else
  return __builtin_convertvector(x, Register);
#endif
}

FADIAG_INLINE Words widen(HalfWords x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return bits_as<Words>(_mm_cvtepu16_epi32(_mm_cvtsi64_si128(bits_as<int64_t>(x))));
#else
  return __builtin_convertvector(x, Words);
#endif
}

FADIAG_INLINE Register load_register(const double* source) { return load_vector<Register>(source); }

FADIAG_INLINE Register load_register(const float* source) {
  return widen(load_vector<Floats>(source));
}

FADIAG_INLINE Register load_register(const BFloat16* source) {
#if defined(__AVX512F__)
  // Each word to the upper half of its float, zeros below: one instruction for extend and shift.
  const __m256i words = _mm256_castsi128_si256(bits_as<__m128i>(load_vector<HalfWords>(source)));
  const __m256i places = _mm256_setr_epi16(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  return widen(bits_as<Floats>(_mm256_maskz_permutexvar_epi16(0xaaaa, places, words)));
#else
  return widen(bits_as<Floats>(widen(load_vector<HalfWords>(source)) << 16));
#endif
}

FADIAG_INLINE Register load_register(const Half* source) {
  const auto half_words = load_vector<HalfWords>(source);
#if defined(__AVX512F__)
  return widen(bits_as<Floats>(_mm256_cvtph_ps(bits_as<__m128i>(half_words))));
#elif defined(__AVX2__)
  return widen(bits_as<Floats>(_mm_cvtph_ps(_mm_cvtsi64_si128(bits_as<int64_t>(half_words)))));
#else
  // Shifting exponent and mantissa into place leaves the value 2^112 too small, subnormals
  // included; only the exponent of infinities and NaNs has to be set by hand.
  const Words words = widen(half_words);
  const Words magnitude = (words & 0x7fffu) << 13;
  const Words scaled = bits_as<Words>(bits_as<Floats>(magnitude) * 0x1p112f);
  const Words non_finite = bits_as<Words>((words & 0x7c00u) == 0x7c00u);
  const Words exponent = non_finite & 0x7f800000u;
  return widen(bits_as<Floats>(((words & 0x8000u) << 16) | scaled | exponent));
#endif
}

// sum + x * x where the product is exact: fused or not, the bits are the same.
FADIAG_INLINE Register add_exact_square(Register sum, Register x) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(x, x, sum);
#elif defined(__AVX2__)
  return _mm256_fmadd_pd(x, x, sum);
#else
  return sum + x * x;
#endif
}

template <typename Element>
FADIAG_INLINE Double8 load_doubles(const Element* source) {
  Double8 x;
  for (int p = 0; p < kParts; ++p) x.part[p] = load_register(source + p * kRegisterLanes);
  return x;
}

// The first `count` < 8 elements; zeros behind them.
template <typename Element>
FADIAG_INLINE Double8 load_doubles_partial(const Element* source, int64_t count) {
  Element padded[kLanes] = {};
  std::memcpy(padded, source, count * sizeof(Element));
  return load_doubles(padded);
}

FADIAG_INLINE void store_lanes(const Double8& x, double* target) {
  std::memcpy(target, &x, sizeof(x));
}

// A fixed order, so that the sum does not depend on the instruction set: upper to lower half.
FADIAG_INLINE double sum_lanes(const Double8& x) {
  using Double4 = double __attribute__((vector_size(32)));
  using Double2 = double __attribute__((vector_size(16)));
#if defined(__AVX512F__)
  const Double4 four = _mm512_maskz_extractf64x4_pd(0xf, x.part[0], 0) +
                       _mm512_maskz_extractf64x4_pd(0xf, x.part[0], 1);
#else
  const Double4 four = x.part[0] + x.part[1];
#endif
  const Double2 two = Double2{four[0], four[1]} + Double2{four[2], four[3]};
  return two[0] + two[1];
}

}  // namespace fadiag
