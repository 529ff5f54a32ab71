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
  LinearCrossEntropyArgs args{rows_of(x), weight, bias, flat_of(target), loss, lse};
  args.ignore_index = ignore_index, args.label_smoothing = label_smoothing;
  require_targets_beside(x, target);
  linear_cross_entropy_check(args);
  linear_cross_entropy_check_targets(args);
  py::gil_scoped_release release;
  linear_cross_entropy_fwd_cpu(args);
}

// Memory for the losses of the rows where only their sum or mean is returned.
class RowLosses {
 public:
  explicit RowLosses(int64_t rows) : values_(static_cast<size_t>(rows)) {}
  TensorView view() {
    TensorView v;
    v.data = values_.data();
    v.dtype = DType::f32;
    v.ndim = 1;
    v.shape[0] = static_cast<int64_t>(values_.size()), v.strides[0] = 1;
    return v;
  }

 private:
  std::vector<float> values_;
};

void require_scalar(Tensor loss) {
  const Checker c{"linear_cross_entropy"};
  c.tensor("loss", loss, {});
  c.dtype("loss", loss, {DType::f32});
}

// The mean or the sum of the losses into the 0-d `loss`.
void linear_cross_entropy_reduced(Tensor x, Tensor weight, Tensor bias, Tensor target, Tensor loss,
                                  int64_t ignore_index, float label_smoothing, bool mean) {
  require_targets_beside(x, target);
  require_scalar(loss);
  RowLosses rows(target.numel());
  LinearCrossEntropyArgs args{rows_of(x), weight, bias, flat_of(target), rows.view(), {}};
  args.ignore_index = ignore_index, args.label_smoothing = label_smoothing;
  linear_cross_entropy_check(args);
  linear_cross_entropy_check_targets(args);
  py::gil_scoped_release release;
  linear_cross_entropy_fwd_cpu(args);
  *loss.as<float>() = linear_cross_entropy_reduce(args, mean);
}

// Gradients, each where its tensor is given: those of the rows' losses weighed by `drows`, or,
// where that is None, those of their mean or sum, which then goes into the 0-d `loss`.
void linear_cross_entropy_grads(Tensor x, Tensor weight, Tensor bias, Tensor target, Tensor drows,
                                Tensor loss, Tensor dx, Tensor dweight, Tensor dbias,
                                int64_t ignore_index, float label_smoothing, bool mean) {
  require_targets_beside(x, target);
  if (!drows) require_scalar(loss);
  RowLosses rows(target.numel());
  LinearCrossEntropyArgs args{rows_of(x), weight, bias, flat_of(target), rows.view(), {}};
  args.ignore_index = ignore_index, args.label_smoothing = label_smoothing;
  args.drows = drows, args.dx = rows_of(dx), args.dweight = dweight, args.dbias = dbias;
  linear_cross_entropy_check(args);
  linear_cross_entropy_check_targets(args);
  if (!drows && mean) {
    int64_t count = 0;
    for (int64_t i = 0; i < target.numel(); ++i)
      count += args.target.as<const int64_t>()[i * args.target.strides[0]] != ignore_index;
    args.scale = 1.0f / static_cast<float>(count);  // used by no row where none counts
  }
  py::gil_scoped_release release;
  linear_cross_entropy_grads_cpu(args);
  if (!drows) *loss.as<float>() = linear_cross_entropy_reduce(args, mean);
}

}  // namespace

inline void bind_cross_entropy(py::module_& m) {
  m.def("linear_cross_entropy_fwd", &linear_cross_entropy_fwd);
  m.def("linear_cross_entropy_reduced", &linear_cross_entropy_reduced);
  m.def("linear_cross_entropy_grads", &linear_cross_entropy_grads);
}

}  // namespace cgpt::python
