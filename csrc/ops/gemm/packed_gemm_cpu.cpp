// y = activation(x W^T + scale u v^T + bias) + residual on CPU, W packed (packed.h).
//
// Few rows of x: each thread walks its own contiguous range of panels once, as one stream, with the
// prepared rows in L1: 2 M N K FLOPs over the packed bytes, bound by memory bandwidth.
//
// Many rows: panels are taken in blocks that stay in L2 while a chunk of rows passes, a register
// tile of rows at a time; on AMX packed_tiles.h says how. Rows of x are prepared (converted,
// quantized) once per chunk, by all threads; panels that are not multiplied as they lie are
// unpacked once per chunk.
#include "../../cpu/parallel.h"
#include "gemm_epilogue.h"
#include "packed_float.h"
#include "packed_int4.h"
#include "packed_int8.h"
#include "packed_tiles.h"

namespace cgpt::CGPT_TIER {
namespace {

CGPT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
CGPT_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of x that one walk over the panels takes as a whole.
constexpr int64_t kFewRows = 16;
constexpr int64_t kChunkRows = 512;
// Of L2, for the block of panels: 1 MB from Zen 4 and Sapphire Rapids on, 256 KB before.
constexpr int64_t kBlockBytes = CGPT_TIER_LEVEL >= 2 ? 524288 : 131072;
// Below this much work, in cycles, another thread costs more than it brings.
constexpr int64_t kCyclesPerThread = 10000;

template <class T, class Y>
struct Problem : GemmEpilogue<T, Y> {
  explicit Problem(const PackedGemmArgs& a)
      : GemmEpilogue<T, Y>(a),
        M(a.x.shape[0]),
        x(a.x.as<const T>()),
        ldx(a.x.strides[0]),
        weight(a.weight),
        first_panel(a.first_panel),
        panels(a.panels < 0 ? panel_count(a.weight.N) - a.first_panel : a.panels),
        low_rank(low_rank_of(a.low_rank, first_panel * kPanelColumns,
                             smaller((first_panel + panels) * kPanelColumns, a.weight.N))) {}

  int64_t M;
  const T* x;
  int64_t ldx;
  PackedWeight weight;
  int64_t first_panel, panels;
  LowRank low_rank;
};

// Rows i0 .. i1 (from `rows`, prepared, row `base` first) times panels p0 .. p1.
template <class Kernel, class T, class Y>
void multiply_part(const Kernel& kernel, const Problem<T, Y>& p, const char* rows, int64_t base,
                   int64_t i0, int64_t i1, int64_t p0, int64_t p1) {
  const bool few = i1 - i0 <= kFewRows;
  const int64_t fit = kBlockBytes / (kernel.block_bytes() + 1);
  int64_t block = smaller(few ? kernel.few_panels(i1 - i0) : fit, p1 - p0);
  block = block < 1 ? 1 : block;
  block = divide_up(p1 - p0, divide_up(p1 - p0, block));
  const int64_t tile = few ? i1 - i0 : Kernel::kRowTile, ldc = block * kPanelColumns;
  float* c = static_cast<float*>(thread_scratch(kSlotSums, static_cast<size_t>(tile * ldc * 4)));
  for (int64_t panel = p0; panel < p1; panel += block) {
    const int64_t count = smaller(block, p1 - panel), n0 = panel * kPanelColumns;
    const int64_t columns = smaller(count * kPanelColumns, p.weight.N - n0);
    const void* b = kernel.block(panel, count);
    const int64_t tiles = divide_up(i1 - i0, tile);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t i = i0 + (i1 - i0) * t / tiles, next = i0 + (i1 - i0) * (t + 1) / tiles;
      kernel.multiply(next - i, rows + (i - base) * kernel.row_bytes(), count, b, c, ldc);
      add_low_rank(p.low_rank, i, next - i, n0, columns, c, ldc);
      finish(p, i, next - i, n0, columns, c, ldc);
    }
  }
}

// Calls multiply(i0, i1, p0, p1) for rectangles of rows [0, M) and panels, one a thread; rows begin
// at multiples of `tile`. The split is the cheapest one, counted in products of one k: a
// rectangle's own, and `traffic` for each column it reads, twice that for a row, which other cores
// wrote; with 0 weights are read once in all.
template <class T, class Y, class F>
void each_rectangle(const Problem<T, Y>& p, int64_t M, int64_t tile, int64_t traffic,
                    F&& multiply) {
  // Cycles on one thread: multiplication, or reading the panels at 8 bytes a cycle.
  const int64_t work = M * p.panels * kPanelColumns * (p.weight.K + 1) / (kLanes * 2);
  const int64_t read = p.panels * panel_bytes(p.weight.format, p.weight.K, p.weight.group) / 8;
  const int64_t cycles = work > read ? work : read;
  int64_t threads = smaller(available_threads(), cycles / kCyclesPerThread);
  threads = threads < 1 ? 1 : threads;

  const int64_t units = divide_up(M, tile);
  int64_t best_m = 1, best_n = 1, best = -1;
  for (int64_t m = 1; m <= smaller(threads, units); ++m) {
    const int64_t n = smaller(threads / m, p.panels);
    const int64_t rows = divide_up(units, m) * tile, columns = divide_up(p.panels, n) * kColumns;
    const int64_t cost = columns * (rows + 1) + traffic * (2 * rows + columns);
    if (best < 0 || cost < best) best = cost, best_m = m, best_n = n;
  }
  parallel_ranges(best_m * best_n, kParallelGrain, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t i = part / best_n, j = part % best_n;
      multiply(units * i / best_m * tile, smaller(M, units * (i + 1) / best_m * tile),
               p.first_panel + p.panels * j / best_n, p.first_panel + p.panels * (j + 1) / best_n);
    }
  });
}

template <class Kernel, class T, class Y>
void run(const Kernel& kernel, const Problem<T, Y>& p) {
  const int64_t chunk = smaller(p.M, kChunkRows), bytes = kernel.row_bytes();
  char* rows = static_cast<char*>(thread_scratch(kSlotRows, static_cast<size_t>(chunk * bytes)));
  for (int64_t base = 0; base < p.M; base += chunk) {
    const int64_t M = smaller(chunk, p.M - base);
    parallel_ranges(M, p.weight.K, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        kernel.prepare(p.x + (base + i) * p.ldx, rows + i * bytes);
    });
    each_rectangle(p, M, M <= kFewRows ? M : Kernel::kRowTile, 0,
                   [&](int64_t i0, int64_t i1, int64_t p0, int64_t p1) {
                     multiply_part(kernel, p, rows, base, base + i0, base + i1, p0, p1);
                   });
  }
}

#if CGPT_TIER_LEVEL >= 5
// One or two panels of `w`, ready, times rows i0 .. i1 of the chunk from `base` on, for the steps
// from `begin` to `end`; finished where these are the last. `next`: steps of these panels' first
// one that are read after these, and come into L2 meanwhile.
template <int panels, class Kernel, class T, class Y>
void multiply_columns(const Kernel& kernel, const Problem<T, Y>& p, const TileRows& rows,
                      const float* scales, int64_t base, int64_t i0, int64_t i1, int64_t panel,
                      const char* w, int64_t begin, int64_t end, const char* next,
                      typename Kernel::Sum* sums) {
  constexpr int64_t kTile = kTileRows * panels * kColumns;
  const int64_t n0 = panel * kPanelColumns, stride = kernel.panel_stride();
  const int64_t columns = smaller(panels * kPanelColumns, p.weight.N - n0);
  const bool fused = p.low_rank.rank == 0;  // whose product would take the tiles
  const auto finish_tile = [&](int64_t i) {
    auto* tile = sums + (i - i0) / kTileRows * kTile;
    const int64_t height = smaller(kTileRows, i1 - i);
    float* c = kernel.scaled(panels, tile, w, scales + i);
    add_low_rank(p.low_rank, base + i, height, n0, columns, c, panels * kColumns);
    finish(p, base + i, height, n0, columns, c, panels * kColumns);
  };
  const int64_t tiles_down = divide_up(i1 - i0, kTileRows);
  for (int64_t s = begin; s < end || s == 0; s += kChunkSteps) {
    const int64_t steps = smaller(kChunkSteps, end - s);
    const char* part = w + s * kPanelStep;
    const char* ahead = s + steps < end ? part + steps * kPanelStep : next;
    const int64_t lines = divide_up(steps * kPanelStep / 64, tiles_down);
    AmxTiles tiles(kTileRows, kTileRows);
    auto* c = sums;
    for (int64_t i = i0; i < i1; i += kTileRows, c += kTile) {
      for (int64_t line = 0; line < lines; ++line, ahead += 64)
        for (int q = 0; q < panels; ++q) __builtin_prefetch(ahead + q * stride, 0, 2);
      tile_multiply<panels, typename Kernel::C>(tiles, steps, rows.tile(i, s), part, stride, c,
                                                s > 0);
      if (fused && s + steps == rows.steps) finish_tile(i);
    }
  }
  if (!fused && end == rows.steps)
    for (int64_t i = i0; i < i1; i += kTileRows) finish_tile(i);
}

// Rows i0 .. i1 of the chunk from `base` on times panels p0 .. p1.
template <class Kernel, class T, class Y>
void multiply_tiles(const Kernel& kernel, const Problem<T, Y>& p, const TileRows& rows,
                    const float* scales, int64_t base, int64_t i0, int64_t i1, int64_t p0,
                    int64_t p1) {
  const int64_t height = round_up(i1 - i0, kTileRows), pair = height * 2 * kColumns;
  const int64_t chunks = divide_up(rows.steps, kChunkSteps);
  const int64_t fit = kSectionBytes / (height * kChunkBytes);
  const int64_t sections = divide_up(chunks, fit < 1 ? 1 : fit);
  // In one section columns are finished at once, otherwise they wait for all sections.
  int64_t group = sections <= 1 ? 2 : kGroupBytes / (pair * 4) * 2;
  group = group < 2 ? 2 : group;
  const int64_t stride = kernel.panel_stride();
  auto* sums = static_cast<typename Kernel::Sum*>(
      thread_scratch(kSlotSums, static_cast<size_t>(smaller(group, p1 - p0 + 1) / 2 * pair * 4)));
  for (int64_t first = p0; first < p1; first += group) {
    const int64_t count = smaller(group, p1 - first);
    const char* w = static_cast<const char*>(kernel.block(first, count));
    for (int64_t section = 0; section == 0 || section < sections; ++section) {
      const auto from = [&](int64_t n) {
        return sections < 1 ? 0 : smaller(rows.steps, chunks * n / sections * kChunkSteps);
      };
      const int64_t begin = from(section), end = from(section + 1);
      for (int64_t q = 0; q < count; q += 2) {
        // After a section's last columns come the first ones of the next.
        const char* next = w + (q + 2) * stride + begin * kPanelStep;
        if (q + 2 >= count && section + 1 < sections) next = w + end * kPanelStep;
        auto* c = sums + q / 2 * pair;
        const char* at = w + q * stride;
        if (q + 1 < count)
          multiply_columns<2>(kernel, p, rows, scales, base, i0, i1, first + q, at, begin, end,
                              next, c);
        else
          multiply_columns<1>(kernel, p, rows, scales, base, i0, i1, first + q, at, begin, end,
                              next, c);
      }
    }
  }
}

template <class Kernel, class T, class Y>
void run_tiles(const Kernel& kernel, const Problem<T, Y>& p) {
  const int64_t chunk = smaller(p.M, kChunkRows), steps = kernel.steps();
  const int64_t bytes = TileRows::bytes(chunk, steps);
  char* data = static_cast<char*>(
      thread_scratch(kSlotRows, static_cast<size_t>(bytes + round_up(chunk, kTileRows) * 4)));
  float* scales = reinterpret_cast<float*>(data + bytes);
  for (int64_t base = 0; base < p.M; base += chunk) {
    const int64_t M = smaller(chunk, p.M - base);
    const TileRows rows(data, M, steps);
    parallel_ranges(M, p.weight.K, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        kernel.prepare(p.x + (base + i) * p.ldx, rows, i, scales);
    });
    each_rectangle(p, M, kTileRows, kTileTraffic,
                   [&](int64_t i0, int64_t i1, int64_t p0, int64_t p1) {
                     multiply_tiles(kernel, p, rows, scales, base, i0, i1, p0, p1);
                   });
  }
}
#endif

template <class T, class Y>
void packed_gemm(const PackedGemmArgs& a) {
  const Problem<T, Y> p(a);
  if (p.M == 0 || p.panels == 0) return;
  const bool few = p.M <= kFewRows;
#if CGPT_TIER_LEVEL >= 5
  if (!few && p.weight.format == WeightFormat::int8) return run_tiles(Int8Tiles(p.weight), p);
  if constexpr (__is_same(T, bf16))
    if (!few && (p.weight.format == WeightFormat::bf16 || p.weight.format == WeightFormat::int4))
      return run_tiles(FloatTiles(p.weight), p);
#endif
#if CGPT_TIER_LEVEL >= 3
  if (p.weight.format == WeightFormat::int8)
    return few ? run(Int8Kernel<true>(p.weight), p) : run(Int8Kernel<false>(p.weight), p);
  if (p.weight.format == WeightFormat::int4 && few)
    return p.weight.group == 32 ? run(Int4Kernel<32>(p.weight), p)
                                : run(Int4Kernel<64>(p.weight), p);
#endif
#if CGPT_TIER_LEVEL >= 4
  if constexpr (__is_same(T, bf16))
    if (p.weight.format == WeightFormat::bf16 || p.weight.format == WeightFormat::int4)
      return run(FloatKernel<bf16>(p.weight, few), p);
#endif
  run(FloatKernel<float>(p.weight, few), p);
}

template <class T>
void pack_panels(const PackWeightArgs& a, const PackedWeight& w) {
  const int64_t stride_n = a.weight_kn ? 1 : a.weight.strides[0];
  const int64_t stride_k = a.weight_kn ? a.weight.strides[0] : 1;
  const int64_t bytes = panel_bytes(w.format, w.K, w.group);
  const int64_t Kp = packed_k(w.format, w.K, w.group);
  parallel_ranges(panel_count(w.N), Kp * kPanelColumns * 4, [&](int64_t begin, int64_t end) {
    auto* wide = static_cast<float*>(
        thread_scratch(kSlotPanels, static_cast<size_t>(w.K + 1) * kPanelColumns * 4));
    for (int64_t p = begin; p < end; ++p) {
      const int64_t n = p * kPanelColumns;
      read_panel(a.weight.as<const T>() + n * stride_n, stride_n, stride_k, w.K,
                 static_cast<int>(smaller(kPanelColumns, w.N - n)), wide);
      encode_panel(w, wide, static_cast<char*>(a.data) + p * bytes);
    }
  });
}

template <class T>
void unpack_panels(const UnpackWeightArgs& a) {
  const PackedWeight& w = a.weight;
  const int64_t stride_n = a.weight_kn ? 1 : a.out.strides[0];
  const int64_t stride_k = a.weight_kn ? a.out.strides[0] : 1;
  const int64_t bytes = panel_bytes(w.format, w.K, w.group);
  parallel_ranges(panel_count(w.N), (w.K + 1) * kPanelColumns * 2, [&](int64_t begin, int64_t end) {
    auto* wide = static_cast<float*>(
        thread_scratch(kSlotPanels, static_cast<size_t>(w.K + 1) * kPanelColumns * 4));
    for (int64_t p = begin; p < end; ++p) {
      const int64_t n = p * kPanelColumns;
      decode_panel(w, static_cast<const char*>(w.data) + p * bytes, 0, w.K, wide);
      write_panel(wide, stride_n, stride_k, w.K, static_cast<int>(smaller(kPanelColumns, w.N - n)),
                  a.out.as<T>() + n * stride_n);
    }
  });
}

}  // namespace

void packed_gemm_fwd(const PackedGemmArgs& a) {
  const bool wide = a.y.dtype == DType::f32;
  switch (a.x.dtype) {
    case DType::f32: return packed_gemm<float, float>(a);
    case DType::bf16: return wide ? packed_gemm<bf16, float>(a) : packed_gemm<bf16, bf16>(a);
    case DType::f16: return wide ? packed_gemm<f16, float>(a) : packed_gemm<f16, f16>(a);
    default: return;
  }
}

void pack_weight(const PackWeightArgs& a) {
  const int64_t N = a.weight.shape[a.weight_kn], K = a.weight.shape[!a.weight_kn];
  const PackedWeight w{a.format, N, K, a.group, a.data};
  if (a.weight.dtype == DType::f32) pack_panels<float>(a, w);
  if (a.weight.dtype == DType::bf16) pack_panels<bf16>(a, w);
  if (a.weight.dtype == DType::f16) pack_panels<f16>(a, w);
}

void unpack_weight(const UnpackWeightArgs& a) {
  if (a.out.dtype == DType::f32) unpack_panels<float>(a);
  if (a.out.dtype == DType::bf16) unpack_panels<bf16>(a);
  if (a.out.dtype == DType::f16) unpack_panels<f16>(a);
}

}  // namespace cgpt::CGPT_TIER
