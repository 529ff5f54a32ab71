#pragma once

#include <utility>

#include "../ops/gemm/gemm_cuda.h"
#include "../ops/gemm/packed_gemm_cuda.h"
#include "cuda.h"

namespace cgpt::python {

inline void gemm_product(const GemmProductArgs& args) {
  gemm_product_check(args, kCudaDevice);
  py::gil_scoped_release release;
  gemm_product_cuda(args);
}

inline void bind_cuda_gemm(py::module_& m) {
  m.def("gemm_fwd_cuda", [](Tensor x, Tensor weight, Tensor bias, Tensor residual, Tensor y,
                            const std::string& activation, bool weight_kn) {
    TensorView b = weight;
    if (weight_kn && b.ndim == 2) {
      std::swap(b.shape[0], b.shape[1]);
      std::swap(b.strides[0], b.strides[1]);
    }
    gemm_product(
        {rows_of(x), b, bias, rows_of(residual), rows_of(y), {}, activation_of(activation)});
  });
  // a [M, K] and b [N, K], each with a stride of 1 in one dimension; pre None or like y.
  m.def("gemm_product_cuda", [](Tensor a, Tensor b, Tensor bias, Tensor residual, Tensor y,
                                Tensor pre, const std::string& activation) {
    gemm_product({a, b, bias, residual, y, pre, activation_of(activation)});
  });
  m.def("gemm_bwd_shares_cuda", &gemm_bwd_shares);
  m.def("gemm_activation_bwd_cuda", [](Tensor dy, Tensor pre, Tensor g, Tensor shares, Tensor dbias,
                                       const std::string& activation) {
    const GemmActivationBwdArgs args{dy, pre, g, shares, dbias, activation_of(activation)};
    gemm_activation_bwd_check(args, kCudaDevice);
    py::gil_scoped_release release;
    gemm_activation_bwd_cuda(args);
  });
  // Rows of x up to which packed_gemm_fwd_cuda needs no workspace.
  m.attr("packed_gemm_rows_cuda") = kPackedCudaRows;
  // workspace: [N, K] like x, for more rows than packed_gemm_rows_cuda; else None.
  m.def("packed_gemm_fwd_cuda", [](Tensor x, Tensor packed, int64_t n, int64_t k,
                                   const std::string& format, int64_t group, Tensor bias,
                                   Tensor residual, Tensor y, Tensor workspace,
                                   const std::string& activation) {
    const PackedWeight weight{weight_format_of(format), n, k, group, packed.data};
    const PackedGemmCudaArgs args{
        {rows_of(x), workspace, bias, rows_of(residual), rows_of(y), {}, activation_of(activation)},
        weight};
    packed_gemm_cuda_check(args, kCudaDevice);
    packed_buffer_check({"packed_gemm", kCudaDevice}, packed, weight);
    py::gil_scoped_release release;
    packed_gemm_cuda(args);
  });
}

}  // namespace cgpt::python
