// Tiles of the transposed logits, W x^T, and what is kept of them: per row of x a running maximum,
// sum of exponentials and sum of logits, and where gradients are wanted the exponentials too.
//
// The weight, which is large, is the operand that the block GEMM reads in place, and x, which is
// small, is the one that is packed, once. A tile is kVocabBlock vocabulary rows by one panel of kNR
// rows of x, and a lane of a vector is a row of x, so nothing needs a horizontal reduction.
#pragma once

#include <new>

#include "../../cpu/block_gemm.h"
#include "../../cpu/parallel.h"
#include "../../cpu/scratch.h"
#include "../../cpu/vmath.h"
#include "cross_entropy.h"

namespace cgpt::CGPT_TIER {
namespace {

// A multiple of the register tiles' 14, 4 and 16 rows; the tile, 112 x 32 floats, is 14 KB of L1.
constexpr int64_t kVocabBlock = 112;
constexpr int64_t kRowBlock = 512;
constexpr int64_t kMaxChunks = 64;
// Up to here rows are multiplied by dot products along K: the panel form would compute kNR columns
// for the few in use.
constexpr int64_t kDotRows = kLanes;

constexpr int64_t kAlign = 64;

CGPT_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// One cache-aligned allocation, cut into arrays. Throws std::bad_alloc.
class Arena {
 public:
  explicit Arena(int64_t bytes)
      : base_(static_cast<char*>(
            ::operator new(static_cast<size_t>(bytes), static_cast<std::align_val_t>(kAlign)))),
        next_(base_) {}
  ~Arena() { ::operator delete(base_, static_cast<std::align_val_t>(kAlign)); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  template <class T>
  static int64_t bytes(int64_t count) {
    return round_up(count * static_cast<int64_t>(sizeof(T)), kAlign);
  }
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return p;
  }

 private:
  char* base_;
  char* next_;
};

// What is known of the rows of x after some of the vocabulary, one float per row.
struct Partial {
  float* max;    // of z; -inf before the first
  float* sum;    // of exp(z - max)
  float* total;  // of z

  Partial operator+(int64_t rows) const { return {max + rows, sum + rows, total + rows}; }
};

// -inf - -inf would be NaN where a row has seen nothing but -inf yet.
CGPT_INLINE VecF finite_or_zero(VecF m) { return select(m == set1(-__builtin_inff()), zero(), m); }

// How exponentials are stored until the sums are known: bf16 as itself, in the tiers that multiply
// in fp32 too; fp16 would lose what lies below 6e-8.
template <class T>
struct Stored {
  using type = float;
};
template <>
struct Stored<bf16> {
  using type = bf16;
};

// Denormals may become 0, which the tier's own conversion does: they are no probabilities.
CGPT_INLINE void store_stored(float* p, VecF v) { store(p, v); }
CGPT_INLINE void store_stored(bf16* p, VecF v) {
#if CGPT_TIER_LEVEL >= 4
  const __m256i half = bit_cast<__m256i>(_mm512_cvtneps_pbh(v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
#else
  store(p, v);
#endif
}

// Where the exponentials of a tile go: e[v * ld + j] = exp(z - shift[j]); e is null where they are
// not wanted.
template <class S>
struct Exponentials {
  S* e = nullptr;
  int64_t ld = 0;
  float* shift = nullptr;
};

// Adds bias to tile[rows][kNR] and takes the first `columns` columns into the partial.
template <class S>
inline void accumulate_tile(float* tile, int64_t rows, int64_t columns, const float* bias,
                            Partial p, Exponentials<S> kept) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    const VecF seen = load(p.max + j);
    VecF m = seen, total = load(p.total + j);
    for (int64_t v = 0; v < rows; ++v) {
      VecF z = load(tile + v * kNR + j);
      if (bias) {
        z += set1(bias[v]);
        store(tile + v * kNR + j, z);
      }
      m = max(m, z);
      total += z;
    }
    const VecF shift = finite_or_zero(m);
    VecF sums[2] = {};
    const auto take = [&](int64_t v) {
      const VecF e = exp(load(tile + v * kNR + j) - shift);
      if (kept.e) store_stored(kept.e + v * kept.ld + j, e);
      return e;
    };
    int64_t v = 0;
    for (; v + 2 <= rows; v += 2) {
      sums[0] += take(v);
      sums[1] += take(v + 1);
    }
    if (v < rows) sums[0] += take(v);
    if (kept.e) store(kept.shift + j, shift);
    store(p.sum + j, fmadd(load(p.sum + j), exp(seen - shift), sums[0] + sums[1]));
    store(p.max + j, m);
    store(p.total + j, total);
  }
}

template <int... i>
struct Indices {};
template <int n, int... i>
struct FirstIndices : FirstIndices<n - 1, n - 1, i...> {};
template <int... i>
struct FirstIndices<0, i...> {
  using type = Indices<i...>;
};

// a and b hold sums in segments of `segment` lanes: adds each segment's halves, a's results first.
template <int segment, int... i>
CGPT_INLINE VecF fold(VecF a, VecF b, Indices<i...>) {
  constexpr int h = segment / 2;
  return __builtin_shufflevector(a, b, (i / h * segment + i % h)...) +
         __builtin_shufflevector(a, b, (i / h * segment + i % h + h)...);
}

// Lane i of the result is the sum over the lanes of acc[i]: n - 1 folds and log2(kLanes / n) more,
// where n sums one by one would take log2(kLanes) steps each.
template <int n, int segment = kLanes>
CGPT_INLINE VecF reduce_each(const VecF* acc) {
  using All = typename FirstIndices<kLanes>::type;
  if constexpr (segment == 1) {
    return acc[0];
  } else {
    constexpr int half = n > 1 ? n / 2 : 1;
    VecF folded[half];
    for (int i = 0; i < half; ++i)
      folded[i] = fold<segment>(acc[2 * i % n], acc[(2 * i + 1) % n], All{});
    return reduce_each<half, segment / 2>(folded);
  }
}

// Copies w[rows, K] into dst with row stride ld, a multiple of a vector, converted, zero padded.
template <class C, class T>
inline void copy_block(const T* w, int64_t ldw, int64_t rows, int64_t K, C* dst, int64_t ld) {
  for (int64_t v = 0; v < rows; ++v, w += ldw, dst += ld)
    for (int64_t k = 0; k < ld; k += KVec<C>::kWidth) {
      typename KVec<C>::type part = {};
      if (k < K) part = KVec<C>::load_n(w + k, K - k);
      __builtin_memcpy(dst + k, &part, sizeof(part));
    }
}

// tile[v][i] = w[v] . x[i] for kDotTile rows of w and kColumns of x, row stride ld.
constexpr int kDotTile = 4;

template <int kColumns, class C>
CGPT_INLINE void dot_tile(const C* w, const C* x, int64_t ld, float* tile) {
  VecF acc[kDotTile * kColumns] = {};
  for (int64_t k = 0; k < ld; k += KVec<C>::kWidth) {
    typename KVec<C>::type xs[kColumns];
    for (int i = 0; i < kColumns; ++i) xs[i] = KVec<C>::load(x + i * ld + k);
    for (int v = 0; v < kDotTile; ++v) {
      const auto wv = KVec<C>::load(w + v * ld + k);
      for (int i = 0; i < kColumns; ++i)
        acc[v * kColumns + i] = KVec<C>::multiply_add(wv, xs[i], acc[v * kColumns + i]);
    }
  }
  const VecF sums = reduce_each<kDotTile * kColumns>(acc);
  for (int v = 0; v < kDotTile; ++v)
    for (int i = 0; i < kColumns; ++i) tile[v * kNR + i] = sums[v * kColumns + i];
}

// tile[v][i] = w[v] . x[i] for `rows` rows of w as stored and M <= kDotRows rows of x, which has
// zeros up to its row stride ldx, a multiple of a vector.
//
// kDotTile rows of w are first copied to `buffer`, one after the other: the copy is one stream from
// memory. Reading the four rows side by side would be four streams of 1-3 KB, too short for the
// prefetcher: 8 GB/s instead of 20 (docs/log.md).
template <class C, class T>
inline void dot_block(const T* w, int64_t ldw, int64_t rows, const C* x, int64_t ldx, int64_t M,
                      int64_t K, C* buffer, float* tile) {
  for (int64_t v = 0; v < rows; v += kDotTile, w += kDotTile * ldw, tile += kDotTile * kNR) {
    copy_block(w, ldw, rows - v < kDotTile ? rows - v : kDotTile, K, buffer, ldx);
    int64_t i = 0;
    if constexpr (kLanes >= 16)
      for (; i + 4 <= M; i += 4) dot_tile<4>(buffer, x + i * ldx, ldx, tile + i);
    if constexpr (kLanes >= 8)
      for (; i + 2 <= M; i += 2) dot_tile<2>(buffer, x + i * ldx, ldx, tile + i);
    for (; i < M; ++i) dot_tile<1>(buffer, x + i * ldx, ldx, tile + i);
  }
}

}  // namespace
}  // namespace cgpt::CGPT_TIER
