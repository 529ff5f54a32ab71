#pragma once

#include "../ops/gemm/gemm.h"
#include "dlpack.h"

namespace cgpt::python {
namespace {

void gemm_fwd(Tensor x, Tensor weight, Tensor bias, Tensor residual, Tensor y,
              const std::string& activation, bool weight_kn) {
  GemmArgs args{rows_of(x), weight, bias, rows_of(residual), rows_of(y), activation_of(activation),
                weight_kn};
  const Checker c{"gemm"};
  c.require(!residual || same_leading(x, residual, 1, 1), [&] {
    return "residual must have x's leading dimensions, got " + shape_text(residual);
  });
  TensorView& w = args.weight;
  if (w.ndim == 2 && w.strides[1] != 1 && w.strides[0] == 1) {
    // a transposed view is the other layout, in place
    std::swap(w.shape[0], w.shape[1]);
    std::swap(w.strides[0], w.strides[1]);
    args.weight_kn = !weight_kn;
  }
  gemm_check(args);
  py::gil_scoped_release release;
  gemm_fwd_cpu(args);
}

}  // namespace

inline void bind_gemm(py::module_& m) { m.def("gemm_fwd", &gemm_fwd); }

}  // namespace cgpt::python
