#pragma once

#include "../ops/gemm/gemm.h"
#include "dlpack.h"

namespace cgpt::python {
namespace {

void gemm_fwd(Tensor x, Tensor weight, Tensor bias, Tensor residual, Tensor y,
              const std::string& activation, bool weight_kn) {
  const GemmArgs args{rows_of(x),        weight,     bias,
                      rows_of(residual), rows_of(y), activation_of(activation),
                      weight_kn};
  gemm_check(args);
  py::gil_scoped_release release;
  gemm_fwd_cpu(args);
}

}  // namespace

inline void bind_gemm(py::module_& m) { m.def("gemm_fwd", &gemm_fwd); }

}  // namespace cgpt::python
