#include "decoder.h"

#include <omp.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "../cpu/scratch.h"
#include "decoder_check.h"

namespace cgpt {

// Where the threads of a step meet. It spins, whatever OMP_WAIT_POLICY says: a step has 5 meetings
// a layer, microseconds apart, and one that sleeps costs 20 to 30 us; long waits give the core
// away. Meanwhile the memory would be idle: a waiting thread asks for the `bytes` bytes at `next`,
// which it will read first once all have met.
class Barrier {
 public:
  void wait(int64_t team, const char* next, int64_t bytes) {
    const uint32_t turn = turn_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == team) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
      for (int line = 0; line < 4 && bytes > 0; ++line, next += 64, bytes -= 64)
        __builtin_prefetch(next, 0, 2);
      if (spins > kSpins) std::this_thread::yield();
#if defined(__x86_64__)
      else __builtin_ia32_pause();
#endif
    }
  }

 private:
  static constexpr int kSpins = 1000;  // about 15 us
  std::atomic<int64_t> arrived_{0};
  std::atomic<uint32_t> turn_{0};
};

// Thread `index` of a team of `count`. Alone (no barrier), the ops bring their own threads.
struct Decoder::Part {
  int64_t index = 0, count = 1;
  Barrier* barrier = nullptr;
  void wait(const Projection& next) const;
};

struct Decoder::Buffers {
  uint8_t *x, *heads, *wide, *normed;
  int64_t normed_bytes;  // one a thread
};

namespace {

// Of a product's weights, what a waiting thread asks for: a part of L2, 1 MB from Zen 4 on.
constexpr int64_t kAheadBytes = 1 << 18;

constexpr int kSlotU = 4, kSlotStep = 5;  // of thread_scratch; gemm has 0 to 3

int64_t bytes_of(DType t) { return t == DType::f32 ? 4 : t == DType::i8 ? 1 : 2; }

// A dense [rows, columns] view of memory that lasts for the step.
TensorView rows_at(void* data, int64_t rows, int64_t columns, DType dtype) {
  TensorView v;
  v.data = data;
  v.ndim = 2;
  v.shape[0] = rows, v.shape[1] = columns;
  v.strides[0] = columns, v.strides[1] = 1;
  v.dtype = dtype;
  return v;
}

// Heads [h0, h1) of the columns of x that begin at first_column, [B, h1 - h0, S, D] as attention
// reads them.
TensorView heads_of(const TensorView& x, int64_t B, int64_t h0, int64_t h1, int64_t first_column,
                    int64_t D) {
  TensorView v = x;
  const int64_t S = x.shape[0] / B, row = x.strides[0];
  v.data = static_cast<char*>(x.data) + (first_column + h0 * D) * bytes_of(x.dtype);
  v.ndim = 4;
  v.shape[0] = B, v.shape[1] = h1 - h0, v.shape[2] = S, v.shape[3] = D;
  v.strides[0] = S * row, v.strides[1] = D, v.strides[2] = row, v.strides[3] = 1;
  return v;
}

// Heads [h0, h1) of layer `l` of the cache, or of its scales, with its first `tokens` tokens.
TensorView cached(const TensorView& cache, int64_t l, int64_t tokens, int64_t h0, int64_t h1) {
  if (!cache) return {};
  TensorView v = cache;
  v.data = static_cast<char*>(cache.data) +
           (l * cache.strides[0] + h0 * cache.strides[2]) * bytes_of(cache.dtype);
  v.ndim = cache.ndim - 1;
  for (int d = 0; d < v.ndim; ++d)
    v.shape[d] = cache.shape[d + 1], v.strides[d] = cache.strides[d + 1];
  v.shape[1] = h1 - h0, v.shape[2] = tokens;
  return v;
}

// The part of a product that is this thread's: a contiguous range of panels.
void project(const Projection& p, const TensorView& x, const TensorView& residual,
             const TensorView& y, const Decoder::Part& part,
             Activation activation = Activation::none) {
  LowRankTerm low_rank;
  if (p.lora_b) {  // every thread makes all of u: it is r / N of the product
    const int64_t M = x.shape[0], rank = p.lora_a.N;
    void* u = thread_scratch(kSlotU, static_cast<size_t>(M * rank) * sizeof(float));
    low_rank = {rows_at(u, M, rank, DType::f32), p.lora_b, p.lora_scale};
    packed_gemm_fwd_cpu(PackedGemmArgs{x, p.lora_a, {}, {}, low_rank.u});
  }
  if (p.weight)
    return gemm_fwd_cpu(
        GemmArgs{x, p.weight, p.bias, residual, y, activation, p.weight_kn, low_rank});
  const int64_t panels = panel_count(p.packed.N);
  const int64_t first = panels * part.index / part.count;
  const int64_t end = panels * (part.index + 1) / part.count;
  if (first < end)
    packed_gemm_fwd_cpu(
        PackedGemmArgs{x, p.packed, p.bias, residual, y, activation, first, end - first, low_rank});
}

// Rows of `table` by number, into the dense rows of `out`.
void gather(const TensorView& table, const TensorView& index, const TensorView& out) {
  const int64_t B = index.shape[0], S = index.shape[1], bytes = bytes_of(table.dtype);
  const int64_t row = out.shape[1] * bytes;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t s = 0; s < S; ++s) {
      const int64_t i = index.as<const int64_t>()[b * index.strides[0] + s * index.strides[1]];
      std::memcpy(out.as<char>() + (b * S + s) * row,
                  table.as<const char>() + i * table.strides[0] * bytes, row);
    }
}

// The step's keys (or values), a column part of qkv, behind the `past` cached tokens.
void append(const TensorView& part, const TensorView& cache, const TensorView& scales,
            int64_t past) {
  const int64_t B = part.shape[0], H = part.shape[1], S = part.shape[2];
  if (scales) {
    TensorView rows = cache, scale = scales;
    rows.data = cache.as<int8_t>() + past * cache.strides[2], rows.shape[2] = S;
    scale.data = scales.as<float>() + past * scales.strides[2], scale.shape[2] = S;
    return attention_quantize_cpu(AttentionQuantizeArgs{part, rows, scale});
  }
  const int64_t bytes = bytes_of(part.dtype), row = part.shape[3] * bytes;
#pragma omp parallel for collapse(2) if (B * H * S * row > (1 << 18))
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t s = 0; s < S; ++s)
        std::memcpy(cache.as<char>() + (b * cache.strides[0] + h * cache.strides[1] +
                                        (past + s) * cache.strides[2]) *
                                           bytes,
                    part.as<const char>() +
                        (b * part.strides[0] + h * part.strides[1] + s * part.strides[2]) * bytes,
                    row);
}

}  // namespace

// next: whose weights this thread reads next.
void Decoder::Part::wait(const Projection& next) const {
  if (!barrier) return;
  const PackedWeight& w = next.packed;
  const int64_t panel = panel_bytes(w.format, w.K, w.group), panels = panel_count(w.N);
  const int64_t first = panels * index / count, end = panels * (index + 1) / count;
  const int64_t bytes = (end - first) * panel;
  barrier->wait(count, static_cast<const char*>(w.data) + first * panel,
                bytes < kAheadBytes ? bytes : kAheadBytes);
}

Decoder::Decoder(DecoderWeights weights) : w_(std::move(weights)) {
  decoder_weights_check(w_);
  const auto plain = [](const Projection& p) { return !p.lora_down; };
  bool packed_lora = plain(w_.head);
  for (const DecoderLayer& l : w_.layers)
    packed_lora = packed_lora && plain(l.qkv) && plain(l.proj) && plain(l.fc) && plain(l.out);
  Checker{"Decoder"}.require(packed_lora, "A of lora must be packed");
  inner_ = w_.layers[0].fc.outputs();
  all_packed_ = !w_.head.weight;
  for (const DecoderLayer& layer : w_.layers)
    for (const Projection* p : {&layer.qkv, &layer.proj, &layer.fc, &layer.out})
      all_packed_ = all_packed_ && !p->weight;
}

void Decoder::check(const DecoderStep& s) const {
  const Checker c{"Decoder"};
  const int64_t V = w_.wte.shape[0], C = w_.wte.shape[1], H = w_.heads, D = C / H;
  c.require(s.ids && s.ids.ndim == 2, "ids must have shape (B, S)");
  const int64_t B = s.ids.shape[0], S = s.ids.shape[1];
  c.require(B >= 1 && S >= 1, "ids must not be empty");
  const auto numbers = [&](const char* name, const TensorView& t, int64_t end) {
    c.tensor(name, t, {B, S});
    c.dtype(name, t, {DType::i64});
    for (int64_t b = 0; b < B; ++b)
      for (int64_t i = 0; i < S; ++i) {
        const int64_t v = t.as<const int64_t>()[b * t.strides[0] + i * t.strides[1]];
        c.require(v >= 0 && v < end, [&] {
          return std::string(name) + " must lie in [0, " + std::to_string(end) + "), got " +
                 std::to_string(v);
        });
      }
  };
  numbers("ids", s.ids, V);
  numbers("positions", s.positions, w_.wpe.shape[0]);
  const int64_t L = static_cast<int64_t>(w_.layers.size());
  c.require(s.keys && s.keys.ndim == 5, "keys must have shape (L, B, H, capacity, D)");
  const int64_t capacity = s.keys.shape[3];
  for (const auto& [name, t] : {std::pair{"keys", &s.keys}, {"values", &s.values}}) {
    c.tensor(name, *t, {L, B, H, capacity, D});
    c.dtype(name, *t, {s.key_scales ? DType::i8 : w_.wte.dtype});
    c.dense_rows(name, *t);
  }
  c.require(bool(s.key_scales) == bool(s.value_scales), "scales of keys and values come together");
  for (const auto& [name, t] :
       {std::pair{"key_scales", &s.key_scales}, {"value_scales", &s.value_scales}}) {
    if (!*t) continue;
    c.tensor(name, *t, {L, B, H, capacity});
    c.dtype(name, *t, {DType::f32});
    c.dense_rows(name, *t);
  }
  c.require(s.past >= 0 && s.past + S <= capacity, [&] {
    return "the cache holds " + std::to_string(capacity) + " tokens, got " +
           std::to_string(s.past) + " and " + std::to_string(S) + " new ones";
  });
  if (s.padding) {
    c.tensor("padding", s.padding, {B, s.past + S});
    c.dtype("padding", s.padding, {DType::boolean});
  }
  c.tensor("logits", s.logits, {B, V});
  if (w_.head.weight) c.dtype("logits", s.logits, {w_.wte.dtype});
  else c.dtype("logits", s.logits, {w_.wte.dtype, DType::f32});
  c.dense_rows("logits", s.logits);
}

void Decoder::step(const DecoderStep& s) const {
  check(s);
  const int64_t M = s.ids.shape[0] * s.ids.shape[1], C = w_.wte.shape[1];
  // q, k, v, or the MLP's inner values, or at the start the rows of wte and wpe
  const int64_t wide = inner_ > 3 * C ? inner_ : 3 * C;
  const int64_t team =
      all_packed_ && M <= kTeamRows && !omp_in_parallel() ? omp_get_max_threads() : 1;
  const int64_t line = 64, element = bytes_of(w_.wte.dtype);
  const auto bytes = [&](int64_t columns) {
    return (M * columns * element + line - 1) / line * line;
  };
  const auto needed = static_cast<size_t>((2 + team) * bytes(C) + bytes(wide));
  auto* at = static_cast<uint8_t*>(thread_scratch(kSlotStep, needed));
  Buffers b;
  b.x = at, b.heads = at += bytes(C), b.wide = at += bytes(C), b.normed = at + bytes(wide);
  b.normed_bytes = bytes(C);
  if (team == 1) return run(s, b, {});
  Barrier barrier;
#pragma omp parallel num_threads(static_cast<int>(team))
  {
    const Part part{omp_get_thread_num(), omp_get_num_threads(), &barrier};
    run(s, b, part);
  }
}

void Decoder::run(const DecoderStep& s, const Buffers& buffers, const Part& part) const {
  const int64_t B = s.ids.shape[0], S = s.ids.shape[1], M = B * S, T = s.past + S;
  const int64_t C = w_.wte.shape[1], H = w_.heads, D = C / H;
  const DType dtype = w_.wte.dtype;
  const int64_t element = bytes_of(dtype);
  const TensorView x = rows_at(buffers.x, M, C, dtype);  // the residual stream
  const TensorView heads = rows_at(buffers.heads, M, C, dtype);
  const TensorView qkv = rows_at(buffers.wide, M, 3 * C, dtype);
  const TensorView inner = rows_at(buffers.wide, M, inner_, dtype);
  // A thread of a team normalises all rows for itself: cheaper than to wait for others' rows.
  const TensorView y = rows_at(buffers.normed + part.index * buffers.normed_bytes, M, C, dtype);
  const TensorView none;
  const auto norm = [&](const NormWeights& n, const TensorView& from, const TensorView& to) {
    layer_norm_fwd_cpu(LayerNormArgs{from, none, n.weight, n.bias, to, none, none, none, w_.eps});
  };

  if (part.index == 0) {
    const TensorView tokens = rows_at(buffers.wide, M, C, dtype);
    const TensorView places = rows_at(buffers.wide + M * C * element, M, C, dtype);
    gather(w_.wte, s.ids, tokens);
    gather(w_.wpe, s.positions, places);
    const NormWeights& n = w_.layers[0].norm1;  // only the sum is kept
    layer_norm_fwd_cpu(LayerNormArgs{tokens, places, n.weight, n.bias, y, x, none, none, w_.eps});
  }
  part.wait(w_.layers[0].qkv);
  const int64_t h0 = H * part.index / part.count, h1 = H * (part.index + 1) / part.count;
  for (size_t l = 0; l < w_.layers.size(); ++l) {
    const DecoderLayer& layer = w_.layers[l];
    norm(layer.norm1, x, y);
    project(layer.qkv, y, none, qkv, part);
    part.wait(layer.proj);
    if (h0 < h1) {
      const auto index = static_cast<int64_t>(l);
      const TensorView keys = cached(s.keys, index, T, h0, h1);
      const TensorView values = cached(s.values, index, T, h0, h1);
      AttentionArgs a{};
      a.k_scale = cached(s.key_scales, index, T, h0, h1);
      a.v_scale = cached(s.value_scales, index, T, h0, h1);
      append(heads_of(qkv, B, h0, h1, C, D), keys, a.k_scale, s.past);
      append(heads_of(qkv, B, h0, h1, 2 * C, D), values, a.v_scale, s.past);
      a.q = heads_of(qkv, B, h0, h1, 0, D);
      a.k = keys, a.v = values;
      a.key_padding_mask = s.padding;
      a.out = heads_of(heads, B, h0, h1, 0, D);
      a.scale = layer.attention_scale;
      a.causal = true;
      attention_fwd_cpu(a);
    }
    part.wait(layer.proj);
    project(layer.proj, heads, x, x, part);
    part.wait(layer.fc);
    norm(layer.norm2, x, y);
    project(layer.fc, y, none, inner, part, w_.activation);
    part.wait(layer.out);
    project(layer.out, inner, x, x, part);
    part.wait(l + 1 < w_.layers.size() ? w_.layers[l + 1].qkv : w_.head);
  }

  TensorView last = x;  // each sequence's last row
  last.data = x.as<char>() + (S - 1) * C * element;
  last.shape[0] = B;
  last.strides[0] = S * C;
  const TensorView normed = rows_at(y.data, B, C, dtype);
  norm(w_.norm, last, normed);
  project(w_.head, normed, none, s.logits, part);
}

}  // namespace cgpt
