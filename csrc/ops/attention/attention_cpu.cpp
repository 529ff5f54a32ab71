// Attention on CPU: which of the two ways (prefill.h, decode.h), and the work over threads.
#include "../../cpu/parallel.h"
#include "decode.h"
#include "prefill.h"

namespace cgpt::CGPT_TIER {
namespace {

template <class S>
S take_scratch(int64_t rows, int64_t D) {
  S work;
  const int64_t bytes = work.carve(nullptr, rows, D);
  work.carve(static_cast<char*>(thread_scratch(0, static_cast<size_t>(bytes))), rows, D);
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
    auto work = take_scratch<Prefill<T>>(rows, D);
    work.run(a, dropout, head / H, head % H, i0, min64(rows, S_q - i0));
  });
}

template <class T>
void decode(const AttentionArgs& a, const Dropout& dropout) {
  const int64_t B = a.q.shape[0], H = a.q.shape[1], rows = a.q.shape[2], D = a.q.shape[3];
  const int64_t S_k = a.k.shape[2], heads = B * H, chunks = (S_k + kChunk - 1) / kChunk;
  const int64_t threads = omp_in_parallel() ? 1 : omp_get_max_threads();
  if (chunks <= 1 || heads % threads == 0 || heads >= 4 * threads)
    return parallel_items(heads, S_k * rows * D / 4, [&](int64_t head) {
      auto work = take_scratch<Decode<T>>(rows, D);
      work.run(a, dropout, head / H, head % H);
    });

  const int64_t ldo = Decode<T>::row_stride(D), size = round_up(rows * (ldo + 2), 16);
  float* partials = static_cast<float*>(
      thread_scratch(1, static_cast<size_t>(heads * chunks * size) * sizeof(float)));
  const auto partial = [&](int64_t item) {
    float* p = partials + item * size;
    return Partial{p, p + rows * ldo, p + rows * ldo + rows};
  };
  parallel_items(heads * chunks, kChunk * rows * D / 4, [&](int64_t item) {
    auto work = take_scratch<Decode<T>>(rows, D);
    const int64_t head = item / chunks;
    work.load_head(a, head / H, head % H);
    work.chunk(a, dropout, head / H, head % H, item % chunks * kChunk, partial(item));
  });
  parallel_items(heads, chunks * rows * D, [&](int64_t head) {
    auto work = take_scratch<Decode<T>>(rows, D);
    const LogitRule rule = logit_rule(a, head / H, head % H);
    for (int64_t c = 1; c < chunks; ++c)
      work.merge(rule, partial(head * chunks), partial(head * chunks + c));
    work.write(a, dropout, rule, head / H, head % H, partial(head * chunks));
  });
}

template <class T>
void attention(const AttentionArgs& a) {
  const Dropout dropout = dropout_of(a);
  if (a.q.shape[2] <= kDecodeRows<T>) decode<T>(a, dropout);
  else prefill<T>(a, dropout);
}

}  // namespace

void attention_fwd(const AttentionArgs& a) {
  if (a.q.numel() == 0) return;
  if (a.q.dtype == DType::f32) attention<float>(a);
  if (a.q.dtype == DType::bf16) attention<bf16>(a);
  if (a.q.dtype == DType::f16) attention<f16>(a);
}

}  // namespace cgpt::CGPT_TIER
