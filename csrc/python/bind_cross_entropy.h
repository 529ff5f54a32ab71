#pragma once

#include <vector>

#include "../ops/cross_entropy/cross_entropy.h"
#include "dlpack.h"

namespace cgpt::python {
namespace {

void require_targets_beside(Tensor x, Tensor target) {
  const Checker c{"linear_cross_entropy"};
  c.require(same_leading(x, target, 1, 0), [&] {
    return "target must have the leading dimensions of x, got " + shape_text(target);
  });
}

void linear_cross_entropy_fwd(Tensor x, Tensor weight, Tensor bias, Tensor target, Tensor loss,
                              Tensor lse, int64_t ignore_index, float label_smoothing) {
  const LinearCrossEntropyArgs args{rows_of(x), weight, bias,         flat_of(target),
                                    loss,       lse,    ignore_index, label_smoothing};
  require_targets_beside(x, target);
  linear_cross_entropy_check(args);
  linear_cross_entropy_check_targets(args);
  py::gil_scoped_release release;
  linear_cross_entropy_fwd_cpu(args);
}

// The mean or the sum of the losses into the 0-d `loss`.
void linear_cross_entropy_reduced(Tensor x, Tensor weight, Tensor bias, Tensor target, Tensor loss,
                                  int64_t ignore_index, float label_smoothing, bool mean) {
  require_targets_beside(x, target);
  const Checker c{"linear_cross_entropy"};
  c.tensor("loss", loss, {});
  c.dtype("loss", loss, {DType::f32});
  std::vector<float> rows(static_cast<size_t>(target.numel()));
  TensorView losses = loss;
  losses.data = rows.data();
  losses.ndim = 1;
  losses.shape[0] = target.numel(), losses.strides[0] = 1;
  const LinearCrossEntropyArgs args{rows_of(x), weight, bias,         flat_of(target),
                                    losses,     {},     ignore_index, label_smoothing};
  linear_cross_entropy_check(args);
  linear_cross_entropy_check_targets(args);
  py::gil_scoped_release release;
  linear_cross_entropy_fwd_cpu(args);
  *loss.as<float>() = linear_cross_entropy_reduce(args, mean);
}

}  // namespace

inline void bind_cross_entropy(py::module_& m) {
  m.def("linear_cross_entropy_fwd", &linear_cross_entropy_fwd);
  m.def("linear_cross_entropy_reduced", &linear_cross_entropy_reduced);
}

}  // namespace cgpt::python
