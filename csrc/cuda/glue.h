// What both CUDA operators need from torch: the device, the stream, the element types.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../checks.h"
#include "elements.cuh"

namespace fadiag {

inline cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline bool is_aligned(const void* pointer, int64_t row_stride, int64_t element_size) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0 &&
         row_stride * element_size % kVectorBytes == 0;
}

// Calls `function` with a null pointer of the element type that `type`, an ElementType, names.
template <typename Function>
auto with_element(int type, Function&& function) {
  switch (type) {
    case kHalf:
      return function(static_cast<__half*>(nullptr));
    case kBFloat16:
      return function(static_cast<__nv_bfloat16*>(nullptr));
    case kFloat:
      return function(static_cast<float*>(nullptr));
    default:
      return function(static_cast<double*>(nullptr));
  }
}

}  // namespace fadiag
