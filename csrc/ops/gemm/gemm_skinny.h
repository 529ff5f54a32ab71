// x W^T for few rows of x, straight from the weights: each weight is read once, in order, and
// nothing is packed, for packing costs as much as several rows of multiplication.
//
//   "nk": dot products along k, a few rows of W against a few rows of x at a time
//   "kn": strips of columns, walking down k; x is broadcast
#pragma once

#include "../../cpu/pack.h"

namespace cgpt::CGPT_TIER {
namespace {

// Lane sums of four vectors.
CGPT_INLINE void store_sums(const VecF (&v)[4], float* out) {
#if CGPT_TIER_LEVEL >= 2
  const VecF ab = _mm512_unpacklo_ps(v[0], v[1]) + _mm512_unpackhi_ps(v[0], v[1]);
  const VecF cd = _mm512_unpacklo_ps(v[2], v[3]) + _mm512_unpackhi_ps(v[2], v[3]);
  const __m512d low = _mm512_unpacklo_pd(bit_cast<__m512d>(ab), bit_cast<__m512d>(cd));
  const __m512d high = _mm512_unpackhi_pd(bit_cast<__m512d>(ab), bit_cast<__m512d>(cd));
  const VecF abcd = bit_cast<VecF>(low) + bit_cast<VecF>(high);
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif CGPT_TIER_LEVEL == 1
  const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
#else
  for (int i = 0; i < 4; ++i) out[i] = reduce_add(v[i]);
#endif
}

// c[rows, columns] = x[rows, K] w[columns, K]^T, columns 1 or a multiple of 4
template <int rows, int columns, class C, class T>
CGPT_INLINE void dot_tile(int64_t K, const C* x, int64_t ldx, const T* w, int64_t ldw, float* c,
                          int64_t ldc) {
  using V = KVec<C>;
  VecF acc[rows][columns] = {};
  const auto step = [&](auto&& from_w, auto&& from_x) __attribute__((always_inline)) {
    typename V::type b[columns];
#pragma GCC unroll 8
    for (int j = 0; j < columns; ++j) b[j] = from_w(w + j * ldw);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const typename V::type a = from_x(x + i * ldx);
#pragma GCC unroll 8
      for (int j = 0; j < columns; ++j) acc[i][j] = V::multiply_add(a, b[j], acc[i][j]);
    }
  };
  int64_t k = 0;
  for (; k + V::kWidth <= K; k += V::kWidth)
    step([&](const T* p) { return V::load(p + k); }, [&](const C* p) { return V::load(p + k); });
  if (k < K)
    step([&](const T* p) { return V::load_n(p + k, K - k); },
         [&](const C* p) { return V::load_n(p + k, K - k); });
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < columns; j += 4) {
      if constexpr (columns == 1) {
        c[i * ldc] = reduce_add(acc[i][0]);
      } else {
        const VecF four[4] = {acc[i][j], acc[i][j + 1], acc[i][j + 2], acc[i][j + 3]};
        store_sums(four, c + i * ldc + j);
      }
    }
}

// Rows of x at a time, and rows of W beside them: 6 x 4 accumulators, 4 rows of W and one of x fill
// the 32 registers of AVX-512, 2 x 4 those of AVX2. One or two rows of x take 8 rows of W, so that
// enough reads are in flight.
constexpr int kDotRows = CGPT_TIER_LEVEL >= 2 ? 6 : 2;
constexpr int dot_columns(int rows) {
  return rows == 1 || (rows == 2 && CGPT_TIER_LEVEL >= 2) ? 8 : 4;
}

template <int rows, class C, class T>
inline void dot_rows(int64_t M, int64_t N, int64_t K, const C* x, int64_t ldx, const T* w,
                     int64_t ldw, float* c, int64_t ldc) {
  if constexpr (rows > 1)
    if (M < rows) return dot_rows<rows - 1>(M, N, K, x, ldx, w, ldw, c, ldc);
  constexpr int columns = dot_columns(rows);
  int64_t n = 0;
  for (; n + columns <= N; n += columns)
    dot_tile<rows, columns>(K, x, ldx, w + n * ldw, ldw, c + n, ldc);
  for (; n < N; ++n) dot_tile<rows, 1>(K, x, ldx, w + n * ldw, ldw, c + n, ldc);
}

// c[M, N] = x[M, K] w[N, K]^T, N small enough for these rows of W to stay in cache.
template <class C, class T>
inline void dot_gemm(int64_t M, int64_t N, int64_t K, const C* x, int64_t ldx, const T* w,
                     int64_t ldw, float* c, int64_t ldc) {
  const int64_t tiles = (M + kDotRows - 1) / kDotRows;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t i = M * t / tiles, rows = M * (t + 1) / tiles - i;
    dot_rows<kDotRows>(rows, N, K, x + i * ldx, ldx, w, ldw, c + i * ldc, ldc);
  }
}

// Rows of W are a large stride apart, which hardware prefetchers follow badly or not at all: strips
// ask for the row this far below.
constexpr int kPrefetchRows = 8;

// k summed in fp32 in one go: one sum over a vocabulary rounds off more than 3 times eager's error.
constexpr int64_t kStripDepth = 1024;

// c[rows, units * KVec<C>::kWidth] = x[rows, K] w[K, :]; with one unit, only its first `columns`.
// For bf16, x must be readable to an even K.
template <int rows, int units, class C, class T>
CGPT_INLINE void strip_tile(int64_t K, const C* x, int64_t ldx, const T* w, int64_t ldw, float* c,
                            int64_t ldc, int64_t columns) {
  using V = KVec<C>;
  const auto read = [&](const T* p) {
    if constexpr (units == 1) return V::load_n(p, columns);
    else return V::load(p);
  };
  if constexpr (sizeof(C) == 4) {
    for (int64_t k0 = 0; k0 == 0 || k0 < K; k0 += kStripDepth) {
      const int64_t end = k0 + kStripDepth < K ? k0 + kStripDepth : K;
      VecF acc[rows][units] = {};
      for (int64_t k = k0; k < end; ++k) {
        const T* row = w + k * ldw;
        VecF b[units];
#pragma GCC unroll 8
        for (int u = 0; u < units; ++u) {
          b[u] = read(row + u * kLanes);
          __builtin_prefetch(row + kPrefetchRows * ldw + u * kLanes);
        }
#pragma GCC unroll 16
        for (int i = 0; i < rows; ++i) {
          const VecF a = set1(x[i * ldx + k]);
#pragma GCC unroll 8
          for (int u = 0; u < units; ++u) acc[i][u] = fmadd(a, b[u], acc[i][u]);
        }
      }
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
        for (int u = 0; u < units; ++u) {
          float* out = c + i * ldc + u * kLanes;
          const int64_t left = columns - u * kLanes;
          store_n(out, k0 == 0 ? acc[i][u] : acc[i][u] + load_n(out, left), left);
        }
    }
  } else {
#if CGPT_TIER_LEVEL >= 4
    // Unpacking interleaves rows k and k + 1 inside 128-bit lanes: acc[0] holds the first four
    // columns of each eight, acc[1] the second four.
    VecF acc[rows][units][2] = {};
    for (int64_t k = 0; k < K; k += 2) {
      const T* row = w + k * ldw;
      __m512i b[units][2];
  #pragma GCC unroll 8
      for (int u = 0; u < units; ++u) {
        const __m512i even = read(row + u * V::kWidth);
        const __m512i odd = k + 1 < K ? read(row + ldw + u * V::kWidth) : __m512i{};
        __builtin_prefetch(row + kPrefetchRows * ldw + u * V::kWidth);
        __builtin_prefetch(row + (kPrefetchRows + 1) * ldw + u * V::kWidth);
        b[u][0] = _mm512_unpacklo_epi16(even, odd);
        b[u][1] = _mm512_unpackhi_epi16(even, odd);
      }
  #pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        int32_t pair;
        __builtin_memcpy(&pair, x + i * ldx + k, 4);
        const __m512i a = _mm512_set1_epi32(pair);
  #pragma GCC unroll 8
        for (int u = 0; u < units; ++u) {
          acc[i][u][0] = V::multiply_add(a, b[u][0], acc[i][u][0]);
          acc[i][u][1] = V::multiply_add(a, b[u][1], acc[i][u][1]);
        }
      }
    }
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  #pragma GCC unroll 16
    for (int i = 0; i < rows; ++i)
  #pragma GCC unroll 8
      for (int u = 0; u < units; ++u) {
        const __m512d p = bit_cast<__m512d>(acc[i][u][0]), q = bit_cast<__m512d>(acc[i][u][1]);
        float* out = c + i * ldc + u * V::kWidth;
        const int64_t left = columns - u * V::kWidth;
        store_n(out, bit_cast<VecF>(_mm512_permutex2var_pd(p, low, q)), left);
        if (left > kLanes)
          store_n(out + kLanes, bit_cast<VecF>(_mm512_permutex2var_pd(p, high, q)), left - kLanes);
      }
#endif
  }
}

// Rows of x that one pass over a strip takes, and the strip's accumulators per row of x: wide
// strips for few rows make the reads of W long, 14 x 2 fills the registers.
constexpr int kStripRows = CGPT_TIER_LEVEL >= 2 ? 14 : 6;
constexpr int strip_vectors(int rows) {
  if (CGPT_TIER_LEVEL >= 2) return rows <= 3 ? 8 : rows <= 4 ? 6 : rows <= 6 ? 4 : 2;
  return rows <= 1 ? 8 : rows <= 2 ? 4 : rows <= 3 ? 3 : 2;
}

// c[M, N] = x[M, K] w[K, N], M up to kStripRows
template <int rows, class C, class T>
inline void strip_gemm(int64_t M, int64_t N, int64_t K, const C* x, int64_t ldx, const T* w,
                       int64_t ldw, float* c, int64_t ldc) {
  if constexpr (rows > 1)
    if (M < rows) return strip_gemm<rows - 1>(M, N, K, x, ldx, w, ldw, c, ldc);
  constexpr int units = strip_vectors(rows) / (4 / sizeof(C)), unit = KVec<C>::kWidth;
  int64_t n = 0;
  if constexpr (units > 1)
    for (; n + units * unit <= N; n += units * unit)
      strip_tile<rows, units>(K, x, ldx, w + n, ldw, c + n, ldc, units * unit);
  for (; n < N; n += unit)
    strip_tile<rows, 1>(K, x, ldx, w + n, ldw, c + n, ldc, N - n < unit ? N - n : unit);
}

}  // namespace
}  // namespace cgpt::CGPT_TIER
