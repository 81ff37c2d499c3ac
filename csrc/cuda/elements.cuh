// Sixteen bytes of elements of any supported type, loaded once and read as doubles.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../accumulate.h"
#include "statistics_table.h"

namespace fadiag {

__device__ __forceinline__ double to_double(double x) { return x; }
__device__ __forceinline__ double to_double(float x) { return static_cast<double>(x); }
__device__ __forceinline__ double to_double(__half x) {
  return static_cast<double>(__half2float(x));
}
__device__ __forceinline__ double to_double(__nv_bfloat16 x) {
  return static_cast<double>(__bfloat162float(x));
}

template <typename Element>
struct Vector {
  static constexpr int kSize = kVectorBytes / sizeof(Element);
  union {
    uint4 bits;
    Element elements[kSize];
  };

  __device__ __forceinline__ Vector() : bits(make_uint4(0, 0, 0, 0)) {}
  __device__ __forceinline__ double operator[](int i) const { return to_double(elements[i]); }

  // A lane's share of the 32 vectors of a warp that lie one behind another in shared memory, in
  // runs of kRun columns, whose means are 16 bytes: consecutive lanes hold consecutive runs.
  static constexpr int kRun = sizeof(Element) == 8 ? 2 : 4;
  __device__ __forceinline__ static int column(int element, int lane) {
    return element / kRun * (kWarpSize * kRun) + lane * kRun + element % kRun;
  }
  __device__ __forceinline__ void load_shared(const unsigned char* source, int lane) {
    if constexpr (kSize == kRun) {
      bits = *reinterpret_cast<const uint4*>(source + lane * kVectorBytes);
    } else {
      constexpr int kRunBytes = kVectorBytes / 2;
      const auto* run = reinterpret_cast<const uint2*>(source + lane * kRunBytes);
      const uint2 first = run[0];
      const uint2 second = run[kWarpSize];
      bits = make_uint4(first.x, first.y, second.x, second.y);
    }
  }

  __device__ __forceinline__ void load_vector(const Element* source) {
    bits = *reinterpret_cast<const uint4*>(source);
  }

  // Loads the first `valid` elements; the others stay zero and add nothing to any sum. The data are
  // read once: no line of them is kept in the L1 cache.
  __device__ __forceinline__ void load(const Element* source, int valid, bool aligned) {
    if (aligned && valid == kSize) {
      bits = __ldcs(reinterpret_cast<const uint4*>(source));
      return;
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i < valid) elements[i] = source[i];
    }
  }
};

// A vector's elements as doubles, word by word: the upper half of a 32-bit word is a bfloat16's
// float32 but for what a mask takes away, the lower half one shift from it.
template <typename Element>
struct Widened {
  static constexpr int kSize = Vector<Element>::kSize;
  double x[kSize];

  __device__ __forceinline__ static uint32_t word(const Vector<Element>& vector, int i) {
    return i == 0 ? vector.bits.x : i == 1 ? vector.bits.y : i == 2 ? vector.bits.z : vector.bits.w;
  }

  __device__ __forceinline__ explicit Widened(const Vector<Element>& vector) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
        const uint32_t bits = word(vector, i / 2);
        x[i] = static_cast<double>(__uint_as_float(i % 2 == 0 ? bits << 16 : bits & 0xffff0000u));
      } else {
        x[i] = vector[i];
      }
    }
  }
};

// The largest magnitude of a float64 vector, NaN if it holds one; for thread 0 of a block.
__device__ __forceinline__ double largest_magnitude(const double* source, int64_t columns) {
  constexpr int kMostThreads = 1024;
  double largest = 0.0;
  for (int64_t c = threadIdx.x; c < columns; c += blockDim.x) {
    const double magnitude = fabs(source[c]);
    // A NaN, once met, fails every later comparison and stays.
    largest = magnitude <= largest ? largest : magnitude;
  }
  __shared__ double shared[kMostThreads];
  shared[threadIdx.x] = largest;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int t = 1; t < blockDim.x; ++t) {
      largest = shared[t] <= largest ? largest : shared[t];
    }
  }
  return largest;
}

}  // namespace fadiag
