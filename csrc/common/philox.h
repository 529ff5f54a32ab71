// Philox 4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC
// 2011, section 3.3): the random words of dropout, a function of (seed, element index) alone.
//
// Element e takes word e & 3 of the block whose counter is (e >> 2 low, e >> 2 high, 0, 0) under
// the key (seed low, seed high). The vector form of the CPU kernels is csrc/cpu/philox.h.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
  #define CGPT_HOST_DEVICE __host__ __device__
#else
  #define CGPT_HOST_DEVICE
#endif

namespace cgpt::philox {

constexpr int kRounds = 10;
constexpr uint32_t kMultiply0 = 0xD2511F53u, kMultiply1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

// One block, for code that runs one element or four at a time.
struct Words {
  uint32_t word[4];
};

CGPT_HOST_DEVICE constexpr Words words(uint64_t seed, uint64_t block) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t p0 = uint64_t{kMultiply0} * c0, p1 = uint64_t{kMultiply1} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace cgpt::philox
