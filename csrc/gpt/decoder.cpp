#include "decoder.h"

#include <cstring>

namespace cgpt {
namespace {

int64_t bytes_of(DType t) { return t == DType::f32 ? 4 : 2; }

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

// [rows, parts * columns] -> its `part`, [B, H, S, D] as attention reads it.
TensorView heads_of(const TensorView& x, int64_t B, int64_t H, int64_t first_column, int64_t D) {
  TensorView v = x;
  const int64_t S = x.shape[0] / B, row = x.strides[0];
  v.data = static_cast<char*>(x.data) + first_column * bytes_of(x.dtype);
  v.ndim = 4;
  v.shape[0] = B, v.shape[1] = H, v.shape[2] = S, v.shape[3] = D;
  v.strides[0] = S * row, v.strides[1] = D, v.strides[2] = row, v.strides[3] = 1;
  return v;
}

// Layer `l` of the cache with its first `tokens` tokens, [B, H, tokens, D].
TensorView cached(const TensorView& cache, int64_t l, int64_t tokens) {
  TensorView v = cache;
  v.data = static_cast<char*>(cache.data) + l * cache.strides[0] * bytes_of(cache.dtype);
  v.ndim = 4;
  for (int d = 0; d < 4; ++d) v.shape[d] = cache.shape[d + 1], v.strides[d] = cache.strides[d + 1];
  v.shape[2] = tokens;
  return v;
}

void project(const Projection& p, const TensorView& x, const TensorView& residual,
             const TensorView& y, Activation activation = Activation::none) {
  if (p.weight) gemm_fwd_cpu(GemmArgs{x, p.weight, p.bias, residual, y, activation, p.weight_kn});
  else packed_gemm_fwd_cpu(PackedGemmArgs{x, p.packed, p.bias, residual, y, activation});
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
void append(const TensorView& part, const TensorView& cache, int64_t past) {
  const int64_t B = part.shape[0], H = part.shape[1], S = part.shape[2];
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

void check_norm(const Checker& c, const char* name, const NormWeights& n, int64_t C, DType T) {
  c.tensor(name, n.weight, {C});
  c.dtype(name, n.weight, {T, DType::f32});
  c.dense_rows(name, n.weight);
  if (!n.bias) return;
  c.tensor(name, n.bias, {C});
  c.dtype(name, n.bias, {n.weight.dtype});
  c.dense_rows(name, n.bias);
}

void check_projection(const Checker& c, const char* name, const Projection& p, int64_t N, int64_t K,
                      DType T) {
  c.require(p.outputs() == N && p.inputs() == K, [&] {
    return std::string(name) + " must map " + std::to_string(K) + " to " + std::to_string(N) +
           " features, got " + std::to_string(p.inputs()) + " to " + std::to_string(p.outputs());
  });
  if (p.weight) {
    c.dtype(name, p.weight, {T});
    c.dense_rows(name, p.weight);
  }
  if (!p.bias) return;
  c.tensor(name, p.bias, {N});
  c.dtype(name, p.bias, {T, DType::f32});
  c.dense_rows(name, p.bias);
}

}  // namespace

Decoder::Decoder(DecoderWeights weights) : w_(std::move(weights)) {
  const Checker c{"Decoder"};
  c.require(w_.wte && w_.wte.ndim == 2, "wte must have shape (V, C)");
  c.require(w_.wpe && w_.wpe.ndim == 2, "wpe must have shape (positions, C)");
  const int64_t V = w_.wte.shape[0], C = w_.wte.shape[1];
  const DType T = w_.wte.dtype;
  c.floating("wte", w_.wte);
  c.dtype("wpe", w_.wpe, {T});
  c.tensor("wpe", w_.wpe, {w_.wpe.shape[0], C});
  c.dense_rows("wte", w_.wte);
  c.dense_rows("wpe", w_.wpe);
  c.require(!w_.layers.empty(), "layers must not be empty");
  c.require(w_.heads >= 1 && C % w_.heads == 0, [&] {
    return "heads must divide the width " + std::to_string(C) + ", got " + std::to_string(w_.heads);
  });
  inner_ = w_.layers[0].fc.outputs();
  for (const DecoderLayer& layer : w_.layers) {
    check_norm(c, "norm1", layer.norm1, C, T);
    check_projection(c, "qkv", layer.qkv, 3 * C, C, T);
    check_projection(c, "proj", layer.proj, C, C, T);
    check_norm(c, "norm2", layer.norm2, C, T);
    check_projection(c, "fc", layer.fc, inner_, C, T);
    check_projection(c, "out", layer.out, C, inner_, T);
  }
  check_norm(c, "norm", w_.norm, C, T);
  check_projection(c, "head", w_.head, V, C, T);
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
    c.dtype(name, *t, {w_.wte.dtype});
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

void Decoder::step(const DecoderStep& s) {
  check(s);
  const int64_t B = s.ids.shape[0], S = s.ids.shape[1], M = B * S, T = s.past + S;
  const int64_t C = w_.wte.shape[1], H = w_.heads, D = C / H;
  const DType dtype = w_.wte.dtype;

  // x: the residual stream. y: what a norm or the heads give. wide: q, k, v, or the MLP's inner
  // values, or at the start the rows of wte and wpe.
  const int64_t wide_columns = inner_ > 3 * C ? inner_ : 3 * C;
  const int64_t element = bytes_of(dtype), line = 64;
  const auto padded = [&](int64_t columns) {
    return (M * columns * element + line - 1) / line * line;
  };
  const size_t needed = static_cast<size_t>(2 * padded(C) + padded(wide_columns) + line);
  if (buffer_.size() < needed) buffer_.resize(needed);
  auto* at = buffer_.data();
  at += (line - reinterpret_cast<uintptr_t>(at) % line) % line;
  const TensorView x = rows_at(at, M, C, dtype);
  const TensorView y = rows_at(at += padded(C), M, C, dtype);
  auto* wide = at += padded(C);
  const TensorView qkv = rows_at(wide, M, 3 * C, dtype);
  const TensorView inner = rows_at(wide, M, inner_, dtype);
  const TensorView tokens = rows_at(wide, M, C, dtype);
  const TensorView places = rows_at(wide + M * C * element, M, C, dtype);
  const TensorView none;

  gather(w_.wte, s.ids, tokens);
  gather(w_.wpe, s.positions, places);
  for (size_t l = 0; l < w_.layers.size(); ++l) {
    const DecoderLayer& layer = w_.layers[l];
    const auto norm = [&](const NormWeights& n) {
      layer_norm_fwd_cpu(LayerNormArgs{x, none, n.weight, n.bias, y, none, none, none, w_.eps});
    };
    if (l == 0)
      layer_norm_fwd_cpu(LayerNormArgs{tokens, places, layer.norm1.weight, layer.norm1.bias, y, x,
                                       none, none, w_.eps});
    else norm(layer.norm1);
    project(layer.qkv, y, none, qkv);
    const auto index = static_cast<int64_t>(l);
    append(heads_of(qkv, B, H, C, D), cached(s.keys, index, T), s.past);
    append(heads_of(qkv, B, H, 2 * C, D), cached(s.values, index, T), s.past);
    AttentionArgs a{};
    a.q = heads_of(qkv, B, H, 0, D);
    a.k = cached(s.keys, index, T), a.v = cached(s.values, index, T);
    a.key_padding_mask = s.padding;
    a.out = heads_of(y, B, H, 0, D);
    a.scale = layer.attention_scale;
    a.causal = true;
    attention_fwd_cpu(a);
    project(layer.proj, y, x, x);
    norm(layer.norm2);
    project(layer.fc, y, none, inner, w_.activation);
    project(layer.out, inner, x, x);
  }

  // Each sequence's last row; the first B rows of y are free.
  TensorView last = x;
  last.data = x.as<char>() + (S - 1) * C * element;
  last.shape[0] = B;
  last.strides[0] = S * C;
  const TensorView normed = rows_at(y.data, B, C, dtype);
  layer_norm_fwd_cpu(
      LayerNormArgs{last, none, w_.norm.weight, w_.norm.bias, normed, none, none, none, w_.eps});
  project(w_.head, normed, none, s.logits);
}

}  // namespace cgpt
