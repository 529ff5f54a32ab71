// int4 panels times few quantized rows: nibbles, unsigned as they lie, against the signed bytes h
// and l of 15-bit rows. Each group of k is summed exactly in int32 and then scaled into fp32. The
// offset of 8 is taken off by the group's sum of x, which is the same for all columns: sum q (n -
// 8) = sum q n - 8 sum q.
//
// Two lines hold 32 columns x 8 k: six instructions take the nibbles apart, eight multiply a row of
// x, in the shadow of the 26 cycles that memory takes.
#pragma once

#include "packed_int8.h"

#if CGPT_TIER_LEVEL >= 3
namespace cgpt::CGPT_TIER {
namespace {

// acc += unsigned bytes of w times the four signed bytes at x, the same for all columns.
CGPT_INLINE void dot_nibbles(__m512i& acc, __m512i w, const int8_t* x) {
  struct __attribute__((packed, may_alias)) Quad {
    int32_t bytes;
  };
  __asm__("vpdpbusd %2%{1to16%}, %1, %0"
          : "+v"(acc)
          : "v"(w), "m"(*reinterpret_cast<const Quad*>(x)));
}

template <int group>
class Int4Kernel {
 public:
  static constexpr int64_t kRowTile = 4;

  explicit Int4Kernel(const PackedWeight& w)
      : weight_(w),
        depth_(packed_k(w.format, w.K, w.group)),
        // h, l, then 8 times the sum of q per group, and the scale.
        stride_(((2 * depth_ + depth_ / group * 4 + 4) / 128 * 2 + 3) * 64),
        panel_bytes_(panel_bytes(w.format, w.K, w.group)) {}

  int64_t row_bytes() const { return stride_; }
  int64_t block_bytes() const { return panel_bytes_; }
  int64_t few_panels(int64_t) const { return 1; }

  template <class T>
  void prepare(const T* x, void* row) const {
    uint8_t* high = static_cast<uint8_t*>(row);
    int32_t* sums = reinterpret_cast<int32_t*>(high + 2 * depth_);
    __m512i total = _mm512_setzero_si512();
    const auto sum = [&](int64_t k, __m512i q) __attribute__((always_inline)) {
      total = _mm512_add_epi32(total, q);
      if ((k + kLanes) % group != 0) return;
      sums[k / group] = 8 * _mm512_reduce_add_epi32(total);
      total = _mm512_setzero_si512();
    };
    const float scale = quantize_row(x, weight_.K, depth_, 0, high, high + depth_, sum);
    __builtin_memcpy(sums + depth_ / group, &scale, 4);
  }

  const void* block(int64_t panel, int64_t) const {
    return static_cast<const char*>(weight_.data) + panel * panel_bytes_;
  }

  void multiply(int64_t rows, const void* a, int64_t count, const void* b, float* c,
                int64_t ldc) const {
    const int8_t* x = static_cast<const int8_t*>(a);
    const int64_t tiles = (rows + kRowTile - 1) / kRowTile;
    for (int64_t p = 0; p < count; ++p)
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t i = rows * t / tiles, height = rows * (t + 1) / tiles - i;
        tile_rows<kRowTile>(height, x + i * stride_,
                            static_cast<const uint8_t*>(b) + p * panel_bytes_,
                            c + i * ldc + p * kPanelColumns, ldc);
      }
  }

 private:
  template <int rows>
  void tile_rows(int64_t M, const int8_t* x, const uint8_t* panel, float* c, int64_t ldc) const {
    if (M == rows) return tile<rows>(x, panel, c, ldc);
    if constexpr (rows > 1) tile_rows<rows - 1>(M, x, panel, c, ldc);
  }

  template <int rows>
  CGPT_INLINE void tile(const int8_t* x, const uint8_t* panel, float* c, int64_t ldc) const {
    VecF total[rows][2] = {};
    const __m512i mask = _mm512_set1_epi8(15);
    const int64_t groups = depth_ / group;
    for (int64_t g = 0; g < groups; ++g) {
      __m512i high[rows][2] = {}, low[rows][2] = {};
      const int8_t* xg = x + g * group;
  #pragma GCC unroll 2
      for (int k = 0; k < group; k += 8, panel += 128) {
        prefetch_step<128, kAhead>(panel);
  #pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m512i both = _mm512_loadu_si512(panel + half * 64);
          const __m512i first = _mm512_and_si512(both, mask);
          const __m512i second = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
  #pragma GCC unroll 4
          for (int i = 0; i < rows; ++i) {
            const int8_t* h = xg + i * stride_ + k;
            dot_nibbles(high[i][half], first, h);
            dot_nibbles(low[i][half], first, h + depth_);
            dot_nibbles(high[i][half], second, h + 4);
            dot_nibbles(low[i][half], second, h + depth_ + 4);
          }
        }
      }
      // The scales' line is asked for as part of the stream.
      __builtin_prefetch(panel + kAhead);
      const VecF scale[2] = {load(reinterpret_cast<const bf16*>(panel)),
                             load(reinterpret_cast<const bf16*>(panel) + kLanes)};
      panel += 64;
  #pragma GCC unroll 4
      for (int i = 0; i < rows; ++i) {
        const __m512i offset = _mm512_set1_epi32(sums(x + i * stride_)[g]);
  #pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[i][half], 7), low[i][half]);
          const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, offset));
          total[i][half] = fmadd(bit_cast<VecF>(exact), scale[half], total[i][half]);
        }
      }
    }
  #pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) {
      float scale;
      __builtin_memcpy(&scale, sums(x + i * stride_) + groups, 4);
      store(c + i * ldc, total[i][0] * set1(scale));
      store(c + i * ldc + kLanes, total[i][1] * set1(scale));
    }
  }

  const int32_t* sums(const int8_t* row) const {
    return reinterpret_cast<const int32_t*>(row + 2 * depth_);
  }

  PackedWeight weight_;
  int64_t depth_, stride_, panel_bytes_;
};

}  // namespace
}  // namespace cgpt::CGPT_TIER
#endif
