// Packing for block_gemm.h: A into rows of the compute type, B into panels of kNR columns,
//
//   fp32:  panel[k][kNR]                 bf16:  panel[k / 2][kNR][2]  (the VNNI order)
//
// zero padded to whole panels and to whole k steps, so that the kernels have no tails. Nothing
// beyond the K x N (or M x K) elements of the source is read.
#pragma once

#include "simd.h"

namespace cgpt::CGPT_TIER {

// What is multiplied for storage type T: bf16 pairs into fp32 where the tier has the dot product
// and T is bf16, otherwise fp32, converted while packing.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<bf16> {
#if CGPT_TIER_LEVEL >= 4
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

// k is padded to a multiple of this in packed A and B: one dot product's pair, or one AMX tile row.
template <class C>
constexpr int kKStep = sizeof(C) == 4 ? 1
                       : kHasAmx      ? 32
                                      : 2;

template <class C>
CGPT_INLINE int64_t padded_k(int64_t K) {
  return (K + kKStep<C> - 1) / kKStep<C> * kKStep<C>;
}

// Elements of packed B for K x N.
template <class C>
CGPT_INLINE int64_t packed_b_size(int64_t K, int64_t N) {
  return (N + kNR - 1) / kNR * kNR * padded_k<C>(K);
}

// Whether block_gemm can read A in place: same type, and whole k steps.
template <class C, class T>
CGPT_INLINE bool a_in_place(int64_t K) {
  return __is_same(C, T) && K % kKStep<C> == 0;
}

// Transposes a square of kLanes x kLanes 32-bit elements in registers.
CGPT_INLINE void transpose(VecF (&v)[kLanes]) {
#if CGPT_TIER_LEVEL >= 2
  // Pairs of rows, then quads, inside each 128-bit lane; then the lanes themselves.
  VecF t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  const auto low = [](VecF a, VecF b) {
    return bit_cast<VecF>(_mm512_unpacklo_pd(bit_cast<__m512d>(a), bit_cast<__m512d>(b)));
  };
  const auto high = [](VecF a, VecF b) {
    return bit_cast<VecF>(_mm512_unpackhi_pd(bit_cast<__m512d>(a), bit_cast<__m512d>(b)));
  };
  VecF q[16];  // q[4 g + c]: lane l holds column 4 l + c of rows 4 g .. 4 g + 3
  for (int g = 0; g < 4; ++g) {
    q[4 * g] = low(t[4 * g], t[4 * g + 2]);
    q[4 * g + 1] = high(t[4 * g], t[4 * g + 2]);
    q[4 * g + 2] = low(t[4 * g + 1], t[4 * g + 3]);
    q[4 * g + 3] = high(t[4 * g + 1], t[4 * g + 3]);
  }
  for (int c = 0; c < 4; ++c) {
    const VecF a = _mm512_shuffle_f32x4(q[c], q[4 + c], 0x88);
    const VecF b = _mm512_shuffle_f32x4(q[8 + c], q[12 + c], 0x88);
    const VecF d = _mm512_shuffle_f32x4(q[c], q[4 + c], 0xdd);
    const VecF e = _mm512_shuffle_f32x4(q[8 + c], q[12 + c], 0xdd);
    v[c] = _mm512_shuffle_f32x4(a, b, 0x88);
    v[8 + c] = _mm512_shuffle_f32x4(a, b, 0xdd);
    v[4 + c] = _mm512_shuffle_f32x4(d, e, 0x88);
    v[12 + c] = _mm512_shuffle_f32x4(d, e, 0xdd);
  }
#elif CGPT_TIER_LEVEL == 1
  VecF t[8], q[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int g = 0; g < 2; ++g) {
    q[4 * g] = _mm256_shuffle_ps(t[4 * g], t[4 * g + 2], 0x44);
    q[4 * g + 1] = _mm256_shuffle_ps(t[4 * g], t[4 * g + 2], 0xee);
    q[4 * g + 2] = _mm256_shuffle_ps(t[4 * g + 1], t[4 * g + 3], 0x44);
    q[4 * g + 3] = _mm256_shuffle_ps(t[4 * g + 1], t[4 * g + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    v[c] = _mm256_permute2f128_ps(q[c], q[4 + c], 0x20);
    v[4 + c] = _mm256_permute2f128_ps(q[c], q[4 + c], 0x31);
  }
#else
  float whole[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) whole[j][i] = v[i][j];
  for (int j = 0; j < kLanes; ++j) v[j] = load(whole[j]);
#endif
}

// Vectors along k, as packing and dot products read them: kWidth elements of storage type T, the
// first n of them (the rest zero), in compute type C.
template <class C>
struct KVec {
  using type = VecF;
  static constexpr int kWidth = kLanes;
  template <class T>
  static CGPT_INLINE VecF load(const T* p) {
    return CGPT_TIER::load(p);
  }
  template <class T>
  static CGPT_INLINE VecF load_n(const T* p, int64_t n) {
    return CGPT_TIER::load_n(p, n);
  }
  static CGPT_INLINE VecF multiply_add(VecF a, VecF b, VecF c) { return fmadd(a, b, c); }
};
#if CGPT_TIER_LEVEL >= 4
CGPT_INLINE __m512i load_n_bf16(const bf16* p, int64_t n) {
  return _mm512_maskz_loadu_epi16(n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1, p);
}
template <>
struct KVec<bf16> {
  using type = __m512i;
  static constexpr int kWidth = 2 * kLanes;
  static CGPT_INLINE __m512i load(const bf16* p) { return _mm512_loadu_si512(p); }
  static CGPT_INLINE __m512i load_n(const bf16* p, int64_t n) { return load_n_bf16(p, n); }
  static CGPT_INLINE VecF multiply_add(__m512i a, __m512i b, VecF c) {
    return _mm512_dpbf16_ps(c, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
  }
};
#endif

// Packs b(k, n) = b[n * stride_n + k]: squares of kLanes columns are transposed, an element of the
// square being one fp32 or one pair of bf16.
template <class C, class T>
inline void pack_b_transposed(const T* b, int64_t stride_n, int64_t K, int64_t N, C* dst) {
  constexpr int step = 4 / sizeof(C), width = KVec<C>::kWidth;
  const int64_t Kp = padded_k<C>(K);
  for (int64_t n0 = 0; n0 < N; n0 += kNR, dst += Kp * kNR)
    for (int half = 0; half < 2; ++half) {
      const int64_t first = n0 + half * kLanes, columns = N - first;
      for (int64_t k0 = 0; k0 < Kp; k0 += width) {
        VecF square[kLanes];
        const T* p = b + first * stride_n + k0;
        if (columns >= kLanes && k0 + width <= K) {
#pragma GCC unroll 16
          for (int j = 0; j < kLanes; ++j)
            square[j] = bit_cast<VecF>(KVec<C>::load(p + j * stride_n));
        } else {
          for (int j = 0; j < kLanes; ++j)
            square[j] = j < columns && k0 < K
                            ? bit_cast<VecF>(KVec<C>::load_n(p + j * stride_n, K - k0))
                            : zero();
        }
        transpose(square);
        C* out = dst + k0 * kNR + half * kLanes * step;
        const int64_t rows = (Kp - k0) / step;
        if (rows >= kLanes) {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i)
            __builtin_memcpy(out + i * kNR * step, &square[i], sizeof(VecF));
        } else {
          for (int i = 0; i < rows; ++i)
            __builtin_memcpy(out + i * kNR * step, &square[i], sizeof(VecF));
        }
      }
    }
}

// Packs b(k, n) = b[k * stride_k + n]: rows are copied, and for bf16 two rows are interleaved. All
// panels of a row are written before the next row, so that the source is read in long runs.
// `stride_panel`: elements between panels where these are a part of the k; 0: the panels are whole.
template <class C, class T>
inline void pack_b_rows(const T* b, int64_t stride_k, int64_t K, int64_t N, C* dst,
                        int64_t stride_panel = 0) {
  const int64_t Kp = padded_k<C>(K);
  if (stride_panel == 0) stride_panel = Kp * kNR;
  if constexpr (sizeof(C) == 4) {
    for (int64_t k = 0; k < K; ++k) {
      const T* row = b + k * stride_k;
      C* out = dst + k * kNR;
      int64_t n = 0;
      for (; n + kNR <= N; n += kNR, out += stride_panel) {
        store(out, load(row + n));
        store(out + kLanes, load(row + n + kLanes));
      }
      if (n < N) {
        store(out, load_n(row + n, N - n));
        store(out + kLanes, N - n > kLanes ? load_n(row + n + kLanes, N - n - kLanes) : zero());
      }
    }
  } else {
#if CGPT_TIER_LEVEL >= 4
    alignas(64) static constexpr uint16_t kPairs[2][32] = {
        {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
         24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
    const __m512i low = _mm512_load_si512(kPairs[0]), high = _mm512_load_si512(kPairs[1]);
    for (int64_t k = 0; k < Kp; k += 2) {
      const T* row = b + k * stride_k;
      C* out = dst + k * kNR;
      for (int64_t n = 0; n < N; n += kNR, out += stride_panel) {
        const __m512i even = k < K ? load_n_bf16(row + n, N - n) : __m512i{};
        const __m512i odd = k + 1 < K ? load_n_bf16(row + stride_k + n, N - n) : __m512i{};
        _mm512_storeu_si512(out, _mm512_permutex2var_epi16(even, low, odd));
        _mm512_storeu_si512(out + kNR, _mm512_permutex2var_epi16(even, high, odd));
      }
    }
#endif
  }
}

// Packs b(k, n) = b[k * stride_k + n * stride_n], one of the strides being 1.
template <class C, class T>
inline void pack_b(const T* b, int64_t stride_k, int64_t stride_n, int64_t K, int64_t N, C* dst) {
  if (stride_n == 1) pack_b_rows(b, stride_k, K, N, dst);
  else pack_b_transposed(b, stride_n, K, N, dst);
}

// Copies A[M, K] with row stride lda into dst[M, padded_k] with row stride ldd (0: padded_k),
// converted, zero padded.
template <class C, class T>
inline void pack_a(const T* a, int64_t lda, int64_t M, int64_t K, C* dst, int64_t ldd = 0) {
  constexpr int width = KVec<C>::kWidth;
  const int64_t Kp = padded_k<C>(K);
  if (ldd == 0) ldd = Kp;
  for (int64_t i = 0; i < M; ++i, a += lda, dst += ldd) {
    int64_t k = 0;
    for (; k + width <= K; k += width) {
      const auto v = KVec<C>::load(a + k);
      __builtin_memcpy(dst + k, &v, sizeof(v));
    }
    if (k < Kp) {
      const auto v = KVec<C>::load_n(a + k, K - k);
      __builtin_memcpy(dst + k, &v, static_cast<size_t>(Kp - k) * sizeof(C));
    }
  }
}

// kLanes columns of the rows k0, k0 + 1, .. of a[K, M] (row stride lda), from column m on: vector r
// holds one fp32 row, or two bf16 rows as pairs. Zero beyond K and M.
template <class C, class T>
CGPT_INLINE void load_square(const T* a, int64_t lda, int64_t k0, int64_t K, int64_t m, int64_t M,
                             VecF (&square)[kLanes]) {
  const T* p = a + k0 * lda + m;
  if constexpr (sizeof(C) == 4) {
    if (k0 + kLanes <= K && m + kLanes <= M) {
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) square[r] = load(p + r * lda);
    } else {
      for (int r = 0; r < kLanes; ++r) square[r] = k0 + r < K ? load_n(p + r * lda, M - m) : zero();
    }
  } else {
#if CGPT_TIER_LEVEL >= 4
    const __mmask16 columns = static_cast<__mmask16>(M - m >= 16 ? 0xffff : (1u << (M - m)) - 1);
    const auto row = [&](int64_t r) {
      return k0 + r < K ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(columns, p + r * lda))
                        : __m512i{};
    };
    for (int r = 0; r < kLanes; ++r)
      square[r] =
          bit_cast<VecF>(_mm512_or_si512(row(2 * r), _mm512_slli_epi32(row(2 * r + 1), 16)));
#endif
  }
}

// Copies the transpose of a[K, M] with row stride lda into dst[M, K] with row stride ldd, converted
// and zero padded. ldd holds K padded to a multiple of 64 bytes, all of which are written.
template <class C, class T>
inline void pack_a_transposed(const T* a, int64_t lda, int64_t M, int64_t K, C* dst, int64_t ldd) {
  constexpr int64_t step = KVec<C>::kWidth;
  for (int64_t k0 = 0; k0 < K; k0 += step)
    for (int64_t m = 0; m < M; m += kLanes) {
      VecF square[kLanes];
      load_square<C>(a, lda, k0, K, m, M, square);
      transpose(square);
      C* out = dst + m * ldd + k0;
      const int64_t rows = M - m < kLanes ? M - m : kLanes;
      if (rows == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) __builtin_memcpy(out + i * ldd, &square[i], sizeof(VecF));
      } else {
        for (int64_t i = 0; i < rows; ++i)
          __builtin_memcpy(out + i * ldd, &square[i], sizeof(VecF));
      }
    }
}

}  // namespace cgpt::CGPT_TIER
