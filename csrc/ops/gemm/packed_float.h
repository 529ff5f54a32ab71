// Panels multiplied in fp32, or as bf16 pairs where the tier has the dot product: read in place
// where they lie in the type that is multiplied, else unpacked, dequantized, into scratch first.
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
//   prepare(x, row)  one row of x into its prepared form
//   block(...)       `count` panels from `panel` on, ready to be multiplied
//   multiply(...)    c[rows, count * 32] = x W^T in fp32 for prepared rows
template <class C>
class FloatKernel {
 public:
  static constexpr int64_t kRowTile = kHasAmx && sizeof(C) == 2 ? 32 : kMR;

  explicit FloatKernel(const PackedWeight& w)
      : weight_(w),
        in_place_(w.format == (sizeof(C) == 4 ? WeightFormat::f32 : WeightFormat::bf16)),
        // An odd number of lines: rows of a register tile must not meet in the same L1 sets.
        depth_(sizeof(C) == 4 ? w.K : round_up(w.K, 32)),
        stride_((depth_ * static_cast<int64_t>(sizeof(C)) / 64 / 2 * 2 + 3) * 64 /
                static_cast<int64_t>(sizeof(C))),
        panel_bytes_(panel_bytes(w.format, w.K, w.group)) {}

  int64_t row_bytes() const { return stride_ * static_cast<int64_t>(sizeof(C)); }
  int64_t block_bytes() const { return depth_ * kPanelColumns * static_cast<int64_t>(sizeof(C)); }

  template <class T>
  void prepare(const T* x, void* row) const {
    C* out = static_cast<C*>(row);
    pack_a<C>(x, 0, 1, weight_.K, out);
    if constexpr (sizeof(C) == 2)
      for (int64_t k = padded_k<C>(weight_.K); k < depth_; ++k) out[k] = {};
  }

  const void* block(int64_t panel, int64_t count) const {
    const char* first = static_cast<const char*>(weight_.data) + panel * panel_bytes_;
    if (in_place_) return first;
    C* out = static_cast<C*>(
        thread_scratch(kSlotPanels, static_cast<size_t>(count * block_bytes() + 4 * depth_ * 32)));
    float* wide = reinterpret_cast<float*>(reinterpret_cast<char*>(out) + count * block_bytes());
    for (int64_t p = 0; p < count; ++p)
      unpack(first + p * panel_bytes_, out + p * depth_ * 32, wide);
    return out;
  }

  void multiply(int64_t rows, const void* a, int64_t count, const void* b, float* c,
                int64_t ldc) const {
    const C* panels = static_cast<const C*>(b);
    const C* x = static_cast<const C*>(a);
#if CGPT_TIER_LEVEL >= 4
    if constexpr (sizeof(C) == 2)
      return amx_gemm(rows, count * kPanelColumns, depth_, x, stride_, panels, c, ldc, false);
#endif
    const int64_t tiles = (rows + kMR - 1) / kMR;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t i = rows * t / tiles, height = rows * (t + 1) / tiles - i;
      for (int64_t p = 0; p < count; ++p)
        for (int64_t n = 0; n < kPanelColumns; n += kNR)
          tile_gemm_rows<kMR, kPanelColumns>(height, depth_, x + i * stride_, stride_,
                                             panels + p * depth_ * kPanelColumns + n,
                                             c + i * ldc + p * kPanelColumns + n, ldc, kNR, false);
    }
  }

 private:
  void unpack(const void* panel, C* out, float* wide) const {
    if constexpr (sizeof(C) == 4) {
      decode_panel(weight_, panel, out);
    } else {
      decode_panel(weight_, panel, wide);
      encode_pairs(wide, weight_.K, depth_, out);
    }
  }

  PackedWeight weight_;
  bool in_place_;
  int64_t depth_, stride_, panel_bytes_;
};

}  // namespace
}  // namespace cgpt::CGPT_TIER
