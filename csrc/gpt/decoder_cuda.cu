// The decoder's step on CUDA, composed of the ops and of what is no op (decoder_kernels.cuh).
//
// Traffic of a step: every weight once, the cache's visible keys and values once. At 111M in bf16
// that is 219 MB, 65 us at 3.35 TB/s; 8 launches a layer (9 with room for more than 128 tokens) and
// 3 more; LoRA adds 2 to a product, 3 to one with an activation. Unmeasured.
#include "decoder_cuda.h"
#include "decoder_kernels.cuh"

namespace cgpt {
namespace {

int64_t bytes_of(DType t) { return t == DType::f32 ? 4 : t == DType::i8 ? 1 : 2; }

// Columns [first, first + count) of a matrix.
TensorView columns_of(const TensorView& x, int64_t first, int64_t count) {
  TensorView v = x;
  v.data = x.as<char>() + first * bytes_of(x.dtype);
  v.shape[1] = count;
  return v;
}

// The heads in D * H columns of x [B * S, ...], [B, H, S, D].
TensorView heads_of(const TensorView& x, int64_t B, int64_t D) {
  TensorView v = x;
  const int64_t S = x.shape[0] / B, row = x.strides[0];
  v.ndim = 4;
  v.shape[0] = B, v.shape[1] = x.shape[1] / D, v.shape[2] = S, v.shape[3] = D;
  v.strides[0] = S * row, v.strides[1] = D, v.strides[2] = row, v.strides[3] = 1;
  return v;
}

// Layer `l` of the cache, or of its scales, with its first `tokens` tokens.
TensorView cached(const TensorView& cache, int64_t l, int64_t tokens) {
  if (!cache) return {};
  TensorView v = cache;
  v.data = cache.as<char>() + l * cache.strides[0] * bytes_of(cache.dtype);
  v.ndim = cache.ndim - 1;
  for (int d = 0; d < v.ndim; ++d)
    v.shape[d] = cache.shape[d + 1], v.strides[d] = cache.strides[d + 1];
  v.shape[2] = tokens;
  return v;
}

template <class F>
void for_each(const DecoderWeights& w, F&& f) {
  for (const DecoderLayer& l : w.layers)
    for (const Projection* p : {&l.qkv, &l.proj, &l.fc, &l.out}) f(*p);
  f(w.head);
}

// Columns of the room that hold q k v or the MLP's inner values.
int64_t work_columns(const DecoderWeights& w) {
  const int64_t C = w.wte.shape[1], inner = w.layers[0].fc.outputs();
  return inner > 3 * C ? inner : 3 * C;
}

// x A^T of LoRA goes to `low`, from its first column on.
struct Memory {
  TensorView unpacked, low;
};

// Under LoRA y is (residual + u B^T) + x W^T, and the activation comes last: each in a launch of
// its own, with y rounded between them as eager rounds its own steps.
void project(const Projection& p, const TensorView& x, const TensorView& residual,
             const TensorView& y, const Memory& memory, Activation activation = Activation::none) {
  GemmProductArgs args{x, p.weight, p.bias, residual, y, {}, activation};
  if (p.lora_b) {
    TensorView u = memory.low;
    u.shape[0] = x.shape[0], u.shape[1] = p.rank();
    gemm_product_cuda({x, p.lora_down, {}, {}, u, {}});
    gemm_product_cuda({u, p.lora_b, {}, residual, y, {}});
    args.residual = y, args.activation = Activation::none;
  }
  TensorView& b = args.b;
  if (p.weight) {
    if (p.weight_kn) std::swap(b.shape[0], b.shape[1]), std::swap(b.strides[0], b.strides[1]);
    gemm_product_cuda(args);
  } else {
    if (x.shape[0] > kPackedCudaRows) {
      b = memory.unpacked;
      b.ndim = 2;
      b.shape[0] = p.packed.N, b.shape[1] = p.packed.K;
      b.strides[0] = p.packed.K, b.strides[1] = 1;
    }
    packed_gemm_cuda({args, p.packed});
  }
  if (args.activation != activation)
    with_type(y.dtype, [&]<class T>() { activate_rows<T>(y, activation); });
}

void embed(const DecoderEmbedArgs& a) {
  with_type(a.x.dtype, [&]<class T>() {
    if (a.norm.weight.dtype == DType::f32) embed<T, float>(a);
    else if constexpr (sizeof(T) == 2) embed<T, T>(a);
  });
}

}  // namespace

CudaDecoder::CudaDecoder(DecoderWeights weights, float embeddings_scale, Device device)
    : w_(std::move(weights)), embeddings_scale_(embeddings_scale), device_(device) {
  decoder_weights_check(w_, device_);
  const Checker c{"Decoder", device_};
  c.require(w_.wte.shape[1] / w_.heads <= kAttentionWidest, "heads must be at most 256 wide");
  for_each(w_, [&](const Projection& p) {
    const WeightFormat f = p.packed.format;
    c.require(p.weight || f == WeightFormat::int8 || f == WeightFormat::int4,
              "on CUDA a packed weight must be int8 or int4");
    c.require(p.weight || w_.wte.dtype != DType::f32,
              "on CUDA packed weights need embeddings in bf16 or fp16, got float32");
    c.require(p.weight || aligned<16>(static_cast<const char*>(p.packed.data)),
              "packed weights must be aligned to 16 bytes");
    c.require(!p.lora_b || p.lora_down, "on CUDA A of lora must be a plain tensor");
  });
}

int64_t CudaDecoder::room() const {
  const int64_t C = w_.wte.shape[1];
  int64_t rank = 0;
  for_each(w_, [&](const Projection& p) {
    if (p.lora_b && p.rank() > rank) rank = p.rank();
  });
  return work_columns(w_) + 3 * C + (rank + 7) / 8 * 8;  // rows stay aligned
}

int64_t CudaDecoder::unpacked(int64_t rows, int64_t B) const {
  int64_t most = 0;
  for_each(w_, [&](const Projection& p) {
    const int64_t count = p.weight ? 0 : p.packed.N * p.packed.K;
    if ((&p == &w_.head ? B : rows) > kPackedCudaRows && count > most) most = count;
  });
  return most;
}

void CudaDecoder::check(const CudaDecoderStep& s) const {
  const Checker c{"Decoder", device_};
  const int64_t V = w_.wte.shape[0], C = w_.wte.shape[1], H = w_.heads, D = C / H;
  const int64_t L = static_cast<int64_t>(w_.layers.size());
  c.require(s.tokens && s.tokens.ndim == 2 && s.tokens.numel() > 0,
            "tokens must have shape (B, total)");
  c.require(s.room && s.room.ndim == 2, "room must have 2 dimensions");
  const int64_t B = s.tokens.shape[0], total = s.tokens.shape[1], rows = s.room.shape[0];
  const auto held = [&](const char* name, const TensorView& t, std::initializer_list<int64_t> shape,
                        DType dtype) {
    c.tensor(name, t, shape);
    c.dtype(name, t, {dtype});
    c.dense_rows(name, t);
  };
  held("tokens", s.tokens, {B, total}, DType::i64);
  held("length", s.length, {B}, DType::i64);
  held("padding", s.padding, {B}, DType::i64);
  held("hidden", s.hidden, {B, total}, DType::boolean);
  const DecoderCache& cache = s.cache;
  const DType stored = cache.key_scales ? DType::i8 : w_.wte.dtype;
  held("keys", cache.keys, {L, B, H, total, D}, stored);
  held("values", cache.values, {L, B, H, total, D}, stored);
  c.require(bool(cache.key_scales) == bool(cache.value_scales),
            "scales of keys and values come together");
  if (cache.key_scales) {
    held("key_scales", cache.key_scales, {L, B, H, total}, DType::f32);
    held("value_scales", cache.value_scales, {L, B, H, total}, DType::f32);
  }
  held("room", s.room, {rows, room()}, w_.wte.dtype);
  c.require(rows > 0 && rows % B == 0 && rows / B <= total, [&] {
    return "room must have B * S rows, B = " + std::to_string(B) + " and S up to " +
           std::to_string(total) + ", got " + std::to_string(rows);
  });
  held("unpacked", s.unpacked, {unpacked(rows, B)}, w_.wte.dtype);
  held("attention", s.attention, {B * H * attention_work(1, total, D)}, DType::f32);
  held("logits", s.logits, {B, V}, w_.wte.dtype);
}

bool CudaDecoder::at_once_fits(int64_t B) const { return decoder_persistent_fits(w_, B); }

void CudaDecoder::step_at_once(const CudaDecoderStep& s, const TensorView& state) const {
  check(s);
  const Checker c{"Decoder", device_};
  const int64_t B = s.tokens.shape[0], total = s.tokens.shape[1];
  c.require(decoder_persistent_fits(w_, B),
            "one launch takes up to 4 sequences, 48 layers, dense weights [N, K] and widths that "
            "are multiples of 8");
  c.require(s.room.shape[0] == B, "one launch takes one token of each sequence");
  c.require(!s.cache.key_scales, "one launch keeps keys and values in the model's dtype");
  for (const auto& [name, t] :
       {std::pair{"keys", &s.cache.keys}, {"values", &s.cache.values}, {"logits", &s.logits}})
    c.require(flat_of(*t).ndim == 1 && aligned<16>(t->as<char>()),
              [&, name = name] { return std::string(name) + " must be dense"; });
  for (const TensorView* t : {&s.tokens, &s.hidden})
    c.require(flat_of(*t).ndim == 1, "tokens and hidden must be dense");
  c.require(aligned<16>(s.room.as<char>()), "room must be aligned to 16 bytes");
  const int64_t C = w_.wte.shape[1];
  c.tensor("state", state, {decoder_persistent_state(B, w_.heads, total, C / w_.heads)});
  c.dtype("state", state, {DType::i32});
  c.dense_rows("state", state);
  decoder_persistent_cuda({w_, s, state, embeddings_scale_});
}

void CudaDecoder::step(const CudaDecoderStep& s) const {
  check(s);
  const int64_t B = s.tokens.shape[0], S = s.room.shape[0] / B, C = w_.wte.shape[1];
  const int64_t D = C / w_.heads, inner = w_.layers[0].fc.outputs();
  const int64_t L = static_cast<int64_t>(w_.layers.size());
  const DType dtype = w_.wte.dtype;
  const DecoderPlace place{s.tokens, s.length, s.padding, s.hidden, S};
  const TensorView x = columns_of(s.room, 0, C), y = columns_of(s.room, C, C);
  const TensorView heads = columns_of(s.room, 2 * C, C);
  const TensorView qkv = columns_of(s.room, 3 * C, 3 * C), wide = columns_of(s.room, 3 * C, inner);
  const Memory memory{s.unpacked, columns_of(s.room, 3 * C + work_columns(w_), 0)};
  const TensorView none;
  const auto norm = [&](const NormWeights& n, const TensorView& from, const TensorView& to) {
    layer_norm_fwd_cuda(LayerNormArgs{from, none, n.weight, n.bias, to, none, none, none, w_.eps});
  };
  // One token sees the whole room, of which `hidden` shows what is written: its call is the same at
  // every step. Keys that are hidden are not read.
  const int64_t visible = S == 1 ? s.tokens.shape[1] : S;
  TensorView hidden = s.hidden;
  hidden.shape[1] = visible;

  for (int64_t l = 0; l < L; ++l) {
    const DecoderLayer& layer = w_.layers[static_cast<size_t>(l)];
    if (l > 0) norm(layer.norm1, x, y);
    else embed({place, w_.wte, w_.wpe, layer.norm1, x, y, embeddings_scale_, w_.eps});
    project(layer.qkv, y, none, qkv, memory);
    with_type(dtype, [&]<class T>() { append<T>(place, qkv, s.cache, l); });
    AttentionArgs a{};
    a.q = heads_of(columns_of(qkv, 0, C), B, D);
    if (S == 1 || !s.cache.key_scales) {
      a.k = cached(s.cache.keys, l, visible), a.v = cached(s.cache.values, l, visible);
      a.k_scale = cached(s.cache.key_scales, l, visible);
      a.v_scale = cached(s.cache.value_scales, l, visible);
    } else {  // a prompt reads its own keys and values, before they were rounded to int8
      a.k = heads_of(columns_of(qkv, C, C), B, D);
      a.v = heads_of(columns_of(qkv, 2 * C, C), B, D);
    }
    a.key_padding_mask = hidden;
    a.out = heads_of(heads, B, D);
    a.scale = layer.attention_scale;
    a.causal = S > 1;
    attention_fwd_cuda(a, s.attention.as<float>());
    project(layer.proj, heads, x, x, memory);
    norm(layer.norm2, x, y);
    project(layer.fc, y, none, wide, memory, w_.activation);
    project(layer.out, wide, x, x, memory);
  }
  TensorView last = x;  // each sequence's last row
  last.data = x.as<char>() + (S - 1) * x.strides[0] * bytes_of(x.dtype);
  last.shape[0] = B;
  last.strides[0] = S * x.strides[0];
  TensorView normed = y;
  normed.shape[0] = B;
  norm(w_.norm, last, normed);
  project(w_.head, normed, none, s.logits, memory);
  with_type(dtype, [&]<class T>() { choose<T>(place, s.logits); });
}

}  // namespace cgpt
