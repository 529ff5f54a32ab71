// Products of rows with packed keys over the head size, the same bits wherever they are formed.
#pragma once

#include "../../cpu/block_gemm.h"
#include "softmax.h"

namespace cgpt::CGPT_TIER {

// s[M, N] = a[M, D] b[D, N]. One fp32 sum over a long D loses digits that eager's blocked
// multiplication keeps: parts of kSumD are added up.
template <class C>
inline void scores(int64_t M, int64_t N, int64_t D, const C* a, int64_t lda, const C* b, float* s,
                   int64_t lds) {
  constexpr int64_t kSumD = 128;
  if (sizeof(C) == 2 || D <= kSumD) {
    block_gemm<C>(M, N, D, a, lda, b, s, lds, false);
    return;
  }
  for (int64_t j = 0; j < N; j += kNR)
    for (int64_t d = 0; d < D; d += kSumD)
      block_gemm<C>(M, min64(kNR, N - j), min64(kSumD, D - d), a + d, lda, b + j * D + d * kNR,
                    s + j, lds, d > 0);
}

}  // namespace cgpt::CGPT_TIER
