// What both CUDA operators need from torch: the device, the stream, the element types.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../checks.h"
#include "elements.cuh"

namespace fadiag {

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline bool is_aligned(const void* pointer, int64_t row_stride, int64_t element_size) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0 &&
         row_stride * element_size % kVectorBytes == 0;
}

// Calls `function` with a null pointer of the element type at index `type` of kDtypes.
template <typename Function>
auto with_element(int type, Function&& function) {
  switch (kDtypes[type]) {
    case ScalarType::Half:
      return function(static_cast<__half*>(nullptr));
    case ScalarType::BFloat16:
      return function(static_cast<__nv_bfloat16*>(nullptr));
    case ScalarType::Float:
      return function(static_cast<float*>(nullptr));
    default:
      return function(static_cast<double*>(nullptr));
  }
}

}  // namespace fadiag
