// One token of a whole model in one launch: what its blocks do, all of them side by side.
//
// The step is a list of phases, qkv, proj, fc and out of each layer and at last the head, with a
// meeting of all blocks after each and one more behind attention: 5 a layer. A phase multiplies its
// input, at most 4 rows that every block lays into its own shared memory (embedding and layer norms
// are done on the way in), by a weight [N, K]. Weights do not wait for the meetings: the order in
// which a warp needs them is known before the step begins, so each warp streams its part of all
// phases, 16 bytes a lane, through a ring in shared memory that runs ahead of the products.
//
// A block owns groups of 4 columns; a group's products over 32 lanes' worth of K are an item, the
// items of a round of groups are dealt to the block's warps, and a group's items are added up in
// the order of K. So the number of blocks changes no bit.
//
// Traffic: every weight once, the visible keys and values once; the input of a phase once per block
// from L2. The floor is their bytes / bandwidth: 219 MB, 65 us at 3.35 TB/s for 111M in bf16, 2.6
// GB, 780 us for 1.3B. Unmeasured.
#pragma once

#include "../cuda/device.cuh"
#include "../ops/attention/attention_cuda_split.cuh"
#include "../ops/gemm/gemm_epilogue.cuh"
#include "decoder_candidate.cuh"

namespace cgpt {
namespace {

using namespace cuda;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kColumns = 4;  // of a weight, multiplied at once: a value of x serves four products
// Items under way of each warp: 64 KB a block, four times what Little's law asks for (2 MB at 3.3
// TB/s and 600 ns over 132 blocks), for what a meeting takes.
constexpr int kDepth = 4;
constexpr int kItems = 64;       // of a round: their sums lie in shared memory
constexpr int kMostLayers = 48;  // pointers are arguments of the kernel
constexpr int kChunk = 64;       // keys that a warp takes

enum Kind : int { kQkv, kProj, kFc, kOut, kHead };

template <class T>
struct Persistent {
  const T* weight[4 * kMostLayers + 1];  // by phase, [N, K] dense
  const void* bias[4 * kMostLayers + 1];
  const void* norm_weight[2 * kMostLayers + 1];  // two a layer, and the last one
  const void* norm_bias[2 * kMostLayers + 1];
  float attention_scale[kMostLayers];
  bool bias_f32, norm_f32, last_norm_f32;  // else T
  const T *wte, *wpe;
  int64_t wte_row, wpe_row;
  int64_t* tokens;
  int64_t* length;
  const int64_t* padding;
  uint8_t* hidden;
  int64_t total;
  T *keys, *values;          // [L, B, H, total, D] dense
  T *x, *q, *heads, *inner;  // columns of the room, rows `row` apart
  T* logits;                 // [B, V] dense
  float* parts;              // [B * H, most chunks, D + 2]: shares of attention
  int* arrived;              // [B * H]: chunks that are done; 0 between steps
  Candidate* best;           // [blocks, rows]
  unsigned* meeting;
  int64_t row;
  int L, B, C, H, D, widest, V, most_chunks;
  int lanes;  // that take a key
  float eps, embeddings_scale;
  Activation activation;

  __device__ int phases() const { return 4 * L + 1; }
  __device__ int kind(int phase) const { return phase == 4 * L ? kHead : phase % 4; }
  __device__ int N(int phase) const {
    switch (kind(phase)) {
      case kQkv: return 3 * C;
      case kFc: return widest;
      case kHead: return V;
      default: return C;
    }
  }
  __device__ int K(int phase) const { return kind(phase) == kOut ? widest : C; }
};

template <class T, int kRows>
struct PersistentShared {
  static constexpr int kOutputs = kRows * kColumns;
  Vec<T> ring[kWarps][kDepth][kColumns][kWarp];
  float partial[2][kItems][kOutputs];
  float scratch[kWarps];
  Candidate found[kThreads];

  // [kRows][K], behind it.
  __device__ static T* x() { return shared<T>(sizeof(PersistentShared)); }
};

// ---- weights ------------------------------------------------------------------------------------

// This block's groups of a phase's columns, and what a round of them is.
template <class T>
struct Work {
  const T* weight;
  int N, K, groups, slices, round;

  __device__ Work(const Persistent<T>& p, int phase) {
    constexpr int kSlice = kWarp * Vec<T>::kSize;
    weight = p.weight[phase], N = p.N(phase), K = p.K(phase);
    const int all = (N + kColumns - 1) / kColumns, blocks = static_cast<int>(blocks_x());
    groups = (all - static_cast<int>(block_x()) + blocks - 1) / blocks;
    slices = (K + kSlice - 1) / kSlice;
    round = slices < kItems ? kItems / slices : 1;
  }
  __device__ int items(int first) const {
    const int left = groups - first;
    return (left < round ? left : round) * slices;
  }
  // The first column of the group that is this block's number `group`.
  __device__ int column(int group) const {
    return (static_cast<int>(block_x()) + group * static_cast<int>(blocks_x())) * kColumns;
  }
};

// What a warp copies next, kDepth items before it multiplies them.
template <class T>
struct Stream {
  Work<T> work;
  int phase = 0, first = 0, item, turn = 0;

  __device__ explicit Stream(const Persistent<T>& p) : work(p, 0), item(warp()) { skip(p); }

  // On to a round that has an item for this warp.
  __device__ void skip(const Persistent<T>& p) {
    while (phase < p.phases() && item >= work.items(first)) {
      item = warp();
      first += work.round;
      if (first < work.groups) continue;
      first = 0;
      if (++phase < p.phases()) work = Work<T>(p, phase);
    }
  }
  // A lane reads back only what it copied itself.
  __device__ void copy(const Persistent<T>& p, Vec<T> (&stage)[kColumns][kWarp]) {
    if (phase < p.phases()) {
      const int n = work.column(first + item / work.slices);
      const int k = (item % work.slices * kWarp + lane()) * Vec<T>::kSize;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const bool there = n + j < work.N && k < work.K;
        const int64_t at = there ? int64_t{n + j} * work.K + k : 0;
        copy_async<16>(&stage[j][lane()], work.weight + at, there);
      }
      item += kWarps;
      skip(p);
    }
    copy_async_commit();
  }
};

// v[i] summed over the warp, of which lane 32 / n * i is left with v[i]: n - 1 + log2(32 / n)
// shuffles. The order of the sum is that of a butterfly.
template <int n>
__device__ inline float scatter_sum(float (&v)[n]) {
#pragma unroll
  for (int count = n, offset = kWarp / 2; offset > 0; offset /= 2, count /= 2) {
    const bool upper = lane() & offset;
    if (count > 1) {
#pragma unroll
      for (int i = 0; i < count / 2; ++i) {
        const float kept = upper ? v[i + count / 2] : v[i];
        const float given = upper ? v[i] : v[i + count / 2];
        v[i] = kept + shuffle_xor(given, offset);
      }
    } else {
      v[0] += shuffle_xor(v[0], offset);
    }
  }
  return v[0];
}

// x [B, K], in shared memory, by the phase's weight; finish(m, n, sum) for each of this block's
// columns, by a thread that always has the same m.
template <class T, int kRows, class F>
__device__ inline void multiply(const Persistent<T>& p, PersistentShared<T, kRows>& s,
                                Stream<T>& stream, int phase, F&& finish) {
  constexpr int kOutputs = kRows * kColumns, N = Vec<T>::kSize;
  static_assert(kThreads % kOutputs == 0 && kOutputs <= kWarp);
  const Work<T> work(p, phase);
  const T* const x = s.x();
  int half = 0;
  for (int first = 0; first < work.groups; first += work.round, half ^= 1) {
    const int items = work.items(first);
    for (int item = warp(); item < items; item += kWarps) {
      auto& stage = s.ring[warp()][stream.turn];
      stream.turn = (stream.turn + 1) % kDepth;
      copy_async_wait<kDepth - 1>();
      Vec<T> w[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) w[j] = load16(&stage[j][lane()][0]);
      const int k = (item % work.slices * kWarp + lane()) * N;
      float sums[kOutputs] = {};
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        const auto row = load_part<true, N>(x + m * work.K + k, work.K - k);
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
#pragma unroll
          for (int i = 0; i < N; ++i)
            sums[m * kColumns + j] =
                fmaf(to_float(row[i]), to_float(w[j][i]), sums[m * kColumns + j]);
      }
      stream.copy(p, stage);
      const float sum = scatter_sum(sums);
      constexpr int kEach = kWarp / kOutputs;
      if (lane() % kEach == 0) s.partial[half][item][lane() / kEach] = sum;
    }
    block_barrier();  // with the other half of `partial` a round later, the only one
    const int groups = items / work.slices;
    for (int o = thread(); o < groups * kOutputs; o += kThreads) {
      const int group = o / kOutputs, within = o % kOutputs, m = within / kColumns;
      const int n = work.column(first + group) + within % kColumns;
      float sum = 0.0f;
      for (int i = 0; i < work.slices; ++i) sum += s.partial[half][group * work.slices + i][within];
      if (m < p.B && n < work.N) finish(m, n, sum);
    }
  }
}

// ---- the input of a phase -----------------------------------------------------------------------

template <class T, int N>
__device__ inline Vec<float, N> parameters(const void* p, bool f32, int at) {
  Vec<float, N> v{};
  if (!p) return v;
  if (f32 || sizeof(T) == 4) return load<N>(static_cast<const float*>(p) + at);
  const auto narrow = load<N>(static_cast<const T*>(p) + at);
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = to_float(narrow[i]);
  return v;
}
template <class T>
__device__ inline float parameter(const void* p, bool f32, int at) {
  return p ? parameters<T, 1>(p, f32, at)[0] : 0.0f;
}

// Over the threads that share a row.
template <int kRows>
__device__ inline float row_total(float x, float* scratch) {
  constexpr int kEach = kWarps / kRows;
  x = warp_sum(x);
  block_barrier();
  if (lane() == 0) scratch[warp()] = x;
  block_barrier();
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kEach; ++i) total += scratch[warp() / kEach * kEach + i];
  return total;
}

// Lays the input of a phase into shared memory: heads, inner values, or the residual stream
// normalised, which at the first phase is the embedding of the step's tokens.
template <class T, int kRows>
__device__ inline void lay_input(const Persistent<T>& p, PersistentShared<T, kRows>& s, int phase,
                                 int64_t at) {
  constexpr int N = Vec<T>::kSize, kSpan = kThreads / kRows;
  const int kind = p.kind(phase), K = p.K(phase), m = thread() / kSpan;
  const bool there = m < p.B;
  const T* from = p.x;
  if (kind == kProj) from = p.heads;
  if (kind == kOut) from = p.inner;
  const T *token = p.wte, *position = p.wpe;
  if (phase == 0 && there) {
    const int64_t behind = at - p.padding[m];
    token += p.tokens[m * p.total + at] * p.wte_row;
    position += (behind > 0 ? behind : 0) * p.wpe_row;
    if (block_x() == 0 && thread() % kSpan == 0) p.hidden[m * p.total + at] = behind < 0;
  }
  T* const row = s.x() + m * K;
  float total = 0.0f;
  for (int c = thread() % kSpan * N; c < K; c += kSpan * N) {
    Vec<T> v{};
    if (there && phase == 0) {
      const auto a = load16(token + c), b = load16(position + c);
#pragma unroll
      for (int i = 0; i < N; ++i)
        v[i] = from_float<T>((to_float(a[i]) + to_float(b[i])) * p.embeddings_scale);
      if (block_x() == 0) store(p.x + m * p.row + c, v);
    } else if (there) {
      v = load16(from + m * p.row + c);
    }
    store(row + c, v);
#pragma unroll
    for (int i = 0; i < N; ++i) total += to_float(v[i]);
  }
  if (kind == kProj || kind == kOut) return;
  const float mean = row_total<kRows>(total, s.scratch) / static_cast<float>(K);
  float squares = 0.0f;
  for (int c = thread() % kSpan * N; c < K; c += kSpan * N) {
    const auto v = load16(row + c);
#pragma unroll
    for (int i = 0; i < N; ++i)
      squares = fmaf(to_float(v[i]) - mean, to_float(v[i]) - mean, squares);
  }
  const float variance = row_total<kRows>(squares, s.scratch) / static_cast<float>(K);
  const float rstd = 1.0f / sqrtf(variance + p.eps);
  const int which = phase / 2;  // norm1 before qkv, norm2 before fc
  const bool f32 = kind == kHead ? p.last_norm_f32 : p.norm_f32;
  for (int c = thread() % kSpan * N; c < K; c += kSpan * N) {
    auto v = load16(row + c);
    const auto weight = parameters<T, N>(p.norm_weight[which], f32, c);
    const auto bias = parameters<T, N>(p.norm_bias[which], f32, c);
#pragma unroll
    for (int i = 0; i < N; ++i)
      v[i] = from_float<T>(fmaf((to_float(v[i]) - mean) * rstd, weight[i], bias[i]));
    store(row + c, v);
  }
}

// ---- attention ----------------------------------------------------------------------------------

// Chunk `chunk` of the keys that are visible at `at`, for one head of one sequence; D / 8 lanes, a
// power of two, take a key. Leaves the share in every lane of each group.
template <class T>
__device__ inline Share attend_chunk(const Persistent<T>& p, int l, int b, int h, int chunk,
                                     int64_t at, int lanes, float (&sums)[kLaneValues]) {
  const int d = lane() % lanes * kLaneValues, groups = kWarp / lanes, group = lane() / lanes;
  const bool mine = d < p.D;
  Vec<T, kLaneValues> q{};
  if (mine) q = load<kLaneValues>(p.q + b * p.row + h * p.D + d);
  const int64_t head = ((int64_t{l} * p.B + b) * p.H + h) * p.total * p.D;
  const T *k = p.keys + head + d, *v = p.values + head + d;
  int64_t low = int64_t{chunk} * kChunk, high = low + kChunk;
  if (high > at + 1) high = at + 1;
  if (low < p.padding[b]) low = p.padding[b];
  const float scale = p.attention_scale[l];
  Share own;
  for (int64_t start = low; start < high; start += groups * kKeysAtOnce) {
    Vec<T, kLaneValues> ks[kKeysAtOnce]{}, vs[kKeysAtOnce]{};
#pragma unroll
    for (int u = 0; u < kKeysAtOnce; ++u) {
      const int64_t j = start + u * groups + group;
      if (!mine || j >= high) continue;
      ks[u] = load<kLaneValues>(k + j * p.D);
      vs[u] = load<kLaneValues>(v + j * p.D);
    }
    take_keys(
        own, sums, q, ks, vs, lanes,
        [&](int u, float product) {
          return start + u * groups + group < high ? product * scale : -INFINITY;
        },
        [](int, float weight) { return weight; });
  }
  join_groups<T>(own, sums, lanes);
  return own;
}

// A warp per head and chunk; the warp that finishes a head's last chunk joins them, in their order.
template <class T>
__device__ inline void attend(const Persistent<T>& p, int l, int64_t at) {
  const int chunks = static_cast<int>(at / kChunk) + 1,
            warps = static_cast<int>(blocks_x()) * kWarps, lanes = p.lanes;
  const int first = static_cast<int>(block_x()) + warp() * static_cast<int>(blocks_x());
  for (int unit = first; unit < p.B * p.H * chunks; unit += warps) {
    const int head = unit / chunks, chunk = unit % chunks, b = head / p.H, h = head % p.H;
    float sums[kLaneValues] = {};
    const Share share = attend_chunk(p, l, b, h, chunk, at, lanes, sums);
    T* const out = p.heads + b * p.row + h * p.D;
    const int d = lane() * kLaneValues;
    if (chunks == 1) {
      const float factor = share.total > 0.0f ? 1.0f / share.total : 0.0f;
      Vec<T, kLaneValues> y;
#pragma unroll
      for (int i = 0; i < kLaneValues; ++i) y[i] = from_float<T>(sums[i] * factor);
      if (d < p.D) store(out + d, y);
      continue;
    }
    float* const parts = p.parts + int64_t{head} * p.most_chunks * (p.D + 2);
    float* const part = parts + int64_t{chunk} * (p.D + 2);
    if (d < p.D)
#pragma unroll
      for (int i = 0; i < kLaneValues; ++i) part[d + i] = sums[i];
    if (lane() == 0) part[p.D] = share.top, part[p.D + 1] = share.total;
    fence();
    warp_barrier();
    int before = 0;
    if (lane() == 0) before = atomic_add(p.arrived + head, 1);
    if (shuffle(before, 0) != chunks - 1) continue;
    fence();
    for (int column = lane(); column < p.D; column += kWarp) {
      Share all;
      float sum = 0.0f;
      for (int i = 0; i < chunks; ++i) {
        const float* const other = parts + int64_t{i} * (p.D + 2);
        float fa, fb;
        common<T>(all, {other[p.D], other[p.D + 1]}, fa, fb);
        sum = sum * fa + other[column] * fb;
      }
      out[column] = from_float<T>(all.total > 0.0f ? sum / all.total : 0.0f);
    }
    if (lane() == 0) p.arrived[head] = 0;
  }
}

// ---- the step -----------------------------------------------------------------------------------

template <class T, int kRows>
__global__ void __launch_bounds__(kThreads, 1) decoder_persistent_kernel(const Persistent<T> p) {
  auto& s = *shared<PersistentShared<T, kRows>>();
  constexpr int kOutputs = kRows * kColumns;
  const int64_t at = p.length[0];
  Stream<T> stream(p);
#pragma unroll 1
  for (int i = 0; i < kDepth; ++i) stream.copy(p, s.ring[warp()][i]);
  Candidate best{-INFINITY, kNoToken};
#pragma unroll 1
  for (int phase = 0; phase < p.phases(); ++phase) {
    const int kind = p.kind(phase), l = phase / 4;
    if (kind == kProj) {
      attend(p, l, at);
      grid_barrier(p.meeting);
    }
    lay_input(p, s, phase, at);
    block_barrier();
    multiply(p, s, stream, phase, [&](int m, int n, float sum) {
      sum += parameter<T>(p.bias[phase], p.bias_f32, n);
      if (kind == kQkv && n >= p.C) {
        const int c = n % p.C, head = (l * p.B + m) * p.H + c / p.D;
        T* const cache = n < 2 * p.C ? p.keys : p.values;
        cache[(head * p.total + at) * p.D + c % p.D] = from_float<T>(sum);
      } else if (kind == kQkv) {
        p.q[m * p.row + n] = from_float<T>(sum);
      } else if (kind == kFc) {
        p.inner[m * p.row + n] = from_float<T>(activate(sum, p.activation));
      } else if (kind == kHead) {
        const T logit = from_float<T>(sum);
        p.logits[int64_t{m} * p.V + n] = logit;
        best.take({to_float(logit), n});
      } else {
        T& x = p.x[m * p.row + n];
        x = from_float<T>(to_float(x) + sum);
      }
    });
    if (kind != kHead) grid_barrier(p.meeting);
  }

  s.found[thread()] = best;
  block_barrier();
  if (warp() < p.B) {
    Candidate mine{-INFINITY, kNoToken};
    for (int i = lane(); i < kThreads; i += kWarp)
      if (i % kOutputs / kColumns == warp()) mine.take(s.found[i]);
    mine = best_of_warp(mine);
    if (lane() == 0) p.best[block_x() * kRows + static_cast<unsigned>(warp())] = mine;
  }
  grid_barrier(p.meeting);
  if (block_x() != 0 || warp() >= p.B) return;
  Candidate all{-INFINITY, kNoToken};
  for (unsigned i = static_cast<unsigned>(lane()); i < blocks_x(); i += kWarp)
    all.take(p.best[i * kRows + static_cast<unsigned>(warp())]);
  all = best_of_warp(all);
  if (lane() != 0) return;
  if (at + 1 < p.total) p.tokens[warp() * p.total + at + 1] = all.token;
  p.length[warp()] = at + 1;
}

}  // namespace
}  // namespace cgpt
