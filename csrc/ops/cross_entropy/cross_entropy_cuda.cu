// Linear cross-entropy on CUDA: the logits of a tile are made, used and gone.
//
// Forward: a block takes 128 rows and one of at most 64 chunks of the vocabulary. Each thread keeps
// maximum, sum of exp(z - maximum) and sum of z of its own columns of its rows; they are joined at
// the chunk's end, and a second kernel joins the chunks in order. Reads the weight once per 128
// rows, from L2 where blocks run side by side; 4 * 3 * 64 bytes per row of extra memory.
// Backward: the same tiles anew, turned into g = d loss / d logits with the forward's lse, rounded
// to T for the two products that the caller makes of it, a slab of rows at a time.
// FLOPs: 2 M K V each.
#include "../../cuda/shares.cuh"
#include "cross_entropy_cuda.h"
#include "logits_tile.cuh"

namespace cgpt {
namespace {

constexpr float kLog2e = 1.4426950408889634f;
__device__ inline float exp_fast(float x) { return exp2_fast(x * kLog2e); }

// ---- forward ------------------------------------------------------------------------------------

struct RowStats {
  float max = -INFINITY, sum = 0.0f, total = 0.0f;
};

// -inf - -inf would be NaN where a row has seen nothing but -inf yet.
__device__ inline float finite_or_zero(float m) { return m == -INFINITY ? 0.0f : m; }

__device__ inline RowStats join(const RowStats& a, const RowStats& b) {
  const float m = fmaxf(a.max, b.max), shift = finite_or_zero(m);
  return {m, a.sum * exp_fast(a.max - shift) + b.sum * exp_fast(b.max - shift), a.total + b.total};
}

struct FwdParams {
  LogitParams logits;
  int64_t chunk;
  float* parts;  // [chunks][3][M], then the target's logit [M]
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) linear_cross_entropy_fwd_kernel(const FwdParams p) {
  const LogitParams& l = p.logits;
  const int64_t row0 = int64_t{block_x()} * kBlockM, v_begin = block_y() * p.chunk;
  const int64_t v_end = v_begin + p.chunk < l.V ? v_begin + p.chunk : l.V;
  float* target_logit = p.parts + int64_t{(l.V + p.chunk - 1) / p.chunk} * 3 * l.M;
  RowStats stats[kFragM][2];
  int64_t target[kFragM][2];
#pragma unroll
  for (int m = 0; m < kFragM; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t r = row0 + tile_row(m, h);
      target[m][h] = r < l.M ? l.target[r * l.target_stride] : -1;
    }

  for_logit_tiles<T, kAligned>(l, row0, v_begin, v_end, [&](int64_t v0, Accumulators& z) {
#pragma unroll
    for (int n = 0; n < kFragN; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int64_t v = v0 + tile_column(n, j);
        const float bias = v < v_end ? bias_at<T>(l, v) : 0.0f;
#pragma unroll
        for (int m = 0; m < kFragM; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float& value = z[m][n][2 * h + j];
            value += bias;
            if (v < v_end) stats[m][h].total += value;
            else value = -INFINITY;
            if (v == target[m][h] && v < v_end) target_logit[row0 + tile_row(m, h)] = value;
          }
      }
#pragma unroll
    for (int m = 0; m < kFragM; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        RowStats& s = stats[m][h];
        float largest = s.max;
#pragma unroll
        for (int n = 0; n < kFragN; ++n)
          largest = fmaxf(largest, fmaxf(z[m][n][2 * h], z[m][n][2 * h + 1]));
        const float shift = finite_or_zero(largest);
        float sum = s.sum * exp_fast(s.max - shift);
#pragma unroll
        for (int n = 0; n < kFragN; ++n)
          sum += exp_fast(z[m][n][2 * h] - shift) + exp_fast(z[m][n][2 * h + 1] - shift);
        s.max = largest, s.sum = sum;
      }
  });

  RowStats(*by_warp)[kBlockM] = shared<RowStats[kBlockM]>();  // [kWarpsN][kBlockM]
#pragma unroll
  for (int m = 0; m < kFragM; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      RowStats s = stats[m][h];
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2)
        s = join(
            s, {shuffle_xor(s.max, lanes), shuffle_xor(s.sum, lanes), shuffle_xor(s.total, lanes)});
      if (lane() % 4 == 0) by_warp[warp() % kWarpsN][tile_row(m, h)] = s;
    }
  block_barrier();
  const int64_t r = row0 + thread();
  if (thread() >= kBlockM || r >= l.M) return;
  RowStats s = by_warp[0][thread()];
#pragma unroll
  for (int w = 1; w < kWarpsN; ++w) s = join(s, by_warp[w][thread()]);
  float* part = p.parts + int64_t{block_y()} * 3 * l.M + r;
  part[0] = s.max, part[l.M] = s.sum, part[2 * l.M] = s.total;
}

struct JoinParams {
  LogitParams logits;
  int64_t chunks;
  const float* parts;
  float* loss;
  float* lse;  // or nullptr
};

__global__ void __launch_bounds__(kThreads) linear_cross_entropy_join_kernel(const JoinParams p) {
  const LogitParams& l = p.logits;
  const int64_t r = int64_t{block_x()} * kThreads + thread();
  if (r >= l.M) return;
  RowStats s;
  for (int64_t c = 0; c < p.chunks; ++c) {
    const float* part = p.parts + c * 3 * l.M + r;
    s = join(s, {part[0], part[l.M], part[2 * l.M]});
  }
  const float lse = s.max + logf(s.sum);
  if (p.lse) p.lse[r] = lse;
  const int64_t target = l.target[r * l.target_stride];
  float loss = 0.0f;
  if (target != l.ignore_index) {
    // No host has seen the targets: one that names no class must not read as a loss.
    const float z = target >= 0 && target < l.V ? p.parts[p.chunks * 3 * l.M + r] : NAN;
    loss = (1.0f - l.smoothing) * (lse - z);
    if (l.smoothing > 0.0f) loss += l.smoothing * (lse - s.total / static_cast<float>(l.V));
  }
  p.loss[r] = loss;
}

// ---- backward -----------------------------------------------------------------------------------

struct GradientParams {
  LogitParams logits;
  const float* lse;
  const float* drows;
  void* g;
  float* shares;  // [row tiles][V], or nullptr
  int64_t g_stride;
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    linear_cross_entropy_logit_gradient_kernel(const GradientParams p) {
  const LogitParams& l = p.logits;
  const int64_t row0 = int64_t{block_x()} * kBlockM, v_begin = int64_t{block_y()} * kBlockN;
  const int64_t v_end = v_begin + kBlockN < l.V ? v_begin + kBlockN : l.V;
  const float spread = l.smoothing / static_cast<float>(l.V);
  float sums[kFragN][2] = {};
  for_logit_tiles<T, kAligned>(l, row0, v_begin, v_end, [&](int64_t v0, Accumulators& z) {
#pragma unroll
    for (int m = 0; m < kFragM; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t r = row0 + tile_row(m, h);
        if (r >= l.M) continue;
        const int64_t target = l.target[r * l.target_stride];
        const bool counts = target != l.ignore_index;
        const float lse = p.lse[r], weighed = counts ? p.drows[r] : 0.0f;
        T* row = static_cast<T*>(p.g) + r * p.g_stride;
#pragma unroll
        for (int n = 0; n < kFragN; ++n) {
          Vec<T, 2> out;
          const int64_t v = v0 + tile_column(n, 0);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float d = 0.0f;
            if (counts && v + j < v_end) {
              d = exp_fast(z[m][n][2 * h + j] + bias_at<T>(l, v + j) - lse) - spread;
              if (v + j == target) d -= 1.0f - l.smoothing;
              d *= weighed;
            }
            out[j] = from_float<T>(d);
            sums[n][j] += d;
          }
          if (v + 1 < v_end) store(row + v, out);
          else if (v < v_end) row[v] = out[0];
        }
      }
  });
  if (!p.shares) return;
  float* by_warp = shared<float>();  // [2][kBlockN]
#pragma unroll
  for (int n = 0; n < kFragN; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float sum = sums[n][j];
#pragma unroll
      for (int lanes = 4; lanes < kWarp; lanes *= 2) sum += shuffle_xor(sum, lanes);
      if (lane() < 4) by_warp[warp() / kWarpsN * kBlockN + tile_column(n, j)] = sum;
    }
  block_barrier();
  const int64_t v = v_begin + thread();
  if (thread() < kBlockN && v < v_end)
    p.shares[int64_t{block_x()} * l.V + v] = by_warp[thread()] + by_warp[kBlockN + thread()];
}

// ---- launch -------------------------------------------------------------------------------------

static_assert(kBlockM == kLogitRows && kBlockN == kLogitColumns);

LogitParams logit_params(const LinearCrossEntropyArgs& a) {
  return {a.x.data,         a.weight.data,       a.bias.data,         a.target.as<const int64_t>(),
          a.x.strides[0],   a.weight.strides[0], a.target.strides[0], a.ignore_index,
          a.x.shape[0],     a.x.shape[1],        a.weight.shape[0],   a.bias.dtype == DType::f32,
          a.label_smoothing};
}

// Calls f.template operator()<T, kAligned>().
template <class T, class F>
void with_alignment(const LogitParams& l, F&& f) {
  const bool vectors = l.K * sizeof(T) % 16 == 0 &&
                       aligned<16>(static_cast<const T*>(l.x), l.x_stride) &&
                       aligned<16>(static_cast<const T*>(l.weight), l.weight_stride);
  if (vectors) f.template operator()<T, true>();
  else f.template operator()<T, false>();
}
template <class F>
void with_dtype(DType dtype, const LogitParams& l, F&& f) {
  if (dtype == DType::f32) with_alignment<float>(l, f);
  if (dtype == DType::bf16) with_alignment<bf16>(l, f);
  if (dtype == DType::f16) with_alignment<f16>(l, f);
}

}  // namespace

void linear_cross_entropy_fwd_cuda(const LinearCrossEntropyArgs& args, const TensorView& parts) {
  const FwdParams p{logit_params(args), linear_cross_entropy_chunk(args.weight.shape[0]),
                    parts.as<float>()};
  const LogitParams& l = p.logits;
  const int64_t chunks = (l.V + p.chunk - 1) / p.chunk;
  with_dtype(args.x.dtype, l, [&]<class T, bool kAligned>() {
    launch("linear_cross_entropy",
           {.grid_x = (l.M + kBlockM - 1) / kBlockM,
            .grid_y = chunks,
            .threads = kThreads,
            .shared = sizeof(LogitTiles),
            .like = args.x},
           &linear_cross_entropy_fwd_kernel<T, kAligned>, p);
  });
  const JoinParams q{l, chunks, p.parts, args.loss.as<float>(), args.lse.as<float>()};
  launch("linear_cross_entropy",
         {.grid_x = (l.M + kThreads - 1) / kThreads, .threads = kThreads, .like = args.x},
         &linear_cross_entropy_join_kernel, q);
}

void linear_cross_entropy_logit_gradient_cuda(const LogitGradientArgs& args) {
  const GradientParams p{logit_params(args.op),        args.op.lse.as<const float>(),
                         args.drows.as<const float>(), args.g.data,
                         args.shares.as<float>(),      args.g.strides[0]};
  const LogitParams& l = p.logits;
  with_dtype(args.op.x.dtype, l, [&]<class T, bool kAligned>() {
    launch("linear_cross_entropy",
           {.grid_x = (l.M + kBlockM - 1) / kBlockM,
            .grid_y = (l.V + kBlockN - 1) / kBlockN,
            .threads = kThreads,
            .shared = sizeof(LogitTiles),
            .like = args.op.x},
           &linear_cross_entropy_logit_gradient_kernel<T, kAligned>, p);
  });
}

void linear_cross_entropy_dbias_cuda(const TensorView& shares, const TensorView& dbias) {
  add_shares(
      "linear_cross_entropy",
      {{{shares.as<const float>(), dbias.data, dbias.dtype}, {}}, shares.shape[0], shares.shape[1]},
      dbias);
}

}  // namespace cgpt
