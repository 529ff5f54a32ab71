// The one switch of kernels for Hopper: files named <op>_hopper.cu, built for sm_90a alone.
//
// They take calls on GPUs of compute capability 9.0 while the switch is on: CGPT_CUDA_HOPPER=1 when
// the module is loaded, or use_hopper(true). Off by default, because no GPU has run or timed them:
// the sources for sm_80 take every call. The host implementation has no compute capability.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace cgpt::cuda {

inline bool hopper_on = [] {
  const char* const text = std::getenv("CGPT_CUDA_HOPPER");
  return text && std::strcmp(text, "1") == 0;
}();

// Launches of kernels for Hopper by this thread: tests and benchmarks ask which kernel answered.
inline thread_local int64_t hopper_launches = 0;

}  // namespace cgpt::cuda

#if defined(__CUDACC__) || defined(CGPT_CUDA_HOST)

  #include "launch.h"

namespace cgpt::cuda {

inline bool hopper_wanted([[maybe_unused]] int device) {
  if (!hopper_on) return false;
  #ifdef CGPT_CUDA_HOST
  return true;
  #else
  int major = 0;
  require(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cuda");
  return major == 9;
  #endif
}

}  // namespace cgpt::cuda

#endif
