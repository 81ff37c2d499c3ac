// What both CUDA operators need from torch: the stream, the code's own compute capability.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <atomic>

#include "../checks.h"
#include "elements.cuh"

namespace fadiag {

inline cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

// The compute capability, times ten, for which the code was compiled that a kernel runs on a
// device: PTX of an earlier one is older than the device. Asked for once; that takes a microsecond.
template <auto kKernel>
int compiled_capability(int32_t device_index) {
  constexpr int32_t kDevices = 64;
  static std::atomic<int> known[kDevices];
  std::atomic<int>& of_device = known[std::min(device_index, kDevices - 1)];
  int found = of_device.load(std::memory_order_relaxed);
  if (found == 0 || device_index >= kDevices - 1) {
    cudaFuncAttributes attributes{};
    STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kKernel));
    found = attributes.ptxVersion;
    of_device.store(found, std::memory_order_relaxed);
  }
  return found;
}

inline bool is_aligned(const void* pointer, int64_t row_stride, int64_t element_size) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0 &&
         row_stride * element_size % kVectorBytes == 0;
}

}  // namespace fadiag
