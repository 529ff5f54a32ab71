// int8 panels times quantized rows: unsigned bytes of x (q + 128) against signed bytes of W, summed
// exactly in int32 by vpdpbusd or AMX tiles. The 128 is taken off with the column sums that lie
// behind each panel: sum (q + 128) w = sum q w + 128 sum w.
//
// One line of W, 16 columns x 4 k, costs one instruction per byte row of x; memory brings a line
// every 13 cycles, so that 15-bit rows (two byte rows each) stay in its shadow up to 6 rows of x.
#pragma once

#include "../../cpu/block_gemm.h"
#include "../../cpu/scratch.h"
#include "packed_float.h"
#include "packed_quantize.h"

#if CGPT_TIER_LEVEL >= 3
namespace cgpt::CGPT_TIER {
namespace {

// acc += unsigned bytes of x times signed bytes of w, in groups of four; never saturates. GCC 12
// copies the accumulator of its own intrinsic around every use.
CGPT_INLINE void dot_bytes(__m512i& acc, __m512i x, __m512i w) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
}

// c[row] = scales * sums; with `digits` the sums are those of the row's h and l.
template <bool digits>
CGPT_INLINE void store_int8(__m512i high, __m512i low, const Int8Tail& tail, int half, float scale,
                            float* c) {
  const __m512i comp = _mm512_slli_epi32(_mm512_loadu_si512(tail.sum + half * kLanes), 7);
  VecF v = bit_cast<VecF>(_mm512_cvtepi32_ps(_mm512_sub_epi32(high, comp)));
  if constexpr (digits) {
    const VecF rest = bit_cast<VecF>(_mm512_cvtepi32_ps(_mm512_sub_epi32(low, comp)));
    v = fmadd(v, set1(128.0f), rest);
  }
  store(c + half * kLanes, v * set1(scale) * load(tail.scale + half * kLanes));
}

// In place: GCC would copy it by a string instruction, 30 cycles and more.
CGPT_INLINE const Int8Tail* tail_of(const int8_t* panel, int64_t Kp) {
  return reinterpret_cast<const Int8Tail*>(panel + Kp * kColumns);
}

CGPT_INLINE float row_scale(const uint8_t* row, int64_t Kp) {
  float scale;
  __builtin_memcpy(&scale, row + Kp, 4);
  return scale;
}

// One register tile: `rows` byte rows x 32 columns over the whole of K.
template <int rows, bool digits>
CGPT_INLINE void int8_tile(int64_t Kp, const uint8_t* a, int64_t lda, const int8_t* panel, float* c,
                           int64_t ldc) {
  __m512i acc[rows][2] = {};
  for (int64_t k = 0; k < Kp; k += 4) {
    const int8_t* lines = panel + k * kColumns;
    prefetch_step<128, kAhead>(lines);
    const __m512i b0 = _mm512_loadu_si512(lines), b1 = _mm512_loadu_si512(lines + 64);
  #pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      int32_t quad;
      __builtin_memcpy(&quad, a + i * lda + k, 4);
      const __m512i x = _mm512_set1_epi32(quad);
      dot_bytes(acc[i][0], x, b0);
      dot_bytes(acc[i][1], x, b1);
    }
  }
  const Int8Tail& tail = *tail_of(panel, Kp);
  constexpr int step = digits ? 2 : 1;
  #pragma GCC unroll 16
  for (int i = 0; i < rows; i += step) {
    const float scale = row_scale(a + i * lda, Kp);
    store_int8<digits>(acc[i][0], acc[i + step - 1][0], tail, 0, scale, c + i / step * ldc);
    store_int8<digits>(acc[i][1], acc[i + step - 1][1], tail, 1, scale, c + i / step * ldc);
  }
}

template <int rows, bool digits>
inline void int8_tile_rows(int64_t M, int64_t Kp, const uint8_t* a, int64_t lda,
                           const int8_t* panel, float* c, int64_t ldc) {
  constexpr int step = digits ? 2 : 1;
  if (M == rows) return int8_tile<rows, digits>(Kp, a, lda, panel, c, ldc);
  if constexpr (rows > step) int8_tile_rows<rows - step, digits>(M, Kp, a, lda, panel, c, ldc);
}

  #if CGPT_TIER_LEVEL >= 5
// c = scales * sums for a panel's sums of `rows` byte rows, h and l in turns.
inline void scale_panel(int rows, int64_t Kp, const uint8_t* a, int64_t lda, const int8_t* panel,
                        const int32_t* sums, int64_t lds, float* c, int64_t ldc) {
  const Int8Tail& tail = *tail_of(panel, Kp);
  for (int i = 0; i < rows; i += 2)
    for (int half = 0; half < 2; ++half) {
      const int32_t* first = sums + i * lds + half * kLanes;
      store_int8<true>(_mm512_loadu_si512(first), _mm512_loadu_si512(first + lds), tail, half,
                       row_scale(a + i * lda, Kp), c + i / 2 * ldc);
    }
}
  #endif

// `digits`: rows of 15 bits, as two byte rows h and l; otherwise of 8.
template <bool digits>
class Int8Kernel {
 public:
  static constexpr int64_t kRowTile = kMR;

  explicit Int8Kernel(const PackedWeight& w)
      : weight_(w),
        depth_(packed_k(w.format, w.K, w.group)),
        // Room for the scale behind the bytes, and an odd number of lines.
        stride_((depth_ / 64 / 2 * 2 + 3) * 64),
        panel_bytes_(panel_bytes(w.format, w.K, w.group)) {}

  int64_t row_bytes() const { return kStep * stride_; }
  int64_t block_bytes() const { return panel_bytes_; }
  int64_t few_panels(int64_t) const { return 1; }

  template <class T>
  void prepare(const T* x, void* row) const {
    uint8_t* first = static_cast<uint8_t*>(row);
    uint8_t* low = digits ? first + stride_ : first;
    const float scale = quantize_row(x, weight_.K, depth_, 128, digits ? first : nullptr, low,
                                     [](int64_t, __m512i) {});
    __builtin_memcpy(first + depth_, &scale, 4);
  }

  const void* block(int64_t panel, int64_t) const {
    return static_cast<const char*>(weight_.data) + panel * panel_bytes_;
  }

  void multiply(int64_t rows, const void* a, int64_t count, const void* b, float* c,
                int64_t ldc) const {
    const uint8_t* x = static_cast<const uint8_t*>(a);
    const int8_t* panels = static_cast<const int8_t*>(b);
  #if CGPT_TIER_LEVEL >= 5
    const int64_t byte_rows = rows * kStep;
    // Sums are exact either way; up to here the dot product keeps pace with memory.
    if constexpr (digits)
      if (byte_rows > 8) return multiply_on_tiles(byte_rows, x, count, panels, c, ldc);
  #endif
    constexpr int64_t kTile = kMR / kStep;
    const int64_t tiles = (rows + kTile - 1) / kTile;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t i = rows * t / tiles, height = rows * (t + 1) / tiles - i;
      for (int64_t p = 0; p < count; ++p)
        int8_tile_rows<kMR, digits>(height * kStep, depth_, x + i * kStep * stride_, stride_,
                                    panels + p * panel_bytes_, c + i * ldc + p * kPanelColumns,
                                    ldc);
    }
  }

 private:
  static constexpr int64_t kStep = digits ? 2 : 1;

  #if CGPT_TIER_LEVEL >= 5
  void multiply_on_tiles(int64_t byte_rows, const uint8_t* x, int64_t count, const int8_t* panels,
                         float* c, int64_t ldc) const {
    alignas(64) int32_t sums[32][kColumns];
    for (int64_t i = 0; i < byte_rows; i += 32) {
      const int height = static_cast<int>(byte_rows - i < 32 ? byte_rows - i : 32);
      const uint8_t* a = x + i * stride_;
      AmxTiles tiles(height < 16 ? height : 16, height < 16 ? 0 : height - 16);
      for (int64_t p = 0; p < count; ++p) {
        const int8_t* panel = panels + p * panel_bytes_;
        amx_panel(tiles, height, depth_, a, stride_, panel, sums[0], kColumns);
        scale_panel(height, depth_, a, stride_, panel, sums[0], kColumns,
                    c + i / 2 * ldc + p * kPanelColumns, ldc);
      }
    }
  }
  #endif

  PackedWeight weight_;
  int64_t depth_, stride_, panel_bytes_;
};

}  // namespace
}  // namespace cgpt::CGPT_TIER
#endif
