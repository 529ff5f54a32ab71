#pragma once

#include "../ops/layer_norm/layer_norm.h"
#include "cuda.h"

namespace cgpt::python {

inline void bind_cuda_layer_norm(py::module_& m) {
  m.def("layer_norm_fwd_cuda", [](Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor y,
                                  Tensor sum, Tensor mean, Tensor rstd, float eps) {
    const LayerNormArgs args{
        rows_of(x), rows_of(residual), weight, bias, rows_of(y), rows_of(sum), mean, rstd, eps};
    layer_norm_check(args, kCudaDevice);
    py::gil_scoped_release release;
    layer_norm_fwd_cuda(args);
  });
  m.def("layer_norm_bwd_shares_cuda", &layer_norm_bwd_shares);
  m.def("layer_norm_bwd_cuda",
        [](Tensor dy, Tensor dtotal, Tensor x, Tensor weight, Tensor mean, Tensor rstd, Tensor dx,
           Tensor dweight, Tensor dbias, Tensor shares) {
          const LayerNormBwdArgs args{rows_of(dy), rows_of(dtotal), rows_of(x), weight, mean,
                                      rstd,        rows_of(dx),     dweight,    dbias,  shares};
          layer_norm_bwd_check(args, kCudaDevice);
          layer_norm_bwd_shares_check(args, kCudaDevice);
          py::gil_scoped_release release;
          layer_norm_bwd_cuda(args);
        });
}

}  // namespace cgpt::python
