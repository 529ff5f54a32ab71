// Attention on CPU: which of the two ways forward (prefill.h, decode.h), the passes of the backward
// (backward.h, backward_rows.h), and the work over threads.
#include "../../cpu/parallel.h"
#include "backward.h"
#include "backward_rows.h"
#include "decode.h"
#include "prefill.h"

namespace cgpt::CGPT_TIER {
namespace {

template <class S, class... Sizes>
S take_scratch(Sizes... sizes) {
  S work;
  const int64_t bytes = work.carve(nullptr, sizes...);
  work.carve(static_cast<char*>(thread_scratch(0, static_cast<size_t>(bytes))), sizes...);
  return work;
}

template <class T>
void prefill(const AttentionArgs& a, const Dropout& dropout) {
  const int64_t B = a.q.shape[0], H = a.q.shape[1], S_q = a.q.shape[2], D = a.q.shape[3];
  const int64_t S_k = a.k.shape[2], heads = B * H;
  // About four items a thread, so that long and short ones even out.
  const int64_t threads = omp_in_parallel() ? 1 : omp_get_max_threads();
  const int64_t share = round_up(heads * S_q / (4 * threads) + 1, kStripM);
  const int64_t rows = min64(min64(share, kItemRows), round_up(S_q, kStripM));
  const int64_t parts = (S_q + rows - 1) / rows;
  parallel_items(heads * parts, rows * S_k * D / 4, [&](int64_t item) {
    // The last rows see the most keys under a causal mask: they go first.
    const int64_t i0 = (parts - 1 - item / heads) * rows, head = item % heads;
    auto work = take_scratch<Prefill<T>>(rows, D, int64_t{a.k_scale ? 1 : 0});
    work.run(a, dropout, head / H, head % H, i0, min64(rows, S_q - i0));
  });
}

// KV: what keys and values are stored as, T or int8.
template <class T, class KV>
void decode(const AttentionArgs& a, const Dropout& dropout) {
  const int64_t B = a.q.shape[0], H = a.q.shape[1], rows = a.q.shape[2], D = a.q.shape[3];
  const int64_t S_k = a.k.shape[2], heads = B * H, chunks = (S_k + kChunk - 1) / kChunk;
  const int64_t threads = omp_in_parallel() ? 1 : omp_get_max_threads();
  if (chunks <= 1 || heads % threads == 0 || heads >= 4 * threads)
    return parallel_items(heads, S_k * rows * D / 4, [&](int64_t head) {
      auto work = take_scratch<Decode<T, KV>>(rows, D);
      work.run(a, dropout, head / H, head % H);
    });

  const int64_t ldo = Decode<T, KV>::row_stride(D), size = round_up(rows * (ldo + 2), 16);
  float* partials = static_cast<float*>(
      thread_scratch(1, static_cast<size_t>(heads * chunks * size) * sizeof(float)));
  const auto partial = [&](int64_t item) {
    float* p = partials + item * size;
    return Partial{p, p + rows * ldo, p + rows * ldo + rows};
  };
  parallel_items(heads * chunks, kChunk * rows * D / 4, [&](int64_t item) {
    auto work = take_scratch<Decode<T, KV>>(rows, D);
    const int64_t head = item / chunks;
    work.load_head(a, head / H, head % H);
    work.chunk(a, dropout, head / H, head % H, item % chunks * kChunk, partial(item));
  });
  parallel_items(heads, chunks * rows * D, [&](int64_t head) {
    auto work = take_scratch<Decode<T, KV>>(rows, D);
    const LogitRule rule = logit_rule(a, head / H, head % H);
    for (int64_t c = 1; c < chunks; ++c)
      work.merge(rule, partial(head * chunks), partial(head * chunks + c));
    work.write(a, dropout, rule, head / H, head % H, partial(head * chunks));
  });
}

template <class T>
void quantize(const AttentionQuantizeArgs& a) {
  const int64_t H = a.x.shape[1], S = a.x.shape[2], D = a.x.shape[3];
  const auto at = [](const TensorView& t, int64_t b, int64_t h, int64_t s) {
    return b * t.strides[0] + h * t.strides[1] + s * t.strides[2];
  };
  parallel_ranges(a.x.shape[0] * H * S, D, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / (H * S), h = row / S % H, s = row % S;
      a.scales.as<float>()[at(a.scales, b, h, s)] = quantize_row(
          a.x.as<const T>() + at(a.x, b, h, s), D, a.rows.as<int8_t>() + at(a.rows, b, h, s));
    }
  });
}

template <class T>
void attention(const AttentionArgs& a) {
  const Dropout dropout = dropout_of(a);
  if (a.q.shape[2] > kDecodeRows<T>) prefill<T>(a, dropout);
  else if (a.k_scale) decode<T, int8_t>(a, dropout);
  else decode<T, T>(a, dropout);
}

// dq, dk and dv of all heads. A head is one item where there are many; its parts are items where
// there are few, and their shares of dq, S_q x D each, are held for some heads at a time.
template <class T>
void main_pass(const AttentionBwdArgs& a, const Dropout& dropout, float* stats) {
  using Gradients = HeadGradients<T>;
  const int64_t B = a.fwd.q.shape[0], H = a.fwd.q.shape[1], S_q = a.fwd.q.shape[2];
  const int64_t D = a.fwd.q.shape[3], S_k = a.fwd.k.shape[2], heads = B * H;
  const int64_t parts = (S_k + kPartN - 1) / kPartN, ldo = Gradients::row_stride(D);
  const int64_t threads = available_threads(), cost = S_q * min64(S_k, kPartN) * D / 2;
  if (parts == 1 || threads == 1 || heads >= 4 * threads)
    return parallel_items(heads, cost * parts, [&](int64_t head) {
      auto work = take_scratch<Gradients>(S_q, D);
      const int64_t b = head / H, h = head % H;
      const LogitRule rule = logit_rule(a.fwd, b, h);
      work.load_head(a, rule, b, h);
      work.run_part(a, rule, dropout, RowStats(stats, head, S_q), b, h, 0, work.sum);
      for (int64_t n = 1; n < parts; ++n) {
        work.run_part(a, rule, dropout, RowStats(stats, head, S_q), b, h, n, work.part);
        Gradients::add_part(rule, n, work.part, 0, S_q, ldo, work.sum);
      }
      Gradients::write_dq(a, b, h, work.sum, 0, S_q, ldo);
    });

  const int64_t wave = min64(heads, (4 * threads + parts - 1) / parts), size = S_q * ldo;
  float* shares = static_cast<float*>(
      thread_scratch(2, static_cast<size_t>(wave * parts * size) * sizeof(float)));
  const int64_t chunks = (S_q + kRowsM - 1) / kRowsM;
  for (int64_t first = 0; first < heads; first += wave) {
    const int64_t count = min64(wave, heads - first);
    parallel_items(count * parts, cost, [&](int64_t item) {
      // Under a causal mask the first parts are seen by the most queries: they go first.
      const int64_t n = item / count, head = first + item % count, b = head / H, h = head % H;
      auto work = take_scratch<Gradients>(S_q, D);
      const LogitRule rule = logit_rule(a.fwd, b, h);
      work.load_head(a, rule, b, h);
      work.run_part(a, rule, dropout, RowStats(stats, head, S_q), b, h, n,
                    shares + (item % count * parts + n) * size);
    });
    parallel_items(count * chunks, kRowsM * parts * D, [&](int64_t item) {
      const int64_t head = first + item / chunks, b = head / H, h = head % H;
      const int64_t begin = item % chunks * kRowsM, end = min64(S_q, begin + kRowsM);
      const LogitRule rule = logit_rule(a.fwd, b, h);
      float* sum = shares + item / chunks * parts * size;
      for (int64_t n = 1; n < parts; ++n)
        Gradients::add_part(rule, n, sum + n * size, begin, end, ldo, sum);
      Gradients::write_dq(a, b, h, sum, begin, end, ldo);
    });
  }
}

template <class T>
void zero_rows(const TensorView& t) {
  for (int64_t b = 0; b < t.shape[0]; ++b)
    for (int64_t h = 0; h < t.shape[1]; ++h)
      for (int64_t i = 0; i < t.shape[2]; ++i)
        for (int64_t d = 0; d < t.shape[3]; ++d)
          t.as<T>()[b * t.strides[0] + h * t.strides[1] + i * t.strides[2] + d] = T{};
}

template <class T>
void backward(const AttentionBwdArgs& a) {
  const Dropout dropout = dropout_of(a.fwd);
  const int64_t H = a.fwd.q.shape[1], S_q = a.fwd.q.shape[2], D = a.fwd.q.shape[3];
  const int64_t S_k = a.fwd.k.shape[2], heads = a.fwd.q.shape[0] * H;
  const int64_t chunks = (S_q + kRowsM - 1) / kRowsM;
  if (heads * S_q * S_k == 0) {  // no pairs: one of the sides may have elements
    zero_rows<T>(a.dq), zero_rows<T>(a.dk), zero_rows<T>(a.dv);
    if (a.dbias) a.dbias.dtype == DType::f32 ? zero_rows<float>(a.dbias) : zero_rows<T>(a.dbias);
    return;
  }
  const int64_t size = RowStats::kFloats * heads * S_q;
  float* stats =
      static_cast<float*>(thread_scratch(1, static_cast<size_t>(size + heads) * sizeof(float)));
  // Of one key the weight is 1 to the last bit, and dS is 0 only where delta is dP itself.
  const bool all_exact = !a.fwd.row_stats || a.dbias || S_q <= kDecodeRows<T> || S_k == 1;
  float* exact = stats + size;  // [heads]: a head's bits do not depend on the others
  parallel_items(heads, all_exact ? 1 : S_k * D, [&](int64_t head) {
    exact[head] = all_exact || values_in_common<T>(a, head / H, head % H) ? 1.0f : 0.0f;
  });
  parallel_items(heads * chunks, kRowsM * D * (all_exact ? S_k : 1), [&](int64_t item) {
    // The last rows see the most keys.
    const int64_t begin = (chunks - 1 - item / heads) * kRowsM, head = item % heads;
    const int64_t b = head / H, h = head % H, end = min64(S_q, begin + kRowsM);
    const RowStats to(stats, head, S_q);
    if (exact[head] == 0.0f) return RowPass<T>::of_forward(a, b, h, begin, end, to);
    take_scratch<RowPass<T>>(end - begin, D).run(a, dropout, b, h, begin, end, to);
  });
  main_pass<T>(a, dropout, stats);
  if (!a.dbias) return;
  const int64_t items = BiasPass<T>::items(a);
  parallel_items(items, heads * S_q * S_k * D / items,
                 [&](int64_t item) { take_scratch<BiasPass<T>>(D).run(a, dropout, stats, item); });
}

}  // namespace

void attention_fwd(const AttentionArgs& a) {
  if (a.q.numel() == 0) return;
  if (a.q.dtype == DType::f32) attention<float>(a);
  if (a.q.dtype == DType::bf16) attention<bf16>(a);
  if (a.q.dtype == DType::f16) attention<f16>(a);
}

void attention_quantize(const AttentionQuantizeArgs& a) {
  if (a.x.dtype == DType::f32) quantize<float>(a);
  if (a.x.dtype == DType::bf16) quantize<bf16>(a);
  if (a.x.dtype == DType::f16) quantize<f16>(a);
}

void attention_bwd(const AttentionBwdArgs& a) {
  if (a.fwd.q.dtype == DType::f32) backward<float>(a);
  if (a.fwd.q.dtype == DType::bf16) backward<bf16>(a);
  if (a.fwd.q.dtype == DType::f16) backward<f16>(a);
}

}  // namespace cgpt::CGPT_TIER
