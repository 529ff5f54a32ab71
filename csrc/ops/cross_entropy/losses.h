// Losses and log-sum-exps of some rows of x.
//
// Work is cut into items of one vocabulary chunk by kRowBlock rows of x. Every chunk leaves its
// maximum, sum of exp(z - maximum) and sum of z per row; they are merged in order of the chunks.
// Chunks depend on V alone, so the same bits come out whatever the number of threads is.
#pragma once

#include "logits.h"

namespace cgpt::CGPT_TIER {
namespace {

// Rows this far apart fall on so few sets of an 8-way L1 that a register tile's rows evict each
// other: fp32 at K = 1024 runs at 0.7 of its speed at 1056.
CGPT_INLINE bool conflicting(int64_t stride_bytes) { return stride_bytes % 2048 == 0; }

// biases [v0, v0 + rows) as fp32; null without a bias.
inline const float* bias_block(const TensorView& bias, int64_t v0, int64_t rows, float* block) {
  if (!bias) return nullptr;
  if (bias.dtype == DType::f32) return bias.as<const float>() + v0;
  for (int64_t v = 0; v < rows; ++v)
    block[v] = bias.dtype == DType::bf16 ? to_float(bias.as<const bf16>()[v0 + v])
                                         : to_float(bias.as<const f16>()[v0 + v]);
  return block;
}

template <class T>
struct Losses {
  using C = compute_t<T>;
  using S = typename Stored<T>::type;
  static constexpr int64_t kLine = kAlign / static_cast<int64_t>(sizeof(C));

  const LinearCrossEntropyArgs& a;
  // With gradients to follow: e [V, padded_M], shifts [blocks of kVocabBlock, padded_M].
  S* const e = nullptr;
  float* const shifts = nullptr;

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
                 const float* bias, Partial p) const {
    Exponentials<S> kept;
    if (e) kept = {e + v0 * padded_M + j, padded_M, shifts + v0 / kVocabBlock * padded_M + j};
    accumulate_tile(logits, rows, columns, bias, p + j, kept);
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t t = target(j + i) - v0;
      if (t >= 0 && t < rows) target_logit[j + i] = logits[t * kNR + i];
    }
  }

  static C* weight_scratch(int64_t elements) {
    return static_cast<C*>(thread_scratch(0, static_cast<size_t>(elements) * sizeof(C)));
  }

  void block_by_dots(int64_t v0, int64_t rows, const float* bias, Partial p) const {
    alignas(kAlign) float logits[kVocabBlock * kNR];
    // Columns from M to the end of the vector are read, never used.
    for (int64_t v = 0; v < rows; ++v)
      for (int64_t i = 0; i < M; i += kLanes) store(logits + v * kNR + i, zero());
    dot_block(w + v0 * ldw, ldw, rows, x_rows, dot_ld, M, K, weight_scratch(kDotTile * dot_ld),
              logits);
    take_tile(logits, v0, rows, 0, M, bias, p);
  }

  void block_by_panels(int64_t v0, int64_t rows, int64_t begin, int64_t end, const float* bias,
                       Partial p) const {
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
      take_tile(logits, v0, rows, j, end - j < kNR ? end - j : kNR, bias, p);
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
      float converted[kVocabBlock];
      const float* bias = bias_block(a.bias, v0, rows, converted);
      if (by_dots) block_by_dots(v0, rows, bias, p);
      else block_by_panels(v0, rows, begin, end, bias, p);
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

}  // namespace
}  // namespace cgpt::CGPT_TIER
