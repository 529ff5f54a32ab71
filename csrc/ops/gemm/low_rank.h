// The low-rank term of a product, scale u v^T with u [M, r] and v [N, r] (LoRA), added to sums of
// x W^T in fp32 while they are in cache: 2 M N r FLOPs, and y is neither written nor read again.
//
// The calling thread prepares u and v once (both are small: (M + N) r values), its team reads them.
#pragma once

#include "../../cpu/block_gemm.h"
#include "../../cpu/scratch.h"
#include "gemm.h"

namespace cgpt::CGPT_TIER {
namespace {

constexpr int kSlotLowRank = 3;  // of thread_scratch; the kernels have 0 to 2

struct LowRank {
  const void* u = nullptr;  // [M, padded r], scaled
  const void* v = nullptr;  // panels of kNR columns from `first` on
  int64_t rank = 0, stride = 0, first = 0;
  bool wide = true;  // fp32, else bf16 pairs
};

template <class T>
LowRank prepare_low_rank(const LowRankTerm& term, int64_t n0, int64_t n1) {
  using C = compute_t<T>;
  const int64_t M = term.u.shape[0], rank = term.u.shape[1], stride = padded_k<C>(rank);
  // u's rows, then v's panels at a multiple of 64 bytes
  const int64_t u_size = (M * stride + 31) / 32 * 32;
  const auto bytes = static_cast<size_t>(u_size + packed_b_size<C>(rank, n1 - n0)) * sizeof(C);
  C* u = static_cast<C*>(thread_scratch(kSlotLowRank, bytes));
  C* v = u + u_size;
  const int64_t ldu = M > 1 ? term.u.strides[0] : rank;
  pack_a(term.u.as<const T>(), ldu, M, rank, u);
  if (term.scale != 1.0f)
    for (int64_t i = 0; i < M * stride; i += kLanes) {
      const int64_t left = M * stride - i;
      store_n(u + i, load_n(u + i, left) * set1(term.scale), left);
    }
  // A dimension of size 1 may have any stride.
  const bool along_k = rank == 1 || term.v.strides[1] == 1;
  const int64_t stride_n = along_k ? term.v.strides[0] : 1;
  const int64_t stride_k = along_k ? 1 : term.v.strides[1];
  pack_b(term.v.as<const T>() + n0 * stride_n, stride_k, stride_n, rank, n1 - n0, v);
  return {u, v, rank, stride, n0, sizeof(C) == 4};
}

// The term's columns [n0, n1), n0 a multiple of kNR; of rank 0 where there is none.
inline LowRank low_rank_of(const LowRankTerm& term, int64_t n0, int64_t n1) {
  if (!term.u || term.u.numel() == 0 || n0 >= n1) return {};
  if (term.u.dtype == DType::f32) return prepare_low_rank<float>(term, n0, n1);
  if (term.u.dtype == DType::bf16) return prepare_low_rank<bf16>(term, n0, n1);
  return prepare_low_rank<f16>(term, n0, n1);
}

// c[i, j] += term[i0 + i, n0 + j]; n0 - term.first is a multiple of kNR.
inline void add_low_rank(const LowRank& term, int64_t i0, int64_t rows, int64_t n0, int64_t columns,
                         float* c, int64_t ldc) {
  if (term.rank == 0) return;
  const int64_t u0 = i0 * term.stride, v0 = (n0 - term.first) * term.stride;
  if (term.wide)
    return block_gemm(rows, columns, term.rank, static_cast<const float*>(term.u) + u0, term.stride,
                      static_cast<const float*>(term.v) + v0, c, ldc, true);
#if CGPT_TIER_LEVEL >= 4
  block_gemm(rows, columns, term.rank, static_cast<const bf16*>(term.u) + u0, term.stride,
             static_cast<const bf16*>(term.v) + v0, c, ldc, true);
#endif
}

}  // namespace
}  // namespace cgpt::CGPT_TIER
