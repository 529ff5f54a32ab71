// Panels multiplied in fp32, or as bf16 pairs where the tier has the dot product: read in place
// where they lie in the type that is multiplied, and bf16 in fp32 where few rows come; else
// unpacked, dequantized, into scratch first.
#pragma once

#include "../../cpu/block_gemm.h"
#include "../../cpu/scratch.h"
#include "packed_pack.h"

namespace cgpt::CGPT_TIER {
namespace {

// Slots of thread_scratch: rows of x of the calling thread, read by its team; a thread's own
// blocks.
constexpr int kSlotPanels = 0, kSlotRows = 1, kSlotSums = 2;

// How far before its use a line of a streamed panel is asked for, in bytes: on Zen 4, 2 to 8 KiB
// read 1.35 times as fast as the hardware's own prefetching, 512 bytes 1.2 times.
constexpr int kAhead = 4096;

// The kernels of packed_gemm_cpu.cpp offer, for rows and panels of one product:
//   kRowTile         rows that one pass over a panel takes
//   row_bytes()      bytes of one prepared row of x
//   block_bytes()    bytes of one panel that the passes over it read
//   few_panels(rows) panels that `multiply` takes at a time where one pass takes all rows
//   prepare(x, row)  one row of x into its prepared form
//   block(...)       `count` panels from `panel` on, ready to be multiplied
//   multiply(...)    c[rows, count * 32] = x W^T in fp32 for prepared rows
#if CGPT_TIER_LEVEL >= 5
// Up to 32 rows times one panel that comes from memory.
template <class C, class B, class Sum>
CGPT_INLINE void amx_panel(AmxTiles& tiles, int rows, int64_t depth, const C* x, int64_t ldx,
                           const B* panel, Sum* c, int64_t ldc) {
  constexpr int kSteps = kAhead / (kNR * 64);
  if (rows > 16)
    amx_gemm_rows<true, kSteps>(tiles, rows, kColumns, depth, x, ldx, panel, c, ldc, false);
  else amx_gemm_rows<false, kSteps>(tiles, rows, kColumns, depth, x, ldx, panel, c, ldc, false);
}
#endif

#if CGPT_TIER_LEVEL >= 4
// An int4 panel as bf16 pairs, dequantized. A group is a whole number of AMX steps of 32, so K
// padded to either ends in zeros of its own.
inline void int4_to_pairs(const PackedWeight& w, const void* panel, bf16* dst) {
  alignas(64) static constexpr uint16_t kInterleave[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i interleave = _mm512_load_si512(kInterleave);
  // The permutation looks at the low four bits of each lane only: no masking, no subtraction.
  const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const int64_t depth = round_up(w.K, 32);
  const uint8_t* bytes = static_cast<const uint8_t*>(panel);
  for (int64_t g = 0; g < depth; g += w.group, bytes += group_bytes(w.group)) {
    const bf16* stored = reinterpret_cast<const bf16*>(bytes + w.group / 2 * kColumns);
    const VecF scale[2] = {load(stored), load(stored + kLanes)};
    const int64_t end = g + w.group < depth ? g + w.group : depth;
    for (int64_t k = g; k < end; k += 8)
  #pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m512i word = _mm512_loadu_si512(bytes + (k - g) * 16 + half * 64);
        // Bits of k, k + 1 .. k + 7 of the group of eight.
        constexpr int kShift[8] = {0, 8, 16, 24, 4, 12, 20, 28};
  #pragma GCC unroll 4
        for (int r = 0; r < 8; r += 2) {
          const auto value = [&](int shift) __attribute__((always_inline)) {
            const __m512i index = _mm512_srli_epi32(word, static_cast<unsigned>(shift));
            return bit_cast<__m512>(bit_cast<VecF>(_mm512_permutexvar_ps(index, values)) *
                                    scale[half]);
          };
          const auto both = _mm512_cvtne2ps_pbh(value(kShift[r + 1]), value(kShift[r]));
          _mm512_storeu_si512(dst + ((k + r) * kColumns + half * 2 * kLanes),
                              _mm512_permutexvar_epi16(interleave, bit_cast<__m512i>(both)));
        }
      }
  }
}
#endif

template <class C>
class FloatKernel {
 public:
  static constexpr int64_t kRowTile = kMR;

  // `few`: the rows of x make one pass over the panels.
  FloatKernel(const PackedWeight& w, bool few)
      : weight_(w),
        in_place_(w.format == (sizeof(C) == 4 ? WeightFormat::f32 : WeightFormat::bf16)),
        widened_(few && sizeof(C) == 4 && w.format == WeightFormat::bf16),
        in_steps_(few && !in_place_ && sizeof(C) == 4),
        depth_(sizeof(C) == 4 ? w.K : round_up(w.K, 32)),
        // An odd number of lines: rows of a register tile must not meet in the same L1 sets.
        stride_((depth_ * static_cast<int64_t>(sizeof(C)) / 64 / 2 * 2 + 3) * 64 /
                static_cast<int64_t>(sizeof(C))),
        panel_bytes_(panel_bytes(w.format, w.K, w.group)) {}

  int64_t row_bytes() const { return stride_ * static_cast<int64_t>(sizeof(C)); }
  int64_t block_bytes() const { return depth_ * kPanelColumns * static_cast<int64_t>(sizeof(C)); }

  int64_t few_panels(int64_t rows) const {
    const int64_t fit = kSums / (rows * kPanelVectors);
    return (in_place_ || widened_) && fit > 1 ? fit : 1;
  }

  template <class T>
  void prepare(const T* x, void* row) const {
    C* out = static_cast<C*>(row);
    pack_a<C>(x, 0, 1, weight_.K, out);
    if constexpr (sizeof(C) == 2)
      for (int64_t k = padded_k<C>(weight_.K); k < depth_; ++k) out[k] = {};
    else out[weight_.K] = 0;  // met by the zero behind an odd K in pairs
  }

  const void* block(int64_t panel, int64_t count) const {
    const char* first = static_cast<const char*>(weight_.data) + panel * panel_bytes_;
    if (in_place_ || in_steps_) return first;
    C* out = static_cast<C*>(
        thread_scratch(kSlotPanels, static_cast<size_t>(count * block_bytes() + 4 * depth_ * 32)));
    float* wide = reinterpret_cast<float*>(reinterpret_cast<char*>(out) + count * block_bytes());
    for (int64_t p = 0; p < count; ++p)
      unpack(first + p * panel_bytes_, out + p * depth_ * 32, wide);
    return out;
  }

  void multiply(int64_t rows, const void* a, int64_t count, const void* b, float* c,
                int64_t ldc) const {
    const C* x = static_cast<const C*>(a);
    if constexpr (sizeof(C) == 4)
      if (widened_ && rows <= kWidenedRows)
        return multiply_beside<kSums / kPanelVectors>(rows, x, count, static_cast<const bf16*>(b),
                                                      c, ldc);
    if (in_steps_) return multiply_in_steps(rows, static_cast<const float*>(a), b, c, ldc);
#if CGPT_TIER_LEVEL >= 5
    // Up to 16 rows. Below five tiles would stay empty, and the dot product keeps pace with memory.
    if constexpr (sizeof(C) == 2)
      if (rows > 4) return multiply_on_tiles(rows, x, count, static_cast<const C*>(b), c, ldc);
#endif
    if (count > 1 && rows * count * kPanelVectors <= kSums)
      return multiply_beside<kSums / kPanelVectors>(rows, x, count, static_cast<const C*>(b), c,
                                                    ldc);
    for (int64_t i = 0, next; i < rows; i = next) {
      next = tile_end(rows, i);
      for (int64_t p = 0; p < count; ++p)
        multiply_panel<kAhead>(next - i, depth_, x + i * stride_,
                               static_cast<const C*>(b) + p * depth_ * kPanelColumns,
                               c + i * ldc + p * kPanelColumns, ldc, false);
    }
  }

 private:
  static constexpr int64_t kStep = 128;  // k unpacked at a time: 16 KiB, half of L1
  // Vectors summed into at a time: a row and a panel alone have two, whose additions wait for each
  // other, 6 cycles for 128 bytes on Zen 5, where the second level of cache gives them in 2.
  static constexpr int64_t kSums = 8;
  static constexpr int64_t kPanelVectors = kPanelColumns / kLanes;
  // Rows whose sums stay in registers beside a panel's bf16 widened to fp32.
  static constexpr int64_t kWidenedRows = CGPT_TIER_LEVEL >= 2 ? 12 : CGPT_TIER_LEVEL == 1 ? 2 : 1;

  // Tiles of nearly equal height.
  static int64_t tile_end(int64_t rows, int64_t begin) {
    const int64_t left = rows - begin, tiles = (left + kMR - 1) / kMR;
    return begin + left / tiles;
  }

  template <int ahead>
  void multiply_panel(int64_t rows, int64_t depth, const C* x, const C* panel, float* c,
                      int64_t ldc, bool accumulate) const {
    for (int64_t n = 0; n < kPanelColumns; n += kNR)
      tile_gemm_rows<kMR, kPanelColumns, ahead>(rows, depth, x, stride_,
                                                panel + n * (4 / static_cast<int64_t>(sizeof(C))),
                                                c + n, ldc, kNR, accumulate);
  }

  template <int64_t panels, class W>
  void multiply_beside(int64_t rows, const C* x, int64_t count, const W* first, float* c,
                       int64_t ldc) const {
    if constexpr (panels > 1) {
      if (count < panels) return multiply_beside<panels - 1>(rows, x, count, first, c, ldc);
      if constexpr (2 * panels * kPanelVectors <= kSums)
        if (rows == 2) return beside<2, panels>(x, first, c, ldc);
      beside<1, panels>(x, first, c, ldc);
    } else if constexpr (sizeof(W) < sizeof(C)) {
      multiply_widened<kWidenedRows>(rows, x, first, c, ldc);
    }
  }

  template <int height>
  void multiply_widened(int64_t rows, const C* x, const bf16* panel, float* c, int64_t ldc) const {
    if (rows == height) return beside<height, 1>(x, panel, c, ldc);
    if constexpr (height > 1) multiply_widened<height - 1>(rows, x, panel, c, ldc);
  }

  // `rows` rows times `panels` panels side by side, each sum in the order of multiply_panel's.
  template <int rows, int panels, class W>
  CGPT_INLINE void beside(const C* x, const W* first, float* c, int64_t ldc) const {
    constexpr int64_t step = 4 / static_cast<int64_t>(sizeof(W));  // k of one word
    constexpr int64_t line = step * kPanelColumns, vectors = kPanelVectors;
    const int64_t depth = packed_k(weight_.format, weight_.K, weight_.group);
    const int64_t panel = depth * kPanelColumns;
    VecF acc[rows][panels * vectors] = {};
    // At a panel's end what follows is this thread's next panel but (panels - 1).
    const int64_t ahead = kAhead / static_cast<int64_t>(sizeof(W));
    const int64_t turn = panel > ahead ? (panel - ahead) / line * step : 0;
    const int64_t end = round_up(weight_.K, step);
    for (int part = 0; part < 2; ++part) {
      const int64_t next = part == 0 ? ahead : ahead + (panels - 1) * panel;
      for (int64_t k = part == 0 ? 0 : turn; k < (part == 0 && turn < end ? turn : end); k += step)
#pragma GCC unroll 4
        for (int p = 0; p < panels; ++p) {
          const W* at = first + p * panel + k * kPanelColumns;
          for (int64_t b = 0; b < kPanelColumns * 4; b += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(at + next) + b);
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v)
#pragma GCC unroll 16
            for (int i = 0; i < rows; ++i)
              multiply_add(acc[i][p * vectors + v], x + i * stride_ + k, at + v * step * kLanes);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < panels * vectors; ++v) store(c + i * ldc + v * kLanes, acc[i][v]);
  }

  // sum += x w of one word of k, that is one, or two in 16 bits, for kLanes columns.
  static CGPT_INLINE void multiply_add(VecF& sum, const float* x, const float* w) {
    sum = fmadd(set1(*x), load(w), sum);
  }
  static CGPT_INLINE void multiply_add(VecF& sum, const float* x, const bf16* w) {
    const VecI words = load_words(w);
    sum = fmadd(set1(x[0]), first_bf16(words), sum);
    sum = fmadd(set1(x[1]), second_bf16(words), sum);
  }
#if CGPT_TIER_LEVEL >= 4
  static CGPT_INLINE void multiply_add(VecF& sum, const bf16* x, const bf16* w) {
    int32_t pair;
    __builtin_memcpy(&pair, x, 4);
    sum = KVec<bf16>::multiply_add(_mm512_set1_epi32(pair), _mm512_loadu_si512(w), sum);
  }
#endif

#if CGPT_TIER_LEVEL >= 5
  void multiply_on_tiles(int64_t rows, const bf16* x, int64_t count, const bf16* panels, float* c,
                         int64_t ldc) const {
    AmxTiles tiles(static_cast<int>(rows), 0);
    for (int64_t p = 0; p < count; ++p)
      amx_panel(tiles, static_cast<int>(rows), depth_, x, stride_,
                panels + p * depth_ * kPanelColumns, c + p * kPanelColumns, ldc);
  }
#endif

  // One panel, unpacked a little at a time, so that the unpacked weights never leave L1.
  void multiply_in_steps(int64_t rows, const float* x, const void* panel, float* c,
                         int64_t ldc) const {
    if constexpr (sizeof(C) == 4) {
      alignas(64) float wide[kStep * kPanelColumns];
      for (int64_t k = 0; k == 0 || k < depth_; k += kStep) {
        const int64_t end = k + kStep < depth_ ? k + kStep : depth_;
        decode_panel(weight_, panel, k, end, wide);
        for (int64_t i = 0, next; i < rows; i = next) {
          next = tile_end(rows, i);
          multiply_panel<0>(next - i, end - k, x + i * stride_ + k, wide, c + i * ldc, ldc, k > 0);
        }
      }
    }
  }

  void unpack(const void* panel, C* out, float* wide) const {
    if constexpr (sizeof(C) == 4) {
      decode_panel(weight_, panel, 0, weight_.K, out);
    } else {
#if CGPT_TIER_LEVEL >= 4
      if (weight_.format == WeightFormat::int4) return int4_to_pairs(weight_, panel, out);
#endif
      decode_panel(weight_, panel, 0, weight_.K, wide);
      encode_pairs(wide, weight_.K, depth_, out);
    }
  }

  PackedWeight weight_;
  bool in_place_, widened_, in_steps_;
  int64_t depth_, stride_, panel_bytes_;
};

}  // namespace
}  // namespace cgpt::CGPT_TIER
