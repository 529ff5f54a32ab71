// C[M, N] (+)= A[M, K] B[K, N] on blocks that live in cache: the multiplication under gemm,
// attention and linear_cross_entropy.
//
// pack.h says what is multiplied (compute_t<T>) and how B is packed; accumulation is fp32. A is
// read row-major in place, or copied by pack_a when it must be converted or has an odd K.
//
//   fp32, and bf16 with the dot product: tiles of up to kMR x kNR in vector registers
//   bf16 with AMX: tiles of 32 x 32, 2 x 2 tile registers of 16 x 16
//
// Each element of C sums its k in ascending order whatever M and N are, so that a row's result does
// not depend on the rows beside it.
#pragma once

#include <cstddef>

#include "amx.h"
#include "pack.h"

namespace cgpt::CGPT_TIER {

constexpr int kMR = CGPT_TIER_LEVEL >= 2 ? 14 : CGPT_TIER_LEVEL == 1 ? 6 : 4;

// Asks for the lines of `bytes` bytes that lie `ahead` bytes behind p; 0 asks for nothing.
template <int bytes, int ahead>
CGPT_INLINE void prefetch_step(const void* p) {
  if constexpr (ahead > 0)
#pragma GCC unroll 32
    for (int line = 0; line < bytes; line += 64)
      __builtin_prefetch(static_cast<const char*>(p) + ahead + line);
}

// One register tile: `rows` x kNR of C over the whole of K, from a panel of `width` columns. Panels
// that come from memory are asked for `ahead` bytes before they are read.
template <int rows, int width = kNR, int ahead = 0, class C>
CGPT_INLINE void tile_gemm(int64_t K, const C* a, int64_t lda, const C* panel, float* c,
                           int64_t ldc, int64_t columns, bool accumulate) {
  VecF acc[rows][2] = {};
  if constexpr (sizeof(C) == 4) {
    for (int64_t k = 0; k < K; ++k) {
      prefetch_step<kNR * 4, ahead>(panel + k * width);
      const VecF b0 = load(panel + k * width), b1 = load(panel + k * width + kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        const VecF x = set1(a[i * lda + k]);
        acc[i][0] = fmadd(x, b0, acc[i][0]);
        acc[i][1] = fmadd(x, b1, acc[i][1]);
      }
    }
  } else {
#if CGPT_TIER_LEVEL >= 4
    for (int64_t k = 0; k < K; k += 2) {
      prefetch_step<kNR * 4, ahead>(panel + k * width);
      const __m512i b0 = _mm512_loadu_si512(panel + k * width);
      const __m512i b1 = _mm512_loadu_si512(panel + k * width + 2 * kLanes);
  #pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        int32_t pair;
        __builtin_memcpy(&pair, a + i * lda + k, 4);
        const __m512i x = _mm512_set1_epi32(pair);
        acc[i][0] = KVec<C>::multiply_add(x, b0, acc[i][0]);
        acc[i][1] = KVec<C>::multiply_add(x, b1, acc[i][1]);
      }
    }
#endif
  }
  // Unrolled, or the sums would live on the stack: a fifth of the time at K = 64.
  float edge[rows][kNR];
  const bool whole = columns >= kNR;
  float* out = whole ? c : edge[0];
  const int64_t ldo = whole ? ldc : kNR;
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      float* p = out + i * ldo + v * kLanes;
      store(p, accumulate && whole ? acc[i][v] + load(p) : acc[i][v]);
    }
  if (whole) return;
  for (int i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += kLanes) {
      const VecF sum = load(edge[i] + j);
      float* p = c + i * ldc + j;
      store_n(p, accumulate ? sum + load_n(p, columns - j) : sum, columns - j);
    }
}

template <int rows, int width = kNR, int ahead = 0, class C>
inline void tile_gemm_rows(int64_t M, int64_t K, const C* a, int64_t lda, const C* panel, float* c,
                           int64_t ldc, int64_t columns, bool accumulate) {
  if (M == rows)
    return tile_gemm<rows, width, ahead>(K, a, lda, panel, c, ldc, columns, accumulate);
  if constexpr (rows > 1)
    tile_gemm_rows<rows - 1, width, ahead>(M, K, a, lda, panel, c, ldc, columns, accumulate);
}

#if CGPT_TIER_LEVEL >= 5
// bf16 times bf16 sums in fp32, unsigned times signed bytes in int32.
template <int c, int a, int b, class C>
CGPT_INLINE void amx_multiply_add(AmxTiles& tiles, const C*) {
  if constexpr (sizeof(C) == 2) tiles.template multiply_add<c, a, b>();
  else tiles.template multiply_add_u8s8<c, a, b>();
}

// `rows` rows of A, 17 to 32 when `two`, else 1 to 16, times all panels: the rows stay in L1 while
// the panels stream from L2. Tiles that stick out of C's columns go through a block on the stack.
// C is fp32, or int32 where A and B are bytes. B that comes from memory is asked for `ahead` steps
// before it is read; from L2 the hardware brings it sooner without being asked.
template <bool two, int ahead = 0, class C, class B, class Sum>
inline void amx_gemm_rows(AmxTiles& tiles, int rows, int64_t N, int64_t Kp, const C* a, int64_t lda,
                          const B* b, Sum* c, int64_t ldc, bool accumulate) {
  constexpr int64_t kDepth = 64 / sizeof(C);  // k of one tile
  const int64_t a_bytes = lda * static_cast<int64_t>(sizeof(C)), b_bytes = kNR * 4;
  alignas(64) Sum edge[32][kNR];
  for (int64_t n0 = 0; n0 < N; n0 += kNR) {
    const int64_t columns = N - n0;
    const bool whole = columns >= kNR;
    Sum* out = whole ? c + n0 : edge[0];
    const int64_t ldo = whole ? ldc : kNR;
    if (accumulate && whole) {
      tiles.template load<0>(out, ldo * 4);
      tiles.template load<1>(out + 16, ldo * 4);
      if constexpr (two) {
        tiles.template load<2>(out + 16 * ldo, ldo * 4);
        tiles.template load<3>(out + 16 * ldo + 16, ldo * 4);
      }
    } else {
      tiles.template zero<0>();
      tiles.template zero<1>();
      if constexpr (two) {
        tiles.template zero<2>();
        tiles.template zero<3>();
      }
    }
    const B* panel = b + n0 * Kp;
    for (int64_t k = 0; k < Kp; k += kDepth, panel += kDepth * kNR) {
      prefetch_step<2048, 2048 * ahead>(panel);
      tiles.template load<6>(panel, b_bytes);
      tiles.template load<4>(a + k, a_bytes);
      amx_multiply_add<0, 4, 6>(tiles, a);
      tiles.template load<7>(panel + kDepth, b_bytes);
      amx_multiply_add<1, 4, 7>(tiles, a);
      if constexpr (two) {
        tiles.template load<5>(a + 16 * lda + k, a_bytes);
        amx_multiply_add<2, 5, 6>(tiles, a);
        amx_multiply_add<3, 5, 7>(tiles, a);
      }
    }
    tiles.template store<0>(out, ldo * 4);
    tiles.template store<1>(out + 16, ldo * 4);
    if constexpr (two) {
      tiles.template store<2>(out + 16 * ldo, ldo * 4);
      tiles.template store<3>(out + 16 * ldo + 16, ldo * 4);
    }
    if constexpr (sizeof(C) == 2) {
      if (whole) continue;
      for (int i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; j += kLanes) {
          VecF v = load(edge[i] + j);
          float* p = c + i * ldc + n0 + j;
          if (accumulate) v += load_n(p, columns - j);
          store_n(p, v, columns - j);
        }
    }
  }
}

inline void amx_gemm(int64_t M, int64_t N, int64_t Kp, const bf16* a, int64_t lda, const bf16* b,
                     float* c, int64_t ldc, bool accumulate) {
  const int64_t whole = M / 32 * 32;
  if (whole > 0) {
    AmxTiles tiles(16, 16);
    for (int64_t i = 0; i < whole; i += 32)
      amx_gemm_rows<true>(tiles, 32, N, Kp, a + i * lda, lda, b, c + i * ldc, ldc, accumulate);
  }
  const int rest = static_cast<int>(M - whole);
  if (rest == 0) return;
  a += whole * lda, c += whole * ldc;
  AmxTiles tiles(rest < 16 ? rest : 16, rest < 16 ? 0 : rest - 16);
  if (rest > 16) amx_gemm_rows<true>(tiles, rest, N, Kp, a, lda, b, c, ldc, accumulate);
  else amx_gemm_rows<false>(tiles, rest, N, Kp, a, lda, b, c, ldc, accumulate);
}
#endif

// c[M, N] = or += a[M, K] b. `a` is in compute type, row-major with stride lda, readable for
// padded_k(K) elements a row; `b` is packed; `c` is fp32 row-major.
template <class C>
inline void block_gemm(int64_t M, int64_t N, int64_t K, const C* a, int64_t lda, const C* b,
                       float* c, int64_t ldc, bool accumulate) {
  const int64_t Kp = padded_k<C>(K);
#if CGPT_TIER_LEVEL >= 5
  if constexpr (sizeof(C) == 2) return amx_gemm(M, N, Kp, a, lda, b, c, ldc, accumulate);
#endif
  const int64_t tiles = (M + kMR - 1) / kMR;
  for (int64_t n0 = 0; n0 < N; n0 += kNR) {
    const C* panel = b + n0 * Kp;
    const int64_t columns = N - n0 < kNR ? N - n0 : kNR;
    // Tiles of nearly equal height: a rest of one or two rows would not hide the latency of FMA.
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t i = M * t / tiles, rows = M * (t + 1) / tiles - i;
      tile_gemm_rows<kMR>(rows, Kp, a + i * lda, lda, panel, c + i * ldc + n0, ldc, columns,
                          accumulate);
    }
  }
}

}  // namespace cgpt::CGPT_TIER
