// Few queries against many keys, the step of generation: limited by reading k and v once,
// 2 * S_k * D * sizeof(T) bytes a head, so no tensor cores and nothing in shared memory.
//
// A block streams one chunk of keys for one query; 8 values of a key lie in a lane, so D / 8 lanes
// (a power of two) are a group that takes a key, four keys at a time for 16-byte loads in flight.
// Groups, warps and chunks are merged in a fixed order; chunks by a second kernel.
#pragma once

#include "attention_cuda_fwd.cuh"

namespace cgpt {
namespace {

constexpr int kDecodeThreads = 128;
constexpr int kLaneValues = 8;
constexpr int kKeysAtOnce = 4;

struct DecodeShared {
  static constexpr int kWarps = kDecodeThreads / kWarp;
  float sums[kWarps][kAttentionWidest];
  float top[kWarps], total[kWarps];
};

// Where the parts of B * H * S_q rows lie: [chunks, rows, D], then [chunks, rows] maxima and
// totals.
struct Parts {
  float* sums;
  float *top, *total;
  int64_t rows;
  int chunk, chunks, lanes;  // lanes of a group
};

template <class T>
__device__ inline Vec<T, kLaneValues> load_values(const T* p, int count, bool whole) {
  return whole ? load_part<true, kLaneValues>(p, count) : load_part<false, kLaneValues>(p, count);
}

// A share of a softmax over keys: `total` and sums relative to exp(top).
struct Share {
  float top = kNegative, total = 0.0f;
};
// Factors that bring two shares to their common maximum, which a takes over.
template <class T>
__device__ inline void common(const Call<T>& c, Share& a, const Share& b, float& fa, float& fb) {
  const float high = fmaxf(a.top, b.top), base = high == kNegative ? 0.0f : high;
  fa = exponential(c, a.top - base), fb = exponential(c, b.top - base);
  a.top = high;
  a.total = a.total * fa + b.total * fb;
}

template <class T>
__device__ inline void write_row(const Call<T>& c, const Result<T>& result, int64_t b, int64_t h,
                                 int i, int d, float sum, const Share& share) {
  const float factor = share.total > 0.0f ? (c.dropout ? c.kept : 1.0f) / share.total : 0.0f;
  result.out.head(b, h)[i * result.out.s + d] = from_float<T>(sum * factor);
  if (d == 0 && result.lse)
    result.lse[b * result.lse_b + h * result.lse_h + i * result.lse_s] =
        share.total > 0.0f ? share.top + logf(share.total) : kNegative;
}

template <class T>
__global__ void __launch_bounds__(kDecodeThreads)
    attention_decode_kernel(const Call<T> c, const Result<T> result, const Parts parts) {
  auto& s = *shared<DecodeShared>();
  const int64_t row = block_x(), head = row / c.S_q, b = head / c.H, h = head % c.H;
  const int i = static_cast<int>(row % c.S_q);
  const Masks<T> masks(c, b, h);
  const int lanes = parts.lanes, groups = kDecodeThreads / lanes;
  const int group = thread() / lanes, d = thread() % lanes * kLaneValues, left = c.D - d;
  const auto q = load_values(c.q.head(b, h) + i * c.q.s + d, left, c.q.aligned);
  const T *k = c.k.head(b, h) + d, *v = c.v.head(b, h) + d;
  const int low = static_cast<int>(block_y()) * parts.chunk;
  int high = low + parts.chunk < c.S_k ? low + parts.chunk : c.S_k;
  if (c.causal && i + c.shift + 1 < high) high = i + c.shift + 1;

  Share own;
  float sums[kLaneValues] = {};
  for (int start = low; start < high; start += groups * kKeysAtOnce) {
    Vec<T, kLaneValues> ks[kKeysAtOnce], vs[kKeysAtOnce];
    float logits[kKeysAtOnce];
#pragma unroll
    for (int u = 0; u < kKeysAtOnce; ++u) {
      const int j = start + u * groups + group;
      const bool there = j < high && !masks.hidden(c, j);
      ks[u] = load_values(k + j * c.k.s, there ? left : 0, c.k.aligned);
      vs[u] = load_values(v + j * c.v.s, there ? left : 0, c.v.aligned);
    }
    float top = own.top;
#pragma unroll
    for (int u = 0; u < kKeysAtOnce; ++u) {
      float product = 0.0f;
#pragma unroll
      for (int x = 0; x < kLaneValues; ++x)
        product = fmaf(to_float(q[x]), to_float(ks[u][x]), product);
      for (int offset = lanes / 2; offset > 0; offset /= 2) product += shuffle_xor(product, offset);
      const int j = start + u * groups + group;
      logits[u] = j < high ? masks.logit(c, product, i, j) : kNegative;
      top = fmaxf(top, logits[u]);
    }
    const float base = top == kNegative ? 0.0f : top;
    const float factor = exponential(c, own.top - base);
    own.top = top;
    own.total *= factor;
#pragma unroll
    for (int x = 0; x < kLaneValues; ++x) sums[x] *= factor;
#pragma unroll
    for (int u = 0; u < kKeysAtOnce; ++u) {
      float weight = exponential(c, logits[u] - base);
      own.total += weight;
      if (c.dropout && !masks.keeps(c, i, start + u * groups + group)) weight = 0.0f;
#pragma unroll
      for (int x = 0; x < kLaneValues; ++x) sums[x] = fmaf(weight, to_float(vs[u][x]), sums[x]);
    }
  }
  for (int offset = lanes; offset < kWarp; offset *= 2) {
    Share other;
    other.top = shuffle_xor(own.top, offset), other.total = shuffle_xor(own.total, offset);
    float fa, fb;
    common(c, own, other, fa, fb);
#pragma unroll
    for (int x = 0; x < kLaneValues; ++x)
      sums[x] = sums[x] * fa + shuffle_xor(sums[x], offset) * fb;
  }
  if (lane() < lanes) {
#pragma unroll
    for (int x = 0; x < kLaneValues; ++x)
      if (x < left) s.sums[warp()][d + x] = sums[x];
    if (lane() == 0) s.top[warp()] = own.top, s.total[warp()] = own.total;
  }
  block_barrier();
  for (int column = thread(); column < c.D; column += kDecodeThreads) {
    Share all{s.top[0], s.total[0]};
    float sum = s.sums[0][column];
#pragma unroll
    for (int w = 1; w < DecodeShared::kWarps; ++w) {
      float fa, fb;
      common(c, all, {s.top[w], s.total[w]}, fa, fb);
      sum = sum * fa + s.sums[w][column] * fb;
    }
    if (parts.chunks == 1) {
      write_row(c, result, b, h, i, column, sum, all);
      continue;
    }
    const int64_t at = block_y() * parts.rows + row;
    parts.sums[at * c.D + column] = sum;
    if (column == 0) parts.top[at] = all.top, parts.total[at] = all.total;
  }
}

// A block per row of q.
template <class T>
__global__ void __launch_bounds__(kDecodeThreads)
    attention_join_kernel(const Call<T> c, const Result<T> result, const Parts parts) {
  const int64_t row = block_x(), head = row / c.S_q;
  for (int column = thread(); column < c.D; column += kDecodeThreads) {
    Share all;
    float sum = 0.0f;
    for (int chunk = 0; chunk < parts.chunks; ++chunk) {
      const int64_t at = chunk * parts.rows + row;
      float fa, fb;
      common(c, all, {parts.top[at], parts.total[at]}, fa, fb);
      sum = sum * fa + parts.sums[at * c.D + column] * fb;
    }
    write_row(c, result, head / c.H, head % c.H, static_cast<int>(row % c.S_q), column, sum, all);
  }
}

}  // namespace
}  // namespace cgpt
