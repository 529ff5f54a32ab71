// Layer norm on CUDA: one block per row, the row held in shared memory as fp32.
//
// Traffic: each row is read from memory once and written once, rows * C * sizeof(T) each way (twice
// with a residual); the centred squares and the normalisation read shared memory. Rows that do not
// fit (C > 12288) are read again from L2 instead.
#include "../../cuda/device.cuh"
#include "../../cuda/launch.h"
#include "layer_norm.h"

namespace cgpt {
namespace {

// 256 threads: at C = 768 three elements each, and eight blocks fill an SM's 2048 threads.
constexpr int kThreads = 256;
// Shared memory every kernel may use without asking for more.
constexpr int64_t kSharedBytes = 48 * 1024;

template <class T, class W>
struct Row {
  const T* x;
  const T* residual;
  const W* weight;
  const W* bias;
  T* y;
  T* sum;
  float* mean;
  float* rstd;
  int64_t x_stride, residual_stride, y_stride, sum_stride, C;
  float eps;
};

template <class T, class W, bool kCached>
__global__ void __launch_bounds__(kThreads) layer_norm_fwd_kernel(const Row<T, W> a) {
  extern __shared__ float cached[];
  __shared__ float scratch[kThreads / cuda::kWarp];
  const int64_t row = blockIdx.x;
  const T* x = a.x + row * a.x_stride;
  const T* residual = a.residual ? a.residual + row * a.residual_stride : nullptr;

  float total = 0.0f;
  for (int64_t c = threadIdx.x; c < a.C; c += kThreads) {
    float value = cuda::to_float(x[c]);
    if (residual) {
      const T rounded = cuda::from_float<T>(value + cuda::to_float(residual[c]));
      a.sum[row * a.sum_stride + c] = rounded;
      value = cuda::to_float(rounded);
    }
    if constexpr (kCached) cached[c] = value;
    total += value;
  }
  const T* again = residual ? a.sum + row * a.sum_stride : x;
  // Each thread reads back only what it wrote itself, so no barrier is needed for the row.
  const auto value_at = [&](int64_t c) {
    if constexpr (kCached) return cached[c];
    else return cuda::to_float(again[c]);
  };

  const float mean = cuda::block_sum<kThreads>(total, scratch) / static_cast<float>(a.C);
  float squares = 0.0f;
  for (int64_t c = threadIdx.x; c < a.C; c += kThreads) {
    const float d = value_at(c) - mean;
    squares += d * d;
  }
  const float variance = cuda::block_sum<kThreads>(squares, scratch) / static_cast<float>(a.C);
  const float rstd = 1.0f / sqrtf(variance + a.eps);
  for (int64_t c = threadIdx.x; c < a.C; c += kThreads) {
    const float shift = a.bias ? cuda::to_float(a.bias[c]) : 0.0f;
    const float y = (value_at(c) - mean) * rstd * cuda::to_float(a.weight[c]) + shift;
    a.y[row * a.y_stride + c] = cuda::from_float<T>(y);
  }
  if (threadIdx.x == 0 && a.mean) a.mean[row] = mean;
  if (threadIdx.x == 0 && a.rstd) a.rstd[row] = rstd;
}

template <class T, class W>
void launch(const LayerNormArgs& args) {
  const int64_t rows = args.x.shape[0], C = args.x.shape[1];
  if (rows == 0) return;
  const cuda::DeviceGuard guard(args.x.device_index, "layer_norm");
  const Row<T, W> a{args.x.as<const T>(),
                    args.residual.as<const T>(),
                    args.weight.as<const W>(),
                    args.bias.as<const W>(),
                    args.y.as<T>(),
                    args.sum.as<T>(),
                    args.mean.as<float>(),
                    args.rstd.as<float>(),
                    args.x.strides[0],
                    args.residual.strides[0],
                    args.y.strides[0],
                    args.sum.strides[0],
                    C,
                    args.eps};
  const auto stream = static_cast<cudaStream_t>(args.x.stream);
  const auto blocks = static_cast<unsigned>(rows);
  const auto bytes = static_cast<size_t>(C) * sizeof(float);
  if (C * static_cast<int64_t>(sizeof(float)) + 1024 <= kSharedBytes)
    layer_norm_fwd_kernel<T, W, true><<<blocks, kThreads, bytes, stream>>>(a);
  else layer_norm_fwd_kernel<T, W, false><<<blocks, kThreads, 0, stream>>>(a);
  cuda::require(cudaGetLastError(), "layer_norm");
}

template <class T>
void launch_weight(const LayerNormArgs& args) {
  if (args.weight.dtype == DType::f32) launch<T, float>(args);
  else launch<T, T>(args);
}

}  // namespace

void layer_norm_fwd_cuda(const LayerNormArgs& args) {
  if (args.x.dtype == DType::f32) launch_weight<float>(args);
  if (args.x.dtype == DType::bf16) launch_weight<bf16>(args);
  if (args.x.dtype == DType::f16) launch_weight<f16>(args);
}

}  // namespace cgpt
