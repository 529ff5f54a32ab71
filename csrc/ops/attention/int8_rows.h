// Rows of keys or values as int8 with a scale each: x ~ scale * q, q = round(x 127 / max |x|), so
// that |x - scale q| <= max |x| / 254. A row that holds a NaN or an infinity becomes NaN whole.
//
// Reads D elements, writes D + 4 bytes a row.
#pragma once

#include "../../cpu/simd.h"
#include "attention.h"

namespace cgpt::CGPT_TIER {

// The first n of kLanes integers.
CGPT_INLINE VecF load_n(const int8_t* p, int64_t n) {
#if CGPT_TIER_LEVEL >= 2
  const __mmask16 m = static_cast<__mmask16>(n >= kLanes ? 0xffff : (1u << n) - 1);
  return bit_cast<VecF>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(m, p))));
#else
  VecI v = {};
  if (n >= kLanes) {
  #if CGPT_TIER_LEVEL == 1
    v = bit_cast<VecI>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  #else
    for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  #endif
  } else {
    for (int i = 0; i < n; ++i) v[i] = p[i];
  }
  return __builtin_convertvector(v, VecF);
#endif
}
CGPT_INLINE VecF load(const int8_t* p) { return load_n(p, kLanes); }

template <class T>
inline float quantize_row(const T* x, int64_t D, int8_t* q) {
  // As integers magnitudes order like the floats do, and NaN is the largest.
  VecI largest = {};
  for (int64_t d = 0; d < D; d += kLanes) {
    const VecI bits = bit_cast<VecI>(load_n(x + d, D - d)) & set1i(0x7fffffff);
    largest = bits > largest ? bits : largest;
  }
  int32_t top = 0;
  for (int i = 0; i < kLanes; ++i) top = largest[i] > top ? largest[i] : top;
  const float extreme = bit_cast<float>(top);
  const bool finite = extreme <= 3.402823466e38f;
  // Below this the inverse would overflow; such a row counts as zero.
  const bool vanishing = extreme < 1e-30f;
  const float inverse = finite && !vanishing ? 127.0f / extreme : 0.0f;
  for (int64_t d = 0; d < D; d += kLanes) {
    // Adding 1.5 * 2^23 rounds to the nearest integer, whose byte is then the lowest of the sum.
    const VecF v = load_n(x + d, D - d) * set1(inverse) + set1(12582912.0f);
    int32_t whole[kLanes];
    __builtin_memcpy(whole, &v, sizeof(v));
    const int64_t n = D - d < kLanes ? D - d : kLanes;
    for (int64_t i = 0; i < n; ++i) q[d + i] = finite ? static_cast<int8_t>(whole[i]) : int8_t{0};
  }
  if (!finite) return __builtin_nanf("");
  return vanishing ? 0.0f : extreme / 127.0f;
}

// to[n, D] = T(scales[j] * rows[j]) for n rows, dense.
template <class T>
inline void dequantize_rows(const int8_t* rows, int64_t stride, const float* scales, int64_t n,
                            int64_t D, T* to) {
  for (int64_t j = 0; j < n; ++j) {
    const VecF scale = set1(scales[j]);
    for (int64_t d = 0; d < D; d += kLanes)
      store_n(to + j * D + d, load_n(rows + j * stride + d, D - d) * scale, D - d);
  }
}

// The scales of (b, h) from key j0 on.
inline const float* scales_of(const TensorView& scale, int64_t b, int64_t h, int64_t j0) {
  return scale.as<const float>() + b * scale.strides[0] + h * scale.strides[1] + j0;
}

}  // namespace cgpt::CGPT_TIER
