// AMX tiles for bf16 and 8-bit products: one thread's eight tile registers, as an object.
//
// A tile is 16 rows of 64 bytes: 16 x 32 bf16 (16 x 64 bytes) of A, 16 k-pairs x 16 columns x 2
// (16 k-quads x 16 columns x 4) of B, the VNNI order, or 16 x 16 fp32 (int32) of C. Numbers here:
// 0-3 accumulate, 4-5 hold A, 6-7 hold B.
//
// Under CGPT_AMX_EMULATED the same operations run on arrays, so that the callers' addressing is
// tested on processors without AMX.
#pragma once

#include "simd.h"

#if CGPT_TIER_LEVEL >= 5
namespace cgpt::CGPT_TIER {

  #ifdef CGPT_AMX_EMULATED

class AmxTiles {
 public:
  // Accumulators 0, 1 and A tile 4 have `rows0` rows; 2, 3 and 5 have `rows1`; B tiles have 16.
  AmxTiles(int rows0, int rows1) : rows_{rows0, rows0, rows1, rows1, rows0, rows1, 16, 16} {
    for (auto& tile : data_)
      for (auto& row : tile)
        for (uint32_t& word : row) word = 0;
  }
  template <int tile>
  void zero() {
    for (int r = 0; r < rows_[tile]; ++r)
      for (uint32_t& word : data_[tile][r]) word = 0;
  }
  template <int tile>
  void load(const void* base, int64_t row_bytes) {
    for (int r = 0; r < rows_[tile]; ++r)
      __builtin_memcpy(data_[tile][r], static_cast<const char*>(base) + r * row_bytes, 64);
  }
  template <int tile>
  void store(void* base, int64_t row_bytes) {
    for (int r = 0; r < rows_[tile]; ++r)
      __builtin_memcpy(static_cast<char*>(base) + r * row_bytes, data_[tile][r], 64);
  }
  // c += a b over 32 of k
  template <int c, int a, int b>
  void multiply_add() {
    for (int r = 0; r < rows_[c]; ++r) {
      VecF sum = load_row(data_[c][r]);
      for (int k = 0; k < 16; ++k) {
        const uint32_t pair = data_[a][r][k];
        const VecI bits = bit_cast<VecI>(load_row(data_[b][k]));
        sum = fmadd(set1(bit_cast<float>(pair << 16)), bit_cast<VecF>(bits << 16), sum);
        sum = fmadd(set1(bit_cast<float>(pair & 0xffff0000u)),
                    bit_cast<VecF>(bits & set1i(static_cast<int32_t>(0xffff0000u))), sum);
      }
      __builtin_memcpy(data_[c][r], &sum, 64);
    }
  }
  // c += a b over 64 of k, integers: a unsigned, b signed
  template <int c, int a, int b>
  void multiply_add_u8s8() {
    for (int r = 0; r < rows_[c]; ++r)
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 16; ++n)
          for (int i = 0; i < 32; i += 8) {
            const int x = data_[a][r][k] >> i & 255;
            const int w = static_cast<int8_t>(data_[b][k][n] >> i & 255);
            data_[c][r][n] += static_cast<uint32_t>(x * w);
          }
  }

 private:
  static VecF load_row(const uint32_t* row) {
    VecF v;
    __builtin_memcpy(&v, row, 64);
    return v;
  }
  int rows_[8];
  uint32_t data_[8][16][16];
};

  #else

class AmxTiles {
 public:
  // Configures this thread's tiles; the destructor releases them, so that other libraries'
  // configurations and the kernel's lazy saving of tile state see none of ours.
  AmxTiles(int rows0, int rows1) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    const int rows[8] = {rows0, rows0, rows1, rows1, rows0, rows1, 16, 16};
    for (int t = 0; t < 8; ++t) {
      // A tile without rows stays unconfigured: zero rows with a width is an invalid configuration.
      config.row_bytes[t] = rows[t] ? 64 : 0;
      config.rows[t] = static_cast<uint8_t>(rows[t]);
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
  }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
  ~AmxTiles() { __asm__ volatile("tilerelease"); }

  template <int tile>
  CGPT_INLINE void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile));
  }
  template <int tile>
  CGPT_INLINE void load(const void* base, int64_t row_bytes) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2"
                     :
                     : "r"(base), "r"(row_bytes), "i"(tile)
                     : "memory");
  }
  template <int tile>
  CGPT_INLINE void store(void* base, int64_t row_bytes) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"
                     :
                     : "r"(base), "r"(row_bytes), "i"(tile)
                     : "memory");
  }
  // c += a b over 32 of k
  template <int c, int a, int b>
  CGPT_INLINE void multiply_add() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
  }
  // c += a b over 64 of k, integers: a unsigned, b signed
  template <int c, int a, int b>
  CGPT_INLINE void multiply_add_u8s8() {
    __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
  }
};

  #endif

}  // namespace cgpt::CGPT_TIER
#endif
