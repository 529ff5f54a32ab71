// Philox 4x32-10 in vectors: the words of csrc/common/philox.h, many blocks at once.
//
// A vector holds one counter word of kLanes / 2 blocks in the low halves of 64-bit lanes, where the
// 32 x 32 -> 64 bit multiplication wants them; the high halves may hold anything until the end.
#pragma once

#include "../common/philox.h"
#include "simd.h"

namespace cgpt::CGPT_TIER {

using VecU64 = uint64_t __attribute__((vector_size(kLanes * 4), aligned(kLanes * 4)));

// Blocks in a vector, and the words they give.
constexpr int kPhiloxBlocks = kLanes / 2;
constexpr int kPhiloxWords = 4 * kPhiloxBlocks;
// Vectors of blocks under way at once: a round is a chain of 7 cycles, in which two multipliers
// take the products of four vectors. Each vector has 4 registers of state.
constexpr int kPhiloxChains = CGPT_TIER_LEVEL >= 2 ? 4 : 2;

// The key of each round.
struct PhiloxKeys {
  explicit PhiloxKeys(uint64_t seed) {
    auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int r = 0; r < philox::kRounds; ++r, k0 += philox::kWeyl0, k1 += philox::kWeyl1)
      low[r] = k0, high[r] = k1;
  }
  uint64_t low[philox::kRounds], high[philox::kRounds];
};

// Low half of each 64-bit lane times m.
CGPT_INLINE VecU64 multiply_low(VecU64 a, uint32_t m) {
  const VecU64 b = VecU64{} + m;
#if CGPT_TIER_LEVEL >= 2
  return bit_cast<VecU64>(_mm512_mul_epu32(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif CGPT_TIER_LEVEL == 1
  return bit_cast<VecU64>(_mm256_mul_epu32(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#else
  return (a & (VecU64{} + 0xffffffffu)) * b;
#endif
}

// dst[w] = word of element 4 * block + w, for N * kPhiloxWords elements.
template <int N>
CGPT_INLINE void philox_words(const PhiloxKeys& keys, uint64_t block, uint32_t* dst) {
  // Block k sits in lane 2k, block k + kPhiloxBlocks / 2 in lane 2k + 1: the order in which the
  // interleaving at the end leaves whole vectors of consecutive words.
  static constexpr struct Order {
    constexpr Order() {
      for (int k = 0; k < kPhiloxBlocks; ++k)
        lane[k] = static_cast<uint64_t>(k / 2 + (k % 2) * (kPhiloxBlocks / 2));
    }
    uint64_t lane[kPhiloxBlocks] = {};
  } order;
  VecU64 c0[N], c1[N], c2[N], c3[N];
  for (int v = 0; v < N; ++v) {
    __builtin_memcpy(&c0[v], order.lane, sizeof(VecU64));
    c0[v] += block + static_cast<uint64_t>(v * kPhiloxBlocks);
    c1[v] = c0[v] >> 32;
    c2[v] = c3[v] = VecU64{};
  }
  for (int round = 0; round < philox::kRounds; ++round) {
    const VecU64 k0 = VecU64{} + keys.low[round], k1 = VecU64{} + keys.high[round];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      const VecU64 p0 = multiply_low(c0[v], philox::kMultiply0),
                   p1 = multiply_low(c2[v], philox::kMultiply1);
      c0[v] = (p1 >> 32) ^ c1[v] ^ k0;
      c2[v] = (p0 >> 32) ^ c3[v] ^ k1;
      c1[v] = p1;
      c3[v] = p0;
    }
  }
  const VecU64 low = VecU64{} + 0xffffffffu;
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v, dst += kPhiloxWords) {
    const VecU64 w01 = (c0[v] & low) | (c1[v] << 32), w23 = (c2[v] & low) | (c3[v] << 32);
#if CGPT_TIER_LEVEL >= 2
    const __m512i a = bit_cast<__m512i>(w01), b = bit_cast<__m512i>(w23);
    _mm512_storeu_si512(dst, _mm512_unpacklo_epi64(a, b));
    _mm512_storeu_si512(dst + kPhiloxWords / 2, _mm512_unpackhi_epi64(a, b));
#elif CGPT_TIER_LEVEL == 1
    const __m256i a = bit_cast<__m256i>(w01), b = bit_cast<__m256i>(w23);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), _mm256_unpacklo_epi64(a, b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + kPhiloxWords / 2),
                        _mm256_unpackhi_epi64(a, b));
#else
    for (int k = 0; k < kPhiloxBlocks; ++k) {
      const uint64_t x = w01[k], y = w23[k];
      __builtin_memcpy(dst + order.lane[k] * 4, &x, 8);
      __builtin_memcpy(dst + order.lane[k] * 4 + 2, &y, 8);
    }
#endif
  }
}

// Room that philox_range needs for `count` elements.
CGPT_INLINE int64_t philox_room(int64_t count) { return count + 3 + kPhiloxWords; }

// Random words of the elements first .. first + count - 1, somewhere in dst: at the returned
// pointer. Not inlined: its rounds would double the code of every epilogue that draws.
inline __attribute__((noinline)) const uint32_t* philox_range(uint64_t seed, uint64_t first,
                                                              int64_t count, uint32_t* dst) {
  const PhiloxKeys keys(seed);
  const uint64_t skip = first & 3;
  const int64_t words = count + static_cast<int64_t>(skip);
  int64_t w = 0;
  const auto block = [&] { return (first >> 2) + static_cast<uint64_t>(w / 4); };
  for (; w + (kPhiloxChains - 1) * kPhiloxWords < words; w += kPhiloxChains * kPhiloxWords)
    philox_words<kPhiloxChains>(keys, block(), dst + w);
  for (; w < words; w += kPhiloxWords) philox_words<1>(keys, block(), dst + w);
  return dst + skip;
}

}  // namespace cgpt::CGPT_TIER
