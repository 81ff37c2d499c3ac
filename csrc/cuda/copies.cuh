// Asynchronous copies into a warp's ring of stages.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "elements.cuh"

namespace fadiag {

constexpr int kStageBytes = 2 * kStageVectors * kWarpSize * kVectorBytes;  // of h, then of g
constexpr int kMostStages = 3;

// Copies the first `bytes` of 16 to shared memory and zeros behind them, kBytes at a time; from
// where there are none, nothing is read. Source and target are aligned to kBytes.
template <int kBytes>
__device__ __forceinline__ void copy_vector(uint32_t target, const void* source, int bytes) {
  const auto* from = static_cast<const char*>(source);
#pragma unroll
  for (int at = 0; at < kVectorBytes; at += kBytes) {
    const int valid = bytes - at >= kBytes ? kBytes : bytes > at ? bytes - at : 0;
    const char* piece = from + at;
    if constexpr (kBytes == kVectorBytes) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target + at), "l"(piece),
                   "r"(valid)
                   : "memory");
    } else {
      asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(target + at), "l"(piece),
                   "r"(valid), "n"(kBytes)
                   : "memory");
    }
  }
}

// Copies all 16.
template <int kBytes>
__device__ __forceinline__ void copy_vector(uint32_t target, const void* source) {
  static_assert(kBytes == kVectorBytes);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kLeft of the groups committed last are under way.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

}  // namespace fadiag
