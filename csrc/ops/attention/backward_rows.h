// The two passes beside the main one: what turns logits into probabilities, row by row, before it,
// and the gradient of attn_bias after it.
//
// RowPass: the forward's row_stats and delta = sum(do * out) cost one pass over do and out. Where
// that is not exact enough, maximum, sum and delta = sum_j P dP are taken anew from the logits
// (4 D more FLOPs per pair): for the gradient of a bias, whose rows must sum to 0, which an output
// rounded to bf16 does not give; where values are mostly what they have in common, which multiplies
// the rounding of out (3.4 times eager's error in dq and dk at means of 10); and for few queries,
// whose logits the forward sums in another order (decode.h), so that its maximum is not quite ours.
// The same where there are no row_stats.
//
// BiasPass: each tile of the gradient has one owner, who walks through what shares it in one order
// (4 D more FLOPs per pair).
#pragma once

#include "backward_tile.h"

namespace cgpt::CGPT_TIER {

// Queries of one item: packing a block of keys costs less than 1 % of multiplying it.
constexpr int64_t kRowsM = 256;

// Whether the values of a head are far from 0 more than from each other: mean beyond two standard
// deviations, over all their columns.
template <class T>
bool values_in_common(const AttentionBwdArgs& a, int64_t b, int64_t h) {
  VecF means = zero(), variances = zero();
  each_moment(GradTile<T>::head_of(a.fwd.v, b, h), a.fwd.v.strides[2], a.fwd.v.shape[2],
              a.fwd.v.shape[3], logit_rule(a.fwd, b, h), [&](int64_t, VecF mean, VecF variance) {
                means = fmadd(mean, mean, means);
                variances += variance;
              });
  return reduce_add(means) > 4.0f * reduce_add(variances);
}

template <class T>
struct RowPass : GradTile<T> {
  using Tile = GradTile<T>;

  int64_t carve(char* base, int64_t rows, int64_t head_size) {
    Carver c(base);
    Tile::carve(c, rows, head_size);
    return c.used();
  }

  // From what the forward saved, for queries begin .. end - 1.
  static void of_forward(const AttentionBwdArgs& a, int64_t b, int64_t h, int64_t begin,
                         int64_t end, const RowStats& to) {
    const int64_t D = a.fwd.q.shape[3];
    const int64_t* step = a.fwd.row_stats.strides;
    const float* saved = a.fwd.row_stats.as<const float>() + b * step[0] + h * step[1];
    const T *out = Tile::head_of(a.fwd.out, b, h), *dout = Tile::head_of(a.dout, b, h);
    for (int64_t i = begin; i < end; ++i) {
      const T *x = out + i * a.fwd.out.strides[2], *y = dout + i * a.dout.strides[2];
      VecF sum = zero();
      for (int64_t d = 0; d < D; d += kLanes)
        sum = fmadd(load_n(x + d, D - d), load_n(y + d, D - d), sum);
      const float top = saved[i * step[2]], total = saved[i * step[2] + step[3]];
      const bool blind = total == 0.0f;
      to.top[i] = top == -kInfinity ? 0.0f : top;
      to.share[i] = blind ? 0.0f : 1.0f / total;
      to.delta[i] = blind ? 0.0f : reduce_add(sum);
    }
  }

  // From the logits.
  void run(const AttentionBwdArgs& a, const Dropout& dropout, int64_t b, int64_t h, int64_t begin,
           int64_t end, const RowStats& to) {
    const LogitRule rule = logit_rule(a.fwd, b, h);
    this->load_queries(a, b, h, begin, end - begin);
    for (int64_t i = begin; i < end; ++i) to.top[i] = -kInfinity, to.share[i] = to.delta[i] = 0.0f;
    const int64_t last = rule.key_end(end - 1, a.fwd.k.shape[2]);
    for (int64_t j0 = 0; j0 < last; j0 += kGradN) {
      const int64_t keys = min64(kGradN, last - j0);
      if (!this->load_keys(a, rule, b, h, j0, keys)) continue;
      for (int64_t i = begin; i < end; i += kGradM) {
        const int64_t strip = min64(kGradM, end - i);
        const int64_t n = rule.key_end(i + strip - 1, j0 + keys) - j0;
        if (n <= 0) continue;
        this->multiply(i - begin, strip, round_up(n, kLanes));
        for (int64_t r = 0; r < strip; ++r) add_block(a, rule, dropout, b, h, i + r, r, j0, n, to);
      }
    }
    for (int64_t i = begin; i < end; ++i) {
      const float sum = to.share[i];  // it sums up here; likewise delta
      to.share[i] = sum == 0.0f ? 0.0f : 1.0f / sum;
      to.delta[i] = sum == 0.0f ? 0.0f : to.delta[i] / sum;
      if (to.top[i] == -kInfinity) to.top[i] = 0.0f;
    }
  }

  // Row r of s and g, which is query i: its maximum, sum and weighted sum brought up to date.
  void add_block(const AttentionBwdArgs& a, const LogitRule& rule, const Dropout& dropout,
                 int64_t b, int64_t h, int64_t i, int64_t r, int64_t j0, int64_t n,
                 const RowStats& to) {
    const int64_t room = round_up(n, kLanes);
    const int64_t seen = this->apply_rules(rule, r, i, j0, n, room);
    if (seen == 0) return;
    if (dropout.on) this->draw(a.fwd, dropout, b, h, i, j0, n, this->keep);
    const float* row = this->s + r * kGradN;
    const float old = to.top[i], fresh = rule.kept(reduce_max(row_max(row, seen)));
    const float now = old > fresh ? old : fresh;
    const float shrink = old == now ? 1.0f : exp2<6>(set1((old - now) * rule.kept_to_log2()))[0];
    const RowTerms terms(rule, now == -kInfinity ? 0.0f : now, 1.0f, 0.0f);
    VecF total = zero(), weighted = zero();
    for (int64_t j = 0; j < room; j += kLanes) {
      const VecF weight = terms.template probability<kExpDegree<T>>(load(row + j));
      VecF dp = load(this->g + r * kGradN + j);
      if (dropout.on) dp = dropped(dp, load(this->keep + j));
      total += weight;
      weighted += terms.logit_gradient(weight, dp);
    }
    to.top[i] = now;
    to.share[i] = to.share[i] * shrink + reduce_add(total);
    to.delta[i] = to.delta[i] * shrink + reduce_add(weighted);
  }
};

template <class T>
struct BiasPass : GradTile<T> {
  using Tile = GradTile<T>;

  float* sum;        // [kRowsM, kGradN] the owner's tile; a row for all queries, or lane sums for
                     // all keys, where the bias has one of them
  float* strip_sum;  // [kGradN]: sums of sums lose fewer digits than one long sum

  int64_t carve(char* base, int64_t head_size) {
    Carver c(base);
    Tile::carve(c, kRowsM, head_size);
    sum = c.take<float>(kRowsM * kGradN);
    strip_sum = c.take<float>(kGradN);
    return c.used();
  }

  // Queries i0 .. i0 + rows - 1 and keys j0 .. j0 + keys - 1 of one head, added to the tile.
  void add(const AttentionBwdArgs& a, const Dropout& dropout, const RowStats& stats, int64_t b,
           int64_t h, int64_t i0, int64_t rows, int64_t j0, int64_t keys, bool each_query,
           bool each_key) {
    const LogitRule rule = logit_rule(a.fwd, b, h);
    if (!this->load_keys(a, rule, b, h, j0, keys)) return;
    for (int64_t part = 0; part < rows; part += kRowsM) {
      const int64_t here = min64(kRowsM, rows - part);
      if (rule.key_end(i0 + part + here - 1, j0 + keys) <= j0) continue;
      this->load_queries(a, b, h, i0 + part, here);
      for (int64_t r = 0; r < here; r += kGradM) {
        const int64_t strip = min64(kGradM, here - r), i = i0 + part + r;
        const int64_t n = rule.key_end(i + strip - 1, j0 + keys) - j0;
        if (n <= 0) continue;
        this->multiply(r, strip, round_up(n, kLanes));
        for (int64_t j = 0; j < kGradN; ++j) strip_sum[j] = 0.0f;
        for (int64_t x = 0; x < strip; ++x)
          add_row(a, rule, dropout, stats, b, h, i + x, x, j0, n, each_key,
                  each_query ? sum + (r + x) * kGradN : strip_sum);
        if (each_query) continue;
        for (int64_t j = 0; j < kGradN; ++j) sum[j] += strip_sum[j];
      }
    }
  }

  void add_row(const AttentionBwdArgs& a, const LogitRule& rule, const Dropout& dropout,
               const RowStats& stats, int64_t b, int64_t h, int64_t i, int64_t r, int64_t j0,
               int64_t n, bool each_key, float* to) {
    const int64_t room = round_up(n, kLanes);
    this->apply_rules(rule, r, i, j0, n, room);
    if (dropout.on) this->draw(a.fwd, dropout, b, h, i, j0, n, this->keep);
    const RowTerms terms(rule, stats.top[i], stats.share[i], stats.delta[i]);
    for (int64_t j = 0; j < room; j += kLanes) {
      VecF dp = load(this->g + r * kGradN + j);
      if (dropout.on) dp = dropped(dp, load(this->keep + j));
      const VecF p = terms.template probability<kExpDegree<T>>(load(this->s + r * kGradN + j));
      float* at = to + (each_key ? j : 0);
      store(at, load(at) + terms.logit_gradient(p, dp));
    }
  }

  // Item number n of the gradient's tiles.
  void run(const AttentionBwdArgs& a, const Dropout& dropout, float* stats, int64_t n) {
    const int64_t B = a.fwd.q.shape[0], H = a.fwd.q.shape[1], S_q = a.fwd.q.shape[2];
    const int64_t S_k = a.fwd.k.shape[2];
    const TensorView& t = a.dbias;
    const bool each_query = t.shape[2] == S_q, each_key = t.shape[3] == S_k;
    const int64_t key_tiles = tiles(t.shape[3], S_k, kGradN);
    const int64_t row_tiles = tiles(t.shape[2], S_q, kRowsM);
    const int64_t j0 = n % key_tiles * kGradN, i0 = n / key_tiles % row_tiles * kRowsM;
    const int64_t head = n / key_tiles / row_tiles, b0 = head / t.shape[1], h0 = head % t.shape[1];
    const int64_t rows = each_query ? min64(kRowsM, S_q - i0) : S_q;
    const int64_t keys = each_key ? min64(kGradN, S_k - j0) : S_k;
    for (int64_t x = 0; x < kRowsM * kGradN; ++x) sum[x] = 0.0f;
    for (int64_t b = b0; b < (t.shape[0] == B ? b0 + 1 : B); ++b)
      for (int64_t h = h0; h < (t.shape[1] == H ? h0 + 1 : H); ++h)
        for (int64_t j = 0; j < keys; j += kGradN)
          add(a, dropout, RowStats(stats, b * H + h, S_q), b, h, i0, rows, j0 + j,
              min64(kGradN, keys - j), each_query, each_key);
    const int64_t base = b0 * t.strides[0] + h0 * t.strides[1];
    for (int64_t i = 0; i < (each_query ? rows : 1); ++i)
      for (int64_t j = 0; j < (each_key ? keys : 1); ++j) {
        const float x = each_key ? sum[i * kGradN + j] : reduce_add(load(sum + i * kGradN));
        const int64_t at = base + (i0 + i) * t.strides[2] + (j0 + j) * t.strides[3];
        if (t.dtype == DType::f32) t.as<float>()[at] = x;
        else t.as<T>()[at] = from_float<T>(x);
      }
  }

  static int64_t tiles(int64_t size, int64_t whole, int64_t tile) {
    return size == whole ? (whole + tile - 1) / tile : 1;
  }
  static int64_t items(const AttentionBwdArgs& a) {
    const TensorView& t = a.dbias;
    return t.shape[0] * t.shape[1] * tiles(t.shape[2], a.fwd.q.shape[2], kRowsM) *
           tiles(t.shape[3], a.fwd.k.shape[2], kGradN);
  }
};

}  // namespace cgpt::CGPT_TIER
