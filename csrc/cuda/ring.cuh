// A ring of shared-memory stages that one warp fills with bulk copies and others empty. It needs
// compute capability 9.0.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fadiag {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kHasBulkCopies = true;
#else
constexpr bool kHasBulkCopies = false;
#endif

// Waits for the threads that consume; the warp that fills the ring goes its own way.
template <int kCount>
__device__ __forceinline__ void sync_consumers() {
  asm volatile("bar.sync 1, %0;" ::"n"(kCount) : "memory");
}

// One thread's view: which stage comes next, and in which pass over the ring. Every thread of a
// block constructs it, at the same place.
template <int kStages>
class Ring {
 public:
  // `barriers` is shared memory for 2 * kStages of them; `consumers` threads release each stage:
  // every thread that reads it, so that the order of read and refill can be checked by racecheck.
  __device__ Ring(uint64_t* barriers, int consumers) : barriers_(barriers) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
      for (int s = 0; s < kStages; ++s) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(full(s)), "r"(1));
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty(s)), "r"(consumers));
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
#endif
  }

  __device__ __forceinline__ int stage() const { return stage_; }
  __device__ __forceinline__ void advance() {
    if (++stage_ == kStages) {
      stage_ = 0;
      pass_ ^= 1;
    }
  }
  // A fresh barrier counts as released: the first pass over the ring does not wait.
  __device__ __forceinline__ void wait_empty() { wait(empty(stage_), pass_ ^ 1); }
  __device__ __forceinline__ void wait_full() { wait(full(stage_), pass_); }

  __device__ __forceinline__ void expect(int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full(stage_)),
                 "r"(bytes)
                 : "memory");
#endif
  }
  __device__ __forceinline__ void release() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty(stage_)) : "memory");
#endif
  }
  // Source and target are aligned to 16 bytes, and so is their size.
  __device__ __forceinline__ void copy(void* target, const void* source, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(address(target)),
        "l"(source), "r"(bytes), "r"(full(stage_))
        : "memory");
#endif
  }

 private:
  __device__ __forceinline__ static uint32_t address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
  }
  __device__ __forceinline__ uint32_t full(int s) const { return address(barriers_ + s); }
  __device__ __forceinline__ uint32_t empty(int s) const {
    return address(barriers_ + kStages + s);
  }
  __device__ __forceinline__ static void wait(uint32_t barrier, int parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
#endif
  }

  uint64_t* barriers_;
  int stage_ = 0;
  int pass_ = 0;
};

}  // namespace fadiag
