// Layer norm on CUDA: a row lies in the registers of a warp (C <= 1024) or of a block (C <= 8192).
//
// Traffic: x is read once and y written once, rows * C * sizeof(T) each way (twice with a
// residual), 16 bytes a thread where pointers and strides allow it. The mean first, then the
// variance around it. Wider rows are read element by element, twice more from L2.
#include "../../cuda/device.cuh"
#include "../../cuda/launch.h"
#include "layer_norm.h"
#include "layer_norm_bwd.cuh"
#include "layer_norm_rows.cuh"

namespace cgpt {
namespace {

template <class T, class W>
struct Params {
  const T* x;
  const T* residual;
  const W* weight;
  const W* bias;
  T* y;
  T* sum;
  float* mean;
  float* rstd;
  int64_t rows, C, x_stride, residual_stride, y_stride, sum_stride;
  float eps;
};

template <class T, class W, int kSpan, bool kAligned>
__global__ void __launch_bounds__(kThreads) layer_norm_fwd_kernel(const Params<T, W> p) {
  constexpr int N = Vec<T>::kSize, kVecs = kHeld / N;
  const int64_t r = int64_t{block_x()} * (kThreads / kSpan) + thread() / kSpan;
  if (r >= p.rows) return;  // a whole warp; with kSpan == kThreads never
  const int first = thread() % kSpan * N;
  const int C = static_cast<int>(p.C);

  Vec<T> row[kVecs];
  float total = 0.0f;
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int c = first + v * kSpan * N;
    row[v] = load_part<kAligned, N>(p.x + r * p.x_stride + c, C - c);
    if (p.residual) {
      const Vec<T> added = load_part<kAligned, N>(p.residual + r * p.residual_stride + c, C - c);
#pragma unroll
      for (int i = 0; i < N; ++i)
        row[v][i] = from_float<T>(to_float(row[v][i]) + to_float(added[i]));
      store_part<kAligned>(p.sum + r * p.sum_stride + c, row[v], C - c);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) total += to_float(row[v][i]);
  }
  const float mean = row_sum<kSpan>(total) / static_cast<float>(C);
  float squares = 0.0f;
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int c = first + v * kSpan * N;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float d = c + i < C ? to_float(row[v][i]) - mean : 0.0f;
      squares = fmaf(d, d, squares);
    }
  }
  const float rstd = 1.0f / sqrtf(row_sum<kSpan>(squares) / static_cast<float>(C) + p.eps);
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int c = first + v * kSpan * N;
    const Vec<W, N> scale = load_part<kAligned, N>(p.weight + c, C - c);
    Vec<W, N> shift{};
    if (p.bias) shift = load_part<kAligned, N>(p.bias + c, C - c);
    Vec<T> out;
#pragma unroll
    for (int i = 0; i < N; ++i)
      out[i] = from_float<T>(
          fmaf((to_float(row[v][i]) - mean) * rstd, to_float(scale[i]), to_float(shift[i])));
    store_part<kAligned>(p.y + r * p.y_stride + c, out, C - c);
  }
  if (first == 0 && p.mean) p.mean[r] = mean;
  if (first == 0 && p.rstd) p.rstd[r] = rstd;
}

// A block per row, element by element: any width.
template <class T, class W>
__global__ void __launch_bounds__(kThreads) layer_norm_fwd_any_kernel(const Params<T, W> p) {
  const int64_t r = block_x();
  const T* x = p.x + r * p.x_stride;
  float total = 0.0f;
  for (int64_t c = thread(); c < p.C; c += kThreads) {
    float value = to_float(x[c]);
    if (p.residual) {
      const T rounded = from_float<T>(value + to_float(p.residual[r * p.residual_stride + c]));
      p.sum[r * p.sum_stride + c] = rounded;
      value = to_float(rounded);
    }
    total += value;
  }
  // Each thread reads back only what it wrote itself.
  const T* row = p.residual ? p.sum + r * p.sum_stride : x;
  const float mean = row_sum<kThreads>(total) / static_cast<float>(p.C);
  float squares = 0.0f;
  for (int64_t c = thread(); c < p.C; c += kThreads) {
    const float d = to_float(row[c]) - mean;
    squares += d * d;
  }
  const float rstd = 1.0f / sqrtf(row_sum<kThreads>(squares) / static_cast<float>(p.C) + p.eps);
  for (int64_t c = thread(); c < p.C; c += kThreads) {
    const float shift = p.bias ? to_float(p.bias[c]) : 0.0f;
    p.y[r * p.y_stride + c] =
        from_float<T>(fmaf((to_float(row[c]) - mean) * rstd, to_float(p.weight[c]), shift));
  }
  if (thread() == 0 && p.mean) p.mean[r] = mean;
  if (thread() == 0 && p.rstd) p.rstd[r] = rstd;
}

template <class T, class W>
void launch_fwd(const LayerNormArgs& args) {
  const Params<T, W> p{args.x.as<const T>(),
                       args.residual.as<const T>(),
                       args.weight.as<const W>(),
                       args.bias.as<const W>(),
                       args.y.as<T>(),
                       args.sum.as<T>(),
                       args.mean.as<float>(),
                       args.rstd.as<float>(),
                       args.x.shape[0],
                       args.x.shape[1],
                       args.x.strides[0],
                       args.residual.strides[0],
                       args.y.strides[0],
                       args.sum.strides[0],
                       args.eps};
  // Widths choose the kernel and with it the order of sums; alignment only how wide accesses are.
  const bool vectors = p.C % Vec<T>::kSize == 0 && aligned<16>(p.x, p.x_stride) &&
                       aligned<16>(p.residual, p.residual_stride) && aligned<16>(p.weight) &&
                       aligned<16>(p.bias) && aligned<16>(p.y, p.y_stride) &&
                       aligned<16>(p.sum, p.sum_stride);
  const auto go = [&](auto kernel, int rows_each) {
    launch("layer_norm",
           {.grid_x = (p.rows + rows_each - 1) / rows_each,
            .threads = kThreads,
            .shared = sizeof(Shared),
            .like = args.x},
           kernel, p);
  };
  const auto choose = [&]<bool kAligned>() {
    if (p.C <= kHeld * kWarp) go(&layer_norm_fwd_kernel<T, W, kWarp, kAligned>, kThreads / kWarp);
    else go(&layer_norm_fwd_kernel<T, W, kThreads, kAligned>, 1);
  };
  if (p.C > kHeld * kThreads) go(&layer_norm_fwd_any_kernel<T, W>, 1);
  else if (vectors) choose.template operator()<true>();
  else choose.template operator()<false>();
}

template <class T>
void launch_weight(const LayerNormArgs& args) {
  if (args.weight.dtype == DType::f32) launch_fwd<T, float>(args);
  else launch_fwd<T, T>(args);
}

}  // namespace

void layer_norm_fwd_cuda(const LayerNormArgs& args) {
  if (args.x.dtype == DType::f32) launch_fwd<float, float>(args);
  if (args.x.dtype == DType::bf16) launch_weight<bf16>(args);
  if (args.x.dtype == DType::f16) launch_weight<f16>(args);
}

void layer_norm_bwd_cuda(const LayerNormBwdArgs& args) {
  if (args.x.dtype == DType::f32) launch_bwd<float, float>(args);
  if (args.x.dtype == DType::bf16) launch_bwd_weight<bf16>(args);
  if (args.x.dtype == DType::f16) launch_bwd_weight<f16>(args);
}

}  // namespace cgpt
