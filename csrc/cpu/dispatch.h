// Which kernels run, and how their tasks are spread over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "kernels.h"

namespace fadiag {

inline const CpuKernels& cpu_kernels() {
#if defined(__x86_64__)
  static const CpuKernels& chosen =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
          ? kAvx512Kernels
      : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c")
          ? kAvx2Kernels
          : kGenericKernels;
  return chosen;
#else
  return kGenericKernels;
#endif
}

// Below this many elements starting threads costs more than they save.
constexpr int64_t kSerialElements = 32768;

// Runs task(0) ... task(count - 1), each exactly once, in any order and on any thread. Tasks are
// handed out one by one, because layers of different width make tasks of different length.
template <typename Task>
void run_tasks(int64_t count, int64_t elements, const Task& task) {
  const int64_t threads =
      elements < kSerialElements ? 1 : std::min<int64_t>(count, torch::stable::get_num_threads());
  if (threads <= 1) {
    for (int64_t t = 0; t < count; ++t) task(t);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t t = next++; t < count; t = next++) task(t);
    }
  });
}

}  // namespace fadiag
