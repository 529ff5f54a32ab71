// Products with a weight quantized to int8 or int4, on CUDA.
#pragma once

#include "gemm_cuda.h"
#include "packed.h"

namespace cgpt {

// Rows of x up to which the integers are multiplied as they come from memory. With more the weight
// is unpacked into a workspace first.
constexpr int kPackedCudaRows = 16;

// y = activation(x W^T + bias) + residual
struct PackedGemmCudaArgs {
  GemmProductArgs product;  // a is x, bf16 or fp16; b is the workspace [N, K] in its dtype, written
                            // here, with more than kPackedCudaRows rows; else none
  PackedWeight weight;      // int8 or int4, 16-byte aligned
};

inline void packed_gemm_cuda_check(const PackedGemmCudaArgs& args, Device device) {
  const Checker c{"packed_gemm", device};
  const GemmProductArgs& p = args.product;
  const PackedWeight& w = args.weight;
  packed_weight_check(c, w);
  c.require(w.format == WeightFormat::int8 || w.format == WeightFormat::int4,
            "the weight must be packed as int8 or int4 on cuda");
  c.require(p.a && p.a.ndim == 2, "x must have shape (M, K)");
  c.dtype("x", p.a, {DType::bf16, DType::f16});
  c.dense_rows("x", p.a);
  GemmProductArgs as_product = p;
  if (p.a.shape[0] <= kPackedCudaRows) {
    c.require(!p.b, "the workspace belongs to more rows");
    as_product.b = p.a;  // stands for [N, K] in the check that follows
    as_product.b.shape[0] = w.N, as_product.b.shape[1] = w.K;
  }
  c.require(reinterpret_cast<uintptr_t>(w.data) % 16 == 0, "packed must be 16-byte aligned");
  gemm_product_check(as_product, device);
  c.tensor("y", p.y, {p.a.shape[0], w.N});
  c.tensor("x", p.a, {p.a.shape[0], w.K});
}

void packed_gemm_cuda(const PackedGemmCudaArgs& args);

}  // namespace cgpt
