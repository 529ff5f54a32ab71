#pragma once

#include "../ops/cross_entropy/cross_entropy_cuda.h"
#include "cuda.h"

namespace cgpt::python {

inline void bind_cuda_cross_entropy(py::module_& m) {
  m.def("linear_cross_entropy_parts_cuda", &linear_cross_entropy_parts);
  m.def("linear_cross_entropy_shares_cuda", &linear_cross_entropy_shares);
  m.def("linear_cross_entropy_fwd_cuda", [](Tensor x, Tensor weight, Tensor bias, Tensor target,
                                            Tensor loss, Tensor lse, int64_t ignore_index,
                                            float label_smoothing, Tensor parts) {
    LinearCrossEntropyArgs args{rows_of(x), weight, bias, flat_of(target), loss, lse};
    args.ignore_index = ignore_index, args.label_smoothing = label_smoothing;
    const Checker c{"linear_cross_entropy", kCudaDevice};
    linear_cross_entropy_check(args, kCudaDevice);
    c.tensor("parts", parts, {linear_cross_entropy_parts(args.weight.shape[0]), args.x.shape[0]});
    c.dtype("parts", parts, {DType::f32});
    c.dense_rows("parts", parts);
    py::gil_scoped_release release;
    linear_cross_entropy_fwd_cuda(args, parts);
  });
  m.def("linear_cross_entropy_logit_gradient_cuda",
        [](Tensor drows, Tensor x, Tensor weight, Tensor bias, Tensor target, Tensor lse, Tensor g,
           Tensor shares, int64_t ignore_index, float label_smoothing) {
          LogitGradientArgs args{{x, weight, bias, target, {}, lse}, drows, g, shares};
          args.op.ignore_index = ignore_index, args.op.label_smoothing = label_smoothing;
          logit_gradient_check(args, kCudaDevice);
          py::gil_scoped_release release;
          linear_cross_entropy_logit_gradient_cuda(args);
        });
  m.def("linear_cross_entropy_dbias_cuda", [](Tensor shares, Tensor dbias) {
    const Checker c{"linear_cross_entropy_bwd", kCudaDevice};
    c.require(shares && shares.ndim == 2, "shares must have shape (count, V)");
    c.tensor("dbias", dbias, {shares.shape[1]});
    c.dtype("shares", shares, {DType::f32});
    c.floating("dbias", dbias);
    linear_cross_entropy_dbias_cuda(shares, dbias);
  });
}

}  // namespace cgpt::python
