// The kernels of a decoder's step that are no op: none of them is a function of tensors alone, they
// read and move the place at which the step stands.
#pragma once

#include "../cuda/device.cuh"
#include "../cuda/launch.h"
#include "../ops/gemm/gemm_epilogue.cuh"
#include "decoder_candidate.cuh"
#include "decoder_cuda.h"

namespace cgpt {
namespace {

using namespace cuda;

// x = scale (wte[token] + wpe[position]) and y = layer_norm(x), and what every kernel of a step
// needs to find its row.
struct DecoderPlace {
  TensorView tokens, length, padding, hidden;
  int64_t S = 1;
};
struct DecoderEmbedArgs {
  DecoderPlace place;
  TensorView wte, wpe;
  NormWeights norm;
  TensorView x, y;  // [B * S, C] T
  float scale = 1.0f, eps = 1e-5f;
};

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Where row (b, s) of a step stands.
struct Place {
  int64_t* tokens;
  int64_t* length;
  const int64_t* padding;
  uint8_t* hidden;
  int64_t tokens_b, hidden_b, total;
  int S;

  __device__ int64_t at(int64_t b, int64_t s) const { return length[b] + s; }
};

Place place_of(const DecoderPlace& p) {
  return {p.tokens.as<int64_t>(), p.length.as<int64_t>(), p.padding.as<const int64_t>(),
          p.hidden.as<uint8_t>(), p.tokens.strides[0],    p.hidden.strides[0],
          p.tokens.shape[1],      static_cast<int>(p.S)};
}

// ---- embedding and the first layer norm ---------------------------------------------------------

template <class T, class W>
struct Embed {
  Place place;
  const T* wte;
  const T* wpe;
  const W* weight;
  const W* bias;
  T* x;
  T* y;
  int64_t wte_row, wpe_row, x_row, y_row;
  int C;
  float scale, eps;
};

// A block per row; a thread reads back only what it wrote itself, so that any width fits.
template <class T, class W, bool kAligned>
__global__ void __launch_bounds__(kThreads, 4) decoder_embed_kernel(const Embed<T, W> p) {
  constexpr int N = Vec<T>::kSize;
  float* const scratch = shared<float>();
  const int64_t row = block_x(), b = row / p.place.S, s = row % p.place.S;
  const int64_t at = p.place.at(b, s), from_first = at - p.place.padding[b];
  const T* token = p.wte + p.place.tokens[b * p.place.tokens_b + at] * p.wte_row;
  const T* position = p.wpe + (from_first > 0 ? from_first : 0) * p.wpe_row;
  T *x = p.x + row * p.x_row, *y = p.y + row * p.y_row;

  float total = 0.0f;
  for (int c = thread() * N; c < p.C; c += kThreads * N) {
    auto sum = load_part<kAligned, N>(token + c, p.C - c);
    const auto added = load_part<kAligned, N>(position + c, p.C - c);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sum[i] = from_float<T>((to_float(sum[i]) + to_float(added[i])) * p.scale);
      total += to_float(sum[i]);
    }
    store_part<kAligned>(x + c, sum, p.C - c);
  }
  const float mean = block_sum<kThreads>(total, scratch) / static_cast<float>(p.C);
  float squares = 0.0f;
  for (int c = thread() * N; c < p.C; c += kThreads * N) {
    const auto v = load_part<kAligned, N>(x + c, p.C - c);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float d = c + i < p.C ? to_float(v[i]) - mean : 0.0f;
      squares = fmaf(d, d, squares);
    }
  }
  const float rstd =
      1.0f / sqrtf(block_sum<kThreads>(squares, scratch) / static_cast<float>(p.C) + p.eps);
  for (int c = thread() * N; c < p.C; c += kThreads * N) {
    auto v = load_part<kAligned, N>(x + c, p.C - c);
    const auto weight = load_part<kAligned, N>(p.weight + c, p.C - c);
    Vec<W, N> bias{};
    if (p.bias) bias = load_part<kAligned, N>(p.bias + c, p.C - c);
#pragma unroll
    for (int i = 0; i < N; ++i)
      v[i] = from_float<T>(
          fmaf((to_float(v[i]) - mean) * rstd, to_float(weight[i]), to_float(bias[i])));
    store_part<kAligned>(y + c, v, p.C - c);
  }
  if (thread() == 0) p.place.hidden[b * p.place.hidden_b + at] = from_first < 0;
}

template <class T, class W>
void embed(const DecoderEmbedArgs& a) {
  const Embed<T, W> p{place_of(a.place),
                      a.wte.as<const T>(),
                      a.wpe.as<const T>(),
                      a.norm.weight.as<const W>(),
                      a.norm.bias.as<const W>(),
                      a.x.as<T>(),
                      a.y.as<T>(),
                      a.wte.strides[0],
                      a.wpe.strides[0],
                      a.x.strides[0],
                      a.y.strides[0],
                      static_cast<int>(a.x.shape[1]),
                      a.scale,
                      a.eps};
  const bool vectors = p.C % Vec<T>::kSize == 0 && aligned<16>(p.wte, p.wte_row) &&
                       aligned<16>(p.wpe, p.wpe_row) && aligned<16>(p.weight) &&
                       aligned<16>(p.bias) && aligned<16>(p.x, p.x_row) &&
                       aligned<16>(p.y, p.y_row);
  const Launch l{.grid_x = a.x.shape[0], .threads = kThreads, .shared = kWarps * 4, .like = a.x};
  if (vectors) launch("decoder", l, &decoder_embed_kernel<T, W, true>, p);
  else launch("decoder", l, &decoder_embed_kernel<T, W, false>, p);
}

// ---- the cache ----------------------------------------------------------------------------------

template <class T, class KV>
struct Append {
  Place place;
  const T* qkv;
  KV* cache[2];      // keys, values: of one layer
  float* scales[2];  // of int8
  int64_t qkv_row, cache_b[2], cache_h[2], cache_s[2], scales_b[2], scales_h[2];
  int C, D;
};

// A block per row and cache. kTogether values move at once, 1 where heads or rows are not aligned.
template <class T, int kTogether>
__global__ void __launch_bounds__(kThreads) decoder_append_kernel(const Append<T, T> p) {
  const int64_t row = block_x(), b = row / p.place.S, at = p.place.at(b, row % p.place.S);
  const int which = static_cast<int>(block_y());
  const T* from = p.qkv + row * p.qkv_row + (1 + which) * p.C;
  T* to = p.cache[which] + b * p.cache_b[which] + at * p.cache_s[which];
  for (int c = thread() * kTogether; c < p.C; c += kThreads * kTogether)
    store(to + c / p.D * p.cache_h[which] + c % p.D, load<kTogether>(from + c));
}

// The same into int8, by the rule of csrc/ops/attention/int8_rows.h: a warp per head.
template <class T>
__global__ void __launch_bounds__(kThreads) decoder_append_int8_kernel(const Append<T, int8_t> p) {
  constexpr int kEach = kAttentionWidest / kWarp;
  const int64_t row = block_x(), b = row / p.place.S, at = p.place.at(b, row % p.place.S);
  const int which = static_cast<int>(block_y());
  for (int h = warp(); h < p.C / p.D; h += kWarps) {
    const T* from = p.qkv + row * p.qkv_row + (1 + which) * p.C + h * p.D;
    float x[kEach];
    int top = 0;  // as integers magnitudes order like the floats do, and NaN is the largest
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int d = lane() + i * kWarp;
      x[i] = d < p.D ? to_float(from[d]) : 0.0f;
      const int magnitude = __builtin_bit_cast(int, x[i]) & 0x7fffffff;
      top = magnitude > top ? magnitude : top;
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const int other = shuffle_xor(top, offset);
      top = other > top ? other : top;
    }
    const float extreme = __builtin_bit_cast(float, top);
    const bool finite = extreme <= 3.402823466e38f;
    // Below this the inverse would overflow; such a row counts as zero.
    const bool vanishing = extreme < 1e-30f;
    const float inverse = finite && !vanishing ? 127.0f / extreme : 0.0f;
    int8_t* to =
        p.cache[which] + b * p.cache_b[which] + h * p.cache_h[which] + at * p.cache_s[which];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      // Adding 1.5 * 2^23 rounds to the nearest integer, whose byte is then the lowest of the sum.
      const float sum = fmaf(x[i], inverse, 12582912.0f);
      const int d = lane() + i * kWarp;
      if (d < p.D) to[d] = static_cast<int8_t>(finite ? __builtin_bit_cast(int, sum) : 0);
    }
    const float scale = vanishing ? 0.0f : extreme / 127.0f;
    if (lane() == 0)
      p.scales[which][b * p.scales_b[which] + h * p.scales_h[which] + at] = finite ? scale : NAN;
  }
}

template <class T, class KV>
void append(const DecoderPlace& place, const TensorView& qkv, const DecoderCache& cache,
            int64_t layer) {
  Append<T, KV> p{};
  p.place = place_of(place);
  p.qkv = qkv.as<const T>(), p.qkv_row = qkv.strides[0];
  p.C = static_cast<int>(qkv.shape[1] / 3), p.D = static_cast<int>(cache.keys.shape[4]);
  bool vectors = p.D % Vec<T>::kSize == 0 && aligned<16>(p.qkv, p.qkv_row);
  const TensorView* rows[2] = {&cache.keys, &cache.values};
  const TensorView* scales[2] = {&cache.key_scales, &cache.value_scales};
  for (int i = 0; i < 2; ++i) {
    const int64_t* s = rows[i]->strides;
    p.cache[i] = rows[i]->as<KV>() + layer * s[0];
    p.cache_b[i] = s[1], p.cache_h[i] = s[2], p.cache_s[i] = s[3];
    for (const int64_t stride : {s[1], s[2], s[3]})
      vectors = vectors && aligned<16>(p.cache[i], stride);
    s = scales[i]->strides;
    p.scales[i] = scales[i]->as<float>() + layer * s[0];
    p.scales_b[i] = s[1], p.scales_h[i] = s[2];
  }
  const Launch l{.grid_x = qkv.shape[0], .grid_y = 2, .threads = kThreads, .like = qkv};
  if constexpr (sizeof(KV) == 1) launch("decoder", l, &decoder_append_int8_kernel<T>, p);
  else if (vectors) launch("decoder", l, &decoder_append_kernel<T, Vec<T>::kSize>, p);
  else launch("decoder", l, &decoder_append_kernel<T, 1>, p);
}

template <class T>
void append(const DecoderPlace& place, const TensorView& qkv, const DecoderCache& cache,
            int64_t layer) {
  if (cache.key_scales) append<T, int8_t>(place, qkv, cache, layer);
  else append<T, T>(place, qkv, cache, layer);
}

// ---- the greedy token ---------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads)
    decoder_choose_kernel(const Place place, const T* logits, int64_t row_stride, int V) {
  Candidate* const found = shared<Candidate>();
  const int64_t b = block_x();
  const T* row = logits + b * row_stride;
  Candidate best{-INFINITY, kNoToken};
#pragma unroll 4
  for (int v = thread(); v < V; v += kThreads) best.take({to_float(row[v]), v});
  best = best_of_warp(best);
  if (lane() == 0) found[warp()] = best;
  block_barrier();
  if (thread() != 0) return;
  for (int w = 1; w < kWarps; ++w) best.take(found[w]);
  const int64_t next = place.at(b, place.S);
  if (next < place.total) place.tokens[b * place.tokens_b + next] = best.token;
  place.length[b] = next;
}

template <class T>
void choose(const DecoderPlace& place, const TensorView& logits) {
  launch("decoder",
         {.grid_x = logits.shape[0],
          .threads = kThreads,
          .shared = kWarps * sizeof(Candidate),
          .like = logits},
         &decoder_choose_kernel<T>, place_of(place), logits.as<const T>(), logits.strides[0],
         static_cast<int>(logits.shape[1]));
}

// ---- the activation of a product under LoRA -----------------------------------------------------

// A block per row and 256 columns.
template <class T>
__global__ void __launch_bounds__(kThreads)
    decoder_activate_kernel(T* x, int64_t row_stride, int columns, Activation activation) {
  const int c = static_cast<int>(block_y()) * kThreads + thread();
  if (c >= columns) return;
  T& at = x[int64_t{block_x()} * row_stride + c];
  at = from_float<T>(activate(to_float(at), activation));
}

template <class T>
void activate_rows(const TensorView& x, Activation activation) {
  const Launch l{.grid_x = x.shape[0],
                 .grid_y = (x.shape[1] + kThreads - 1) / kThreads,
                 .threads = kThreads,
                 .like = x};
  launch("decoder", l, &decoder_activate_kernel<T>, x.as<T>(), x.strides[0],
         static_cast<int>(x.shape[1]), activation);
}

// f<T>() for the T of a dtype.
template <class F>
void with_type(DType t, F&& f) {
  if (t == DType::f32) f.template operator()<float>();
  if (t == DType::bf16) f.template operator()<bf16>();
  if (t == DType::f16) f.template operator()<f16>();
}

}  // namespace
}  // namespace cgpt
