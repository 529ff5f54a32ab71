// y = activation(x W^T + bias) + residual on CPU.
#include "../../cpu/block_gemm.h"
#include "../../cpu/parallel.h"
#include "../../cpu/scratch.h"
#include "../../cpu/vmath.h"
#include "gemm.h"

namespace cgpt::CGPT_TIER {
namespace {

CGPT_INLINE VecF activate(Activation activation, VecF v) {
  switch (activation) {
    case Activation::none: return v;
    case Activation::gelu: return gelu(v);
    case Activation::gelu_tanh: return gelu_tanh(v);
    case Activation::relu: return relu(v);
  }
  return v;
}

// y[i, n0 + j] = activation(c[i, j] + bias[n0 + j]) + residual[i, n0 + j]
template <class T>
void finish(const GemmArgs& a, int64_t i0, int64_t rows, int64_t n0, int64_t columns,
            const float* c, int64_t ldc) {
  for (int64_t i = 0; i < rows; ++i) {
    T* y = a.y.as<T>() + (i0 + i) * a.y.strides[0] + n0;
    const T* residual =
        a.residual ? a.residual.as<const T>() + (i0 + i) * a.residual.strides[0] + n0 : nullptr;
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t left = columns - j;
      VecF v = load_n(c + i * ldc + j, left);
      if (a.bias)
        v += a.bias.dtype == DType::f32 ? load_n(a.bias.as<const float>() + n0 + j, left)
                                        : load_n(a.bias.as<const T>() + n0 + j, left);
      v = activate(a.activation, v);
      if (residual) v += load_n(residual + j, left);
      store_n(y + j, v, left);
    }
  }
}

template <class T>
void gemm_fwd_kernel(const GemmArgs& a) {
  using C = compute_t<T>;
  const int64_t M = a.x.shape[0], K = a.x.shape[1], N = a.y.shape[1], Kp = padded_k<C>(K);
  const int64_t stride_k = a.weight_kn ? a.weight.strides[0] : 1;
  const int64_t stride_n = a.weight_kn ? 1 : a.weight.strides[0];
  constexpr int64_t kRows = 4 * kMR;
  int64_t panels = 524288 / (Kp * kNR * static_cast<int64_t>(sizeof(C)) + 1);
  panels = panels < 1 ? 1 : panels > 16 ? 16 : panels;
  const int64_t block = panels * kNR;
  parallel_ranges((N + kNR - 1) / kNR, M * (K / 16 + 1) * kNR, [&](int64_t begin, int64_t end) {
    C* b = static_cast<C*>(thread_scratch(0, static_cast<size_t>(block * Kp) * sizeof(C)));
    C* packed_a = static_cast<C*>(thread_scratch(1, static_cast<size_t>(kRows * Kp) * sizeof(C)));
    float* c = static_cast<float*>(thread_scratch(2, static_cast<size_t>(kRows * block) * 4));
    const int64_t last = end * kNR < N ? end * kNR : N;
    for (int64_t n0 = begin * kNR; n0 < last; n0 += block) {
      const int64_t columns = last - n0 < block ? last - n0 : block;
      pack_b(a.weight.as<const T>() + n0 * stride_n, stride_k, stride_n, K, columns, b);
      for (int64_t i0 = 0; i0 < M; i0 += kRows) {
        const int64_t rows = M - i0 < kRows ? M - i0 : kRows;
        pack_a(a.x.as<const T>() + i0 * a.x.strides[0], a.x.strides[0], rows, K, packed_a);
        block_gemm(rows, columns, K, packed_a, Kp, b, c, block, false);
        finish<T>(a, i0, rows, n0, columns, c, block);
      }
    }
  });
}

}  // namespace

void gemm_fwd(const GemmArgs& a) {
  if (a.x.dtype == DType::f32) gemm_fwd_kernel<float>(a);
  if (a.x.dtype == DType::bf16) gemm_fwd_kernel<bf16>(a);
  if (a.x.dtype == DType::f16) gemm_fwd_kernel<f16>(a);
}

}  // namespace cgpt::CGPT_TIER
