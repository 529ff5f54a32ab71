// Linear cross-entropy on CPU: logits are made a tile at a time and are gone before the next.
//
// Tiles are computed transposed, logits^T = W x^T: the weight, which is large, is the operand that
// the block GEMM reads in place, and x, which is small, is the one that is packed, once. A tile is
// then kVocabBlock vocabulary rows by one panel of kNR rows of x, and a lane of a vector is a row
// of x, so the running maximum and sum of exponentials need no horizontal reduction.
//
// Work is cut into items of one vocabulary chunk by kRowBlock rows of x. Every chunk leaves its
// maximum, sum of exp(z - maximum) and sum of z per row; they are merged in order of the chunks.
// Chunks depend on V alone, so the same bits come out whatever the number of threads is.
//
// Traffic: the weight is read once per kRowBlock rows, V * K * sizeof(T) bytes. Extra memory:
// packed x, 3 floats per row and chunk (at most 64 chunks), and per thread a weight block where it
// cannot be read in place (fp16, and bf16 on tiers that multiply in fp32).
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

// Adds bias to tile[rows][kNR] and takes the first `columns` columns into the partial.
template <class B>
inline void accumulate_tile(float* tile, int64_t rows, int64_t columns, const B* bias, Partial p) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    const VecF seen = load(p.max + j);
    VecF m = seen, total = load(p.total + j);
    for (int64_t v = 0; v < rows; ++v) {
      VecF z = load(tile + v * kNR + j);
      if (bias) {
        z += set1(to_float(bias[v]));
        store(tile + v * kNR + j, z);
      }
      m = max(m, z);
      total += z;
    }
    const VecF shift = finite_or_zero(m);
    VecF sums[2] = {};
    int64_t v = 0;
    for (; v + 2 <= rows; v += 2) {
      sums[0] += exp(load(tile + v * kNR + j) - shift);
      sums[1] += exp(load(tile + v * kNR + kNR + j) - shift);
    }
    if (v < rows) sums[0] += exp(load(tile + v * kNR + j) - shift);
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

// Rows this far apart fall on so few sets of an 8-way L1 that a register tile's rows evict each
// other: fp32 at K = 1024 runs at 0.7 of its speed at 1056.
CGPT_INLINE bool conflicting(int64_t stride_bytes) { return stride_bytes % 2048 == 0; }

template <class T, class B>
struct Kernel {
  using C = compute_t<T>;
  static constexpr int64_t kLine = kAlign / static_cast<int64_t>(sizeof(C));

  const LinearCrossEntropyArgs& a;
  const T* const w = a.weight.as<const T>();
  const int64_t M = a.x.shape[0], K = a.x.shape[1], V = a.weight.shape[0];
  const int64_t ldx = a.x.strides[0], ldw = a.weight.strides[0];
  const int64_t padded_M = round_up(M, kNR), Kp = padded_k<C>(K);
  const int64_t chunk = round_up((V + kMaxChunks - 1) / kMaxChunks, kVocabBlock);
  const int64_t chunks = (V + chunk - 1) / chunk;
  const int64_t row_blocks = (M + kRowBlock - 1) / kRowBlock;
  const bool by_dots = M <= kDotRows;

  // By panels: x packed. The weight block is copied unless it can be read in place.
  const bool copies = !a_in_place<C, T>(K) || conflicting(ldw * sizeof(T));
  const int64_t copy_ld =
      round_up(Kp, kLine) + (conflicting(round_up(Kp, kLine) * sizeof(C)) ? kLine : 0);
  C* panels = nullptr;

  // By dots: the rows of x, and kDotTile of the weight at a time, with row stride dot_ld.
  const int64_t dot_ld = round_up(K, KVec<C>::kWidth);
  C* x_rows = nullptr;

  float* target_logit = nullptr;  // [M]
  float* partials = nullptr;      // [chunks][3][padded_M]

  Partial partial(int64_t c) const {
    float* p = partials + c * 3 * padded_M;
    return {p, p + padded_M, p + 2 * padded_M};
  }
  int64_t target(int64_t i) const { return a.target.as<const int64_t>()[i * a.target.strides[0]]; }

  void pack_x() const {
    const T* x = a.x.as<const T>();
    if (by_dots) return copy_block(x, ldx, M, K, x_rows, dot_ld);
    parallel_ranges(padded_M / kNR, kNR * K, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin * kNR; j < end * kNR; j += kNR)
        pack_b(x + j * ldx, 1, ldx, K, M - j < kNR ? M - j : int64_t{kNR}, panels + j * Kp);
    });
  }

  // Takes logits of vocabulary rows [v0, v0 + rows) by rows [j, j + columns) of x into p.
  void take_tile(float* logits, int64_t v0, int64_t rows, int64_t j, int64_t columns,
                 Partial p) const {
    accumulate_tile(logits, rows, columns, a.bias ? a.bias.as<const B>() + v0 : nullptr, p + j);
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t t = target(j + i) - v0;
      if (t >= 0 && t < rows) target_logit[j + i] = logits[t * kNR + i];
    }
  }

  static C* weight_scratch(int64_t elements) {
    return static_cast<C*>(thread_scratch(0, static_cast<size_t>(elements) * sizeof(C)));
  }

  void block_by_dots(int64_t v0, int64_t rows, Partial p) const {
    alignas(kAlign) float logits[kVocabBlock * kNR];
    // Columns from M to the end of the vector are read, never used.
    for (int64_t v = 0; v < rows; ++v)
      for (int64_t i = 0; i < M; i += kLanes) store(logits + v * kNR + i, zero());
    dot_block(w + v0 * ldw, ldw, rows, x_rows, dot_ld, M, K, weight_scratch(kDotTile * dot_ld),
              logits);
    take_tile(logits, v0, rows, 0, M, p);
  }

  void block_by_panels(int64_t v0, int64_t rows, int64_t begin, int64_t end, Partial p) const {
    alignas(kAlign) float logits[kVocabBlock * kNR];
    const C* block;
    int64_t ld = ldw;
    if (copies) {
      C* copy = weight_scratch(kVocabBlock * copy_ld);
      copy_block(w + v0 * ldw, ldw, rows, K, copy, copy_ld);
      block = copy, ld = copy_ld;
    } else {
      block = reinterpret_cast<const C*>(w + v0 * ldw);  // `copies` holds where T is not C
    }
    for (int64_t j = begin; j < end; j += kNR) {
      block_gemm(rows, int64_t{kNR}, K, block, ld, panels + j * Kp, logits, int64_t{kNR}, false);
      take_tile(logits, v0, rows, j, end - j < kNR ? end - j : kNR, p);
    }
  }

  void item(int64_t c, int64_t row_block) const {
    const int64_t begin = row_block * kRowBlock;
    const int64_t end = begin + kRowBlock < M ? begin + kRowBlock : M;
    const Partial p = partial(c);
    for (int64_t i = begin; i < round_up(end, kNR); ++i)
      p.max[i] = -__builtin_inff(), p.sum[i] = p.total[i] = 0.0f;
    const int64_t v_end = (c + 1) * chunk < V ? (c + 1) * chunk : V;
    for (int64_t v0 = c * chunk; v0 < v_end; v0 += kVocabBlock) {
      const int64_t rows = v_end - v0 < kVocabBlock ? v_end - v0 : kVocabBlock;
      if (by_dots) block_by_dots(v0, rows, p);
      else block_by_panels(v0, rows, begin, end, p);
    }
  }

  void merge() const {
    const float smoothing = a.label_smoothing, per_class = smoothing / static_cast<float>(V);
    for (int64_t j = 0; j < M; j += kLanes) {
      VecF m = set1(-__builtin_inff()), sum = zero(), total = zero();
      for (int64_t c = 0; c < chunks; ++c) m = max(m, load(partial(c).max + j));
      const VecF shift = finite_or_zero(m);
      for (int64_t c = 0; c < chunks; ++c) {
        sum = fmadd(load(partial(c).sum + j), exp(load(partial(c).max + j) - shift), sum);
        total += load(partial(c).total + j);
      }
      for (int64_t i = j; i < M && i < j + kLanes; ++i) {
        const float lse = shift[i - j] + __builtin_logf(sum[i - j]);
        float loss = lse - target_logit[i];
        // Left out at 0, where a logit of -inf would make 0 * inf of it.
        if (smoothing > 0.0f)
          loss = (1.0f - smoothing) * loss + (smoothing * lse - per_class * total[i - j]);
        if (a.lse) a.lse.as<float>()[i] = lse;
        a.loss.as<float>()[i] = target(i) == a.ignore_index ? 0.0f : loss;
      }
    }
  }

  void run() {
    const int64_t panels_size = by_dots ? 0 : packed_b_size<C>(K, M);
    const int64_t x_rows_size = by_dots ? M * dot_ld : 0;
    const int64_t partials_size = chunks * 3 * padded_M;
    Arena arena(Arena::bytes<C>(panels_size) + Arena::bytes<C>(x_rows_size) +
                Arena::bytes<float>(M) + Arena::bytes<float>(partials_size));
    panels = arena.take<C>(panels_size);
    x_rows = arena.take<C>(x_rows_size);
    target_logit = arena.take<float>(M);
    partials = arena.take<float>(partials_size);
    for (int64_t i = 0; i < M; ++i) target_logit[i] = 0.0f;  // stays so where ignored
    pack_x();
    // Row blocks of a chunk are neighbours: the second finds the weight in the shared cache.
    parallel_items(chunks * row_blocks, chunk * (M < kRowBlock ? M : kRowBlock) * K,
                   [&](int64_t i) { item(i / row_blocks, i % row_blocks); });
    merge();
  }
};

template <class T>
void linear_cross_entropy_bias(const LinearCrossEntropyArgs& a) {
  if (a.bias && a.bias.dtype == DType::f32) Kernel<T, float>{a}.run();
  else Kernel<T, T>{a}.run();
}

}  // namespace

void linear_cross_entropy_fwd(const LinearCrossEntropyArgs& a) {
  if (a.x.shape[0] == 0) return;
  if (a.x.dtype == DType::f32) linear_cross_entropy_bias<float>(a);
  if (a.x.dtype == DType::bf16) linear_cross_entropy_bias<bf16>(a);
  if (a.x.dtype == DType::f16) linear_cross_entropy_bias<f16>(a);
}

}  // namespace cgpt::CGPT_TIER
