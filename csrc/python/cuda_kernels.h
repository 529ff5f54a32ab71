// The list of the lists: every op that has CUDA kernels, and the decoder.
#pragma once

#include <utility>

#include "../cuda/hopper.h"
#include "cuda_attention.h"
#include "cuda_cross_entropy.h"
#include "cuda_decoder.h"
#include "cuda_gemm.h"
#include "cuda_layer_norm.h"

namespace cgpt::python {

inline void bind_cuda(py::module_& m) {
  bind_cuda_attention(m);
  bind_cuda_cross_entropy(m);
  bind_cuda_decoder(m);
  bind_cuda_gemm(m);
  bind_cuda_layer_norm(m);
  // Kernels for Hopper (csrc/cuda/hopper.h): which are built, the switch, and what it did so far.
  py::list hopper;
#ifdef CGPT_HOPPER
  hopper.append("attention");
#endif
#ifdef CGPT_CUTLASS
  hopper.append("gemm");
#endif
  m.attr("hopper_kernels") = py::tuple(hopper);
  m.def("use_hopper", [](bool on) { return std::exchange(cuda::hopper_on, on); });
  m.def("hopper_launches", [] { return cuda::hopper_launches; });
}

}  // namespace cgpt::python
