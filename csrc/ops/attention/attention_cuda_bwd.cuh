// Gradients, without atomics: each output element is summed by one thread in a fixed order.
//
//   dq      a block holds queries and streams keys; it also leaves what turns a logit into a
//           probability, and delta = sum_j P dP, for the kernels after it.
//   dk, dv  a block holds keys and streams queries.
//   dbias   a block holds a tile of the gradient of attn_bias and walks through the heads that
//           share it.
//
// P = exp(logit - lse) and delta = sum(dout * out) cost one pass over dout and out. In fp32 and
// under an added bias that is not exact enough: ulp(lse) is seen in P, lse is no sum where
// finfo.min swallows it, and an output rounded to 16 bits leaves dlogits whose rows do not sum to
// 0, which the gradient of a bias shows. There the dq kernel walks through the keys twice and takes
// maximum, sum and delta from the logits first.
//
// Dao, "FlashAttention-2", arXiv 2307.08691, algorithm 2; 5 products of S_q * S_k * D (7, 2 more
// for delta).
#pragma once

#include "attention_cuda_fwd.cuh"

namespace cgpt {
namespace {

template <class T>
struct Gradients {
  Heads<const T> dout, out;
  Heads<T> dq, dk, dv;
  const float* lse;
  int64_t lse_b, lse_h, lse_s;
  // [B, H, S_q]: P = exp(logit - top) * share.
  float *top, *share, *delta;
  float* dbias;  // [bias_B, bias_H, S_q, S_k] or nullptr
  int bias_B, bias_H, B;
  bool exact;  // top, share and delta are taken from the logits
};

// P of one logit.
template <class T>
__device__ inline float probability(const Call<T>& c, float logit, float top, float share) {
  return exponential(c, logit - top) * share;
}

// The part of sum over D of x * y that this lane, the t-th of four, adds.
template <class T>
__device__ inline float row_dot(const T* x, const T* y, int D, bool whole) {
  constexpr int N = Vec<T>::kSize;
  float sum = 0.0f;
  for (int d = lane() % 4 * N; d < D; d += 4 * N) {
    const auto u = whole ? load16(x + d) : load_part<false, N>(x + d, D - d);
    const auto v = whole ? load16(y + d) : load_part<false, N>(y + d, D - d);
#pragma unroll
    for (int i = 0; i < N; ++i) sum = fmaf(to_float(u[i]), to_float(v[i]), sum);
  }
  return sum;
}

template <class S, class T>
__global__ void __launch_bounds__(S::kThreads)
    attention_dq_kernel(const Call<T> c, const Gradients<T> grad) {
  auto& shared_memory = *shared<Shared<S, 2>>();
  T *const q = shared_memory.held[0], *const dout = shared_memory.held[1];
  const int blocks = (c.S_q + S::kM - 1) / S::kM;
  const int first = (blocks - 1 - static_cast<int>(block_x() % blocks)) * S::kM;
  const int64_t b = block_x() / blocks / c.H, h = block_x() / blocks % c.H;
  const Masks<T> masks(c, b, h);
  const T *k = c.k.head(b, h), *v = c.v.head(b, h);
  const int tiles = key_tiles(c, first, S::kM, S::kN);
  const auto fetch = [&](int step) {
    auto& stage = shared_memory.streamed[step % 2];
    const auto hidden = [&](int j) { return masks.hidden(c, j); };
    const int j = (step < tiles ? step : step - tiles) * S::kN;
    load_rows<S, S::kN>(stage[0], k, c.k, c.D, j, c.S_k, hidden);
    load_rows<S, S::kN>(stage[1], v, c.v, c.D, j, c.S_k, hidden);
    copy_async_commit();
  };
  load_rows<S, S::kM>(q, c.q.head(b, h), c.q, c.D, first, c.S_q);
  load_rows<S, S::kM>(dout, grad.dout.head(b, h), grad.dout, c.D, first, c.S_q);
  const int row = warp() * S::kWarpRows, begin = grad.exact ? 0 : tiles, end = 2 * tiles;
  fetch(begin);

  // Of a thread's rows; rows beyond S_q get P = 0.
  float top[S::kTiles][2], share[S::kTiles][2], delta[S::kTiles][2];
  const auto each_row = [&](auto&& f) {
#pragma unroll
    for (int m = 0; m < S::kTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) f(m, half, first + row + m * 16 + 8 * half + lane() / 4);
  };
  const T *dout_rows = grad.dout.head(b, h), *out_rows = grad.out.head(b, h);
  each_row([&](int m, int half, int i) {
    top[m][half] = INFINITY, share[m][half] = 1.0f, delta[m][half] = 0.0f;
    if (grad.exact || i >= c.S_q) return;
    const float lse = grad.lse[b * grad.lse_b + h * grad.lse_h + i * grad.lse_s];
    if (lse != kNegative) top[m][half] = lse;
    delta[m][half] = row_dot(dout_rows + i * grad.dout.s, out_rows + i * grad.out.s, c.D,
                             grad.dout.aligned && grad.out.aligned);
  });
  if (!grad.exact)
    each_row([&](int m, int half, int) { delta[m][half] = row_sum(delta[m][half]); });

  float dq[S::kTiles][S::kD / 8][4] = {};
  Running<S> running;
  // Takes maximum, sum and delta over once they are complete.
  const auto settle = [&] {
    each_row([&](int m, int half, int) {
      const float total = row_sum(running.total[m][half]);
      delta[m][half] = row_sum(delta[m][half]);
      top[m][half] = total > 0.0f ? running.top[m][half] : 0.0f;
      share[m][half] = total > 0.0f ? 1.0f / total : 0.0f;
      delta[m][half] *= share[m][half];
    });
  };
  for (int step = begin; step < end; ++step) {
    copy_async_wait<0>();
    block_barrier();
    if (step + 1 < end) fetch(step + 1);
    const auto& stage = shared_memory.streamed[step % 2];
    const int j = (step < tiles ? step : step - tiles) * S::kN;
    typename S::Logits s = {}, dp = {};
    multiply_rows<S>(s, q + row * S::kPitch, stage[0]);
    multiply_rows<S>(dp, dout + row * S::kPitch, stage[1]);
    apply<S, false>(s, c, masks, first + row, j, at_edge<S>(c, first + row, j));
    if (c.dropout) drop<S>(dp, kept_bits<S, false>(c, masks, first + row, j), c.kept);
    if (step < tiles) {
      running.add(s, c, [&](int m, int half, float factor) {
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < S::kN8; ++n)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) sum = fmaf(s[m][n][e], dp[m][n][e], sum);
        delta[m][half] = fmaf(delta[m][half], factor, sum);
      });
      if (step + 1 == tiles) settle();
      continue;
    }
#pragma unroll
    for (int m = 0; m < S::kTiles; ++m)
#pragma unroll
      for (int n = 0; n < S::kN8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          s[m][n][e] = probability(c, s[m][n][e], top[m][e / 2], share[m][e / 2]) *
                       (dp[m][n][e] - delta[m][e / 2]);
    multiply_weights<S>(dq, s, stage[0], shared_memory.weights());
  }
  if (grad.exact && tiles == 0) settle();

  each_row([&](int m, int half, int i) {
    if (lane() % 4 != 0 || i >= c.S_q) return;
    grad.top[masks.row + i] = top[m][half];
    grad.share[masks.row + i] = share[m][half];
    grad.delta[masks.row + i] = delta[m][half];
  });
#pragma unroll
  for (int m = 0; m < S::kTiles; ++m)
#pragma unroll
    for (int n = 0; n < S::kD / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) dq[m][n][e] *= c.scale;
  copy_async_wait<0>();
  block_barrier();
  store_rows<S>(q + row * S::kPitch, dq, grad.dq.head(b, h), grad.dq.s, grad.dq.aligned, c.D,
                first + row, c.S_q);
}

// Blocks of a second coordinate: the columns of dk and dv, kOut of them each.
template <class S, class T>
__global__ void __launch_bounds__(S::kThreads)
    attention_dkdv_kernel(const Call<T> c, const Gradients<T> grad) {
  auto& shared_memory = *shared<Shared<S, 2>>();
  T *const k = shared_memory.held[0], *const v = shared_memory.held[1];
  const int blocks = (c.S_k + S::kM - 1) / S::kM;
  // The first keys are seen by the most queries under a causal mask: they go first.
  const int first = static_cast<int>(block_x() % blocks) * S::kM;
  const int64_t b = block_x() / blocks / c.H, h = block_x() / blocks % c.H;
  const int column = static_cast<int>(block_y()) * S::kOut;
  const Masks<T> masks(c, b, h);
  const T *q = c.q.head(b, h), *dout = grad.dout.head(b, h);
  const auto fetch = [&](int tile) {
    auto& stage = shared_memory.streamed[tile % 2];
    load_rows<S, S::kN>(stage[0], q, c.q, c.D, tile * S::kN, c.S_q);
    load_rows<S, S::kN>(stage[1], dout, grad.dout, c.D, tile * S::kN, c.S_q);
    copy_async_commit();
  };
  const auto hidden = [&](int j) { return masks.hidden(c, j); };
  load_rows<S, S::kM>(k, c.k.head(b, h), c.k, c.D, first, c.S_k, hidden);
  load_rows<S, S::kM>(v, c.v.head(b, h), c.v, c.D, first, c.S_k, hidden);
  const int sees = c.causal && first > c.shift ? first - c.shift : 0;  // the first query that does
  const int begin = sees / S::kN, end = (c.S_q + S::kN - 1) / S::kN;
  fetch(begin);

  const int row = warp() * S::kWarpRows;
  float dk[S::kTiles][S::kOut / 8][4] = {}, dv[S::kTiles][S::kOut / 8][4] = {};
  for (int tile = begin; tile < end; ++tile) {
    copy_async_wait<0>();
    block_barrier();
    if (tile + 1 < end) fetch(tile + 1);
    const auto& stage = shared_memory.streamed[tile % 2];
    const int i = tile * S::kN;
    typename S::Logits s = {}, dp = {};  // transposed: a row is a key
    multiply_rows<S>(s, k + row * S::kPitch, stage[0]);
    multiply_rows<S>(dp, v + row * S::kPitch, stage[1]);
    apply<S, true>(s, c, masks, first + row, i,
                   c.causal && first + row + S::kWarpRows - 1 > i + c.shift);
    float delta[S::kN8][2];
#pragma unroll
    for (int n = 0; n < S::kN8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = i + n * 8 + lane() % 4 * 2 + half;
        const bool there = at < c.S_q;  // else P = 0
        const float top = there ? grad.top[masks.row + at] : INFINITY;
        const float share = there ? grad.share[masks.row + at] : 1.0f;
        delta[n][half] = there ? grad.delta[masks.row + at] : 0.0f;
#pragma unroll
        for (int m = 0; m < S::kTiles; ++m)
#pragma unroll
          for (int e = half; e < 4; e += 2) s[m][n][e] = probability(c, s[m][n][e], top, share);
      }
    if (c.dropout) {
      const uint64_t bits = kept_bits<S, true>(c, masks, first + row, i);
      typename S::Logits dropped;
#pragma unroll
      for (int m = 0; m < S::kTiles; ++m)
#pragma unroll
        for (int n = 0; n < S::kN8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) dropped[m][n][e] = s[m][n][e];
      drop<S>(dropped, bits, c.kept);
      drop<S>(dp, bits, c.kept);
      multiply_weights<S>(dv, dropped, stage[1] + column, shared_memory.weights());
    } else {
      multiply_weights<S>(dv, s, stage[1] + column, shared_memory.weights());
    }
#pragma unroll
    for (int m = 0; m < S::kTiles; ++m)
#pragma unroll
      for (int n = 0; n < S::kN8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[m][n][e] *= dp[m][n][e] - delta[n][e % 2];
    multiply_weights<S>(dk, s, stage[0] + column, shared_memory.weights());
  }
#pragma unroll
  for (int m = 0; m < S::kTiles; ++m)
#pragma unroll
    for (int n = 0; n < S::kOut / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) dk[m][n][e] *= c.scale;
  copy_async_wait<0>();
  block_barrier();
  store_rows<S>(k + row * S::kPitch, dk, grad.dk.head(b, h) + column, grad.dk.s, grad.dk.aligned,
                c.D - column, first + row, c.S_k);
  store_rows<S>(v + row * S::kPitch, dv, grad.dv.head(b, h) + column, grad.dv.s, grad.dv.aligned,
                c.D - column, first + row, c.S_k);
}

// Blocks: tiles of kM queries and kN keys, of each head that the bias has.
template <class S, class T>
__global__ void __launch_bounds__(S::kThreads)
    attention_dbias_kernel(const Call<T> c, const Gradients<T> grad) {
  auto& shared_memory = *shared<Shared<S, 2>>();
  T *const q = shared_memory.held[0], *const dout = shared_memory.held[1];
  const auto& stage = shared_memory.streamed[0];
  const unsigned across = (c.S_k + S::kN - 1) / S::kN, down = (c.S_q + S::kM - 1) / S::kM;
  const int j = static_cast<int>(block_x() % across) * S::kN;
  const int first = static_cast<int>(block_x() / across % down) * S::kM;
  const int64_t own = block_x() / across / down;  // of the bias_B * bias_H heads
  const int row = warp() * S::kWarpRows;
  const int over_b = grad.B / grad.bias_B, over_h = c.H / grad.bias_H;
  typename S::Logits sum = {};
  for (int shared_by = 0; shared_by < over_b * over_h; ++shared_by) {
    // An axis is shared as a whole or not at all.
    const int64_t b = own / grad.bias_H + shared_by / over_h;
    const int64_t h = own % grad.bias_H + shared_by % over_h;
    const Masks<T> masks(c, b, h);
    const auto hidden = [&](int key) { return masks.hidden(c, key); };
    block_barrier();
    load_rows<S, S::kM>(q, c.q.head(b, h), c.q, c.D, first, c.S_q);
    load_rows<S, S::kM>(dout, grad.dout.head(b, h), grad.dout, c.D, first, c.S_q);
    load_rows<S, S::kN>(shared_memory.streamed[0][0], c.k.head(b, h), c.k, c.D, j, c.S_k, hidden);
    load_rows<S, S::kN>(shared_memory.streamed[0][1], c.v.head(b, h), c.v, c.D, j, c.S_k, hidden);
    copy_async_commit();
    copy_async_wait<0>();
    block_barrier();
    typename S::Logits s = {}, dp = {};
    multiply_rows<S>(s, q + row * S::kPitch, stage[0]);
    multiply_rows<S>(dp, dout + row * S::kPitch, stage[1]);
    apply<S, false>(s, c, masks, first + row, j, at_edge<S>(c, first + row, j));
    if (c.dropout) drop<S>(dp, kept_bits<S, false>(c, masks, first + row, j), c.kept);
#pragma unroll
    for (int m = 0; m < S::kTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = first + row + m * 16 + 8 * half + lane() / 4;
        const bool there = i < c.S_q;
        const float top = there ? grad.top[masks.row + i] : INFINITY;
        const float share = there ? grad.share[masks.row + i] : 1.0f;
        const float delta = there ? grad.delta[masks.row + i] : 0.0f;
#pragma unroll
        for (int n = 0; n < S::kN8; ++n)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e)
            sum[m][n][e] =
                fmaf(probability(c, s[m][n][e], top, share), dp[m][n][e] - delta, sum[m][n][e]);
      }
  }
  each<S, false>(sum, first + row, j, [&](float& x, int i, int key) {
    if (i < c.S_q && key < c.S_k) grad.dbias[(own * c.S_q + i) * c.S_k + key] = x;
  });
}

}  // namespace
}  // namespace cgpt
