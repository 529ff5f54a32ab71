// Attention of a few queries over many keys: the decoding step of generation.
//
// Nothing is packed: K and V are read once, in order, where they lie: 2 S_k D sizeof(T) bytes per
// (batch, head), which is the bound. Logits are dot products, kLanes keys at a time; the output is
// a sum of rows of V in registers. Keys and values in int8 are widened to fp32 as they are read;
// their scales multiply logits and probabilities.
//
// Keys are cut into chunks of kChunk, whose partial results (m, l, o) are merged in order. The cut
// depends on S_k alone: outputs have the same bits on any number of threads and in any batch.
#pragma once

#include "../../cpu/block_gemm.h"
#include "../../cpu/scratch.h"
#include "int8_rows.h"
#include "softmax.h"

namespace cgpt::CGPT_TIER {

constexpr int64_t kChunk = 512;
// Up to so many queries streaming the keys beats packing them: measured over 512 keys of 64, where
// the two ways take the same time at 9 queries in fp32 and at 5 in bf16.
template <class T>
constexpr int64_t kDecodeRows = sizeof(compute_t<T>) == 2 ? 4 : 8;

// One query row's share of a softmax: o sums P V over some keys, m and l belong to it.
struct Partial {
  float* o;  // [rows, ldo]
  float* m;  // [rows]
  float* l;  // [rows]
};

// KV: what keys and values are stored as, T or int8.
template <class T, class KV>
struct Decode {
  static constexpr bool kQuantized = !__is_same(T, KV);
  using C = typename Compute<KV>::type;
  // Elements of one multiplication vector.
  static constexpr int kStep = kLanes * 4 / static_cast<int>(sizeof(C));

  int64_t rows, D, Dq, ldo;
  C* q;         // [rows, Dq], zero padded
  float* s;     // [rows, kChunk] logits, then probabilities in place
  float* add;   // [kChunk] bias and mask of a row
  KV* nothing;  // [D] zeros: the row of V that a masked key gives
  uint32_t* random;
  Partial sum, part;

  // Takes its arrays from memory; with a null base only counts bytes.
  int64_t carve(char* base, int64_t queries, int64_t head_size) {
    Carver c(base);
    rows = queries, D = head_size, Dq = round_up(D, kStep), ldo = row_stride(D);
    q = c.take<C>(rows * Dq);
    s = c.take<float>(rows * kChunk);
    add = c.take<float>(kChunk);
    nothing = c.take<KV>(D);
    random = c.take<uint32_t>(philox_room(kChunk));
    sum = {c.take<float>(rows * ldo), c.take<float>(rows), c.take<float>(rows)};
    part = {c.take<float>(rows * ldo), c.take<float>(rows), c.take<float>(rows)};
    return c.used();
  }
  // Whole vectors of columns as they are summed: of two vectors for pairs of bf16.
  static int64_t row_stride(int64_t D) { return round_up(D, kStep); }

  void load_head(const AttentionArgs& a, int64_t b, int64_t h) {
    const T* src = a.q.as<const T>() + b * a.q.strides[0] + h * a.q.strides[1];
    for (int64_t i = 0; i < rows; ++i, src += a.q.strides[2]) {
      for (int64_t d = 0; d < D; ++d) q[i * Dq + d] = from_float<C>(to_float(src[d]));
      for (int64_t d = D; d < Dq; ++d) q[i * Dq + d] = C{};
    }
    for (int64_t d = 0; d < D; ++d) nothing[d] = KV{};
  }

  // acc += one vector of q times kStep elements of a key, of which `left` exist.
  static CGPT_INLINE VecF dot_step(const C* query, const KV* key, int64_t left, VecF acc) {
    if constexpr (sizeof(C) == 4) {
      return fmadd(load_n(key, left), load(query), acc);
    } else {
#if CGPT_TIER_LEVEL >= 4
      const __m512i x = left >= 32 ? _mm512_loadu_si512(key)
                                   : _mm512_maskz_loadu_epi16((__mmask32{1} << left) - 1, key);
      return _mm512_dpbf16_ps(acc, bit_cast<__m512bh>(x),
                              bit_cast<__m512bh>(_mm512_loadu_si512(query)));
#endif
    }
  }

  // Vectors of a query that dots_of keeps in registers.
  static constexpr int kMaxSteps = 8;

  // s[i][j] = q[i] . keys[j] for n keys of `steps` vectors each (0: any number). A key is read from
  // its first element to its last before the next one: column by column, sixteen keys at a time,
  // half of the memory bandwidth is lost.
  template <int steps>
  void dots_of(const KV* keys, int64_t stride, int64_t n) {
    for (int64_t j = 0; j < n; j += kLanes) {
      for (int64_t i = 0; i < rows; ++i) {
        const C* query = q + i * Dq;
        VecF acc[kLanes];
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) {
          // Beyond the end the last key is repeated; its logits are not stored.
          const KV* key = keys + min64(j + r, n - 1) * stride;
          VecF sum = zero();
          if constexpr (steps > 0) {
#pragma GCC unroll 8
            for (int u = 0; u < steps - 1; ++u)
              sum = dot_step(query + u * kStep, key + u * kStep, kStep, sum);
            constexpr int64_t last = (steps - 1) * kStep;
            acc[r] = dot_step(query + last, key + last, D - last, sum);
          } else {
            for (int64_t d = 0; d < D; d += kStep) sum = dot_step(query + d, key + d, D - d, sum);
            acc[r] = sum;
          }
        }
        store_n(s + i * kChunk + j, reduce_each(acc, kSum), n - j);
      }
    }
  }

  template <int steps = 1>
  void dots(const KV* keys, int64_t stride, int64_t n) {
    if (Dq == steps * kStep) return dots_of<steps>(keys, stride, n);
    if constexpr (steps < kMaxSteps) dots<steps + 1>(keys, stride, n);
    else dots_of<0>(keys, stride, n);
  }

  // o[0 .. width * kStep) = sum over n keys of p[j] * rows[j]; `left` columns exist.
  template <int width, bool masked, bool whole>
  void sum_columns(const C* p, const KV* values, int64_t stride, int64_t n, int64_t left,
                   float* o) {
    const auto row = [&](int64_t j) CGPT_INLINE_LAMBDA {
      return masked && add[j] == -kInfinity ? nothing : values + j * stride;
    };
    if constexpr (sizeof(C) == 4) {
      VecF acc[width] = {};
      for (int64_t j = 0; j < n; ++j) {
        const KV* x = row(j);
        const VecF weight = set1(p[j]);
#pragma GCC unroll 8
        for (int w = 0; w < width; ++w)
          acc[w] = fmadd(weight, whole ? load(x + w * kLanes) : load_n(x, left), acc[w]);
      }
      for (int w = 0; w < width; ++w) store(o + w * kLanes, acc[w]);
    } else {
#if CGPT_TIER_LEVEL >= 4
      // Two keys at a time: their columns interleaved are pairs, p's two elements the other pair.
      __m512 low[width] = {}, high[width] = {};
      const __mmask32 m = whole ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
      for (int64_t j = 0; j < n; j += 2) {
        const KV *x = row(j), *y = j + 1 < n ? row(j + 1) : nothing;
        int32_t pair;
        __builtin_memcpy(&pair, p + j, 4);
        const __m512bh weight = bit_cast<__m512bh>(_mm512_set1_epi32(pair));
  #pragma GCC unroll 8
        for (int w = 0; w < width; ++w) {
          const __m512i a = whole ? _mm512_loadu_si512(x + w * 32) : _mm512_maskz_loadu_epi16(m, x);
          const __m512i b = whole ? _mm512_loadu_si512(y + w * 32) : _mm512_maskz_loadu_epi16(m, y);
          low[w] =
              _mm512_dpbf16_ps(low[w], weight, bit_cast<__m512bh>(_mm512_unpacklo_epi16(a, b)));
          high[w] =
              _mm512_dpbf16_ps(high[w], weight, bit_cast<__m512bh>(_mm512_unpackhi_epi16(a, b)));
        }
      }
      // Quarter l of `low` has columns 8 l .. 8 l + 3, of `high` the four behind them.
      const __m512i first =
          _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
      const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
      for (int w = 0; w < width; ++w) {
        _mm512_storeu_ps(o + w * 32, _mm512_permutex2var_ps(low[w], first, high[w]));
        _mm512_storeu_ps(o + w * 32 + 16, _mm512_permutex2var_ps(low[w], second, high[w]));
      }
#endif
    }
  }

  template <bool masked>
  void sums(const C* p, const KV* values, int64_t stride, int64_t n, float* o) {
    int64_t d = 0;
    for (; d + 8 * kStep <= D; d += 8 * kStep)
      sum_columns<8, masked, true>(p, values + d, stride, n, 8 * kStep, o + d);
    for (; d + 4 * kStep <= D; d += 4 * kStep)
      sum_columns<4, masked, true>(p, values + d, stride, n, 4 * kStep, o + d);
    for (; d + 2 * kStep <= D; d += 2 * kStep)
      sum_columns<2, masked, true>(p, values + d, stride, n, 2 * kStep, o + d);
    for (; d + kStep <= D; d += kStep)
      sum_columns<1, masked, true>(p, values + d, stride, n, kStep, o + d);
    if (d < D) sum_columns<1, masked, false>(p, values + d, stride, n, D - d, o + d);
  }

  // x[n] *= scales; zero stays zero, which is what a masked key with a scale of NaN has.
  static void times_scales(float* x, const float* scales, int64_t n) {
    for (int64_t j = 0; j < n; j += kLanes) {
      const VecF v = load_n(x + j, n - j);
      store_n(x + j, select(v == zero(), v, v * load_n(scales + j, n - j)), n - j);
    }
  }

  // Keys j0 .. j0 + kChunk - 1 for the queries of the loaded head.
  void chunk(const AttentionArgs& a, const Dropout& dropout, int64_t b, int64_t h, int64_t j0,
             const Partial& to) {
    const LogitRule rule = logit_rule(a, b, h);
    const int64_t H = a.q.shape[1], S_k = a.k.shape[2];
    const int64_t k_stride = a.k.strides[2], v_stride = a.v.strides[2];
    const KV* keys = a.k.as<const KV>() + b * a.k.strides[0] + h * a.k.strides[1] + j0 * k_stride;
    const KV* values = a.v.as<const KV>() + b * a.v.strides[0] + h * a.v.strides[1] + j0 * v_stride;
    const int64_t all = rule.key_end(rows - 1, min64(S_k, j0 + kChunk)) - j0;
    if (all > 0) dots(keys, k_stride, all);
    if constexpr (kQuantized) {
      const float* scales = scales_of(a.k_scale, b, h, j0);
      for (int64_t i = 0; i < rows; ++i) times_scales(s + i * kChunk, scales, all);
    }
    const bool masked = rule.bias || rule.padding, shared_add = !rule.bias || rule.bias_row == 0;
    if (all > 0 && shared_add && (masked || rule.rewrites())) row_addends(rule, 0, j0, all, add);
    for (int64_t i = 0; i < rows; ++i) {
      float* row = s + i * kChunk;
      float* o = to.o + i * ldo;
      const int64_t n = max64(0, rule.key_end(i, j0 + all) - j0);
      if (n > 0 && masked && !shared_add) row_addends(rule, i, j0, n, add);
      if (rule.rewrites()) rewrite_logits(rule, i, j0, n, add, row);
      else if (masked) mask_logits(n, add, row);
      to.m[i] = rule.kept(reduce_max(row_max(row, n)));
      // -inf says that nothing is visible, or that a NaN has hidden what is: exponentials tell.
      const float top = to.m[i] == -kInfinity ? 0.0f : to.m[i];
      C* p = reinterpret_cast<C*>(row);
      const float c = rule.scale * kLog2e;
      const int64_t room = min64(kChunk, round_up(n, kNR));
      to.l[i] =
          reduce_add(rule.rewrites() ? row_exp<kExpDegree<T>, true>(row, n, room, top, c, p)
                                     : row_exp<kExpDegree<T>, false>(row, n, room, top, c, p));
      if (dropout.on)
        row_dropout(dropout, static_cast<uint64_t>(((b * H + h) * rows + i) * S_k + j0), n, random,
                    p);
      if constexpr (kQuantized) times_scales(p, scales_of(a.v_scale, b, h, j0), n);
      if (masked) sums<true>(p, values, v_stride, n, o);
      else sums<false>(p, values, v_stride, n, o);
    }
  }

  // to = to and more: softmax over the keys of both.
  void merge(const LogitRule& rule, const Partial& to, const Partial& more) const {
    const VecF c = set1(rule.kept_to_log2());
    for (int64_t i = 0; i < rows; ++i) {
      const VecF old = set1(to.m[i]), added = set1(more.m[i]), top = max(old, added);
      // Equal ones may both be -inf, whose difference would be NaN.
      const VecF keep = select(old == top, set1(1.0f), exp2<6>((old - top) * c));
      const VecF take = select(added == top, set1(1.0f), exp2<6>((added - top) * c));
      to.m[i] = top[0];
      to.l[i] = to.l[i] * keep[0] + more.l[i] * take[0];
      float* o = to.o + i * ldo;
      for (int64_t d = 0; d < ldo; d += kLanes)
        store(o + d, fmadd(load(more.o + i * ldo + d), take, load(o + d) * keep));
    }
  }

  void write(const AttentionArgs& a, const Dropout& dropout, const LogitRule& rule, int64_t b,
             int64_t h, const Partial& from) const {
    for (int64_t i = 0; i < rows; i += kLanes)
      write_rows<T>(a, rule, b, h, i, min64(kLanes, rows - i), from.o + i * ldo, ldo, from.m + i,
                    load_n(from.l + i, rows - i), dropout.rescale);
  }

  // All chunks of one (batch, head), one after another.
  void run(const AttentionArgs& a, const Dropout& dropout, int64_t b, int64_t h) {
    const LogitRule rule = logit_rule(a, b, h);
    load_head(a, b, h);
    chunk(a, dropout, b, h, 0, sum);
    for (int64_t j0 = kChunk; j0 < a.k.shape[2]; j0 += kChunk) {
      chunk(a, dropout, b, h, j0, part);
      merge(rule, sum, part);
    }
    write(a, dropout, rule, b, h, sum);
  }
};

}  // namespace cgpt::CGPT_TIER
