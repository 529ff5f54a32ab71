// Layer norm's backward on CUDA: one pass over dy and x that writes dx and keeps dweight and dbias.
//
// A block walks through a contiguous range of rows. As in the forward a row lies in a warp or in
// the block; each thread keeps the sums over its rows of its own columns' dweight and dbias in
// registers, and writes them as the block's share, which add_shares_kernel adds up in the order of
// the blocks: no atomics, the same bits on every run and device.
// Traffic: reads dy and x, writes dx: 3 * rows * C * sizeof(T) bytes; shares: 4 * 256 * C * 4
// bytes.
#pragma once

#include "../../cuda/shares.cuh"
#include "layer_norm.h"
#include "layer_norm_rows.cuh"

namespace cgpt {
namespace {

template <class T, class W>
struct BwdParams {
  const T* dy;
  const T* dtotal;
  const T* x;
  const W* weight;
  const float* mean;
  const float* rstd;
  T* dx;
  float* shares;  // [2][count][C], or nullptr where no parameter needs its gradient
  int64_t rows, rows_each, count, C, dy_stride, dtotal_stride, x_stride, dx_stride;
};

template <class T, class W, int kSpan, bool kAligned>
__global__ void __launch_bounds__(kThreads) layer_norm_bwd_kernel(const BwdParams<T, W> p) {
  constexpr int N = Vec<T>::kSize, kVecs = kHeld / N, kRows = kThreads / kSpan;
  const int first = thread() % kSpan * N;
  const int C = static_cast<int>(p.C);
  const float inverse = 1.0f / static_cast<float>(C);
  float dweight[kHeld] = {}, dbias[kHeld] = {};

  const int64_t begin = block_x() * p.rows_each;
  const int64_t end = begin + p.rows_each < p.rows ? begin + p.rows_each : p.rows;
  for (int64_t r = begin + thread() / kSpan; r < end; r += kRows) {
    const float mean = p.mean[r], rstd = p.rstd[r];
    Vec<T> dy[kVecs], x[kVecs];
    float sums[2] = {};  // of g and of g * xhat
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      const int c = first + v * kSpan * N;
      dy[v] = load_part<kAligned, N>(p.dy + r * p.dy_stride + c, C - c);
      x[v] = load_part<kAligned, N>(p.x + r * p.x_stride + c, C - c);
      const Vec<W, N> weight = load_part<kAligned, N>(p.weight + c, C - c);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        // Beyond the end dy and weight are 0, and so is what becomes of xhat.
        const float d = to_float(dy[v][i]), xhat = (to_float(x[v][i]) - mean) * rstd;
        const float g = d * to_float(weight[i]);
        sums[0] += g;
        sums[1] = fmaf(g, xhat, sums[1]);
        dweight[v * N + i] = fmaf(d, xhat, dweight[v * N + i]);
        dbias[v * N + i] += d;
      }
    }
    if (!p.dx) continue;
    row_sums<kSpan>(sums);
    const float of_mean = sums[0] * inverse, of_rstd = sums[1] * inverse;
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      const int c = first + v * kSpan * N;
      const Vec<W, N> weight = load_part<kAligned, N>(p.weight + c, C - c);
      Vec<T> also{}, out;
      if (p.dtotal) also = load_part<kAligned, N>(p.dtotal + r * p.dtotal_stride + c, C - c);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float xhat = (to_float(x[v][i]) - mean) * rstd;
        const float g = to_float(dy[v][i]) * to_float(weight[i]);
        out[i] = from_float<T>(fmaf(g - of_mean - xhat * of_rstd, rstd, to_float(also[i])));
      }
      store_part<kAligned>(p.dx + r * p.dx_stride + c, out, C - c);
    }
  }
  if (!p.shares) return;

  // The rows of this block, added up warp after warp where each warp has rows of its own.
  float* mine = p.shares + block_x() * p.C;
  float* of_bias = mine + p.count * p.C;
  if constexpr (kRows > 1) {
    float* sums = shared<float>();  // [2][C]
    for (int w = 0; w < kRows; ++w) {
      block_barrier();
      if (warp() != w) continue;
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        const int c = first + j / N * kSpan * N + j % N;
        if (c >= C) continue;
        sums[c] = w == 0 ? dweight[j] : sums[c] + dweight[j];
        sums[C + c] = w == 0 ? dbias[j] : sums[C + c] + dbias[j];
      }
    }
    block_barrier();
    for (int c = thread(); c < C; c += kThreads) mine[c] = sums[c], of_bias[c] = sums[C + c];
  } else {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const int c = first + j / N * kSpan * N + j % N;
      if (c < C) mine[c] = dweight[j], of_bias[c] = dbias[j];
    }
  }
}

// Any width: a block per row for dx.
template <class T, class W>
__global__ void __launch_bounds__(kThreads) layer_norm_bwd_any_kernel(const BwdParams<T, W> p) {
  const int64_t r = block_x();
  const T* dy = p.dy + r * p.dy_stride;
  const T* x = p.x + r * p.x_stride;
  const float mean = p.mean[r], rstd = p.rstd[r];
  float sums[2] = {};
  for (int64_t c = thread(); c < p.C; c += kThreads) {
    const float g = to_float(dy[c]) * to_float(p.weight[c]);
    sums[0] += g;
    sums[1] = fmaf(g, (to_float(x[c]) - mean) * rstd, sums[1]);
  }
  row_sums<kThreads>(sums);
  const float of_mean = sums[0] / static_cast<float>(p.C);
  const float of_rstd = sums[1] / static_cast<float>(p.C);
  for (int64_t c = thread(); c < p.C; c += kThreads) {
    const float g = to_float(dy[c]) * to_float(p.weight[c]);
    const float also = p.dtotal ? to_float(p.dtotal[r * p.dtotal_stride + c]) : 0.0f;
    const float d = g - of_mean - (to_float(x[c]) - mean) * rstd * of_rstd;
    p.dx[r * p.dx_stride + c] = from_float<T>(fmaf(d, rstd, also));
  }
}

// Any width: a thread per column and range of rows for dweight and dbias.
template <class T, class W>
__global__ void __launch_bounds__(kThreads) layer_norm_bwd_columns_kernel(const BwdParams<T, W> p) {
  const int64_t c = int64_t{block_x()} * kThreads + thread();
  if (c >= p.C) return;
  const int64_t begin = block_y() * p.rows_each;
  const int64_t end = begin + p.rows_each < p.rows ? begin + p.rows_each : p.rows;
  float dweight = 0.0f, dbias = 0.0f;
  for (int64_t r = begin; r < end; ++r) {
    const float d = to_float(p.dy[r * p.dy_stride + c]);
    dweight = fmaf(d, (to_float(p.x[r * p.x_stride + c]) - p.mean[r]) * p.rstd[r], dweight);
    dbias += d;
  }
  p.shares[block_y() * p.C + c] = dweight;
  p.shares[(p.count + block_y()) * p.C + c] = dbias;
}

template <class T, class W>
void launch_bwd(const LayerNormBwdArgs& args) {
  const int64_t rows = args.x.shape[0], C = args.x.shape[1];
  const bool parameters = args.dweight || args.dbias;
  const int64_t rows_each =
      rows == 0 ? 1 : (rows + layer_norm_bwd_shares(rows) - 1) / layer_norm_bwd_shares(rows);
  const int64_t blocks = (rows + rows_each - 1) / rows_each;
  const BwdParams<T, W> p{args.dy.as<const T>(),
                          args.dtotal.as<const T>(),
                          args.x.as<const T>(),
                          args.weight.as<const W>(),
                          args.mean.as<const float>(),
                          args.rstd.as<const float>(),
                          args.dx.as<T>(),
                          parameters ? args.shares.as<float>() : nullptr,
                          rows,
                          rows_each,
                          blocks,
                          C,
                          args.dy.strides[0],
                          args.dtotal.strides[0],
                          args.x.strides[0],
                          args.dx.strides[0]};
  const bool vectors = C % Vec<T>::kSize == 0 && aligned<16>(p.dy, p.dy_stride) &&
                       aligned<16>(p.dtotal, p.dtotal_stride) && aligned<16>(p.x, p.x_stride) &&
                       aligned<16>(p.weight) && aligned<16>(p.dx, p.dx_stride);
  const auto go = [&](auto kernel, int64_t grid_x, int64_t grid_y, int64_t shared) {
    launch(
        "layer_norm",
        {.grid_x = grid_x, .grid_y = grid_y, .threads = kThreads, .shared = shared, .like = args.x},
        kernel, p);
  };
  const auto choose = [&]<bool kAligned>() {
    if (C <= kHeld * kWarp)
      go(&layer_norm_bwd_kernel<T, W, kWarp, kAligned>, blocks, 1, 2 * C * sizeof(float));
    else go(&layer_norm_bwd_kernel<T, W, kThreads, kAligned>, blocks, 1, sizeof(Shared));
  };
  if (C > kHeld * kThreads) {
    if (p.dx) go(&layer_norm_bwd_any_kernel<T, W>, rows, 1, sizeof(Shared));
    if (parameters)
      go(&layer_norm_bwd_columns_kernel<T, W>, (C + kThreads - 1) / kThreads, blocks, 0);
  } else if (vectors) {
    choose.template operator()<true>();
  } else {
    choose.template operator()<false>();
  }
  if (parameters)
    add_shares("layer_norm",
               {{{p.shares, args.dweight.data, args.dweight.dtype},
                 {p.shares + blocks * C, args.dbias.data, args.dbias.dtype}},
                blocks,
                C},
               args.x);
}

template <class T>
void launch_bwd_weight(const LayerNormBwdArgs& args) {
  if (args.weight.dtype == DType::f32) launch_bwd<T, float>(args);
  else launch_bwd<T, T>(args);
}

}  // namespace
}  // namespace cgpt
