// One query against keys that several warps share: softmax as shares, and how they are joined.
//
// 8 values of a key lie in a lane, so D / 8 lanes (a power of two) are a group that takes a key,
// four keys at a time for loads in flight. Keys and values are T, or int8 with a scale for each
// row, which multiplies logits and weights.
#pragma once

#include "../../cuda/device.cuh"

namespace cgpt {
namespace {

using namespace cuda;

constexpr int kLaneValues = 8;
constexpr int kKeysAtOnce = 4;

inline int lanes_of(int64_t D) {
  int lanes = 1;
  while (lanes * kLaneValues < D) lanes *= 2;
  return lanes;
}

// A share of a softmax over keys: `total` and sums relative to exp(top).
struct Share {
  float top = -INFINITY, total = 0.0f;
};

// exp of a difference of logits. fp32 takes the exact function; for 16-bit results ex2.approx is a
// hundredth of their rounding.
template <class T>
__device__ inline float share_exponential(float difference) {
  if constexpr (sizeof(T) == 4) return expf(difference);
  else return exp2_fast(difference * 1.44269504088896341f);
}

// Factors that bring two shares to their common maximum, which a takes over.
template <class T>
__device__ inline void common(Share& a, const Share& b, float& fa, float& fb) {
  const float high = fmaxf(a.top, b.top), base = high == -INFINITY ? 0.0f : high;
  fa = share_exponential<T>(a.top - base), fb = share_exponential<T>(b.top - base);
  a.top = high;
  a.total = a.total * fa + b.total * fb;
}

template <class T>
__device__ inline float widened(T x) {
  return to_float(x);
}
// Without a conversion, whose rate is a quarter: the float 2^23 + n has n for its low bits.
__device__ inline float widened(int8_t x) {
  const uint32_t n = static_cast<uint8_t>(x) ^ 0x80u;
  return __builtin_bit_cast(float, 0x4b000000u | n) - 8388736.0f;
}

// Takes four keys of a lane's group into its share. logit(u, q . key u): the logit of key u, -inf
// where it is hidden; weight(u, w): what its value is multiplied by, w its part of the total.
template <class T, class KV, class Logit, class Weight>
__device__ inline void take_keys(Share& own, float (&sums)[kLaneValues],
                                 const Vec<T, kLaneValues>& q,
                                 const Vec<KV, kLaneValues> (&ks)[kKeysAtOnce],
                                 const Vec<KV, kLaneValues> (&vs)[kKeysAtOnce], int lanes,
                                 Logit&& logit, Weight&& weight) {
  float logits[kKeysAtOnce], top = own.top;
#pragma unroll
  for (int u = 0; u < kKeysAtOnce; ++u) {
    float product = 0.0f;
#pragma unroll
    for (int x = 0; x < kLaneValues; ++x)
      product = fmaf(to_float(q[x]), widened(ks[u][x]), product);
    for (int offset = lanes / 2; offset > 0; offset /= 2) product += shuffle_xor(product, offset);
    logits[u] = logit(u, product);
    top = fmaxf(top, logits[u]);
  }
  const float base = top == -INFINITY ? 0.0f : top;
  const float factor = share_exponential<T>(own.top - base);
  own.top = top;
  own.total *= factor;
#pragma unroll
  for (int x = 0; x < kLaneValues; ++x) sums[x] *= factor;
#pragma unroll
  for (int u = 0; u < kKeysAtOnce; ++u) {
    const float part = share_exponential<T>(logits[u] - base), w = weight(u, part);
    own.total += part;
#pragma unroll
    for (int x = 0; x < kLaneValues; ++x) sums[x] = fmaf(w, widened(vs[u][x]), sums[x]);
  }
}

// The shares of a warp's groups as one, in every lane of each group.
template <class T>
__device__ inline void join_groups(Share& own, float (&sums)[kLaneValues], int lanes) {
  for (int offset = lanes; offset < kWarp; offset *= 2) {
    Share other;
    other.top = shuffle_xor(own.top, offset), other.total = shuffle_xor(own.total, offset);
    float fa, fb;
    common<T>(own, other, fa, fb);
#pragma unroll
    for (int x = 0; x < kLaneValues; ++x)
      sums[x] = sums[x] * fa + shuffle_xor(sums[x], offset) * fb;
  }
}

}  // namespace
}  // namespace cgpt
