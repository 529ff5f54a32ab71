#pragma once

#include "../ops/cross_entropy/cross_entropy.h"
#include "dlpack.h"

namespace cgpt::python {
namespace {

void linear_cross_entropy_fwd(Tensor x, Tensor weight, Tensor bias, Tensor target, Tensor loss,
                              Tensor lse, int64_t ignore_index, float label_smoothing) {
  const LinearCrossEntropyArgs args{rows_of(x), weight, bias,         flat_of(target),
                                    loss,       lse,    ignore_index, label_smoothing};
  linear_cross_entropy_check(args);
  linear_cross_entropy_check_targets(args);
  py::gil_scoped_release release;
  linear_cross_entropy_fwd_cpu(args);
}

}  // namespace

inline void bind_cross_entropy(py::module_& m) {
  m.def("linear_cross_entropy_fwd", &linear_cross_entropy_fwd);
}

}  // namespace cgpt::python
