// Logits to probabilities, a row of one key block at a time: masks, biases, exponentials, dropout.
//
// Exponentials are taken in base 2: exp(x - m) = 2^((x - m) log2(e)), with the conversion folded into
// the multiplication by the scale. Masked logits are -inf and give probabilities of exactly 0, so a
// row's bits do not depend on how many masked keys it is computed with.
#pragma once

#include "../../cpu/philox.h"
#include "../../cpu/simd.h"
#include "attention.h"

namespace cgpt::CGPT_TIER {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr float kInfinity = __builtin_inff();

CGPT_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
CGPT_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
CGPT_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// 2^x for x <= 0 (or NaN, which stays); exactly 0 below -126, exactly 1 at 0. x = floor(x) + r;
// 2^r by a polynomial with constant term 1, minimax in relative error on [0, 1]: 2.0e-9 for
// degree 6 (the rounding of fp32 arithmetic, 1e-7, remains), 2.9e-6 for degree 4, a hundredth of the
// rounding of a 16-bit result.
template <int degree>
CGPT_INLINE VecF exp2(VecF x) {
#if CGPT_TIER_LEVEL >= 2
  const VecF r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
#else
  const VecF clamped = x < set1(-126.0f) ? set1(-126.0f) : x;
  // Adding 1.5 * 2^23 rounds to an integer, which then lies in the low bits; -1/2 makes it floor
  // (or, where x is an integer, perhaps x - 1: r = 1 is as good).
  const VecF shifted = (clamped - set1(0.5f)) + set1(12582912.0f);
  const VecF r = clamped - (shifted - set1(12582912.0f));
#endif
  VecF p;
  if constexpr (degree == 4) {
    p = set1(0.013426685705780983f);
    p = fmadd(p, r, set1(0.052242472767829895f));
    p = fmadd(p, r, set1(0.2412802129983902f));
    p = fmadd(p, r, set1(0.6930448412895203f));
  } else {
    static_assert(degree == 6);
    p = set1(0.0002161291631637141f);
    p = fmadd(p, r, set1(0.0012467845808714628f));
    p = fmadd(p, r, set1(0.009675451554358006f));
    p = fmadd(p, r, set1(0.055485282093286514f));
    p = fmadd(p, r, set1(0.2402293086051941f));
    p = fmadd(p, r, set1(0.6931470632553101f));
  }
  p = fmadd(p, r, set1(1.0f));
#if CGPT_TIER_LEVEL >= 2
  // Results below 2^-126 would be denormal, which some processors multiply 100 times slower.
  const __mmask16 normal = _mm512_cmp_ps_mask(x, set1(-126.0f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(normal, p, x);
#else
  const VecF power = bit_cast<VecF>((bit_cast<VecI>(shifted) + set1i(127)) << 23);
  return select(x < set1(-126.0f), zero(), p * power);
#endif
}

// Degree for probabilities that end up in T.
template <class T>
constexpr int kExpDegree = sizeof(T) == 4 ? 6 : 4;

// One probability vector in the type that multiplies V.
CGPT_INLINE void store_p(float* p, VecF v) { store(p, v); }
CGPT_INLINE void store_p(bf16* p, VecF v) {
#if CGPT_TIER_LEVEL >= 3
  const __m256bh half = _mm512_cvtneps_pbh(v);
  __builtin_memcpy(p, &half, sizeof(half));
#else
  store(p, v);
#endif
}

// What is added to, or removed from, the scaled logits of one (batch, head).
struct LogitRule {
  const uint8_t* padding = nullptr;  // [S_k], stride padding_stride; 1 = ignored
  int64_t padding_stride = 0;
  const char* bias = nullptr;  // row i, key j at (i * bias_row + j * bias_key) elements
  DType bias_dtype = DType::other;
  int64_t bias_row = 0, bias_key = 0;
  float slope = 0.0f;
  float scale = 1.0f;
  int64_t shift = 0;  // S_k - S_q
  bool causal = false;

  CGPT_INLINE bool bias_keeps(int64_t i, int64_t j) const {
    if (!bias) return true;
    const int64_t at = i * bias_row + j * bias_key;
    if (bias_dtype == DType::boolean) return bias[at] != 0;
    return bias_at(at) != -kInfinity;
  }
  CGPT_INLINE float bias_at(int64_t at) const {
    if (bias_dtype == DType::f32) return reinterpret_cast<const float*>(bias)[at];
    if (bias_dtype == DType::bf16) return to_float(reinterpret_cast<const bf16*>(bias)[at]);
    return to_float(reinterpret_cast<const f16*>(bias)[at]);
  }
  CGPT_INLINE bool visible(int64_t i, int64_t j) const {
    return !(causal && j > i + shift) && !(padding && padding[j * padding_stride]) &&
           bias_keeps(i, j);
  }
  // Whether logits are more than scale * q k^T: otherwise the scale joins the exponential and a
  // masked key costs one select. One answer for the whole call, so that a row is rounded alike with
  // and without padding behind it.
  CGPT_INLINE bool rewrites() const { return bias || slope != 0.0f || !(scale > 0.0f); }
  // A row's running maximum is kept in natural units if logits are rewritten, else as a power of two,
  // rounded once: probabilities and rescaling factors then refer to the same number.
  CGPT_INLINE float kept(float largest) const {
    return rewrites() ? largest : largest * (scale * kLog2e);
  }
  CGPT_INLINE float kept_to_log2() const { return rewrites() ? kLog2e : 1.0f; }
  CGPT_INLINE float kept_to_natural() const { return rewrites() ? 1.0f : kLn2; }
  // Keys that query i may see of those before `end`, as far as causality goes.
  CGPT_INLINE int64_t key_end(int64_t i, int64_t end) const {
    return causal ? max64(0, min64(end, i + shift + 1)) : end;
  }
};

inline LogitRule logit_rule(const AttentionArgs& a, int64_t b, int64_t h) {
  LogitRule rule;
  if (a.key_padding_mask) {
    rule.padding = a.key_padding_mask.as<const uint8_t>() + b * a.key_padding_mask.strides[0];
    rule.padding_stride = a.key_padding_mask.strides[1];
  }
  if (a.attn_bias) {
    const int64_t* strides = a.attn_bias.strides;
    rule.bias_dtype = a.attn_bias.dtype;
    const int64_t size = rule.bias_dtype == DType::f32 ? 4 : rule.bias_dtype == DType::boolean ? 1 : 2;
    rule.bias = a.attn_bias.as<const char>() + (b * strides[0] + h * strides[1]) * size;
    rule.bias_row = strides[2];
    rule.bias_key = strides[3];
  }
  if (a.alibi_slopes) rule.slope = a.alibi_slopes.as<const float>()[h];
  rule.scale = a.scale;
  rule.shift = a.k.shape[2] - a.q.shape[2];
  rule.causal = a.causal;
  return rule;
}

// add[n] = bias of query i at keys j0 .. j0 + n - 1, -inf where masked by bias or padding; zero where
// there is neither.
inline void row_addends(const LogitRule& rule, int64_t i, int64_t j0, int64_t n, float* add) {
  if (!rule.bias) {
    for (int64_t j = 0; j < n; ++j) add[j] = 0.0f;
  } else if (rule.bias_dtype == DType::boolean) {
    const char* keep = rule.bias + i * rule.bias_row + j0 * rule.bias_key;
    for (int64_t j = 0; j < n; ++j) add[j] = keep[j * rule.bias_key] ? 0.0f : -kInfinity;
  } else if (rule.bias_dtype == DType::f32 && rule.bias_key == 1) {
    __builtin_memcpy(add, reinterpret_cast<const float*>(rule.bias) + i * rule.bias_row + j0,
                     static_cast<size_t>(n) * 4);
  } else {
    for (int64_t j = 0; j < n; ++j)
      add[j] = rule.bias_at(i * rule.bias_row + (j0 + j) * rule.bias_key);
  }
  if (rule.padding)
    for (int64_t j = 0; j < n; ++j)
      if (rule.padding[(j0 + j) * rule.padding_stride]) add[j] = -kInfinity;
}

// s[n] = -inf where add is -inf, whatever s is there.
inline void mask_logits(int64_t n, const float* add, float* s) {
  const VecF masked = set1(-kInfinity);
  for (int64_t j = 0; j < n; j += kLanes)
    store_n(s + j, select(load_n(add + j, n - j) == masked, masked, load_n(s + j, n - j)), n - j);
}

// s[n] = s * scale + add - slope * |i + shift - j|, -inf where add is -inf, whatever s is there.
inline void rewrite_logits(const LogitRule& rule, int64_t i, int64_t j0, int64_t n, const float* add,
                          float* s) {
  VecF lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = static_cast<float>(l);
  const VecF scale = set1(rule.scale), slope = set1(rule.slope), masked = set1(-kInfinity);
  for (int64_t j = 0; j < n; j += kLanes) {
    const VecF extra = load_n(add + j, n - j);
    VecF x = fmadd(load_n(s + j, n - j), scale, extra);
    if (rule.slope != 0.0f) {
      const VecF offset = set1(static_cast<float>(i + rule.shift - j0 - j)) - lane;
      x = x - slope * max(offset, -offset);
    }
    store_n(s + j, select(extra == masked, masked, x), n - j);
  }
}

// max(s[0 .. n)), -inf for n = 0.
CGPT_INLINE float row_max(const float* s, int64_t n) {
  VecF a = set1(-kInfinity), b = a;
  int64_t j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
    a = max(a, load(s + j));
    b = max(b, load(s + j + kLanes));
  }
  for (; j < n; j += kLanes) a = max(a, load_n(s + j, n - j, -kInfinity));
  return reduce_max(max(a, b));
}

// p[j] = exp(logit j - maximum) for j < n, 0 up to `room`; the sums of the lanes. m is the maximum as
// kept by the rule, c the scale in base 2. `rewritten` logits are subtracted before they are
// multiplied: biases may be near the largest float, and their product with log2(e) infinite. p may be
// s's own memory: what is written lies behind what is read.
template <int degree, bool rewritten, class C>
CGPT_INLINE VecF row_exp(const float* s, int64_t n, int64_t room, float m, float c, C* p) {
  const VecF mv = set1(m), cv = set1(rewritten ? kLog2e : c);
  const auto probability = [&](VecF x) {
    if constexpr (rewritten) return exp2<degree>((x - mv) * cv);
    else return exp2<degree>(fmadd(x, cv, -mv));
  };
  VecF sum = zero();
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const VecF x = probability(load(s + j));
    sum += x;
    store_p(p + j, x);
  }
  if (j < n) {
    const VecF x = probability(load_n(s + j, n - j, -kInfinity));
    sum += x;
    store_p(p + j, x);
    j += kLanes;
  }
  for (; j < room; j += kLanes) store_p(p + j, zero());
  return sum;
}

// Zeroes the probabilities that dropout drops: those whose random word is below floor(p * 2^32).
struct Dropout {
  bool on = false;
  uint32_t threshold = 0;
  uint64_t seed = 0;
  float rescale = 1.0f;  // 1 / (1 - p), for the row's end
};

inline Dropout dropout_of(const AttentionArgs& a) {
  Dropout d;
  if (a.dropout_p <= 0.0) return d;
  d.on = true;
  d.seed = a.seed;
  // p = 1 drops everything: no threshold says so in 32 bits, a factor of 0 does.
  d.threshold = a.dropout_p < 1.0 ? static_cast<uint32_t>(a.dropout_p * 4294967296.0) : 0;
  d.rescale = a.dropout_p < 1.0 ? static_cast<float>(1.0 / (1.0 - a.dropout_p)) : 0.0f;
  return d;
}

// `first` is the element index of p[0], `random` has philox_room(n) words.
template <class C>
inline void row_dropout(const Dropout& d, uint64_t first, int64_t n, uint32_t* random, C* p) {
  const uint32_t* r = philox_range(d.seed, first, n, random);
  for (int64_t j = 0; j < n; ++j)
    if (r[j] < d.threshold) p[j] = C{};
}

// Row i of (b, h) from its sums: out = o / l, lse = m + log(l).
template <class T>
CGPT_INLINE void write_row(const AttentionArgs& a, const LogitRule& rule, int64_t b, int64_t h,
                           int64_t i, const float* o, float m, float l, float rescale) {
  const int64_t D = a.out.shape[3];
  T* out = a.out.as<T>() + b * a.out.strides[0] + h * a.out.strides[1] + i * a.out.strides[2];
  const bool blind = l == 0.0f;  // o may then be anything
  const VecF factor = set1(rescale / l);
  for (int64_t d = 0; d < D; d += kLanes)
    store_n(out + d, blind ? zero() : load_n(o + d, D - d) * factor, D - d);
  if (!a.lse) return;
  const int64_t* stride = a.lse.strides;
  a.lse.as<float>()[b * stride[0] + h * stride[1] + i * stride[2]] =
      blind ? -kInfinity : m * rule.kept_to_natural() + __builtin_logf(l);
}

// Cuts one allocation into arrays.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace cgpt::CGPT_TIER
