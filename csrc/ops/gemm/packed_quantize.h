// Rows of x as small integers, for the products with quantized weights.
//
//   8 bits    q = round(x 127 / max |x|), one byte: many rows
//   15 bits   q = round(x 16319 / max |x|) = 128 h + l with h in -127 .. 127, l in -64 .. 63, two
//             bytes: few rows, where memory sets the pace and a second multiplication is free
//
// Either way a product of bytes sums exactly in 32 bits, on dot products and on tiles.
#pragma once

#include "packed_pack.h"

#if CGPT_TIER_LEVEL >= 3
namespace cgpt::CGPT_TIER {
namespace {

// max |x| of a row; a NaN or an infinity comes back as such.
template <class T>
inline float row_extreme(const T* x, int64_t K) {
  // As integers magnitudes order like the floats do, and NaN is the largest.
  __m512i largest = _mm512_setzero_si512();
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int64_t k = 0; k < K; k += kLanes) {
    const __m512i bits = bit_cast<__m512i>(load_n(x + k, K - k));
    largest = _mm512_max_epi32(largest, _mm512_and_si512(bits, magnitude));
  }
  return bit_cast<float>(_mm512_reduce_max_epi32(largest));
}

// Writes the bytes of one row, each plus `offset`, zero (plus offset) from K to Kp: `high` and
// `low` for 15 bits, `low` alone (high null) for 8. Calls sum(k, q) with the integers of 16 values
// at a time. Returns the scale: x ~ scale * q; NaN for a row that holds a NaN or an infinity.
template <class T, class Sum>
CGPT_INLINE float quantize_row(const T* x, int64_t K, int64_t Kp, int offset, uint8_t* high,
                               uint8_t* low, Sum&& sum) {
  const float levels = high ? 16319.0f : 127.0f;
  const float extreme = row_extreme(x, K);
  const bool finite = extreme <= 3.402823466e38f;
  // Below this the inverse would overflow; such a row counts as zero.
  const bool vanishing = extreme < 1e-30f;
  const float inverse = finite && !vanishing ? levels / extreme : 0.0f;
  const __m512i shift = _mm512_set1_epi32(offset);
  for (int64_t k = 0; k < Kp; k += kLanes) {
    const VecF v = k < K ? load_n(x + k, K - k) : zero();
    const __m512i q = _mm512_cvtps_epi32(v * set1(inverse));
    sum(k, q);
    __m512i l = q;
    if (high) {
      const __m512i half = _mm512_set1_epi32(64);
      l = _mm512_sub_epi32(_mm512_and_si512(_mm512_add_epi32(q, half), _mm512_set1_epi32(127)),
                           half);
      const __m512i h = _mm512_srai_epi32(_mm512_sub_epi32(q, l), 7);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(high + k),
                       _mm512_cvtepi32_epi8(_mm512_add_epi32(h, shift)));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low + k),
                     _mm512_cvtepi32_epi8(_mm512_add_epi32(l, shift)));
  }
  if (!finite) return __builtin_nanf("");
  return vanishing ? 0.0f : extreme / levels;
}

}  // namespace
}  // namespace cgpt::CGPT_TIER
#endif
