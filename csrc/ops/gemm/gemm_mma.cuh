// Tiles of a product on tensor cores: bf16 and fp16, sums in fp32.
//
// A block of four warps makes a tile of 128 x 128 (a warp 64 x 64) or 64 x 64 (a warp 32 x 32).
// Slices of 32 values along K go to shared memory by cp.async, three ahead of the one in use, and
// from there by ldmatrix, transposed where the dense dimension is not K, to m16n8k16. Every sum is
// made in the order of K in steps of 16, whatever the tile: the tiles give the same bits.
//
// Reads M * N * K * (1 / kM + 1 / kN) values from L2, writes M * N once.
#pragma once

#include "gemm_epilogue.cuh"

namespace cgpt {
namespace {

constexpr int kMmaThreads = 128;
constexpr int kSlice = 32;  // along K: 64 bytes of a row
// 64 KB of shared memory for the large tile: two blocks on an A100 or H100, one elsewhere.
constexpr int kStages = 4;

struct LargeTile {
  static constexpr int kM = 128, kN = 128, kWarpM = 64, kWarpN = 64;
  static constexpr bool kVectorsOnly = true;
};
struct SmallTile {
  static constexpr int kM = 64, kN = 64, kWarpM = 32, kWarpN = 32;
  static constexpr bool kVectorsOnly = false;
};

template <class Tile>
constexpr int kMmaShared = kStages * (Tile::kM + Tile::kN) * kSlice * 2;

// A slice of kRows rows by kSlice in shared memory, in chunks of 8 values along the dense
// dimension: [row][k / 8] where that is K, else [k][row / 8]. The chunk number is mixed with the
// line so that the 8 chunks of one ldmatrix lie in different banks.
template <int kRows, bool kDenseK>
struct Slice {
  static constexpr int kAcross = (kDenseK ? kSlice : kRows) / 8;
  static constexpr int kLines = kDenseK ? kRows : kSlice;
  static constexpr int kEach = kLines * kAcross / kMmaThreads;  // chunks a thread copies

  __device__ static int offset(int line, int chunk) {
    const int mixed = chunk ^ (kDenseK ? line >> 1 & 3 : line & 7);
    return (line * kAcross + mixed) * 8;
  }

  template <bool kVectorsOnly, class T>
  __device__ static void copy(T* to, const Operand<T>& from, int64_t row0, int64_t k0, int64_t K) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int c = thread() + i * kMmaThreads, line = c / kAcross, chunk = c % kAcross;
      T* const target = to + offset(line, chunk);
      const int64_t row = row0 + (kDenseK ? line : chunk * 8);
      const int64_t k = k0 + (kDenseK ? chunk * 8 : line);
      const bool there = row < from.rows && k < K;
      const T* const source =
          from.data + (kDenseK ? row * from.row_stride + k : k * from.k_stride + row);
      if (kVectorsOnly || from.vectors) {
        copy_async<16>(target, there ? source : from.data, there);
      } else {
        const int64_t left = !there ? 0 : kDenseK ? K - k : from.rows - row;
        store(target, load_part<false, 8>(source, left));
      }
    }
  }
};

// Rows row .. row + 15 and values k .. k + 15 of a slice as the factor a of an mma.
template <int kRows, bool kDenseK, class T>
__device__ inline void load_a(uint32_t (&r)[4], const T* slice, int row, int k) {
  using S = Slice<kRows, kDenseK>;
  if constexpr (kDenseK) ldmatrix(r, slice + S::offset(row + lane() % 16, k / 8 + lane() / 16));
  else
    ldmatrix_trans(r,
                   slice + S::offset(k + lane() / 16 * 8 + lane() % 8, row / 8 + lane() / 8 % 2));
}

// The same as the factors b of two: registers 0 and 1 for rows row .. row + 7, then the others.
template <int kRows, bool kDenseK, class T>
__device__ inline void load_b(uint32_t (&r)[4], const T* slice, int row, int k) {
  using S = Slice<kRows, kDenseK>;
  if constexpr (kDenseK)
    ldmatrix(r, slice + S::offset(row + lane() / 16 * 8 + lane() % 8, k / 8 + lane() / 8 % 2));
  else
    ldmatrix_trans(r,
                   slice + S::offset(k + lane() / 8 % 2 * 8 + lane() % 8, row / 8 + lane() / 16));
}

template <class T, class Tile, bool kDenseA, bool kDenseB>
__global__ void __launch_bounds__(kMmaThreads) gemm_mma_kernel(const Product<T> p) {
  constexpr int kM = Tile::kM, kN = Tile::kN, kWarpM = Tile::kWarpM, kWarpN = Tile::kWarpN;
  constexpr int kAcross = kN / kWarpN;
  using SliceA = Slice<kM, kDenseA>;
  using SliceB = Slice<kN, kDenseB>;
  T* const slices_a = shared<T>();
  T* const slices_b = slices_a + kStages * kM * kSlice;

  const TilePlace place = tile_place(block_x(), (p.M() + kM - 1) / kM, (p.N() + kN - 1) / kN);
  const int64_t m0 = place.m * kM, n0 = place.n * kN;
  const int warp_m = warp() / kAcross * kWarpM, warp_n = warp() % kAcross * kWarpN;
  const int slices = static_cast<int>((p.K + kSlice - 1) / kSlice);

  const auto copy = [&](int slice) {
    const int stage = slice % kStages;
    const int64_t k0 = int64_t{slice} * kSlice;
    SliceA::template copy<Tile::kVectorsOnly>(slices_a + stage * kM * kSlice, p.a, m0, k0, p.K);
    SliceB::template copy<Tile::kVectorsOnly>(slices_b + stage * kN * kSlice, p.b, n0, k0, p.K);
  };

  float sums[kWarpM / 16][kWarpN / 8][4] = {};
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < slices) copy(s);
    copy_async_commit();
  }
#pragma unroll 1
  for (int s = 0; s < slices; ++s) {
    copy_async_wait<kStages - 2>();
    block_barrier();  // slice s has come for all, and none reads slice s - 1 any more
    if (s + kStages - 1 < slices) copy(s + kStages - 1);
    copy_async_commit();
    const T* const slice_a = slices_a + s % kStages * kM * kSlice;
    const T* const slice_b = slices_b + s % kStages * kN * kSlice;
#pragma unroll
    for (int k = 0; k < kSlice; k += 16) {
      uint32_t a[kWarpM / 16][4], b[kWarpN / 16][4];
#pragma unroll
      for (int i = 0; i < kWarpM / 16; ++i) load_a<kM, kDenseA>(a[i], slice_a, warp_m + i * 16, k);
#pragma unroll
      for (int j = 0; j < kWarpN / 16; ++j) load_b<kN, kDenseB>(b[j], slice_b, warp_n + j * 16, k);
#pragma unroll
      for (int i = 0; i < kWarpM / 16; ++i)
#pragma unroll
        for (int j = 0; j < kWarpN / 8; ++j) {
          const uint32_t half[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          mma<T>(sums[i][j], a[i], half);
        }
    }
  }
  copy_async_wait<0>();
  block_barrier();  // the slices' memory becomes the tile's

  float* const tile = shared<float>();
  const int g = lane() / 4, t = lane() % 4;
#pragma unroll
  for (int i = 0; i < kWarpM / 16; ++i)
#pragma unroll
    for (int j = 0; j < kWarpN / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_m + i * 16 + half * 8 + g, column = warp_n + j * 8 + 2 * t;
        store(tile + tile_index<kN>(row, column),
              Vec<float, 2>{{sums[i][j][2 * half], sums[i][j][2 * half + 1]}});
      }
  block_barrier();
  finish_tile<kM, kN, kMmaThreads>(p, tile, m0, n0);
}

}  // namespace
}  // namespace cgpt
