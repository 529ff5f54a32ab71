// What the binding lists of the CUDA kernels (cuda_<op>.h) share. They are bound in _C where nvcc
// was found, and in _cuda_host, which runs the same sources on CPU tensors (csrc/cuda/device.cuh).
#pragma once

#include "dlpack.h"

namespace cgpt::python {

#ifdef CGPT_CUDA_HOST
constexpr Device kCudaDevice = Device::cpu;
#else
constexpr Device kCudaDevice = Device::cuda;
#endif

}  // namespace cgpt::python
