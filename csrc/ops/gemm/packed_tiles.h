// Many rows of x times packed panels on AMX tiles: bf16 in fp32, bytes exactly in int32.
//
//   tile     16 rows x 64 columns of sums, two panels: 1 tile of x and 4 of W a step of 64 bytes
//   chunk    kChunkSteps steps: two panels' part, 24 KiB, stays in L1 while all rows pass
//   section  chunks of x that stay in L2 while a group of panels passes
//
// A step moves 1 KiB of x from L2 and multiplies for 64 cycles; 32 rows x 32 columns would move 2
// KiB in as long. The panels' next part comes into L2 meanwhile, and a tile is finished while it
// is in L1. Sums that are taken up again are exact, so where chunks and sections begin does not
// show in the result.
#pragma once

#include "packed_float.h"
#include "packed_int8.h"

#if CGPT_TIER_LEVEL >= 5
namespace cgpt::CGPT_TIER {
namespace {

constexpr int64_t kTileRows = 16, kStepBytes = 64, kTileBytes = kTileRows * kStepBytes;
// Measured on a Xeon with AMX and 2 MB of L2, 512 x 768 x 3072: 6 steps are 5 % faster than 8
// and 25 % than 12, the columns' part being all of L1 then.
constexpr int64_t kChunkSteps = 6;
constexpr int64_t kChunkBytes = kChunkSteps * kStepBytes;
constexpr int64_t kSectionBytes = 1 << 20;  // of x in L2
constexpr int64_t kGroupBytes = 1 << 20;    // of sums that wait for the next section
// Of a row or column, in products: 280 a cycle are multiplied, and 8 bytes come from beyond L2.
constexpr int64_t kTileTraffic = 70;
constexpr int64_t kPanelStep = kStepBytes * kColumns;

// Rows of x as tiles: for each chunk, the tiles of 16 rows one after the other, so that a walk down
// the rows reads one stream. Rows up to the next multiple of 16 are room; what lies there meets
// sums that nobody reads.
struct TileRows {
  char* data;
  int64_t rows, steps;

  static int64_t bytes(int64_t rows, int64_t steps) {
    return round_up(rows, kTileRows) * steps * kStepBytes;
  }
  TileRows(char* data, int64_t rows, int64_t steps)
      : data(data), rows(round_up(rows, kTileRows)), steps(steps) {}

  // The tile of rows i .. i + 15 at `step`; the chunk's next ones lie behind it.
  char* tile(int64_t i, int64_t step) const {
    const int64_t chunk = step / kChunkSteps * kChunkSteps;
    const int64_t length = steps - chunk < kChunkSteps ? steps - chunk : kChunkSteps;
    return data + chunk * kStepBytes * rows + i * length * kStepBytes + (step - chunk) * kTileBytes;
  }
  char* row(int64_t i, int64_t step) const {
    return tile(i / kTileRows * kTileRows, step) + i % kTileRows * kStepBytes;
  }
};

// c[16, 32 panels] (+)= `steps` steps of 16 rows times one or two panels. Lines of x two steps
// ahead and of the next rows' sums are asked for, a few at a time.
template <int panels, class C, class Sum>
CGPT_INLINE void tile_multiply(AmxTiles& tiles, int64_t steps, const char* x, const char* w,
                               int64_t panel_stride, Sum* c, bool accumulate) {
  constexpr int64_t ldc = panels * kColumns, row = ldc * 4;
  const char* second = w + panel_stride;
  if (accumulate) {
    tiles.load<0>(c, row);
    tiles.load<1>(c + 16, row);
    if constexpr (panels == 2) {
      tiles.load<2>(c + 32, row);
      tiles.load<3>(c + 48, row);
    }
  } else {
    tiles.zero<0>();
    tiles.zero<1>();
    if constexpr (panels == 2) {
      tiles.zero<2>();
      tiles.zero<3>();
    }
  }
  const C* type = nullptr;
  const char* sums = reinterpret_cast<const char*>(c) + kTileRows * row;
  for (int64_t s = 0; s < steps; ++s, x += kTileBytes, w += kPanelStep, second += kPanelStep) {
    tiles.load<4>(x, kStepBytes);
    tiles.load<6>(w, 128);
    amx_multiply_add<0, 4, 6>(tiles, type);
  #pragma GCC unroll 16
    for (int line = 0; line < 16; ++line) __builtin_prefetch(x + 2 * kTileBytes + line * 64);
    tiles.load<7>(w + 64, 128);
    amx_multiply_add<1, 4, 7>(tiles, type);
    if (accumulate)
  #pragma GCC unroll 8
      for (int line = 0; line < 4 * panels; ++line, sums += 64) __builtin_prefetch(sums);
    if constexpr (panels == 2) {
      tiles.load<5>(second, 128);
      amx_multiply_add<2, 4, 5>(tiles, type);
      tiles.load<6>(second + 64, 128);
      amx_multiply_add<3, 4, 6>(tiles, type);
    }
  }
  tiles.store<0>(c, row);
  tiles.store<1>(c + 16, row);
  if constexpr (panels == 2) {
    tiles.store<2>(c + 32, row);
    tiles.store<3>(c + 48, row);
  }
}

// What the two kinds of panels ask for:
//   C, Sum           what is multiplied and what sums it
//   steps()          of x's and the panels' k
//   panel_stride()   bytes from a panel of a block to the next
//   block(...)       `count` panels from `panel` on, ready to be multiplied
//   prepare(...)     row i of x into `rows`, and its scale
//   scaled(...)      sums of 16 rows as products in fp32, in their place

// bf16 as it lies, int4 dequantized to it.
class FloatTiles {
 public:
  using C = bf16;
  using Sum = float;

  explicit FloatTiles(const PackedWeight& w) : weight_(w), panels_(w, false) {}

  int64_t steps() const { return panels_.block_bytes() / kPanelStep; }
  int64_t panel_stride() const { return panels_.block_bytes(); }
  const void* block(int64_t panel, int64_t count) const { return panels_.block(panel, count); }

  void prepare(const bf16* x, const TileRows& rows, int64_t i, float*) const {
    for (int64_t s = 0; s < rows.steps; ++s)
      _mm512_storeu_si512(rows.row(i, s), load_n_bf16(x + s * 32, weight_.K - s * 32));
  }

  float* scaled(int64_t, float* c, const char*, const float*) const { return c; }

 private:
  PackedWeight weight_;
  FloatKernel<bf16> panels_;
};

// int8, times rows of 8 bits.
class Int8Tiles {
 public:
  using C = uint8_t;
  using Sum = int32_t;

  explicit Int8Tiles(const PackedWeight& w)
      : weight_(w),
        depth_(packed_k(w.format, w.K, w.group)),
        panel_bytes_(panel_bytes(w.format, w.K, w.group)) {}

  int64_t steps() const { return depth_ / kStepBytes; }
  int64_t panel_stride() const { return panel_bytes_; }
  const void* block(int64_t panel, int64_t) const {
    return static_cast<const char*>(weight_.data) + panel * panel_bytes_;
  }

  template <class T>
  void prepare(const T* x, const TileRows& rows, int64_t i, float* scales) const {
    auto* bytes = static_cast<uint8_t*>(thread_scratch(kSlotSums, static_cast<size_t>(depth_)));
    scales[i] = quantize_row(x, weight_.K, depth_, 128, nullptr, bytes, [](int64_t, __m512i) {});
    for (int64_t s = 0; s < rows.steps; ++s)
      _mm512_storeu_si512(rows.row(i, s), _mm512_loadu_si512(bytes + s * kStepBytes));
  }

  float* scaled(int64_t panels, int32_t* c, const char* w, const float* scales) const {
    float* out = reinterpret_cast<float*>(c);
    for (int64_t p = 0; p < panels; ++p, w += panel_bytes_) {
      const Int8Tail& tail = *tail_of(reinterpret_cast<const int8_t*>(w), depth_);
      for (int64_t i = 0; i < kTileRows; ++i)
        for (int half = 0; half < 2; ++half) {
          const int64_t at = (i * panels + p) * kColumns;
          const __m512i sum = _mm512_loadu_si512(c + at + half * kLanes);
          store_int8<false>(sum, sum, tail, half, scales[i], out + at);
        }
    }
    return out;
  }

 private:
  PackedWeight weight_;
  int64_t depth_, panel_bytes_;
};

}  // namespace
}  // namespace cgpt::CGPT_TIER
#endif
