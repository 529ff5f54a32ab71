// g = dropout(dy) * activation'(pre) and its column sums dbias, in one pass over dy and pre.
//
// Reads dy and pre once, writes g once: 3 M N sizeof(T) bytes; only dy is read where it is g itself
// and only dbias is wanted. A thread owns columns and walks down their rows, so the sums, taken
// over slabs of kSlabRows first, do not depend on the number of threads.
#pragma once

#include "../../cpu/parallel.h"
#include "gemm_epilogue.h"

namespace cgpt::CGPT_TIER {
namespace {

// Sums of 64 rows at a time keep the error of fp32 sums near that of a tree.
constexpr int64_t kSlabRows = 64;
// Columns whose sums lie in L1 beside the rows: the strip of a dropout mask.
constexpr int64_t kSumColumns = Dropout::kStrip;
// Columns that threads divide: two lines of 16-bit elements.
constexpr int64_t kColumnUnit = 64;

template <class T>
struct GemmGradient {
  explicit GemmGradient(const GemmBwdArgs& a)
      : M(a.dy.shape[0]),
        N(a.dy.shape[1]),
        dy(a.dy.as<const T>()),
        ldd(a.dy.strides[0]),
        activation(a.activation),
        dbias(a.dbias) {
    if (activation != Activation::none) pre = a.pre.as<const T>(), ldp = a.pre.strides[0];
    if (activation != Activation::none || a.dropout_p > 0.0) g = a.g.as<T>(), ldg = a.g.strides[0];
    if (a.dropout_p > 0.0) dropout = Dropout(a.dropout_p, a.seed, N);
  }

  int64_t M, N;
  const T* dy;
  int64_t ldd;
  Activation activation;
  TensorView dbias;
  const T* pre = nullptr;
  int64_t ldp = 0;
  T* g = nullptr;  // none: dy is g
  int64_t ldg = 0;
  Dropout dropout;
};

template <Activation activation>
CGPT_INLINE VecF times_slope(VecF v, VecF pre) {
  if constexpr (activation == Activation::gelu) return v * gelu_slope(pre);
  if constexpr (activation == Activation::gelu_tanh) return v * gelu_tanh_slope(pre);
  if constexpr (activation == Activation::relu) return select(pre <= zero(), zero(), v);
  return v;
}

// Rows i0 .. i1 of g, `columns` from n on, up to kSumColumns; sum += their column sums.
template <Activation activation, class T>
void gradient_rows(const GemmGradient<T>& p, int64_t i0, int64_t i1, int64_t n, int64_t columns,
                   float* sum) {
  const bool drops = p.dropout.threshold > 0;
  Dropout::Buffer buffer;
  for (int64_t i = i0; i < i1; ++i) {
    const T* dy = p.dy + i * p.ldd + n;
    const T* pre = activation == Activation::none ? nullptr : p.pre + i * p.ldp + n;
    T* g = p.g + i * p.ldg + n;
    const uint32_t* words = drops ? p.dropout.words(i, n, columns, buffer) : nullptr;
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t left = columns - j;
      VecF v = load_n(dy + j, left);
      if (words) v = p.dropout.apply(v, words + j);
      if constexpr (activation != Activation::none)
        v = times_slope<activation>(v, load_n(pre + j, left));
      store_n(g + j, v, left);
      store(sum + j, load(sum + j) + v);
    }
  }
}

// The same where g is dy: four rows share a load and a store of the sums.
template <class T>
void sum_rows(const GemmGradient<T>& p, int64_t i0, int64_t i1, int64_t n, int64_t columns,
              float* sum) {
  int64_t i = i0;
  for (; i + 4 <= i1; i += 4) {
    const T* dy = p.dy + i * p.ldd + n;
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t left = columns - j;
      const VecF a = load_n(dy + j, left) + load_n(dy + p.ldd + j, left);
      const VecF b = load_n(dy + 2 * p.ldd + j, left) + load_n(dy + 3 * p.ldd + j, left);
      store(sum + j, load(sum + j) + (a + b));
    }
  }
  for (; i < i1; ++i) {
    const T* dy = p.dy + i * p.ldd + n;
    for (int64_t j = 0; j < columns; j += kLanes)
      store(sum + j, load(sum + j) + load_n(dy + j, columns - j));
  }
}

template <class T>
void gradient_block(const GemmGradient<T>& p, int64_t i0, int64_t i1, int64_t n, int64_t columns,
                    float* sum) {
  if (!p.g) return sum_rows(p, i0, i1, n, columns, sum);
  switch (p.activation) {
    case Activation::none: return gradient_rows<Activation::none>(p, i0, i1, n, columns, sum);
    case Activation::gelu: return gradient_rows<Activation::gelu>(p, i0, i1, n, columns, sum);
    case Activation::gelu_tanh:
      return gradient_rows<Activation::gelu_tanh>(p, i0, i1, n, columns, sum);
    case Activation::relu: return gradient_rows<Activation::relu>(p, i0, i1, n, columns, sum);
  }
}

template <class T>
void gemm_bwd_g(const GemmGradient<T>& p) {
  const int64_t units = (p.N + kColumnUnit - 1) / kColumnUnit;
  // A slope costs about as much as 16 reads.
  const int64_t cost = (p.M + 1) * kColumnUnit * (p.g ? 16 : 1) / 4;
  parallel_ranges(units, cost, [&](int64_t begin, int64_t end) {
    const int64_t last = end * kColumnUnit < p.N ? end * kColumnUnit : p.N;
    for (int64_t n = begin * kColumnUnit; n < last; n += kSumColumns) {
      const int64_t columns = last - n < kSumColumns ? last - n : kSumColumns;
      alignas(64) float total[kSumColumns] = {}, slab[kSumColumns];
      for (int64_t i = 0; i < p.M; i += kSlabRows) {
        for (int64_t j = 0; j < columns; j += kLanes) store(slab + j, zero());
        const int64_t next = i + kSlabRows < p.M ? i + kSlabRows : p.M;
        gradient_block(p, i, next, n, columns, slab);
        for (int64_t j = 0; j < columns; j += kLanes)
          store(total + j, load(total + j) + load(slab + j));
      }
      if (!p.dbias) continue;
      for (int64_t j = 0; j < columns; j += kLanes) {
        const VecF v = load(total + j);
        if (p.dbias.dtype == DType::f32)
          store_n(p.dbias.template as<float>() + n + j, v, columns - j);
        else store_n(p.dbias.template as<T>() + n + j, v, columns - j);
      }
    }
  });
}

}  // namespace
}  // namespace cgpt::CGPT_TIER
