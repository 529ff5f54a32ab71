// Few queries against many keys, the step of generation: limited by reading k and v once,
// 2 * S_k * D * sizeof(T) bytes a head, half of bf16's and 8 * S_k where they are int8, so no
// tensor cores and nothing in shared memory.
//
// A block streams one chunk of keys for one query, a group of lanes four keys at a time
// (attention_cuda_split.cuh). Groups, warps and chunks are merged in a fixed order; chunks by a
// second kernel.
#pragma once

#include "attention_cuda_fwd.cuh"
#include "attention_cuda_split.cuh"

namespace cgpt {
namespace {

constexpr int kDecodeThreads = 128;

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

// Keys and values as they are stored.
template <class KV>
struct Stored {
  Heads<const KV> k, v;
  const float *k_scale, *v_scale;  // [B, H, S_k], of int8
  int64_t k_scale_b, k_scale_h, v_scale_b, v_scale_h;
};

template <class T>
__device__ inline Vec<T, kLaneValues> load_values(const T* p, int count, bool whole) {
  return whole ? load_part<true, kLaneValues>(p, count) : load_part<false, kLaneValues>(p, count);
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

// Three blocks a multiprocessor: told nothing, ptxas stops one kernel at 128 registers and spills.
template <class T, class KV>
__global__ void __launch_bounds__(kDecodeThreads, 3)
    attention_decode_kernel(const Call<T> c, const Stored<KV> kv, const Result<T> result,
                            const Parts parts) {
  constexpr bool kScaled = sizeof(KV) == 1;
  auto& s = *shared<DecodeShared>();
  const int64_t row = block_x(), head = row / c.S_q, b = head / c.H, h = head % c.H;
  const int i = static_cast<int>(row % c.S_q);
  const Masks<T> masks(c, b, h);
  const int lanes = parts.lanes, groups = kDecodeThreads / lanes;
  const int group = thread() / lanes, d = thread() % lanes * kLaneValues, left = c.D - d;
  const auto q = load_values(c.q.head(b, h) + i * c.q.s + d, left, c.q.aligned);
  const KV *k = kv.k.head(b, h) + d, *v = kv.v.head(b, h) + d;
  const float* const k_scale = kv.k_scale + b * kv.k_scale_b + h * kv.k_scale_h;
  const float* const v_scale = kv.v_scale + b * kv.v_scale_b + h * kv.v_scale_h;
  const int low = static_cast<int>(block_y()) * parts.chunk;
  int high = low + parts.chunk < c.S_k ? low + parts.chunk : c.S_k;
  if (c.causal && i + c.shift + 1 < high) high = i + c.shift + 1;

  Share own;
  float sums[kLaneValues] = {};
  for (int start = low; start < high; start += groups * kKeysAtOnce) {
    Vec<KV, kLaneValues> ks[kKeysAtOnce], vs[kKeysAtOnce];
    float k_scales[kKeysAtOnce], v_scales[kKeysAtOnce];
#pragma unroll
    for (int u = 0; u < kKeysAtOnce; ++u) {
      const int j = start + u * groups + group;
      const bool there = j < high && !masks.hidden(c, j);
      ks[u] = load_values(k + j * kv.k.s, there ? left : 0, kv.k.aligned);
      vs[u] = load_values(v + j * kv.v.s, there ? left : 0, kv.v.aligned);
      if constexpr (kScaled) {
        k_scales[u] = there ? k_scale[j] : 0.0f;
        v_scales[u] = there ? v_scale[j] : 0.0f;
      }
    }
    take_keys(
        own, sums, q, ks, vs, lanes,
        [&](int u, float product) {
          const int j = start + u * groups + group;
          if constexpr (kScaled) product *= k_scales[u];
          return j < high ? masks.logit(c, product, i, j) : kNegative;
        },
        [&](int u, float weight) {
          if (c.dropout && !masks.keeps(c, i, start + u * groups + group)) return 0.0f;
          if constexpr (kScaled) weight *= v_scales[u];
          return weight;
        });
  }
  join_groups<T>(own, sums, lanes);
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
      common<T>(all, {s.top[w], s.total[w]}, fa, fb);
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
      common<T>(all, {parts.top[at], parts.total[at]}, fa, fb);
      sum = sum * fa + parts.sums[at * c.D + column] * fb;
    }
    write_row(c, result, head / c.H, head % c.H, static_cast<int>(row % c.S_q), column, sum, all);
  }
}

}  // namespace
}  // namespace cgpt
