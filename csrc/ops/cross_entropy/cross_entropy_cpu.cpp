// Linear cross-entropy on CPU: logits are made a tile at a time and are gone before the next.
//
// losses.h: forward. It reads the weight once per kRowBlock rows, V * K * sizeof(T) bytes. Extra
// memory: packed x, 3 floats per row and chunk (at most 64 chunks), and per thread a weight block
// where it cannot be read in place (fp16, and bf16 on tiers that multiply in fp32).
// gradients.h: forward and gradients together, with at most M * V bytes more in bf16 and fp32.
#include "gradients.h"

namespace cgpt::CGPT_TIER {
namespace {

template <class T>
void with_gradients(const LinearCrossEntropyArgs& a) {
  const int64_t M = a.x.shape[0], K = a.x.shape[1], V = a.weight.shape[0];
  const auto target = [&](int64_t i) {
    return a.target.as<const int64_t>()[i * a.target.strides[0]];
  };
  Gathered<T> rows;
  for (int64_t i = 0; i < M; ++i) rows.count += target(i) != a.ignore_index;
  const bool all = rows.count == M;
  Arena arena(2 * Arena::bytes<int64_t>(rows.count) + 2 * Arena::bytes<float>(rows.count) +
              Arena::bytes<T>(all ? 0 : rows.count * K));
  rows.index = arena.take<int64_t>(rows.count);
  rows.target = arena.take<int64_t>(rows.count);
  rows.d = arena.take<float>(rows.count);
  rows.loss = arena.take<float>(rows.count);
  rows.x = a.x.as<const T>();
  rows.ldx = a.x.strides[0];
  T* const copy = all ? nullptr : arena.take<T>(rows.count * K);
  for (int64_t i = 0, n = 0; i < M; ++i) {
    if (target(i) == a.ignore_index) {
      a.loss.as<float>()[i] = 0.0f;
      if (a.dx)
        __builtin_memset(a.dx.as<T>() + i * a.dx.strides[0], 0, static_cast<size_t>(K) * sizeof(T));
      continue;
    }
    rows.index[n] = i;
    rows.target[n] = target(i);
    rows.d[n] = a.drows ? a.drows.as<const float>()[i * a.drows.strides[0]] : a.scale;
    if (!all)
      __builtin_memcpy(copy + n * K, rows.x + i * rows.ldx, static_cast<size_t>(K) * sizeof(T));
    ++n;
  }
  if (!all) rows.x = copy, rows.ldx = K;

  if (rows.count == 0) {
    if (a.dweight)
      for (int64_t v = 0; v < V; ++v)
        __builtin_memset(a.dweight.as<T>() + v * a.dweight.strides[0], 0,
                         static_cast<size_t>(K) * sizeof(T));
    if (a.dbias)
      __builtin_memset(a.dbias.data, 0,
                       static_cast<size_t>(V) * (a.dbias.dtype == DType::f32 ? 4 : 2));
    return;
  }
  Gradients<T> gradients{a, rows, plan<T>(rows.count, V)};
  gradients.run();
  for (int64_t n = 0; n < rows.count; ++n) a.loss.as<float>()[rows.index[n]] = rows.loss[n];
}

}  // namespace

void linear_cross_entropy_fwd(const LinearCrossEntropyArgs& a) {
  if (a.x.shape[0] == 0) return;
  if (a.x.dtype == DType::f32) Losses<float>{a}.run();
  if (a.x.dtype == DType::bf16) Losses<bf16>{a}.run();
  if (a.x.dtype == DType::f16) Losses<f16>{a}.run();
}

void linear_cross_entropy_grads(const LinearCrossEntropyArgs& a) {
  if (a.x.dtype == DType::f32) with_gradients<float>(a);
  if (a.x.dtype == DType::bf16) with_gradients<bf16>(a);
  if (a.x.dtype == DType::f16) with_gradients<f16>(a);
}

}  // namespace cgpt::CGPT_TIER
