// Attention against a double-precision loop, on every tier of this machine, without Python.
#include "attention.h"

#include <omp.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../../common/test.h"

namespace {

using namespace cgpt;

struct Case {
  int64_t B, H, S_q, S_k, D;
  bool causal = true, padding = false, bias = false, alibi = false;
  double dropout_p = 0;
};

// Philox 4x32-10, one counter, straight from the paper's figure: the word of element e.
uint32_t random_word(uint64_t seed, uint64_t e) {
  uint32_t c[4] = {static_cast<uint32_t>(e >> 2), static_cast<uint32_t>(e >> 34), 0, 0};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ull * c[0], p1 = 0xCD9E8D57ull * c[2];
    const uint32_t next[4] = {
        static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
        static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
    std::memcpy(c, next, sizeof(c));
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return c[e & 3];
}

float widen(float x) { return x; }
float widen(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// The values of `from` that T can hold, rounded towards zero.
template <class T>
std::vector<T> narrow(const std::vector<float>& from) {
  std::vector<T> to(from.size());
  for (size_t i = 0; i < from.size(); ++i) {
    if constexpr (sizeof(T) == 4) {
      to[i] = from[i];
    } else {
      uint32_t bits;
      std::memcpy(&bits, &from[i], 4);
      to[i].bits = static_cast<uint16_t>(bits >> 16);
    }
  }
  return to;
}

template <class T>
struct Problem {
  Case c;
  std::vector<T> q, k, v, out, dout, dq, dk, dv;
  std::vector<float> bias, slopes, lse, row_stats, dbias;
  std::vector<uint8_t> padding;
  uint64_t seed = 0x123456789abcdefull;

  explicit Problem(const Case& c) : c(c) {
    const int64_t rows = c.B * c.H * c.S_q * c.D, keys = c.B * c.H * c.S_k * c.D;
    const auto draw = [](int64_t n, uint32_t seed) {
      std::vector<float> x(static_cast<size_t>(n));
      test::fill(x, seed);
      return x;
    };
    q = narrow<T>(draw(rows, 1)), k = narrow<T>(draw(keys, 2)), v = narrow<T>(draw(keys, 3));
    bias = draw(c.B * c.H * c.S_q * c.S_k, 4), slopes = draw(c.H, 5);
    out = narrow<T>(std::vector<float>(q.size(), NAN));
    lse.assign(static_cast<size_t>(c.B * c.H * c.S_q), NAN);
    row_stats.assign(2 * lse.size(), NAN);
    dout = narrow<T>(draw(rows, 6));
    dq = out, dk = dv = narrow<T>(std::vector<float>(k.size(), NAN));
    padding.assign(static_cast<size_t>(c.B * c.S_k), 0);
    for (size_t j = 0; j < padding.size(); ++j) padding[j] = j % 3 == 1;
  }

  AttentionArgs args() {
    AttentionArgs a;
    a.q = test::view(q, {c.B, c.H, c.S_q, c.D});
    a.k = test::view(k, {c.B, c.H, c.S_k, c.D});
    a.v = test::view(v, {c.B, c.H, c.S_k, c.D});
    if (c.padding) {
      a.key_padding_mask = test::view(padding, {c.B, c.S_k});
      a.key_padding_mask.dtype = DType::boolean;
    }
    if (c.bias) a.attn_bias = test::view(bias, {c.B, c.H, c.S_q, c.S_k});
    if (c.alibi) a.alibi_slopes = test::view(slopes, {c.H});
    a.out = test::view(out, {c.B, c.H, c.S_q, c.D});
    a.lse = test::view(lse, {c.B, c.H, c.S_q});
    a.row_stats = test::view(row_stats, {c.B, c.H, c.S_q, 2});
    a.scale = 0.7f;
    a.causal = c.causal;
    a.dropout_p = c.dropout_p;
    a.seed = seed;
    return a;
  }

  // The gradient of the bias is summed over heads and queries, as that of one row of it would be.
  AttentionBwdArgs bwd_args(bool with_stats) {
    AttentionBwdArgs a;
    a.fwd = args();
    a.fwd.lse = {};
    if (!with_stats) a.fwd.row_stats = {};
    a.dout = test::view(dout, {c.B, c.H, c.S_q, c.D});
    a.dq = test::view(dq, {c.B, c.H, c.S_q, c.D});
    a.dk = test::view(dk, {c.B, c.H, c.S_k, c.D});
    a.dv = test::view(dv, {c.B, c.H, c.S_k, c.D});
    if (c.bias) {
      dbias.assign(static_cast<size_t>(c.B * c.S_k), NAN);
      a.dbias = test::view(dbias, {c.B, 1, 1, c.S_k});
    }
    return a;
  }

  double kept(int64_t bh, int64_t i, int64_t j) const {
    const uint64_t e = static_cast<uint64_t>((bh * c.S_q + i) * c.S_k + j);
    const bool dropped = c.dropout_p > 0 && random_word(seed, e) < c.dropout_p * 4294967296.0;
    return dropped ? 0.0 : 1.0 / (1.0 - c.dropout_p);
  }

  // The logits of row (b h, i), -inf where it does not look; the largest one.
  double logits(int64_t bh, int64_t i, std::vector<double>& z) const {
    const int64_t shift = c.S_k - c.S_q;
    double top = -INFINITY;
    z.assign(static_cast<size_t>(c.S_k), -INFINITY);
    for (int64_t j = 0; j < c.S_k; ++j) {
      if ((c.causal && j > i + shift) || (c.padding && padding[bh / c.H * c.S_k + j])) continue;
      z[j] = 0;
      for (int64_t d = 0; d < c.D; ++d)
        z[j] += double(widen(q[(bh * c.S_q + i) * c.D + d])) * widen(k[(bh * c.S_k + j) * c.D + d]);
      z[j] *= 0.7f;
      if (c.bias) z[j] += bias[(bh * c.S_q + i) * c.S_k + j];
      if (c.alibi) z[j] -= slopes[bh % c.H] * std::fabs(double(i + shift - j));
      top = std::fmax(top, z[j]);
    }
    return top;
  }

  // out and lse of row (b h, i) by the formula.
  double row(int64_t bh, int64_t i, std::vector<double>& o) const {
    std::vector<double> z;
    const double top = logits(bh, i, z);
    double sum = 0;
    o.assign(static_cast<size_t>(c.D), 0);
    for (int64_t j = 0; j < c.S_k; ++j) {
      if (z[j] == -INFINITY) continue;
      const double p = std::exp(z[j] - top);
      sum += p;
      for (int64_t d = 0; d < c.D; ++d)
        o[d] += p * kept(bh, i, j) * widen(v[(bh * c.S_k + j) * c.D + d]);
    }
    for (double& x : o) x = sum > 0 ? x / sum : 0;
    return sum > 0 ? top + std::log(sum) : -INFINITY;
  }

  // All gradients by the formula.
  void gradients(std::vector<double>& gq, std::vector<double>& gk, std::vector<double>& gv,
                 std::vector<double>& gbias) const {
    gq.assign(q.size(), 0), gk.assign(k.size(), 0), gv.assign(v.size(), 0);
    gbias.assign(static_cast<size_t>(c.B * c.S_k), 0);
    std::vector<double> z, o;
    for (int64_t row_at = 0; row_at < c.B * c.H * c.S_q; ++row_at) {
      const int64_t bh = row_at / c.S_q, i = row_at % c.S_q;
      logits(bh, i, z);
      const double lse = row(bh, i, o);
      double delta = 0;
      for (int64_t d = 0; d < c.D; ++d) delta += o[d] * widen(dout[row_at * c.D + d]);
      for (int64_t j = 0; j < c.S_k; ++j) {
        if (z[j] == -INFINITY) continue;
        const double p = std::exp(z[j] - lse), keep = kept(bh, i, j);
        const int64_t key = (bh * c.S_k + j) * c.D, query = row_at * c.D;
        double dp = 0;
        for (int64_t d = 0; d < c.D; ++d) {
          dp += double(widen(dout[query + d])) * widen(v[key + d]);
          gv[key + d] += p * keep * widen(dout[query + d]);
        }
        const double dz = p * (dp * keep - delta);
        gbias[bh / c.H * c.S_k + j] += dz;
        for (int64_t d = 0; d < c.D; ++d) {
          gq[query + d] += 0.7f * dz * widen(k[key + d]);
          gk[key + d] += 0.7f * dz * widen(q[query + d]);
        }
      }
    }
  }
};

template <class T>
void matches_the_formula(const Case& c) {
  Problem<T> problem(c);
  const AttentionArgs args = problem.args();
  attention_check(args);
  attention_fwd_cpu(args);
  std::vector<double> o;
  for (int64_t row = 0; row < c.B * c.H * c.S_q; ++row) {
    const double lse = problem.row(row / c.S_q, row % c.S_q, o);
    if (lse == -INFINITY) {
      if (problem.lse[row] != -INFINITY) test::failed("a row that sees nothing has a finite lse");
    } else {
      test::close(problem.lse[row], lse, 2e-5);
    }
    // bf16: P and the output are rounded to 8 bits, values lie in [-1, 1) / (1 - p).
    for (int64_t d = 0; d < c.D; ++d)
      test::close(widen(problem.out[row * c.D + d]), o[d], sizeof(T) == 4 ? 1e-5 : 2e-2);
  }
}

// Keys and values in int8 give what their stored values give.
template <class T>
void int8_rows_match_the_formula(const Case& c) {
  Problem<T> problem(c);
  AttentionArgs args = problem.args();
  std::vector<int8_t> rows[2];
  std::vector<float> scales[2];
  const auto quantize = [&](std::vector<T>& values, TensorView& t, int n) {
    rows[n].assign(values.size(), 99), scales[n].assign(values.size() / size_t(c.D), NAN);
    const TensorView x = t;
    t = test::view(rows[n], {c.B, c.H, c.S_k, c.D});
    const TensorView scale = test::view(scales[n], {c.B, c.H, c.S_k});
    attention_quantize_cpu(AttentionQuantizeArgs{x, t, scale});
    for (size_t i = 0; i < values.size(); ++i) {
      const float step = scales[n][i / size_t(c.D)], found = step * float(rows[n][i]);
      if (!(std::fabs(found - widen(values[i])) <= 0.5001f * step))
        test::failed("a stored value is off by more than half a step");
      values[i] = narrow<T>({found})[0];
    }
    return scale;
  };
  args.k_scale = quantize(problem.k, args.k, 0);
  args.v_scale = quantize(problem.v, args.v, 1);
  attention_check(args);
  attention_fwd_cpu(args);
  std::vector<double> o;
  for (int64_t row = 0; row < c.B * c.H * c.S_q; ++row) {
    problem.row(row / c.S_q, row % c.S_q, o);
    for (int64_t d = 0; d < c.D; ++d)
      test::close(widen(problem.out[row * c.D + d]), o[d], sizeof(T) == 4 ? 1e-5 : 4e-2);
  }
}

// Largest error relative to the largest value, of fp32 or of values rounded to 8 bits on the way.
template <class T>
void all_close(const std::vector<T>& got, const std::vector<double>& expected, double tolerance) {
  double scale = 0.1;
  for (double x : expected) scale = std::fmax(scale, std::fabs(x));
  for (size_t i = 0; i < got.size(); ++i)
    test::close(widen(got[i]), expected[i], tolerance * scale);
}

template <class T>
void gradients_match_the_formula(const Case& c) {
  Problem<T> problem(c);
  attention_fwd_cpu(problem.args());
  std::vector<double> gq, gk, gv, gbias;
  problem.gradients(gq, gk, gv, gbias);
  const double tolerance = sizeof(T) == 4 ? 1e-5 : 2e-2;
  for (bool with_stats : {true, false}) {
    const AttentionBwdArgs args = problem.bwd_args(with_stats);
    attention_bwd_check(args);
    attention_bwd_cpu(args);
    all_close(problem.dq, gq, tolerance);
    all_close(problem.dk, gk, tolerance);
    all_close(problem.dv, gv, tolerance);
    if (c.bias) all_close(problem.dbias, gbias, tolerance);
  }
}

// Heads are items of work where there are many, parts of a head where there are few.
template <class T>
void gradients_do_not_depend_on_threads(const Case& c) {
  const int before = omp_get_max_threads();
  Problem<T> problem(c);
  attention_fwd_cpu(problem.args());
  std::vector<std::vector<T>> first;
  for (int threads : {1, 2, 3, 5}) {
    omp_set_num_threads(threads);
    attention_bwd_cpu(problem.bwd_args(true));
    const std::vector<std::vector<T>> found{problem.dq, problem.dk, problem.dv};
    if (first.empty()) first = found;
    for (size_t n = 0; n < found.size(); ++n)
      if (std::memcmp(found[n].data(), first[n].data(), found[n].size() * sizeof(T)) != 0)
        test::failed("the number of threads changed a gradient");
  }
  omp_set_num_threads(before);
}

// What follows the visible keys cannot be seen, not even as NaN, in any bit.
template <class T>
void future_keys_leave_no_trace(int64_t S, int64_t D) {
  Problem<T> clean({1, 2, S, S, D});
  attention_fwd_cpu(clean.args());
  const int64_t seen = S / 2;
  Problem<T> poisoned({1, 2, S, S, D});
  for (int64_t h = 0; h < 2; ++h)
    for (int64_t x = (h * S + seen) * D; x < (h + 1) * S * D; ++x)
      poisoned.k[x] = poisoned.v[x] = narrow<T>({NAN})[0];
  attention_fwd_cpu(poisoned.args());
  for (int64_t h = 0; h < 2; ++h)
    for (int64_t x = h * S * D; x < (h + 1) * S * D; ++x) {
      const bool same = std::memcmp(&clean.out[x], &poisoned.out[x], sizeof(T)) == 0;
      if (x < (h * S + seen) * D && !same) test::failed("a future key changed an output");
      if (x >= (h * S + seen) * D && !std::isnan(widen(poisoned.out[x])))
        test::failed("a visible NaN vanished");
    }
}

void wrong_arguments_are_named() {
  Problem<float> p({1, 2, 3, 4, 5});
  AttentionArgs a = p.args();
  a.k.shape[3] = 6;
  test::throws("attention: k must have shape (1, 2, 4, 5), got (1, 2, 4, 6)",
               [&] { attention_check(a); });
  a = p.args();
  a.v.strides[3] = 2;
  test::throws("attention: v must have stride 1 in its last dimension, got 2",
               [&] { attention_check(a); });
  a = p.args();
  a.dropout_p = 1.5;
  test::throws("attention: dropout_p must be in [0, 1], got 1.500000", [&] { attention_check(a); });
  a = p.args();
  a.k_scale = test::view(p.lse, {1, 2, 3});
  test::throws("attention: k_scale and v_scale come together", [&] { attention_check(a); });
  a.v_scale = a.k_scale = test::view(p.slopes, {1, 2, 4});
  test::throws("attention: k must be int8, got float32", [&] { attention_check(a); });
  AttentionBwdArgs b = p.bwd_args(true);
  b.dk.shape[2] = 3;
  test::throws("attention: dk must have shape (1, 2, 4, 5), got (1, 2, 3, 5)",
               [&] { attention_bwd_check(b); });
}

}  // namespace

int main() {
  wrong_arguments_are_named();
  return test::on_every_tier([] {
    const Case cases[] = {
        {1, 1, 1, 1, 1},
        {2, 3, 1, 600, 64},                          // two chunks of a decoding step
        {1, 2, 3, 37, 80},                           // queries that see different numbers of keys
        {2, 2, 17, 17, 64},                          // one strip
        {1, 1, 70, 300, 33},                         // two key blocks, odd head
        {1, 1, 40, 8, 16},                           // the first queries see no key
        {1, 1, 9, 9, 300},                           // a long head
        {2, 2, 33, 70, 20, false, true},             // padding
        {2, 1, 2, 40, 20, true, true, true},         // padding and bias
        {1, 2, 50, 50, 24, true, true, true, true},  // everything but dropout
        {1, 2, 50, 61, 24, true, false, false, false, 0.3},
        {2, 2, 2, 61, 24, false, true, false, true, 0.5},
        {0, 2, 5, 5, 4},  // an empty batch
        {1, 2, 5, 0, 4},  // no keys at all
    };
    for (const Case& c : cases) matches_the_formula<float>(c), matches_the_formula<bf16>(c);
    for (const Case& c : cases)
      int8_rows_match_the_formula<float>(c), int8_rows_match_the_formula<bf16>(c);
    for (const Case& c : cases)
      gradients_match_the_formula<float>(c), gradients_match_the_formula<bf16>(c);
    for (const Case& c :
         {Case{1, 2, 37, 2100, 8}, Case{1, 1, 1300, 1300, 8}, Case{2, 3, 40, 40, 8}})
      gradients_do_not_depend_on_threads<float>(c), gradients_do_not_depend_on_threads<bf16>(c);
    for (int64_t S : {3, 61, 300})
      future_keys_leave_no_trace<float>(S, 24), future_keys_leave_no_trace<bf16>(S, 24);
  });
}
