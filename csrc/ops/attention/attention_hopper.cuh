// Attention forward on Hopper: wgmma and TMA (csrc/cuda/hopper.cuh), for the calls that training
// and prefill of GPT-2-class models make: 16 bits, D of 64, 80 or 128, causal or not, no other
// mask.
//
// A block holds kGroups * 64 queries, a warp group 64 of them, and streams tiles of kN keys. One
// thread of a further warp group copies, kStages tiles ahead; of each stage it waits until all warp
// groups have released it. While a group takes the exponentials of a tile, the tensor cores add up
// the tile before: its logits are asked for first, then the sums of the last weights with v
// (Shah et al., "FlashAttention-3", arXiv 2407.08608, section 3.2).
//
// q is read and out written once, k and v once per block of queries, from L2:
// (2 * S_q + 2 * S_k * S_q / kM) * B * H * D * 2 bytes.
//
// D is cut into columns of 64 values, the lines of the swizzle; of 80 the second one is zeros from
// the 16th value on, and only what exists is multiplied.
#pragma once

#include "../../cuda/hopper.cuh"
#include "attention_cuda_fwd.cuh"

namespace cgpt {
namespace {

template <class T_, int kD_, int kGroups_>
struct HopperShape {
  using T = T_;
  static constexpr int kD = kD_, kGroups = kGroups_, kN = 128, kStages = 2;
  static constexpr int kM = kGroups * 64, kThreads = (kGroups + 1) * kGroup;
  static constexpr int kColumns = (kD + kLine - 1) / kLine;
  // 64 K registers a multiprocessor: the copying group gives up what the others take.
  static constexpr int kFewRegisters = kGroups == 2 ? 24 : 32;
  static constexpr int kManyRegisters = kGroups == 2 ? 240 : 160;
  static_assert(kD % 16 == 0);
};

template <class S>
struct HopperShared {
  using T = typename S::T;
  // each column of 64 values in atoms of 1024 bytes
  alignas(1024) T q[S::kColumns][S::kM][kLine];
  alignas(1024) T k[S::kStages][S::kColumns][S::kN][kLine];
  alignas(1024) T v[S::kStages][S::kColumns][S::kN][kLine];
  Barrier q_there, k_there[S::kStages], v_there[S::kStages], k_free[S::kStages], v_free[S::kStages];
};
// What a launch asks for: its memory is aligned to 16 bytes only.
template <class S>
constexpr int64_t kHopperBytes = sizeof(HopperShared<S>) + 1024;

struct HopperMaps {
  TensorMap q, k, v;
};

// A stage of a ring of kStages and the parity of its phase, of the tile-th use.
template <class S>
struct Stage {
  int at, parity;
  __device__ explicit Stage(int tile) : at(tile % S::kStages), parity(tile / S::kStages & 1) {}
};

template <class S>
__device__ inline void copy_tiles(HopperShared<S>& s, const HopperMaps& maps, int first, int tiles,
                                  int h, int b) {
  constexpr int kRowBytes = S::kColumns * kLine * 2;
  const auto copy = [&](auto& to, const TensorMap& map, Barrier& there, int row) {
#pragma unroll
    for (int c = 0; c < S::kColumns; ++c) copy_box(to[c], map, there, c * kLine, row, h, b);
  };
  barrier_expect(s.q_there, S::kM * kRowBytes);
  copy(s.q, maps.q, s.q_there, first);
  for (int tile = 0; tile < tiles; ++tile) {
    const Stage<S> stage(tile);
    // Nobody has to release a stage before its first use: "the phase before the first" has ended.
    barrier_wait(s.k_free[stage.at], stage.parity ^ 1);
    barrier_expect(s.k_there[stage.at], S::kN * kRowBytes);
    copy(s.k[stage.at], maps.k, s.k_there[stage.at], tile * S::kN);
    barrier_wait(s.v_free[stage.at], stage.parity ^ 1);
    barrier_expect(s.v_there[stage.at], S::kN * kRowBytes);
    copy(s.v[stage.at], maps.v, s.v_there[stage.at], tile * S::kN);
  }
}

// logits[64, kN] = q k^T of a group's 64 rows.
template <class S>
__device__ inline void ask_logits(float (&logits)[S::kN / 2], const HopperShared<S>& s, int group,
                                  int stage) {
  wgmma_begin();
#pragma unroll
  for (int d = 0; d < S::kD; d += 16)
    wgmma<typename S::T, S::kN>(logits, operand(&s.q[d / kLine][group * 64][d % kLine]),
                                operand(&s.k[stage][d / kLine][0][d % kLine]), d > 0);
  wgmma_end();
}

// out[64, kD] += weights[64, kN] v
template <class S>
__device__ inline void ask_sums(float (&out)[S::kD / 2], const uint32_t (&weights)[S::kN / 16][4],
                                const HopperShared<S>& s, int stage) {
  constexpr int kNext = S::kN * kLine * 2;
  wgmma_begin();
#pragma unroll
  for (int j = 0; j < S::kN; j += 16) {
    if constexpr (S::kD % kLine == 0) {
      wgmma_rows<typename S::T, S::kD>(out, weights[j / 16], operand(&s.v[stage][0][j][0], kNext));
    } else {
      constexpr int kTail = S::kD % kLine;
      static_assert(S::kColumns == 2);
      wgmma_rows<typename S::T, kLine>(reinterpret_cast<float (&)[kLine / 2]>(out), weights[j / 16],
                                       operand(&s.v[stage][0][j][0], kNext));
      wgmma_rows<typename S::T, kTail>(reinterpret_cast<float (&)[kTail / 2]>(out[kLine / 2]),
                                       weights[j / 16], operand(&s.v[stage][1][j][0], kNext));
    }
  }
  wgmma_end();
}

// The running maximum and this lane's part of the sum of its two rows, g and g + 8 of the warp's.
struct HopperRows {
  float top[2] = {kNegative, kNegative}, total[2] = {0.0f, 0.0f}, factor[2] = {1.0f, 1.0f};

  // Logits to exp(logit - maximum), 0 beyond key last[half] of the tile where it has an edge;
  // `factor` is what earlier sums shrink by.
  template <int n>
  __device__ void add(float (&x)[n], float exponent, bool edge, const int (&last)[2]) {
    if (edge) {
      const int t = lane() % 4;
#pragma unroll
      for (int i = 0; i < n; ++i)
        x[i] = i / 4 * 8 + i % 2 > last[i / 2 % 2] - 2 * t ? kNegative : x[i];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float high = top[half];
#pragma unroll
      for (int i = 2 * half; i < n; i += 4) high = fmaxf(high, fmaxf(x[i], x[i + 1]));
      high = fmaxf(high, shuffle_xor(high, 1));
      high = fmaxf(high, shuffle_xor(high, 2));
      // A row that has seen no key yet: -inf - (-inf) would be NaN.
      const float base = high == kNegative ? 0.0f : high * exponent;
      factor[half] = exp2_fast(fmaf(top[half], exponent, -base));
      top[half] = high;
      float sum = 0.0f;
#pragma unroll
      for (int i = 2 * half; i < n; i += 4) {
        x[i] = exp2_fast(fmaf(x[i], exponent, -base));
        x[i + 1] = exp2_fast(fmaf(x[i + 1], exponent, -base));
        sum += x[i] + x[i + 1];
      }
      total[half] = fmaf(total[half], factor[half], sum);
    }
  }
};

template <class T, int n>
__device__ inline void round_weights(uint32_t (&weights)[n / 8][4], const float (&x)[n]) {
#pragma unroll
  for (int i = 0; i < n / 8; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) weights[i][j] = pack<T>(x[i * 8 + 2 * j], x[i * 8 + 2 * j + 1]);
}

// What a warp group does with its 64 rows.
template <class S, class T>
__device__ inline void attend(HopperShared<S>& s, const Call<T>& c, const Result<T>& result,
                              int first, int tiles, int64_t h, int64_t b) {
  const int group = thread() / kGroup - 1, g = lane() / 4, t = lane() % 4;
  const int i = first + group * 64 + warp() % 4 * 16 + g;  // and i + 8
  const auto add = [&](HopperRows& rows, float (&logits)[S::kN / 2], int tile) {
    const int j = tile * S::kN, end = c.S_k - 1 - j, seen = c.causal ? i + c.shift - j : end;
    const int last[2] = {seen < end ? seen : end, seen + 8 < end ? seen + 8 : end};
    const bool edge =
        j + S::kN > c.S_k || (c.causal && j + S::kN - 1 > first + group * 64 + c.shift);
    rows.add(logits, c.exponent, edge, last);
  };
  const auto release = [](Barrier& free) {
    if (lane() == 0) barrier_arrive(free);
  };

  float out[S::kD / 2] = {}, logits[S::kN / 2] = {};
  uint32_t weights[S::kN / 16][4];
  HopperRows rows;
  // The weights of a tile, once the products with those before are made, and what they shrink out
  // by.
  const auto finish_weights = [&](int tile) {
    wgmma_wait<0>();
    wgmma_result(out);
    if (tile > 0) release(s.v_free[Stage<S>(tile - 1).at]);
    round_weights<T>(weights, logits);
  };
  const auto shrink = [&] {
#pragma unroll
    for (int n = 0; n < S::kD / 2; ++n) out[n] *= rows.factor[n / 2 % 2];
  };

  barrier_wait(s.q_there, 0);
  if (tiles > 0) {
    barrier_wait(s.k_there[0], 0);
    ask_logits<S>(logits, s, group, 0);
    wgmma_wait<0>();
    wgmma_result(logits);
    release(s.k_free[0]);
    add(rows, logits, 0);
  }
  for (int tile = 1; tile < tiles; ++tile) {
    const Stage<S> now(tile), before(tile - 1);
    // The loop in this wait keeps the exponentials before it: ptxas would move them behind the wait
    // for the products that they are to overlap.
    wgmma_result(logits);
    barrier_wait(s.k_there[now.at], now.parity);
    finish_weights(tile - 1);
    ask_logits<S>(logits, s, group, now.at);
    shrink();
    barrier_wait(s.v_there[before.at], before.parity);
    ask_sums<S>(out, weights, s, before.at);
    wgmma_wait<1>();
    wgmma_result(logits);
    release(s.k_free[now.at]);
    add(rows, logits, tile);
  }
  if (tiles > 0) {
    const Stage<S> last(tiles - 1);
    finish_weights(tiles - 1);
    shrink();
    barrier_wait(s.v_there[last.at], last.parity);
    ask_sums<S>(out, weights, s, last.at);
  }
  wgmma_wait<0>();
  wgmma_result(out);

  // Rows leave through the group's part of q, which all its warps have read by now.
  group_barrier(1 + group, kGroup);
  const int line = group * 64 + warp() % 4 * 16;
  const auto chunk = [&](int row, int d) {  // 16 bytes, mixed so that 8 lines use different banks
    return &s.q[d / kLine][line + row][(d / 8 % 8 ^ row % 8) * 8];
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = rows.total[half];
    total += shuffle_xor(total, 1);
    total += shuffle_xor(total, 2);
    const float factor = total > 0.0f ? 1.0f / total : 0.0f;
    if (result.lse && t == 0 && i + 8 * half < c.S_q)
      result.lse[b * result.lse_b + h * result.lse_h + (i + 8 * half) * result.lse_s] =
          total > 0.0f ? rows.top[half] * c.scale + logf(total) : kNegative;
#pragma unroll
    for (int n = 0; n < S::kD / 8; ++n)
      store(chunk(g + 8 * half, n * 8) + 2 * t,
            Vec<T, 2>{{from_float<T>(out[n * 4 + 2 * half] * factor),
                       from_float<T>(out[n * 4 + 2 * half + 1] * factor)}});
  }
  warp_barrier();
  T* const to = result.out.head(b, h);
  constexpr int kChunks = S::kD / 8;
#pragma unroll 2
  for (int x = lane(); x < 16 * kChunks; x += kWarp) {
    const int row = first + line + x / kChunks, d = x % kChunks * 8;
    if (row >= c.S_q) continue;
    const auto v = load16(chunk(x / kChunks, d));
    T* const at = to + row * result.out.s + d;
    if (result.out.aligned) store(at, v);
    else store_part<false>(at, v, 8);
  }
}

template <class S, class T>
__global__ void __launch_bounds__(S::kThreads, 1)
    attention_hopper_kernel(const CGPT_GRID_CONSTANT HopperMaps maps, const Call<T> c,
                            const Result<T> result) {
  auto* const memory = shared<unsigned char>();
  auto& s = *reinterpret_cast<HopperShared<S>*>(
      memory + (1024 - reinterpret_cast<uintptr_t>(memory) % 1024) % 1024);
  const int blocks = (c.S_q + S::kM - 1) / S::kM;
  // The last queries see the most keys under a causal mask: they go first.
  const int first = (blocks - 1 - static_cast<int>(block_x() % blocks)) * S::kM;
  const int b = static_cast<int>(block_x()) / blocks / c.H;
  const int h = static_cast<int>(block_x()) / blocks % c.H;
  const int tiles = key_tiles(c, first, S::kM, S::kN);
  if (thread() == 0) {
    barrier_init(s.q_there, 1);
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(s.k_there[i], 1), barrier_init(s.v_there[i], 1);
      barrier_init(s.k_free[i], S::kGroups * 4), barrier_init(s.v_free[i], S::kGroups * 4);
    }
    barriers_ready();
  }
  block_barrier();
  if (thread() < kGroup) {
    fewer_registers<S::kFewRegisters>();
    if (thread() == 0) copy_tiles<S>(s, maps, first, tiles, h, b);
  } else {
    more_registers<S::kManyRegisters>();
    attend<S>(s, c, result, first, tiles, h, b);
  }
}

}  // namespace
}  // namespace cgpt
