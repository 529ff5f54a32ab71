// A call of attention as its kernels are told it: tensors by head, masks, dropout.
//
// Letters: B batch, H heads, S_q queries, S_k keys, D head size; i a query, j a key; shift is
// S_k - S_q, so that key j is visible to query i under `causal` iff j <= i + shift.
#pragma once

#include "../../cuda/device.cuh"
#include "../../cuda/launch.h"
#include "attention_cuda.h"

namespace cgpt {
namespace {

using namespace cuda;

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kNegative = -INFINITY;

// [B, H, S, D] with its last stride 1.
template <class T>
struct Heads {
  T* data;
  int64_t b, h, s;  // strides in elements
  bool aligned;     // rows of D are whole chunks of 16 bytes

  __device__ T* head(int64_t batch, int64_t head) const { return data + batch * b + head * h; }
};

template <class T>
Heads<T> heads_of(const TensorView& t) {
  using Plain = std::remove_const_t<T>;
  const T* p = t.as<const Plain>();
  const int64_t* s = t.strides;
  const bool whole = t.shape[3] * sizeof(T) % 16 == 0;
  return {t.as<Plain>(), s[0], s[1], s[2],
          whole && aligned<16>(p, s[0]) && aligned<16>(p, s[1]) && aligned<16>(p, s[2])};
}

enum class Bias : uint8_t { none, f32, same, boolean };  // same: the dtype of q

template <class T>
struct Call {
  Heads<const T> q, k, v;
  const uint8_t* padding;  // [B, S_k], nonzero hides a key; or nullptr
  const void* bias;
  const float* slopes;
  int64_t padding_b, padding_j, bias_b, bias_h, bias_i, bias_j;
  int H, S_q, S_k, D, shift;
  Bias bias_kind;
  bool causal;
  bool scaled;  // masks() multiplies by scale; else `exponent` holds it
  float scale;
  float exponent;  // log2(e), times the scale where that is not applied before
  bool dropout;
  uint32_t threshold;  // words below it drop
  float kept;          // 1 / (1 - dropout_p); 0 at p = 1, where one word in 2^32 is not below
  uint64_t seed;
};

// exp of a difference of logits, in the unit of `scaled`. fp32 takes the exact function; for 16-bit
// results ex2.approx is a hundredth of their rounding.
template <class T>
__device__ inline float exponential(const Call<T>& c, float difference) {
  if constexpr (sizeof(T) == 4) return expf(difference);
  else return exp2_fast(difference * c.exponent);
}

template <class T>
Call<T> call_of(const AttentionArgs& a, bool scaled) {
  Call<T> c{};
  c.q = heads_of<const T>(a.q), c.k = heads_of<const T>(a.k), c.v = heads_of<const T>(a.v);
  if (a.key_padding_mask) {
    c.padding = a.key_padding_mask.as<const uint8_t>();
    c.padding_b = a.key_padding_mask.strides[0], c.padding_j = a.key_padding_mask.strides[1];
  }
  if (a.attn_bias) {
    const int64_t* s = a.attn_bias.strides;
    c.bias = a.attn_bias.data;
    c.bias_b = s[0], c.bias_h = s[1], c.bias_i = s[2], c.bias_j = s[3];
    const DType t = a.attn_bias.dtype;
    c.bias_kind = t == DType::boolean ? Bias::boolean : t == DType::f32 ? Bias::f32 : Bias::same;
  }
  c.slopes = a.alibi_slopes.as<const float>();
  c.H = static_cast<int>(a.q.shape[1]), c.D = static_cast<int>(a.q.shape[3]);
  c.S_q = static_cast<int>(a.q.shape[2]), c.S_k = static_cast<int>(a.k.shape[2]);
  c.shift = c.S_k - c.S_q;
  c.causal = a.causal;
  // Without anything added, logits stay products and the scale waits for the exponential; a
  // maximum of products is one of logits only under a positive scale.
  const bool added = c.bias_kind == Bias::f32 || c.bias_kind == Bias::same || c.slopes;
  c.scaled = scaled || added || sizeof(T) == 4 || !(a.scale > 0.0f);
  c.scale = a.scale;
  c.exponent = c.scaled ? kLog2e : a.scale * kLog2e;
  c.dropout = a.dropout_p > 0.0;
  const double words = a.dropout_p * 4294967296.0;
  c.threshold = words < 4294967295.0 ? static_cast<uint32_t>(words) : 4294967295u;
  c.kept = a.dropout_p < 1.0 ? static_cast<float>(1.0 / (1.0 - a.dropout_p)) : 0.0f;
  c.seed = a.seed;
  return c;
}

inline bool adds_bias(const AttentionArgs& a) {
  return a.attn_bias && a.attn_bias.dtype != DType::boolean;
}

// One head's masks.
template <class T>
struct Masks {
  const uint8_t* padding;
  const void* bias;
  float slope;
  int64_t row;  // of the head's first query in [B, H, S_q]

  __device__ Masks(const Call<T>& c, int64_t b, int64_t h)
      : padding(c.padding ? c.padding + b * c.padding_b : nullptr),
        bias(nullptr),
        slope(c.slopes ? c.slopes[h] : 0.0f),
        row((b * c.H + h) * c.S_q) {
    const int64_t at = b * c.bias_b + h * c.bias_h;
    if (c.bias_kind == Bias::f32) bias = static_cast<const float*>(c.bias) + at;
    if (c.bias_kind == Bias::same) bias = static_cast<const T*>(c.bias) + at;
    if (c.bias_kind == Bias::boolean) bias = static_cast<const uint8_t*>(c.bias) + at;
  }
  // Whether key j is hidden as padding.
  __device__ bool hidden(const Call<T>& c, int j) const {
    return padding && padding[j * c.padding_j];
  }
  template <class B>
  __device__ B added(const Call<T>& c, int i, int j) const {
    return static_cast<const B*>(bias)[i * c.bias_i + j * c.bias_j];
  }
  // The logit of one pair that exists, as apply() of attention_cuda_tile.cuh makes a tile of them.
  __device__ float logit(const Call<T>& c, float product, int i, int j) const {
    float x = product * c.scale;
    if (c.bias_kind == Bias::f32) x += added<float>(c, i, j);
    if (c.bias_kind == Bias::same) x += to_float(added<T>(c, i, j));
    if (c.slopes) x -= slope * fabsf(static_cast<float>(i + c.shift - j));
    if (c.bias_kind == Bias::boolean && !added<uint8_t>(c, i, j)) x = kNegative;
    return hidden(c, j) ? kNegative : x;
  }
  // Whether the weight of a pair survives dropout: element e of [B, H, S_q, S_k] takes word e & 3
  // of block e >> 2.
  __device__ bool keeps(const Call<T>& c, int i, int j) const {
    const uint64_t e =
        static_cast<uint64_t>(row + i) * static_cast<uint64_t>(c.S_k) + static_cast<uint64_t>(j);
    const philox::Words w = philox::words(c.seed, e >> 2);
    const uint32_t low = e & 1 ? w.word[1] : w.word[0], high = e & 1 ? w.word[3] : w.word[2];
    return (e & 2 ? high : low) >= c.threshold;
  }
};

}  // namespace
}  // namespace cgpt
