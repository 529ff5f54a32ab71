// Logits to probabilities, a row of one key block at a time: masks, biases, exponentials, dropout.
//
// Exponentials are taken in base 2: exp(x - m) = 2^((x - m) log2(e)), with the conversion folded
// into the multiplication by the scale. Masked logits are -inf and give probabilities of exactly 0,
// so a row's bits do not depend on how many masked keys it is computed with.
#pragma once

#include "../../cpu/philox.h"
#include "../../cpu/simd.h"
#include "attention.h"

// GCC leaves a lambda that is used twice as a call, even in the innermost loop.
#define CGPT_INLINE_LAMBDA __attribute__((always_inline))

namespace cgpt::CGPT_TIER {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr float kInfinity = __builtin_inff();

CGPT_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
CGPT_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
CGPT_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Intel's processors multiply by 2^n and take fractions in one instruction each; AMD's need two
// cycles for both, and integer arithmetic is the faster way.
constexpr bool kScalef = CGPT_TIER_LEVEL >= 2 && CGPT_TIER_LEVEL != 4;

// 2^r = 1 + c1 r + c2 r^2 + ..., minimax in relative error on [0, 1] (for kScalef) or [-1/2, 1/2].
// The error is 2e-9 for degree 6 (the rounding of fp32 arithmetic, 1e-7, remains), and 2.9e-6 for
// degree 4, a hundredth of the rounding of a 16-bit result.
constexpr float kExp2Degree4[2][4] = {
    {0.6931241750717163f, 0.24024099111557007f, 0.055906426161527634f, 0.009582852944731712f},
    {0.6930448412895203f, 0.2412802129983902f, 0.052242472767829895f, 0.013426685705780983f}};
constexpr float kExp2Degree6[2][6] = {
    {0.6931471824645996f, 0.24022647738456726f, 0.055503323674201965f, 0.00961843691766262f,
     0.0013398875016719103f, 0.00015353361959569156f},
    {0.6931470632553101f, 0.2402293086051941f, 0.055485282093286514f, 0.009675451554358006f,
     0.0012467845808714628f, 0.0002161291631637141f}};
template <int degree>
CGPT_INLINE VecF exp2_fraction(VecF r) {
  static_assert(degree == 4 || degree == 6);
  const float* c = degree == 4 ? kExp2Degree4[kScalef] : kExp2Degree6[kScalef];
  VecF p = set1(c[degree - 1]);
#pragma GCC unroll 6
  for (int i = degree - 2; i >= 0; --i) p = fmadd(p, r, set1(c[i]));
  return fmadd(p, r, set1(1.0f));
}

// 2^x for x <= 0 (or NaN, which stays); exactly 0 below -126, exactly 1 at 0. Results below 2^-126
// would be denormal, which some processors multiply 100 times slower.
template <int degree>
CGPT_INLINE VecF exp2(VecF x) {
#if CGPT_TIER_LEVEL >= 2
  const __mmask16 normal = _mm512_cmp_ps_mask(x, set1(-126.0f), _CMP_NLT_UQ);
  if constexpr (kScalef) {
    const VecF r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    return _mm512_maskz_scalef_ps(normal, exp2_fraction<degree>(r), x);
  }
#endif
  // Adding 1.5 * 2^23 + 127 rounds to an integer n, and the sum's low bits are the exponent of 2^n.
  const VecF shifted = x + set1(12583039.0f);
  const VecF r = x - (shifted - set1(12583039.0f));
  const VecF p = exp2_fraction<degree>(r);
  const VecF power = bit_cast<VecF>(bit_cast<VecI>(shifted) << 23);
#if CGPT_TIER_LEVEL >= 2
  return _mm512_maskz_mul_ps(normal, p, power);
#else
  return select(x < set1(-126.0f), zero(), p * power);
#endif
}

// Degree for probabilities that end up in T.
template <class T>
constexpr int kExpDegree = sizeof(T) == 4 ? 6 : 4;

// Rounds to nearest like store(), to bf16 in one instruction where there is one.
template <class C>
CGPT_INLINE void store_p(C* p, VecF v) {
  store(p, v);
}
template <>
CGPT_INLINE void store_p(bf16* p, VecF v) {
#if CGPT_TIER_LEVEL >= 4
  const __m256bh half = _mm512_cvtneps_pbh(v);
  __builtin_memcpy(p, &half, sizeof(half));
#else
  store(p, v);
#endif
}
template <class C>
CGPT_INLINE void store_p(C* p, VecF a, VecF b) {
#if CGPT_TIER_LEVEL >= 4
  if constexpr (sizeof(C) == 2) {
    const __m512bh both = _mm512_cvtne2ps_pbh(b, a);
    __builtin_memcpy(p, &both, sizeof(both));
    return;
  }
#endif
  store_p(p, a);
  store_p(p + kLanes, b);
}

// Reduces kLanes vectors at once: lane i of the result combines the lanes of a[i].
template <class Op>
CGPT_INLINE VecF reduce_each(const VecF* a, Op op) {
#if CGPT_TIER_LEVEL >= 2
  // Within each 128 bits: four vectors become [a b c d]; then the four quarters are combined.
  const auto four = [&](const VecF* v) CGPT_INLINE_LAMBDA {
    const VecF ab = op(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const VecF cd = op(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    return op(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  };
  const auto pair = [&](VecF x, VecF y) CGPT_INLINE_LAMBDA {
    return op(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
  };
  return pair(pair(four(a), four(a + 4)), pair(four(a + 8), four(a + 12)));
#elif CGPT_TIER_LEVEL == 1
  const auto four = [&](const VecF* v) CGPT_INLINE_LAMBDA {
    const VecF ab = op(_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1]));
    const VecF cd = op(_mm256_unpacklo_ps(v[2], v[3]), _mm256_unpackhi_ps(v[2], v[3]));
    return op(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  };
  const VecF x = four(a), y = four(a + 4);
  return op(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
#else
  VecF each;
  for (int i = 0; i < kLanes; ++i) {
    float lane = a[i][0];
    for (int l = 1; l < kLanes; ++l) lane = op(set1(lane), set1(a[i][l]))[0];
    each[i] = lane;
  }
  return each;
#endif
}
constexpr auto kSum = [](VecF a, VecF b) CGPT_INLINE_LAMBDA { return a + b; };
constexpr auto kMax = [](VecF a, VecF b) CGPT_INLINE_LAMBDA { return max(a, b); };

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
  // A row's running maximum is kept in natural units if logits are rewritten, else as a power of
  // two, rounded once: probabilities and rescaling factors then refer to the same number.
  template <class V>
  CGPT_INLINE V kept(V largest) const {
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
    const int64_t size = rule.bias_dtype == DType::f32       ? 4
                         : rule.bias_dtype == DType::boolean ? 1
                                                             : 2;
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

// add[n] = bias of query i at keys j0 .. j0 + n - 1, -inf where masked by bias or padding; zero
// where there is neither.
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
inline void rewrite_logits(const LogitRule& rule, int64_t i, int64_t j0, int64_t n,
                           const float* add, float* s) {
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

// Lane maxima of s[0 .. n), -inf for n = 0.
CGPT_INLINE VecF row_max(const float* s, int64_t n) {
  VecF a = set1(-kInfinity), b = a;
  int64_t j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
    a = max(a, load(s + j));
    b = max(b, load(s + j + kLanes));
  }
  for (; j < n; j += kLanes) a = max(a, load_n(s + j, n - j, -kInfinity));
  return max(a, b);
}

// p[j] = exp(logit j - maximum) for j < n, 0 up to `room`; the sums of the lanes. m is the maximum
// as kept by the rule, c the scale in base 2. `rewritten` logits are subtracted before they are
// multiplied: biases may be near the largest float, and their product with log2(e) infinite. p may
// be s's own memory: what is written lies behind what is read.
template <int degree, bool rewritten, class C>
CGPT_INLINE VecF row_exp(const float* s, int64_t n, int64_t room, float m, float c, C* p) {
  const VecF mv = set1(m), cv = set1(rewritten ? kLog2e : c);
  const auto probability = [&](VecF x) CGPT_INLINE_LAMBDA {
    if constexpr (rewritten) return exp2<degree>((x - mv) * cv);
    else return exp2<degree>(fmadd(x, cv, -mv));
  };
  VecF sum = zero(), odd = zero();
  int64_t j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
    const VecF x = probability(load(s + j)), y = probability(load(s + j + kLanes));
    sum += x;
    odd += y;
    store_p(p + j, x, y);
  }
  for (; j < n; j += kLanes) {
    const VecF x = probability(load_n(s + j, n - j, -kInfinity));
    sum += x;
    store_p(p + j, x);
  }
  for (; j < room; j += kLanes) store_p(p + j, zero());
  return sum + odd;
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

template <class C>
struct BitsOf {
  using Type = int16_t;
};
template <>
struct BitsOf<float> {
  using Type = int32_t;
};

// Zeros what is dropped of a row. `first` is the element index of p[0], `random` has
// philox_room(n) words.
template <class C>
inline void row_dropout(const Dropout& d, uint64_t first, int64_t n, uint32_t* random, C* p) {
  typedef typename BitsOf<C>::Type VecBits __attribute__((vector_size(kLanes * sizeof(C))));
  const uint32_t* r = philox_range(d.seed, first, n, random);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    VecU32 words;
    VecBits bits;
    __builtin_memcpy(&words, r + j, sizeof(words));
    __builtin_memcpy(&bits, p + j, sizeof(bits));
    bits &= __builtin_convertvector(words >= d.threshold, VecBits);
    __builtin_memcpy(p + j, &bits, sizeof(bits));
  }
  for (; j < n; ++j)
    if (r[j] < d.threshold) p[j] = C{};
}

// Up to kLanes rows of (b, h) from their sums: out = o / l, lse = m + log(l). A row with l = 0 has
// seen no key, and its o may be anything.
template <class T>
inline void write_rows(const AttentionArgs& a, const LogitRule& rule, int64_t b, int64_t h,
                       int64_t i0, int64_t rows, const float* o, int64_t ldo, const float* m,
                       VecF l, float rescale) {
  const int64_t D = a.out.shape[3], whole = D / kLanes * kLanes;
  float factor[kLanes], sum[kLanes];
  store(sum, l);
  store(factor, set1(rescale) / l);
  T* out = a.out.as<T>() + b * a.out.strides[0] + h * a.out.strides[1] + i0 * a.out.strides[2];
  for (int64_t i = 0; i < rows; ++i, out += a.out.strides[2], o += ldo) {
    const VecF f = set1(factor[i]);
    if (sum[i] == 0.0f) {
      for (int64_t d = 0; d < D; ++d) out[d] = T{};
    } else {
      for (int64_t d = 0; d < whole; d += kLanes) store_p(out + d, load(o + d) * f);
      if (whole < D) store_n(out + whole, load_n(o + whole, D - whole) * f, D - whole);
    }
  }
  if (a.row_stats) {
    const int64_t* step = a.row_stats.strides;
    float* to = a.row_stats.as<float>() + b * step[0] + h * step[1] + i0 * step[2];
    for (int64_t i = 0; i < rows; ++i, to += step[2]) to[0] = m[i], to[step[3]] = sum[i];
  }
  if (!a.lse) return;
  const int64_t* stride = a.lse.strides;
  float* lse = a.lse.as<float>() + b * stride[0] + h * stride[1] + i0 * stride[2];
  for (int64_t i = 0; i < rows; ++i)
    lse[i * stride[2]] =
        sum[i] == 0.0f ? -kInfinity : m[i] * rule.kept_to_natural() + __builtin_logf(sum[i]);
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
