// A kernel that starts while the one before it in the stream drains.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace fadiag {

// The first statement of a kernel started by launch_dependent that reads what an earlier launch of
// the stream wrote. To any other launch it means nothing.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Launches a kernel that calls wait_for_previous_kernel. It may be there before the one before it
// in the stream ends if it `waits`: if it was compiled for 9.0 or later. Else the two run one after
// the other.
template <typename Argument>
cudaError_t launch_dependent(void (*kernel)(Argument), bool waits, dim3 grid, dim3 block,
                             int64_t shared_bytes, cudaStream_t stream,
                             const std::remove_cv_t<Argument>& argument) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = waits ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, argument);
}

}  // namespace fadiag
