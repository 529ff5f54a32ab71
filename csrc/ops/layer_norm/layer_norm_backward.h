// Gradients of layer norm: dx, and the sums over rows for dweight and dbias, in one walk over rows.
//
// Reads dy and x once from memory (twice from L1), writes dx once: 3 rows C sizeof(T) bytes. Rows
// are cut into chunks by their number alone; a chunk adds up its own sums in fp32 and the chunks'
// are added in order, so no bit depends on the number of threads.
#pragma once

#include "../../cpu/parallel.h"
#include "../../cpu/scratch.h"
#include "../../cpu/simd.h"
#include "layer_norm.h"

namespace cgpt::CGPT_TIER {
namespace {

constexpr int64_t kChunkRows = 32, kMostChunks = 64;
// Rows walked together, in the forward too: they share the parameters' loads, and the sums of one
// row hide the latency of another's.
constexpr int kGroupRows = CGPT_TIER_LEVEL >= 2 ? 4 : 2;

template <class T, class W>
struct LayerNormGradient {
  explicit LayerNormGradient(const LayerNormBwdArgs& a)
      : rows(a.x.shape[0]),
        C(a.x.shape[1]),
        dy(a.dy.as<const T>()),
        x(a.x.as<const T>()),
        dtotal(a.dtotal ? a.dtotal.as<const T>() : nullptr),
        dx(a.dx ? a.dx.as<T>() : nullptr),
        ldy(a.dy.strides[0]),
        ldx(a.x.strides[0]),
        lds(a.dtotal ? a.dtotal.strides[0] : 0),
        ldd(a.dx ? a.dx.strides[0] : 0),
        weight(a.weight.as<const W>()),
        mean(a.mean.as<const float>()),
        rstd(a.rstd.as<const float>()) {}

  int64_t rows, C;
  const T *dy, *x, *dtotal;
  T* dx;
  int64_t ldy, ldx, lds, ldd;
  const W* weight;
  const float *mean, *rstd;
};

// Calls f(c, left) for whole vectors of a row with left = kLanes known to the compiler, then once
// for the rest.
template <class F>
CGPT_INLINE void each_vector(int64_t C, F&& f) {
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) f(c, kLanes);
  if (c < C) f(c, C - c);
}

// Rows i .. i + n - 1. dw[c] += sum(dy xhat), db[c] += sum(dy); both hold C padded to a vector.
template <int n, class T, class W>
CGPT_INLINE void gradient_of_rows(const LayerNormGradient<T, W>& p, int64_t i, float* dw,
                                  float* db) {
  VecF m[n], r[n], sum_g[n] = {}, sum_gx[n] = {};
  for (int u = 0; u < n; ++u) m[u] = set1(p.mean[i + u]), r[u] = set1(p.rstd[i + u]);
  const T *x = p.x + i * p.ldx, *dy = p.dy + i * p.ldy;
  each_vector(p.C, [&](int64_t c, int64_t left) __attribute__((always_inline)) {
    const VecF w = load_n(p.weight + c, left);
    VecF dw_c = load(dw + c), db_c = load(db + c);
#pragma GCC unroll 4
    for (int u = 0; u < n; ++u) {
      const VecF d = load_n(dy + u * p.ldy + c, left);
      const VecF xhat = (load_n(x + u * p.ldx + c, left) - m[u]) * r[u];
      const VecF g = d * w;
      sum_g[u] += g;
      sum_gx[u] = fmadd(g, xhat, sum_gx[u]);
      dw_c = fmadd(d, xhat, dw_c);
      db_c += d;
    }
    store(dw + c, dw_c);
    store(db + c, db_c);
  });
  if (!p.dx) return;
  VecF a[n], b[n];
  for (int u = 0; u < n; ++u) {
    a[u] = set1(reduce_add(sum_g[u]) / static_cast<float>(p.C));
    b[u] = -r[u] * set1(reduce_add(sum_gx[u]) / static_cast<float>(p.C));
  }
  T* dx = p.dx + i * p.ldd;
  const T* dtotal = p.dtotal ? p.dtotal + i * p.lds : nullptr;
  each_vector(p.C, [&](int64_t c, int64_t left) __attribute__((always_inline)) {
    const VecF w = load_n(p.weight + c, left);
#pragma GCC unroll 4
    for (int u = 0; u < n; ++u) {
      const VecF g = load_n(dy + u * p.ldy + c, left) * w;
      const VecF centred = load_n(x + u * p.ldx + c, left) - m[u];
      VecF v = r[u] * fmadd(centred, b[u], g - a[u]);  // 0 where C is 1
      if (dtotal) v += load_n(dtotal + u * p.lds + c, left);
      store_rounded(dx + u * p.ldd + c, v, left);
    }
  });
}

// out = the sum of `chunks` partial sums, `stride` floats apart.
template <class T>
void add_chunks(const TensorView& out, const float* partial, int64_t chunks, int64_t stride) {
  if (!out) return;
  const int64_t C = out.shape[0];
  parallel_ranges((C + kLanes - 1) / kLanes, chunks, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * kLanes; c < end * kLanes; c += kLanes) {
      VecF total = zero();
      for (int64_t k = 0; k < chunks; ++k) total += load(partial + k * stride + c);
      if (out.dtype == DType::f32) store_n(out.as<float>() + c, total, C - c);
      else store_n(out.as<T>() + c, total, C - c);
    }
  });
}

template <class T, class W>
void layer_norm_bwd_kernel(const LayerNormBwdArgs& a) {
  const LayerNormGradient<T, W> p(a);
  const int64_t wanted = (p.rows + kChunkRows - 1) / kChunkRows;
  const int64_t chunks = wanted < kMostChunks ? wanted : kMostChunks;
  const int64_t padded = (p.C + kLanes - 1) / kLanes * kLanes, stride = 2 * padded;
  float* partial =
      static_cast<float*>(thread_scratch(0, static_cast<size_t>(chunks * stride + 1) * 4));
  parallel_ranges(chunks, kChunkRows * p.C, [&](int64_t begin, int64_t end) {
    // Backwards: of dy, made just before from the first row to the last, the end is in L2.
    for (int64_t k = end - 1; k >= begin; --k) {
      float *dw = partial + k * stride, *db = dw + padded;
      for (int64_t c = 0; c < stride; c += kLanes) store(dw + c, zero());
      int64_t i = p.rows * k / chunks;
      const int64_t last = p.rows * (k + 1) / chunks;
      for (; i + kGroupRows <= last; i += kGroupRows) gradient_of_rows<kGroupRows>(p, i, dw, db);
      for (; i < last; ++i) gradient_of_rows<1>(p, i, dw, db);
    }
  });
  add_chunks<T>(a.dweight, partial, chunks, stride);
  add_chunks<T>(a.dbias, partial + padded, chunks, stride);
}

}  // namespace
}  // namespace cgpt::CGPT_TIER
