// C[M, N] (+)= A[M, K] B[K, N] on blocks that live in cache: the multiplication under gemm,
// attention and linear_cross_entropy.
//
// What is multiplied (compute_t<T>): bf16 pairs into fp32 where the tier has the dot product and T
// is bf16, otherwise fp32, converted while packing. Accumulation is fp32.
//
// B is packed into panels of kNR columns, zero padded to whole panels and to whole k steps, so the
// kernels have no column tail:
//
//   fp32:  panel[k][kNR]                 bf16:  panel[k / 2][kNR][2]  (the VNNI order)
//
// A is read row-major in place, or copied by pack_a when it must be converted or has an odd K.
#pragma once

#include <cstddef>

#include "simd.h"

namespace cgpt::CGPT_TIER {

template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<bf16> {
#if CGPT_TIER_LEVEL >= 3
  using type = bf16;
#else
  using type = float;
#endif
};
template <class T>
using compute_t = typename Compute<T>::type;

// Two vectors of columns: 14 rows x 2 vectors fill the 32 registers of AVX-512 and leave room for
// B's two vectors and the broadcast of A; 6 x 2 do so for the 16 of AVX2.
constexpr int kNR = 2 * kLanes;
constexpr int kMR = CGPT_TIER_LEVEL >= 2 ? 14 : CGPT_TIER_LEVEL == 1 ? 6 : 4;

// k is padded to a multiple of this in packed A and B.
template <class C>
constexpr int kKStep = sizeof(C) == 2 ? 2 : 1;

template <class C>
CGPT_INLINE int64_t padded_k(int64_t K) {
  return (K + kKStep<C> - 1) / kKStep<C> * kKStep<C>;
}

// Elements of packed B for K x N.
template <class C>
CGPT_INLINE int64_t packed_b_size(int64_t K, int64_t N) {
  return (N + kNR - 1) / kNR * kNR * padded_k<C>(K);
}

template <class C, class T>
CGPT_INLINE C convert(T x) {
  if constexpr (__is_same(C, T)) return x;
  else return from_float<C>(to_float(x));
}

// Packs b(k, n) = b[k * stride_k + n * stride_n], one of the strides being 1.
template <class C, class T>
inline void pack_b(const T* b, int64_t stride_k, int64_t stride_n, int64_t K, int64_t N, C* dst) {
  constexpr int step = kKStep<C>;
  const int64_t Kp = padded_k<C>(K);
  for (int64_t n0 = 0; n0 < N; n0 += kNR, dst += Kp * kNR) {
    const int64_t columns = N - n0 < kNR ? N - n0 : kNR;
    for (int64_t k0 = 0; k0 < Kp; k0 += step)
      for (int64_t j = 0; j < kNR; ++j)
        for (int64_t s = 0; s < step; ++s) {
          const bool inside = k0 + s < K && j < columns;
          dst[k0 * kNR + j * step + s] =
              inside ? convert<C>(b[(k0 + s) * stride_k + (n0 + j) * stride_n]) : C{};
        }
  }
}

// Whether block_gemm can read A in place: same type, and whole k steps.
template <class C, class T>
CGPT_INLINE bool a_in_place(int64_t K) {
  return __is_same(C, T) && K % kKStep<C> == 0;
}

// Copies A[M, K] with row stride lda into dst[M, padded_k], converted, zero padded.
template <class C, class T>
inline void pack_a(const T* a, int64_t lda, int64_t M, int64_t K, C* dst) {
  const int64_t Kp = padded_k<C>(K);
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t k = 0; k < K; ++k) dst[i * Kp + k] = convert<C>(a[i * lda + k]);
    for (int64_t k = K; k < Kp; ++k) dst[i * Kp + k] = C{};
  }
}

// One register tile: `rows` x kNR of C over the whole of K.
template <int rows, class C>
CGPT_INLINE void tile_gemm(int64_t K, const C* a, int64_t lda, const C* panel, float* c,
                           int64_t ldc, int64_t columns, bool accumulate) {
  VecF acc[rows][2] = {};
  if constexpr (sizeof(C) == 4) {
    for (int64_t k = 0; k < K; ++k) {
      const VecF b0 = load(panel + k * kNR), b1 = load(panel + k * kNR + kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        const VecF x = set1(a[i * lda + k]);
        acc[i][0] = fmadd(x, b0, acc[i][0]);
        acc[i][1] = fmadd(x, b1, acc[i][1]);
      }
    }
  } else {
#if CGPT_TIER_LEVEL >= 3
    for (int64_t k = 0; k < K; k += 2) {
      const __m512bh b0 = bit_cast<__m512bh>(_mm512_loadu_si512(panel + k * kNR));
      const __m512bh b1 = bit_cast<__m512bh>(_mm512_loadu_si512(panel + k * kNR + 2 * kLanes));
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        int32_t pair;
        __builtin_memcpy(&pair, a + i * lda + k, 4);
        const __m512bh x = bit_cast<__m512bh>(_mm512_set1_epi32(pair));
        acc[i][0] = _mm512_dpbf16_ps(acc[i][0], x, b0);
        acc[i][1] = _mm512_dpbf16_ps(acc[i][1], x, b1);
      }
    }
#endif
  }
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < 2; ++v) {
      const int64_t left = columns - v * kLanes;
      if (left <= 0) continue;
      float* p = c + i * ldc + v * kLanes;
      if (accumulate) acc[i][v] += load_n(p, left);
      store_n(p, acc[i][v], left);
    }
}

template <int rows, class C>
inline void tile_gemm_rows(int64_t M, int64_t K, const C* a, int64_t lda, const C* panel, float* c,
                           int64_t ldc, int64_t columns, bool accumulate) {
  if (M == rows) return tile_gemm<rows>(K, a, lda, panel, c, ldc, columns, accumulate);
  if constexpr (rows > 1)
    tile_gemm_rows<rows - 1>(M, K, a, lda, panel, c, ldc, columns, accumulate);
}

// c[M, N] = or += a[M, K] b. `a` is in compute type, row-major with stride lda, readable for
// padded_k(K) elements a row; `b` is packed; `c` is fp32 row-major.
template <class C>
inline void block_gemm(int64_t M, int64_t N, int64_t K, const C* a, int64_t lda, const C* b,
                       float* c, int64_t ldc, bool accumulate) {
  const int64_t Kp = padded_k<C>(K);
  for (int64_t n0 = 0; n0 < N; n0 += kNR) {
    const C* panel = b + n0 * Kp;
    const int64_t columns = N - n0 < kNR ? N - n0 : kNR;
    for (int64_t i = 0; i < M; i += kMR)
      tile_gemm_rows<kMR>(M - i < kMR ? M - i : kMR, Kp, a + i * lda, lda, panel, c + i * ldc + n0,
                          ldc, columns, accumulate);
  }
}

}  // namespace cgpt::CGPT_TIER
