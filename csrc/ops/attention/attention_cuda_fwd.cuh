// Forward: one pass over the keys with a running maximum and sum (Dao, "FlashAttention-2", arXiv
// 2307.08691, algorithm 1). q is read and out written once, k and v once per block of kM queries,
// from L2: (2 * S_q + 2 * S_k * S_q / kM) * B * H * D * sizeof(T) bytes. The next keys are copied
// to shared memory while these are worked on.
#pragma once

#include "attention_cuda_tile.cuh"

namespace cgpt {
namespace {

// Keys that some query of the rows first .. first + rows - 1 may see, in tiles of n.
template <class T>
__device__ inline int key_tiles(const Call<T>& c, int first, int rows, int n) {
  int high = c.S_k;
  if (c.causal) {
    const int last = first + rows < c.S_q ? first + rows : c.S_q;
    high = last + c.shift < high ? last + c.shift : high;
  }
  return high > 0 ? (high + n - 1) / n : 0;
}
// Whether the tile of keys from j on lies beyond S_k or the causal edge for some row from i on.
template <class S, class T>
__device__ inline bool at_edge(const Call<T>& c, int i, int j) {
  return j + S::kN > c.S_k || (c.causal && j + S::kN - 1 > i + c.shift);
}

// Running statistics of a thread's rows: the maximum, and this lane's part of the sums.
template <class S>
struct Running {
  float top[S::kTiles][2], total[S::kTiles][2];

  __device__ Running() {
#pragma unroll
    for (int m = 0; m < S::kTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) top[m][half] = kNegative, total[m][half] = 0.0f;
  }
  // Logits to exp(logit - maximum), sums with them; shrink(m, half, factor) for what else is
  // relative to the maximum.
  template <class T, class Shrink>
  __device__ void add(typename S::Logits& s, const Call<T>& c, Shrink&& shrink) {
#pragma unroll
    for (int m = 0; m < S::kTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float high = kNegative;
#pragma unroll
        for (int n = 0; n < S::kN8; ++n)
          high = fmaxf(high, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        high = fmaxf(top[m][half], row_max(high));
        // A row that has seen no key yet: -inf - (-inf) would be NaN.
        const float base = high == kNegative ? 0.0f : high;
        const float factor = exponential(c, top[m][half] - base);
        top[m][half] = high;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < S::kN8; ++n)
#pragma unroll
          for (int column = 0; column < 2; ++column) {
            float& x = s[m][n][2 * half + column];
            x = exponential(c, x - base);
            sum += x;
          }
        total[m][half] = fmaf(total[m][half], factor, sum);
        shrink(m, half, factor);
      }
  }
};

template <class T>
struct Result {
  Heads<T> out;
  float* lse;
  int64_t lse_b, lse_h, lse_s;
};

template <class T>
Result<T> result_of(const AttentionArgs& a) {
  if (!a.lse) return {heads_of<T>(a.out), nullptr, 0, 0, 0};
  const int64_t* s = a.lse.strides;
  return {heads_of<T>(a.out), a.lse.as<float>(), s[0], s[1], s[2]};
}

template <class S, class T>
__global__ void __launch_bounds__(S::kThreads)
    attention_fwd_kernel(const Call<T> c, const Result<T> result) {
  auto& shared_memory = *shared<Shared<S, 1>>();
  T* const q = shared_memory.held[0];
  const int blocks = (c.S_q + S::kM - 1) / S::kM;
  // The last queries see the most keys under a causal mask: they go first.
  const int first = (blocks - 1 - static_cast<int>(block_x() % blocks)) * S::kM;
  const int64_t b = block_x() / blocks / c.H, h = block_x() / blocks % c.H;
  const Masks<T> masks(c, b, h);
  const T *k = c.k.head(b, h), *v = c.v.head(b, h);
  const int tiles = key_tiles(c, first, S::kM, S::kN);
  const auto fetch = [&](int tile) {
    auto& stage = shared_memory.streamed[tile % 2];
    const auto hidden = [&](int j) { return masks.hidden(c, j); };
    load_rows<S, S::kN>(stage[0], k, c.k, c.D, tile * S::kN, c.S_k, hidden);
    load_rows<S, S::kN>(stage[1], v, c.v, c.D, tile * S::kN, c.S_k, hidden);
    copy_async_commit();
  };
  load_rows<S, S::kM>(q, c.q.head(b, h), c.q, c.D, first, c.S_q);
  fetch(0);

  const int row = warp() * S::kWarpRows;  // the warp's first, within the block
  float out[S::kTiles][S::kD / 8][4] = {};
  Running<S> running;
  for (int tile = 0; tile < tiles; ++tile) {
    copy_async_wait<0>();
    block_barrier();  // the tile is there, and nobody reads the stage that comes next
    if (tile + 1 < tiles) fetch(tile + 1);
    const auto& stage = shared_memory.streamed[tile % 2];
    typename S::Logits s = {};
    multiply_rows<S>(s, q + row * S::kPitch, stage[0]);
    const int j = tile * S::kN;
    apply<S, false>(s, c, masks, first + row, j, at_edge<S>(c, first + row, j));
    running.add(s, c, [&](int m, int half, float factor) {
#pragma unroll
      for (int n = 0; n < S::kD / 8; ++n) {
        out[m][n][2 * half] *= factor;
        out[m][n][2 * half + 1] *= factor;
      }
    });
    if (c.dropout) drop<S>(s, kept_bits<S, false>(c, masks, first + row, j), 1.0f);
    multiply_weights<S>(out, s, stage[1], shared_memory.weights());
  }

  copy_async_wait<0>();
  block_barrier();
#pragma unroll
  for (int m = 0; m < S::kTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = row_sum(running.total[m][half]), top = running.top[m][half];
      const float factor = total > 0.0f ? (c.dropout ? c.kept : 1.0f) / total : 0.0f;
#pragma unroll
      for (int n = 0; n < S::kD / 8; ++n) {
        out[m][n][2 * half] *= factor;
        out[m][n][2 * half + 1] *= factor;
      }
      const int i = first + row + m * 16 + 8 * half + lane() / 4;
      if (result.lse && lane() % 4 == 0 && i < c.S_q)
        result.lse[b * result.lse_b + h * result.lse_h + i * result.lse_s] =
            total > 0.0f ? (c.scaled ? top : top * c.scale) + logf(total) : kNegative;
    }
  store_rows<S>(q + row * S::kPitch, out, result.out.head(b, h), result.out.s, result.out.aligned,
                c.D, first + row, c.S_q);
}

}  // namespace
}  // namespace cgpt
