// Tiles of attention: rows from memory to shared memory, their products, masks, dropout.
//
// A block holds kM = kWarps * 16 * kTiles rows of one side (queries, or keys for dk and dv), each
// warp 16 * kTiles of them, and streams kN rows of the other side at a time. Products lie in the
// fragments of mma.m16n8k16 (csrc/cuda/device.cuh) whatever T is:
//
//   16 bits  ldmatrix and mma. 32 rows a warp where registers allow it: each fragment of the
//            streamed side is then used twice, and 128 bytes a clock of shared memory suffice.
//   fp32     fused multiply-adds from shared memory, 16 bytes a load along the summed dimension.
//
// Rows in shared memory are 16 bytes longer than D: 8 rows of 16 bytes, what ldmatrix and a
// quarter of a warp read at once, then lie in 32 different banks for every D that is a multiple of
// 16 (a pitch of 4, 12, 20 or 28 words modulo 32), so that no swizzle is needed.
#pragma once

#include "attention_cuda_call.cuh"

namespace cgpt {
namespace {

template <class T_, int kD_, int kWarps_, int kTiles_, int kN_>
struct Shape {
  using T = T_;
  static constexpr bool kExact = sizeof(T) == 4;
  static constexpr int kD = kD_, kWarps = kWarps_, kTiles = kTiles_, kN = kN_;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kWarpRows = 16 * kTiles, kM = kWarps * kWarpRows;
  static constexpr int kPitch = kD + 16 / static_cast<int>(sizeof(T));
  static constexpr int kN8 = kN / 8;
  // Columns of a sum over rows that a warp keeps in registers; the others are another block's.
  static constexpr int kOut = kD < 128 ? kD : 128;
  // fp32 takes P through shared memory, 16 bytes a load.
  static constexpr int kWeightPitch = kN + 4;
  static constexpr int kWeights = kExact ? kM * kWeightPitch : 0;

  using Logits = float[kTiles][kN8][4];

  static_assert(kD % 16 == 0 && kN % (kExact ? 8 : 16) == 0);
  static_assert(kTiles * kN8 * 4 <= 64);  // dropout's bits of a thread
};

// Shared memory for weights, none where they stay in registers.
template <int n>
struct Weights {
  alignas(16) float values[n];
  __device__ float* weights() { return values; }
};
template <>
struct Weights<0> {
  __device__ float* weights() { return nullptr; }
};

template <class S, int kHeld>
struct Shared : Weights<S::kWeights> {
  alignas(16) typename S::T held[kHeld][S::kM * S::kPitch];     // the block's own rows
  alignas(16) typename S::T streamed[2][2][S::kN * S::kPitch];  // [stage][which]
};

// ---- memory -------------------------------------------------------------------------------------

// Rows first .. first + kRows - 1 of `rows` below `count`: zeros beyond them, beyond D, and where
// `hidden` says so, since what a masked key holds may be NaN, and 0 * NaN is no 0.
template <class S, int kRows, class T, class Hidden>
__device__ inline void load_rows(T* to, const T* rows, const Heads<const T>& like, int D, int first,
                                 int count, Hidden&& hidden) {
  constexpr int N = Vec<T>::kSize, kChunks = S::kD / N;
  for (int x = thread(); x < kRows * kChunks; x += S::kThreads) {
    const int row = first + x / kChunks, d = x % kChunks * N;
    const bool there = row < count && d < D && !hidden(row);
    T* at = to + x / kChunks * S::kPitch + d;
    const T* from = rows + row * like.s + d;
    if (like.aligned) {
      copy_async<16>(at, there ? from : rows, there);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) at[i] = there && d + i < D ? from[i] : T{};
    }
  }
}
template <class S, int kRows, class T>
__device__ inline void load_rows(T* to, const T* rows, const Heads<const T>& like, int D, int first,
                                 int count) {
  load_rows<S, kRows>(to, rows, like, D, first, count, [](int) { return false; });
}

// A warp's rows of fragments, kC8 * 8 columns, to rows first .. of `rows` below `count`, through
// `stage`, the warp's own rows in shared memory: so that each access is 16 bytes.
template <class S, int kC8, class T>
__device__ inline void store_rows(T* stage, const float (&x)[S::kTiles][kC8][4], T* rows,
                                  int64_t stride, bool whole, int columns, int first, int count) {
  const int g = lane() / 4, t = lane() % 4;
  warp_barrier();
#pragma unroll
  for (int m = 0; m < S::kTiles; ++m)
#pragma unroll
    for (int n = 0; n < kC8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store(stage + (m * 16 + 8 * half + g) * S::kPitch + n * 8 + 2 * t,
              Vec<T, 2>{{from_float<T>(x[m][n][2 * half]), from_float<T>(x[m][n][2 * half + 1])}});
  warp_barrier();
  constexpr int N = Vec<T>::kSize, kChunks = kC8 * 8 / N;
  for (int y = lane(); y < S::kWarpRows * kChunks; y += kWarp) {
    const int row = first + y / kChunks, d = y % kChunks * N;
    if (row >= count || d >= columns) continue;
    const auto v = load16(stage + y / kChunks * S::kPitch + d);
    T* to = rows + row * stride + d;
    if (whole) store(to, v);
    else store_part<false>(to, v, columns - d);
  }
}

// ---- products -----------------------------------------------------------------------------------

// s[r][c] += sum over d of held[r][d] * streamed[c][d]; `held` points to the warp's rows.
template <class S, class T>
__device__ inline void multiply_rows(typename S::Logits& s, const T* held, const T* streamed) {
  if constexpr (S::kExact) {
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll 1
    for (int d = 0; d < S::kD; d += 4) {
      Vec<T, 4> x[S::kTiles][2];
#pragma unroll
      for (int m = 0; m < S::kTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          x[m][half] = load<4>(held + (m * 16 + 8 * half + g) * S::kPitch + d);
#pragma unroll
      for (int n = 0; n < S::kN8; ++n)
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const auto y = load<4>(streamed + (n * 8 + 2 * t + column) * S::kPitch + d);
#pragma unroll
          for (int m = 0; m < S::kTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              float& into = s[m][n][2 * half + column];
#pragma unroll
              for (int i = 0; i < 4; ++i) into = fmaf(x[m][half][i], y[i], into);
            }
        }
    }
  } else {
    const T* a_row = held + lane() % 16 * S::kPitch + lane() / 16 * 8;
    const T* b_row = streamed + (lane() % 8 + lane() / 16 * 8) * S::kPitch + lane() / 8 % 2 * 8;
#pragma unroll
    for (int d = 0; d < S::kD; d += 16) {
      uint32_t a[S::kTiles][4];
#pragma unroll
      for (int m = 0; m < S::kTiles; ++m) ldmatrix(a[m], a_row + m * 16 * S::kPitch + d);
#pragma unroll
      for (int n = 0; n < S::kN8; n += 2) {
        uint32_t b[4];
        ldmatrix(b, b_row + n * 8 * S::kPitch + d);
        const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < S::kTiles; ++m) {
          mma<T>(s[m][n], a[m], left);
          mma<T>(s[m][n + 1], a[m], right);
        }
      }
    }
  }
}

// out[r][c] += sum over j of p[r][j] * streamed[j][c], p rounded to T; `weights` is the block's.
template <class S, int kC8, class T>
__device__ inline void multiply_weights(float (&out)[S::kTiles][kC8][4],
                                        const typename S::Logits& p, const T* streamed,
                                        float* weights) {
  const int g = lane() / 4, t = lane() % 4;
  if constexpr (S::kExact) {
    float* own = weights + warp() * S::kWarpRows * S::kWeightPitch;
    warp_barrier();
#pragma unroll
    for (int m = 0; m < S::kTiles; ++m)
#pragma unroll
      for (int n = 0; n < S::kN8; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          store(own + (m * 16 + 8 * half + g) * S::kWeightPitch + n * 8 + 2 * t,
                Vec<float, 2>{{p[m][n][2 * half], p[m][n][2 * half + 1]}});
    warp_barrier();
#pragma unroll 1
    for (int j = 0; j < S::kN; j += 4) {
      Vec<float, 4> x[S::kTiles][2];
#pragma unroll
      for (int m = 0; m < S::kTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          x[m][half] = load<4>(own + (m * 16 + 8 * half + g) * S::kWeightPitch + j);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int n = 0; n < kC8; ++n) {
          const auto y = load<2>(streamed + (j + i) * S::kPitch + n * 8 + 2 * t);
#pragma unroll
          for (int m = 0; m < S::kTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
              for (int column = 0; column < 2; ++column) {
                float& into = out[m][n][2 * half + column];
                into = fmaf(x[m][half][i], y[column], into);
              }
        }
    }
  } else {
    const T* row = streamed + lane() % 16 * S::kPitch + lane() / 16 * 8;
#pragma unroll
    for (int k = 0; k < S::kN8; k += 2) {
      uint32_t a[S::kTiles][4];
#pragma unroll
      for (int m = 0; m < S::kTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[m][i] = pack<T>(p[m][k + i / 2][i % 2 * 2], p[m][k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int n = 0; n < kC8; n += 2) {
        uint32_t b[4];
        ldmatrix_trans(b, row + k * 8 * S::kPitch + n * 8);
        const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < S::kTiles; ++m) {
          mma<T>(out[m][n], a[m], left);
          mma<T>(out[m][n + 1], a[m], right);
        }
      }
    }
  }
}

// ---- elements -----------------------------------------------------------------------------------

// f(element, row, column) of a tile whose first row (the warp's) and column are given. kLoads: f
// reads memory; without a barrier the compiler has the loads of the whole tile under way at once
// and spills.
template <class S, bool kLoads, class F>
__device__ inline void each(typename S::Logits& s, int row, int column, F&& f) {
  row += lane() / 4, column += lane() % 4 * 2;
#pragma unroll
  for (int n = 0; n < S::kN8; ++n) {
#pragma unroll
    for (int m = 0; m < S::kTiles; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) f(s[m][n][e], row + m * 16 + e / 2 * 8, column + n * 8 + e % 2);
    if constexpr (kLoads) warp_barrier();
  }
}

// Products to logits: scale, bias, ALiBi; -inf where a key is masked. `edge`: the tile may reach
// beyond S_k or the causal edge. kKeyRows: rows are keys and columns queries, else the reverse.
template <class S, bool kKeyRows, class T>
__device__ inline void apply(typename S::Logits& s, const Call<T>& c, const Masks<T>& masks,
                             int row, int column, bool edge) {
  const auto pairs = [&]<bool kLoads>(auto&& f) {
    each<S, kLoads>(s, row, column, [&](float& x, int r, int k) {
      if constexpr (kKeyRows) f(x, k, r);
      else f(x, r, k);
    });
  };
  const auto computed = [&](auto&& f) { pairs.template operator()<false>(f); };
  const auto loaded = [&](auto&& f) {
    pairs.template operator()<true>([&](float& x, int i, int j) {
      if (i < c.S_q && j < c.S_k) f(x, i, j);
    });
  };
  if (c.scaled) computed([&](float& x, int, int) { x *= c.scale; });
  if (c.bias_kind == Bias::f32)
    loaded([&](float& x, int i, int j) { x += masks.template added<float>(c, i, j); });
  if (c.bias_kind == Bias::same && !S::kExact)
    loaded([&](float& x, int i, int j) { x += to_float(masks.template added<T>(c, i, j)); });
  if (c.slopes)
    computed([&](float& x, int i, int j) {
      x -= masks.slope * fabsf(static_cast<float>(i + c.shift - j));
    });
  if (c.bias_kind == Bias::boolean)
    loaded([&](float& x, int i, int j) {
      if (!masks.template added<uint8_t>(c, i, j)) x = kNegative;
    });
  if (c.padding)
    loaded([&](float& x, int, int j) {
      if (masks.hidden(c, j)) x = kNegative;
    });
  if (edge)
    computed([&](float& x, int i, int j) {
      if (j >= c.S_k || (c.causal && j > i + c.shift)) x = kNegative;
    });
}

// Which weights of a thread survive dropout: bit 4 (m * kN8 + n) + e. Where rows of S_k keys start
// with a block of four words, lanes draw a block each and exchange its bits; elsewhere each
// element draws its own, four times the work.
template <class S, bool kKeyRows, class T>
__device__ inline uint64_t kept_bits(const Call<T>& c, const Masks<T>& masks, int row, int column) {
  const int g = lane() / 4, t = lane() % 4;
  const bool whole = c.S_k % 4 == 0;
  uint64_t kept = 0;
#pragma unroll 1
  for (int x = 0; x < S::kTiles * S::kN8; ++x) {
    const int r = row + x / S::kN8 * 16, k = column + x % S::kN8 * 8;
    uint32_t bits = 0;
    if (whole) {
      // The block that this lane draws: of the keys j .. j + 3 under query i.
      int i, j;
      if constexpr (kKeyRows) i = k + 2 * t + g % 2, j = r + g / 4 * 4 + g / 2 % 2 * 8;
      else i = r + g + t % 2 * 8, j = k + t / 2 * 4;
      const uint64_t block = (static_cast<uint64_t>(masks.row + i) * static_cast<uint64_t>(c.S_k) +
                              static_cast<uint64_t>(j)) >>
                             2;
      const philox::Words w = philox::words(c.seed, block);
      uint32_t drawn = 0;
#pragma unroll
      for (int word = 0; word < 4; ++word) drawn |= (w.word[word] >= c.threshold) << word;
      if constexpr (kKeyRows) {
        // Element e lies in the block of the lane e of four, as this lane's row within the block.
#pragma unroll
        for (int e = 0; e < 4; ++e)
          bits |= (shuffle(drawn, (g / 4 * 4 + e) * 4 + t) >> (g % 4) & 1u) << e;
      } else {
        const uint32_t other = shuffle_xor(drawn, 1);
        bits = t % 2 == 0 ? (drawn & 3u) | (other & 3u) << 2 : other >> 2 | (drawn & 12u);
      }
    } else {
#pragma unroll 1
      for (int e = 0; e < 4; ++e) {
        const int at_row = r + g + e / 2 * 8, at_column = k + 2 * t + e % 2;
        const bool keep =
            kKeyRows ? masks.keeps(c, at_column, at_row) : masks.keeps(c, at_row, at_column);
        bits |= static_cast<uint32_t>(keep) << e;
      }
    }
    kept |= static_cast<uint64_t>(bits) << (4 * x);
  }
  return kept;
}
// s times `kept` where its bit is set, else 0.
template <class S>
__device__ inline void drop(typename S::Logits& s, uint64_t bits, float kept) {
#pragma unroll
  for (int m = 0; m < S::kTiles; ++m)
#pragma unroll
    for (int n = 0; n < S::kN8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        s[m][n][e] = bits >> (4 * (m * S::kN8 + n) + e) & 1u ? s[m][n][e] * kept : 0.0f;
}

// Over the four lanes that share a row.
__device__ inline float row_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
__device__ inline float row_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

}  // namespace
}  // namespace cgpt
