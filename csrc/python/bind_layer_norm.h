#pragma once

#include "../ops/layer_norm/layer_norm.h"
#include "dlpack.h"
#include "gil.h"

namespace cgpt::python {
namespace {

void layer_norm_fwd(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor y, Tensor sum,
                    Tensor mean, Tensor rstd, float eps) {
  const LayerNormArgs args{
      rows_of(x), rows_of(residual), weight, bias, rows_of(y), rows_of(sum), mean, rstd, eps};
  const Checker c{"layer_norm"};
  c.require(!residual || same_leading(x, residual, 1, 1),
            [&] { return "residual must have the shape of x, got " + shape_text(residual); });
  layer_norm_check(args);
  const ReleaseGil release(args.x.numel());
  layer_norm_fwd_cpu(args);
}

// dtotal, dx, dweight and dbias may be None.
void layer_norm_bwd(Tensor dy, Tensor dtotal, Tensor x, Tensor weight, Tensor mean, Tensor rstd,
                    Tensor dx, Tensor dweight, Tensor dbias) {
  const LayerNormBwdArgs args{rows_of(dy), rows_of(dtotal), rows_of(x), weight, mean,
                              rstd,        rows_of(dx),     dweight,    dbias};
  layer_norm_bwd_check(args);
  const ReleaseGil release(args.x.numel());
  layer_norm_bwd_cpu(args);
}

}  // namespace

inline void bind_layer_norm(py::module_& m) {
  m.def("layer_norm_fwd", &layer_norm_fwd);
  m.def("layer_norm_bwd", &layer_norm_bwd);
}

}  // namespace cgpt::python
