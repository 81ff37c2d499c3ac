// Range-safe accumulation: the one definition of how elements become sums and sums become figures.
//
// What:          sums of squares (norms) and column sums (means), for the CPU and the GPU.
// Accumulation:  float64. For fp16, bf16 and fp32 the square of an element is exact in float64
//                apart from its last rounding, and neither overflows nor underflows: one word is
//                enough. A float64 element can leave that range, so its squares go to one of three
//                scaled words (Blue's algorithm as in LAPACK's xNRM2; Anderson 2017, ACM TOMS
//                44:1), and its column sum is kept twice, plain and scaled by 2^-64.
// Merging:       word by word, by addition. Every partial result of a row or a column is therefore
//                just kWords numbers, and a reduction needs no knowledge of the type.
// Non-finite:    NaN and infinity stay in the row and the column they occur in.
// Dependencies:  none but <cmath>; no torch header, so that tests can compile it alone.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FADIAG_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FADIAG_HOST_DEVICE inline
#endif

namespace fadiag {

// Blue's constants for float64, from the exponent range [-1021, 1024] and 53 bits of precision.
// Squares of elements in [kSmallLimit, kBigLimit] can be summed as they are.
constexpr double kSmallLimit = 0x1p-511;  // 2^ceil((-1021 - 1) / 2)
constexpr double kBigLimit = 0x1p+486;    // 2^floor((1024 - 53 + 1) / 2)
constexpr double kSmallScale = 0x1p+537;  // 2^(-floor((-1021 - 53) / 2))
constexpr double kBigScale = 0x1p-538;    // 2^(-ceil((1024 + 53 - 1) / 2))
// No sum of fewer than 2^64 elements scaled by this can overflow.
constexpr double kMeanScale = 0x1p-64;
constexpr double kMeanUnscale = 0x1p+64;
constexpr double kLargestDouble = 0x1.fffffffffffffp+1023;

// Division by a whole number below 2^50, rounded correctly: the bits of x / count, without the
// twenty instructions that a GPU takes for it. q is within two units of the quotient, so that the
// remainder is exact; and corrected by it, q rounds as the quotient does, for that is no nearer to
// the middle between two numbers than 1 / count of a unit, and never on it unless count is a power
// of two, where q is exact already. Holds where neither x nor the remainder leaves the normal
// range.
struct Divisor {
  double count;
  double reciprocal;

  FADIAG_HOST_DEVICE explicit Divisor(double number) : count(number), reciprocal(1.0 / number) {}

  FADIAG_HOST_DEVICE double divide(double x) const {
    const double q = x * reciprocal;
    const double corrected = std::fma(std::fma(-q, count, x), reciprocal, q);
    // Infinity less infinity would be NaN.
    return std::fabs(q) <= kLargestDouble ? corrected : q;
  }
};

// The add_* functions take a double or a vector of doubles (the CPU kernels' SIMD type), so that
// there is one definition for both; the figures come from merged, scalar words.

// Sums for element types whose squares fit float64: fp16, bf16, fp32.
struct NarrowSums {
  static constexpr int kSquareWords = 1;
  static constexpr int kColumnWords = 1;

  template <typename Value>
  FADIAG_HOST_DEVICE static void add_square(Value (&words)[1], Value x) {
    words[0] += x * x;
  }
  template <typename Value>
  FADIAG_HOST_DEVICE static void add_column(Value (&words)[1], Value x) {
    words[0] += x;
  }
  FADIAG_HOST_DEVICE static double norm(const double (&words)[1]) { return std::sqrt(words[0]); }
  FADIAG_HOST_DEVICE static double mean(const double (&words)[1], const Divisor& count) {
#if defined(__CUDA_ARCH__)
    return count.divide(words[0]);
#else
    return words[0] / count.count;
#endif
  }
};

// Sums for float64 elements, over the whole range of the type.
struct WideSums {
  static constexpr int kSquareWords = 3;  // big, medium, small
  static constexpr int kColumnWords = 2;  // plain, scaled

  template <typename Value>
  FADIAG_HOST_DEVICE static void add_square(Value (&words)[3], Value x) {
    // A NaN fails every comparison and lands in the medium word, where it stays.
    const auto big = (x > kBigLimit) | (x < -kBigLimit);
    const auto small = (x < kSmallLimit) & (x > -kSmallLimit);
    const Value zero{};
    const Value scaled_big = big ? x * kBigScale : zero;
    const Value scaled_small = small ? x * kSmallScale : zero;
    const Value medium = (big | small) ? zero : x;
    words[0] += scaled_big * scaled_big;
    words[1] += medium * medium;
    words[2] += scaled_small * scaled_small;
  }

  template <typename Value>
  FADIAG_HOST_DEVICE static void add_column(Value (&words)[2], Value x) {
    words[0] += x;
    words[1] += x * kMeanScale;
  }

  FADIAG_HOST_DEVICE static double norm(const double (&words)[3]) {
    const double big = words[0];
    const double medium = words[1];
    const double small = words[2];
    if (big > 0.0 || big != big) {
      // Beside a big element the small ones are below half a unit in the last place.
      const bool has_medium = medium > 0.0 || medium != medium;
      const double sum = has_medium ? big + (medium * kBigScale) * kBigScale : big;
      return std::sqrt(sum) / kBigScale;
    }
    if (small > 0.0) {
      const double small_norm = std::sqrt(small) / kSmallScale;
      if (medium == 0.0) return small_norm;
      const double medium_norm = std::sqrt(medium);
      if (medium_norm != medium_norm) return medium_norm;
      const double larger = medium_norm > small_norm ? medium_norm : small_norm;
      const double ratio = (medium_norm > small_norm ? small_norm : medium_norm) / larger;
      return larger * std::sqrt(1.0 + ratio * ratio);
    }
    return std::sqrt(medium);
  }

  // The mean of finite values is finite: where the plain sum left the range, the scaled one holds.
  FADIAG_HOST_DEVICE static double mean(const double (&words)[2], const Divisor& divisor) {
    const double plain = words[0] / divisor.count;
    if (std::fabs(plain) <= kLargestDouble) return plain;
    const double scaled = words[1] / divisor.count;
    if (!(std::fabs(scaled) <= kLargestDouble)) return scaled;
    // Rounding of the sum may put the mean of equal, largest values one unit above them.
    const double limit = kLargestDouble * kMeanScale;
    return (scaled > limit ? limit : scaled < -limit ? -limit : scaled) * kMeanUnscale;
  }
};

// The sums that an element type needs.
template <typename Element>
struct SumsOf {
  using type = NarrowSums;
};
template <>
struct SumsOf<double> {
  using type = WideSums;
};

// Cosine of two directions from their dot product and sums of squares. Zero and non-finite vectors
// have no direction: NaN, not a clamped quotient.
FADIAG_HOST_DEVICE double cosine(double dot, double squares_a, double squares_b) {
  const double value = (dot / std::sqrt(squares_a)) / std::sqrt(squares_b);
  return value > 1.0 ? 1.0 : value < -1.0 ? -1.0 : value;
}

// The same for a direction with itself: exactly one, unless it has no direction.
FADIAG_HOST_DEVICE double self_cosine(double squares) { return squares / squares; }

// A power of two that brings the largest element of a float64 vector near one, so that neither its
// squares overflow nor all of them vanish; one for vectors that are zero or not finite. Narrower
// types need none: their products fit float64.
FADIAG_HOST_DEVICE double power_of_two_scale(double largest) {
  if (!(largest > 0.0 && largest <= kLargestDouble)) return 1.0;
  int exponent = 0;
  std::frexp(largest, &exponent);
  // Normal numbers only: subnormal ones may be flushed to zero.
  return std::ldexp(1.0, exponent > 1022 ? -1022 : exponent < -1022 ? 1022 : -exponent);
}

// One element of an exponential average, moved by `weight` of the way to x.
template <typename Element>
FADIAG_HOST_DEVICE Element moved_average(Element average, Element x, double weight) {
  const double from = static_cast<double>(average);
  return static_cast<Element>(from + (static_cast<double>(x) - from) * weight);
}

}  // namespace fadiag
