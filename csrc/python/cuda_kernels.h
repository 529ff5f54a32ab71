// The list of the lists: every op that has CUDA kernels, and the decoder.
#pragma once

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
}

}  // namespace cgpt::python
