// One strip of queries against one block of keys, as every pass of the backward meets it: logits,
// do v^T, the rules of masks, and per row what turns logits into probabilities and their gradients.
//
//   P = exp(logits - top) * share          top the largest logit of the row, share = 1 / sum
//   dlogits = P * (dP * keep - delta)      delta = sum_j P dP keep, keep of dropout: 0 or 1 / (1 -
//   p)
//
// Maximum and sum stay apart: exp(logits - lse) misses P by ulp(lse), which is 1e-5 at logits of
// 100, and in a row masked throughout by finfo.min fp32 cannot hold min + log(S_k).
#pragma once

#include "../../cpu/scratch.h"
#include "scores.h"

namespace cgpt::CGPT_TIER {

// Rows that multiply one block of keys at a time: whole register tiles, or AMX tiles. dk and dv of
// the block (128 KB for D = 64) are read and written once per strip, so that it is higher than the
// forward's.
constexpr int64_t kGradM = kHasAmx ? 64 : 4 * kMR;
// Near the diagonal strips are lower, which wastes less on keys that only their last row sees.
constexpr int64_t kGradUnitM = kHasAmx ? 32 : 2 * kMR;
constexpr int64_t kGradN = 256;

// Per query of one (batch, head).
struct RowStats {
  static constexpr int64_t kFloats = 3;

  float* top;    // as LogitRule::kept has it; 0 in a row that sees nothing
  float* share;  // 0 in a row that sees nothing
  float* delta;

  // Those of one head in an array of all heads.
  RowStats(float* all, int64_t head, int64_t S_q)
      : top(all + kFloats * head * S_q), share(top + S_q), delta(share + S_q) {}
};

template <class T>
struct GradTile {
  using C = compute_t<T>;

  int64_t D, Dp;
  C *q, *dout;   // [rows, Dp]
  C *kt, *vt;    // packed, K = D, N = kGradN
  float *s, *g;  // [kGradM, kGradN] logits; gradients of the dropped probabilities
  float* add;    // [kGradN] bias and mask of a row
  float* keep;   // [2, kGradN] factors of dropout of one or two rows
  uint32_t* random;
  bool masked, shared_add;  // of the block that load_keys saw last

  void carve(Carver& c, int64_t rows, int64_t head_size) {
    D = head_size, Dp = padded_k<C>(D);
    // Vectors read whole may reach beyond the last row.
    q = c.take<C>(rows * Dp + 2 * kLanes);
    dout = c.take<C>(rows * Dp + 2 * kLanes);
    kt = c.take<C>(packed_b_size<C>(D, kGradN));
    vt = c.take<C>(packed_b_size<C>(D, kGradN));
    s = c.take<float>(kGradM * kGradN);
    g = c.take<float>(kGradM * kGradN);
    add = c.take<float>(kGradN);
    keep = c.take<float>(2 * kGradN);
    random = c.take<uint32_t>(philox_room(kGradN));
  }

  static const T* head_of(const TensorView& t, int64_t b, int64_t h) {
    return t.as<const T>() + b * t.strides[0] + h * t.strides[1];
  }

  // Queries i0 .. i0 + rows - 1 become rows 0 .. rows - 1 of q and dout.
  void load_queries(const AttentionBwdArgs& a, int64_t b, int64_t h, int64_t i0, int64_t rows) {
    const int64_t q_stride = a.fwd.q.strides[2], d_stride = a.dout.strides[2];
    pack_a<C>(head_of(a.fwd.q, b, h) + i0 * q_stride, q_stride, rows, D, q);
    pack_a<C>(head_of(a.dout, b, h) + i0 * d_stride, d_stride, rows, D, dout);
  }

  // Packs keys j0 .. j0 + keys - 1; false, and nothing packed, if all of them are padding.
  bool load_keys(const AttentionBwdArgs& a, const LogitRule& rule, int64_t b, int64_t h, int64_t j0,
                 int64_t keys) {
    int64_t ignored = 0;
    if (rule.padding)
      for (int64_t j = j0; j < j0 + keys; ++j)
        ignored += rule.padding[j * rule.padding_stride] != 0;
    if (ignored == keys) return false;
    masked = rule.bias || ignored > 0;
    shared_add = !rule.bias || rule.bias_row == 0;
    if (shared_add && (masked || rule.rewrites())) row_addends(rule, 0, j0, keys, add);
    const int64_t k_stride = a.fwd.k.strides[2], v_stride = a.fwd.v.strides[2];
    pack_b_transposed<C>(head_of(a.fwd.k, b, h) + j0 * k_stride, k_stride, D, keys, kt);
    pack_b_transposed<C>(head_of(a.fwd.v, b, h) + j0 * v_stride, v_stride, D, keys, vt);
    return true;
  }

  // s and g of `strip` rows of q and dout from `row` on, against the first n keys of the block.
  void multiply(int64_t row, int64_t strip, int64_t n) {
    scores<C>(strip, n, D, q + row * Dp, Dp, kt, s, kGradN);
    scores<C>(strip, n, D, dout + row * Dp, Dp, vt, g, kGradN);
  }

  // The rules on row r of s, which is query i, against keys j0 ..: -inf where it may not look, up
  // to `room`. Returns the keys before the diagonal.
  int64_t apply_rules(const LogitRule& rule, int64_t r, int64_t i, int64_t j0, int64_t keys,
                      int64_t room) {
    float* row = s + r * kGradN;
    const int64_t end = max64(0, rule.key_end(i, j0 + keys) - j0);
    if (end > 0 && masked && !shared_add) row_addends(rule, i, j0, end, add);
    if (end > 0 && rule.rewrites()) rewrite_logits(rule, i, j0, end, add, row);
    else if (end > 0 && masked) mask_logits(end, add, row);
    for (int64_t j = end; j < room; ++j) row[j] = -kInfinity;
    return end;
  }

  // Dropout's factors of query i (of H heads, S_q queries) at keys j0 .. j0 + n - 1.
  void draw(const AttentionArgs& a, const Dropout& dropout, int64_t b, int64_t h, int64_t i,
            int64_t j0, int64_t n, float* factors) {
    const int64_t H = a.q.shape[1], S_q = a.q.shape[2], S_k = a.k.shape[2];
    const uint32_t* r = philox_range(
        dropout.seed, static_cast<uint64_t>(((b * H + h) * S_q + i) * S_k + j0), n, random);
    for (int64_t j = 0; j < n; j += kLanes) {  // random and factors have room for whole vectors
      VecU32 words;
      __builtin_memcpy(&words, r + j, sizeof(words));
      store(factors + j, words < dropout.threshold ? zero() : set1(dropout.rescale));
    }
  }
};

// Calls f(d, mean, variance) for vectors of columns of the S_k rows that are no padding.
template <class T, class F>
CGPT_INLINE void each_moment(const T* rows, int64_t stride, int64_t S_k, int64_t D,
                             const LogitRule& rule, F&& f) {
  for (int64_t d = 0; d < D; d += kLanes) {
    VecF sum = zero(), squares = zero();
    float count = 0.0f;
    for (int64_t j = 0; j < S_k; ++j) {
      if (rule.padding && rule.padding[j * rule.padding_stride]) continue;
      const VecF x = load_n(rows + j * stride + d, D - d);
      sum += x;
      squares = fmadd(x, x, squares);
      count += 1.0f;
    }
    const VecF n = set1(count > 0.0f ? count : 1.0f), mean = sum / n;
    f(d, mean, squares / n - mean * mean);
  }
}

// Gradients of dropped probabilities: what is dropped is selected, not multiplied, as do v^T may be
// infinite there.
CGPT_INLINE VecF dropped(VecF dp, VecF factor) {
  return select(factor == zero(), zero(), dp * factor);
}

// What the elements of one row share. Logits that were rewritten are subtracted before they are
// multiplied: biases may be near the largest float.
struct RowTerms {
  VecF before, factor, after, share, delta;

  RowTerms() = default;
  CGPT_INLINE RowTerms(const LogitRule& rule, float top, float share, float delta)
      : before(set1(rule.rewrites() ? top : 0.0f)),
        factor(set1(rule.rewrites() ? kLog2e : rule.scale * kLog2e)),
        after(set1(rule.rewrites() ? -0.0f : -top)),
        share(set1(share)),
        delta(set1(delta)) {}

  template <int degree>
  CGPT_INLINE VecF probability(VecF logit) const {
    return exp2<degree>(fmadd(logit - before, factor, after)) * share;
  }
  // Zero probabilities have gradient zero, whatever masked keys and blind rows hold.
  CGPT_INLINE VecF logit_gradient(VecF p, VecF dp) const {
    return select(p == zero(), zero(), p * (dp - delta));
  }
};

}  // namespace cgpt::CGPT_TIER
