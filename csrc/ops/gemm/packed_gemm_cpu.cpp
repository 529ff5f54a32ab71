// y = activation(x W^T + scale u v^T + bias) + residual on CPU, W packed (packed.h).
//
// Few rows of x: each thread walks its own contiguous range of panels once, as one stream, with the
// prepared rows in L1: 2 M N K FLOPs over the packed bytes, bound by memory bandwidth.
//
// Many rows: panels are taken in blocks that stay in L2 while a chunk of rows passes, a register
// tile of rows at a time. Rows of x are prepared (converted, quantized) once per chunk, by all
// threads; panels that are not multiplied as they lie are unpacked once per chunk.
#include "../../cpu/parallel.h"
#include "gemm_epilogue.h"
#include "packed_float.h"
#include "packed_int4.h"
#include "packed_int8.h"

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

    // Cycles on one thread: multiplication, or reading the panels at 8 bytes a cycle.
    const int64_t multiply = M * p.panels * kPanelColumns * (p.weight.K + 1) / (kLanes * 2);
    const int64_t read = p.panels * panel_bytes(p.weight.format, p.weight.K, p.weight.group) / 8;
    const int64_t cycles = multiply > read ? multiply : read;
    int64_t threads = smaller(available_threads(), cycles / kCyclesPerThread);
    threads = threads < 1 ? 1 : threads;

    // A rectangle of y per thread: panels first, for then the weights are read once in all.
    const int64_t units_m = M <= kFewRows ? 1 : divide_up(M, Kernel::kRowTile);
    int64_t best_m = 1, best_n = 1, best = -1;
    for (int64_t m = 1; m <= smaller(threads, units_m); ++m) {
      const int64_t n = smaller(threads / m, p.panels);
      const int64_t cost = divide_up(p.panels, n) * (divide_up(units_m, m) * Kernel::kRowTile + 1);
      if (best < 0 || cost < best) best = cost, best_m = m, best_n = n;
    }
    parallel_ranges(best_m * best_n, kParallelGrain, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t i = part / best_n, j = part % best_n;
        const int64_t i0 = base + M * i / best_m, i1 = base + M * (i + 1) / best_m;
        const int64_t p0 = p.first_panel + p.panels * j / best_n;
        const int64_t p1 = p.first_panel + p.panels * (j + 1) / best_n;
        multiply_part(kernel, p, rows, base, i0, i1, p0, p1);
      }
    });
  }
}

template <class T, class Y>
void packed_gemm(const PackedGemmArgs& a) {
  const Problem<T, Y> p(a);
  if (p.M == 0 || p.panels == 0) return;
  const bool few = p.M <= kFewRows;
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
