// Sixteen bytes of elements of any supported type, loaded once and read as doubles.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../accumulate.h"

namespace fadiag {

constexpr int kVectorBytes = 16;

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

  __device__ __forceinline__ void load_shared(const Element* source) {
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
