// One float vector type per tier: loads and stores that convert bf16 and fp16, partial forms for
// row ends, and the reductions. Arithmetic is the compiler's own operators on vector types.
//
//   tier                    floats  registers
//   scalar                  4       generic vectors, any processor
//   avx2                    8       16
//   avx512 and above        16      32
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/dtype.h"

#ifndef CGPT_TIER
  #error "simd.h is for tier code: compile with -DCGPT_TIER=<name> -DCGPT_TIER_LEVEL=<0..5>"
#endif
#if CGPT_TIER_LEVEL >= 1
  #include <immintrin.h>
#endif

#define CGPT_INLINE inline __attribute__((always_inline))

namespace cgpt::CGPT_TIER {

#if CGPT_TIER_LEVEL >= 2
constexpr int kLanes = 16;
#elif CGPT_TIER_LEVEL == 1
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr bool kHasBf16Dot = CGPT_TIER_LEVEL >= 4;
constexpr bool kHasAmx = CGPT_TIER_LEVEL >= 5;

using VecF = float __attribute__((vector_size(kLanes * 4), aligned(kLanes * 4)));
using VecI = int32_t __attribute__((vector_size(kLanes * 4), aligned(kLanes * 4)));
using VecU32 = uint32_t __attribute__((vector_size(kLanes * 4), aligned(kLanes * 4)));

// dst and src never overlap in these kernels; a fixed-size copy becomes one unaligned move.
template <class To, class From>
CGPT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// Not `VecF{} + x`, which must add the zero (-0 + 0 is 0): an addition and a shuffle on the ports
// that multiply, where a broadcasting load needs neither.
CGPT_INLINE VecF set1(float x) {
#if CGPT_TIER_LEVEL >= 2
  return _mm512_set1_ps(x);
#elif CGPT_TIER_LEVEL == 1
  return _mm256_set1_ps(x);
#else
  return VecF{x, x, x, x};
#endif
}
CGPT_INLINE VecI set1i(int32_t x) { return VecI{} + x; }
CGPT_INLINE VecF zero() { return VecF{}; }

// Lane numbers 0, 1, 2, ...
CGPT_INLINE VecI iota() {
  VecI v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

CGPT_INLINE VecF fmadd(VecF a, VecF b, VecF c) {
#if CGPT_TIER_LEVEL >= 2
  return _mm512_fmadd_ps(a, b, c);
#elif CGPT_TIER_LEVEL == 1
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// x86 order: a NaN in `b` is returned, a NaN in `a` is dropped. Put data in `b` to keep its NaN.
CGPT_INLINE VecF max(VecF a, VecF b) {
#if CGPT_TIER_LEVEL >= 2
  return _mm512_max_ps(a, b);
#elif CGPT_TIER_LEVEL == 1
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
CGPT_INLINE VecF min(VecF a, VecF b) {
#if CGPT_TIER_LEVEL >= 2
  return _mm512_min_ps(a, b);
#elif CGPT_TIER_LEVEL == 1
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

CGPT_INLINE VecF select(VecI mask, VecF yes, VecF no) { return mask ? yes : no; }

// Pairwise, in a fixed order.
CGPT_INLINE float reduce_add(VecF v) {
  float lane[kLanes];
  __builtin_memcpy(lane, &v, sizeof(v));
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lane[i] += lane[i + step];
  return lane[0];
}
CGPT_INLINE float reduce_max(VecF v) {
  float lane[kLanes];
  __builtin_memcpy(lane, &v, sizeof(v));
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lane[i] = lane[i] > lane[i + step] ? lane[i] : lane[i + step];
  return lane[0];
}

// ---- one element -------------------------------------------------------------------------------

CGPT_INLINE float to_float(float x) { return x; }
CGPT_INLINE float to_float(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
CGPT_INLINE float to_float(f16 x) {
#if CGPT_TIER_LEVEL >= 1
  return _cvtsh_ss(x.bits);
#else
  // Shift the exponent and mantissa into place and rescale: exact for denormals too.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00)  // infinity or NaN
    return bit_cast<float>(sign | 0x7f800000u | (magnitude << 13));
  const float value = bit_cast<float>(magnitude << 13) * bit_cast<float>(0x77800000u);  // 2^112
  return bit_cast<float>(bit_cast<uint32_t>(value) | sign);
#endif
}

template <class T>
CGPT_INLINE T from_float(float x);
template <>
CGPT_INLINE float from_float<float>(float x) {
  return x;
}
template <>
CGPT_INLINE bf16 from_float<bf16>(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>((u >> 16) | 0x40)};
  return {static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
template <>
CGPT_INLINE f16 from_float<f16>(float x) {
#if CGPT_TIER_LEVEL >= 1
  return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t u = bit_cast<uint32_t>(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds above 65504
  if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 leaves the denormal in the low mantissa
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000))};
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000;
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
#endif
}

// ---- vectors -----------------------------------------------------------------------------------

CGPT_INLINE VecF load(const float* p) {
  VecF v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
CGPT_INLINE VecF load(const bf16* p) {
#if CGPT_TIER_LEVEL >= 2
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return bit_cast<VecF>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
#elif CGPT_TIER_LEVEL == 1
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return bit_cast<VecF>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
#else
  VecF v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
CGPT_INLINE VecF load(const f16* p) {
#if CGPT_TIER_LEVEL >= 2
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif CGPT_TIER_LEVEL == 1
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  VecF v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

CGPT_INLINE void store(float* p, VecF v) { __builtin_memcpy(p, &v, sizeof(v)); }
CGPT_INLINE void store(bf16* p, VecF v) {
#if CGPT_TIER_LEVEL >= 1
  const VecI u = bit_cast<VecI>(v);
  const VecI rounded = u + set1i(0x7fff) + ((u >> 16) & set1i(1));
  const VecI bits =
      bit_cast<VecI>(select(v != v, bit_cast<VecF>(u | set1i(0x400000)), bit_cast<VecF>(rounded)));
#endif
#if CGPT_TIER_LEVEL >= 2
  const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bit_cast<__m512i>(bits), 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
#elif CGPT_TIER_LEVEL == 1
  const __m256i words = _mm256_srli_epi32(bit_cast<__m256i>(bits), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<bf16>(v[i]);
#endif
}
CGPT_INLINE void store(f16* p, VecF v) {
#if CGPT_TIER_LEVEL >= 2
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif CGPT_TIER_LEVEL == 1
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<f16>(v[i]);
#endif
}

// The first n lanes, 0 <= n <= kLanes; nothing beyond them is read or written, the rest is `fill`.
template <class T>
CGPT_INLINE VecF load_n(const T* p, int64_t n, float fill = 0.0f) {
  if (n >= kLanes) return load(p);
#if CGPT_TIER_LEVEL >= 2
  const __mmask16 m = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (sizeof(T) == 4) {
    return _mm512_mask_loadu_ps(set1(fill), m, p);
  } else {
    T whole[kLanes];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(whole), _mm256_maskz_loadu_epi16(m, p));
    return _mm512_mask_mov_ps(set1(fill), m, load(whole));
  }
#else
  VecF v = set1(fill);
  for (int i = 0; i < n; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
template <class T>
CGPT_INLINE void store_n(T* p, VecF v, int64_t n) {
  if (n >= kLanes) return store(p, v);
#if CGPT_TIER_LEVEL >= 2
  const __mmask16 m = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, m, v);
  } else {
    T whole[kLanes];
    store(whole, v);
    _mm256_mask_storeu_epi16(p, m, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(whole)));
  }
#else
  for (int i = 0; i < n; ++i) p[i] = from_float<T>(v[i]);
#endif
}

// As store_n, to bf16 in one instruction where there is one, which takes denormals for zero.
template <class T>
CGPT_INLINE void store_rounded(T* p, VecF v, int64_t n) {
#if CGPT_TIER_LEVEL >= 4
  if constexpr (__is_same(T, bf16)) {
    const __mmask16 m = static_cast<__mmask16>(n >= kLanes ? 0xffff : (1u << n) - 1);
    _mm256_mask_storeu_epi16(p, m, bit_cast<__m256i>(_mm512_cvtneps_pbh(v)));
    return;
  }
#endif
  store_n(p, v, n);
}
// Two whole vectors, side by side.
template <class T>
CGPT_INLINE void store_two_rounded(T* p, VecF first, VecF second) {
#if CGPT_TIER_LEVEL >= 4
  if constexpr (__is_same(T, bf16)) {
    const auto both = _mm512_cvtne2ps_pbh(second, first);
    _mm512_storeu_si512(p, bit_cast<__m512i>(both));
    return;
  }
#endif
  store_rounded(p, first, kLanes);
  store_rounded(p + kLanes, second, kLanes);
}

}  // namespace cgpt::CGPT_TIER
