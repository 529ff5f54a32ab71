// The decoder's step on CUDA, composed of the ops, and the three kernels that are no op: none of
// them is a function of tensors alone, they read and move the place at which the step stands.
//
// Traffic of a step: every weight once, the cache's visible keys and values once. At 111M in bf16
// that is 219 MB, 65 us at 3.35 TB/s; 8 launches a layer (9 with room for more than 128 tokens) and
// 3 more. Unmeasured.
#include "../cuda/device.cuh"
#include "../cuda/launch.h"
#include "decoder_candidate.cuh"
#include "decoder_cuda.h"

namespace cgpt {
namespace {

using namespace cuda;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Where row (b, s) of a step stands.
struct Place {
  int64_t* tokens;
  int64_t* length;
  const int64_t* padding;
  uint8_t* hidden;
  int64_t tokens_b, hidden_b, total;
  int S;

  __device__ int64_t at(int64_t b, int64_t s) const { return length[b] + s; }
};

Place place_of(const DecoderPlace& p) {
  return {p.tokens.as<int64_t>(), p.length.as<int64_t>(), p.padding.as<const int64_t>(),
          p.hidden.as<uint8_t>(), p.tokens.strides[0],    p.hidden.strides[0],
          p.tokens.shape[1],      static_cast<int>(p.S)};
}

// ---- embedding and the first layer norm ---------------------------------------------------------

template <class T, class W>
struct Embed {
  Place place;
  const T* wte;
  const T* wpe;
  const W* weight;
  const W* bias;
  T* x;
  T* y;
  int64_t wte_row, wpe_row, x_row, y_row;
  int C;
  float scale, eps;
};

// A block per row; a thread reads back only what it wrote itself, so that any width fits.
template <class T, class W, bool kAligned>
__global__ void __launch_bounds__(kThreads, 4) decoder_embed_kernel(const Embed<T, W> p) {
  constexpr int N = Vec<T>::kSize;
  float* const scratch = shared<float>();
  const int64_t row = block_x(), b = row / p.place.S, s = row % p.place.S;
  const int64_t at = p.place.at(b, s), from_first = at - p.place.padding[b];
  const T* token = p.wte + p.place.tokens[b * p.place.tokens_b + at] * p.wte_row;
  const T* position = p.wpe + (from_first > 0 ? from_first : 0) * p.wpe_row;
  T *x = p.x + row * p.x_row, *y = p.y + row * p.y_row;

  float total = 0.0f;
  for (int c = thread() * N; c < p.C; c += kThreads * N) {
    auto sum = load_part<kAligned, N>(token + c, p.C - c);
    const auto added = load_part<kAligned, N>(position + c, p.C - c);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sum[i] = from_float<T>((to_float(sum[i]) + to_float(added[i])) * p.scale);
      total += to_float(sum[i]);
    }
    store_part<kAligned>(x + c, sum, p.C - c);
  }
  const float mean = block_sum<kThreads>(total, scratch) / static_cast<float>(p.C);
  float squares = 0.0f;
  for (int c = thread() * N; c < p.C; c += kThreads * N) {
    const auto v = load_part<kAligned, N>(x + c, p.C - c);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float d = c + i < p.C ? to_float(v[i]) - mean : 0.0f;
      squares = fmaf(d, d, squares);
    }
  }
  const float rstd =
      1.0f / sqrtf(block_sum<kThreads>(squares, scratch) / static_cast<float>(p.C) + p.eps);
  for (int c = thread() * N; c < p.C; c += kThreads * N) {
    auto v = load_part<kAligned, N>(x + c, p.C - c);
    const auto weight = load_part<kAligned, N>(p.weight + c, p.C - c);
    Vec<W, N> bias{};
    if (p.bias) bias = load_part<kAligned, N>(p.bias + c, p.C - c);
#pragma unroll
    for (int i = 0; i < N; ++i)
      v[i] = from_float<T>(
          fmaf((to_float(v[i]) - mean) * rstd, to_float(weight[i]), to_float(bias[i])));
    store_part<kAligned>(y + c, v, p.C - c);
  }
  if (thread() == 0) p.place.hidden[b * p.place.hidden_b + at] = from_first < 0;
}

template <class T, class W>
void embed(const DecoderEmbedArgs& a) {
  const Embed<T, W> p{place_of(a.place),
                      a.wte.as<const T>(),
                      a.wpe.as<const T>(),
                      a.norm.weight.as<const W>(),
                      a.norm.bias.as<const W>(),
                      a.x.as<T>(),
                      a.y.as<T>(),
                      a.wte.strides[0],
                      a.wpe.strides[0],
                      a.x.strides[0],
                      a.y.strides[0],
                      static_cast<int>(a.x.shape[1]),
                      a.scale,
                      a.eps};
  const bool vectors = p.C % Vec<T>::kSize == 0 && aligned<16>(p.wte, p.wte_row) &&
                       aligned<16>(p.wpe, p.wpe_row) && aligned<16>(p.weight) &&
                       aligned<16>(p.bias) && aligned<16>(p.x, p.x_row) &&
                       aligned<16>(p.y, p.y_row);
  const Launch l{.grid_x = a.x.shape[0], .threads = kThreads, .shared = kWarps * 4, .like = a.x};
  if (vectors) launch("decoder", l, &decoder_embed_kernel<T, W, true>, p);
  else launch("decoder", l, &decoder_embed_kernel<T, W, false>, p);
}

template <class T>
void embed_weight(const DecoderEmbedArgs& a) {
  if (a.norm.weight.dtype == DType::f32) embed<T, float>(a);
  else embed<T, T>(a);
}

// ---- the cache ----------------------------------------------------------------------------------

template <class T, class KV>
struct Append {
  Place place;
  const T* qkv;
  KV* cache[2];      // keys, values: of one layer
  float* scales[2];  // of int8
  int64_t qkv_row, cache_b[2], cache_h[2], cache_s[2], scales_b[2], scales_h[2];
  int C, D;
};

// A block per row and cache. kTogether values move at once, 1 where heads or rows are not aligned.
template <class T, int kTogether>
__global__ void __launch_bounds__(kThreads) decoder_append_kernel(const Append<T, T> p) {
  const int64_t row = block_x(), b = row / p.place.S, at = p.place.at(b, row % p.place.S);
  const int which = static_cast<int>(block_y());
  const T* from = p.qkv + row * p.qkv_row + (1 + which) * p.C;
  T* to = p.cache[which] + b * p.cache_b[which] + at * p.cache_s[which];
  for (int c = thread() * kTogether; c < p.C; c += kThreads * kTogether)
    store(to + c / p.D * p.cache_h[which] + c % p.D, load<kTogether>(from + c));
}

// The same into int8, by the rule of csrc/ops/attention/int8_rows.h: a warp per head.
template <class T>
__global__ void __launch_bounds__(kThreads) decoder_append_int8_kernel(const Append<T, int8_t> p) {
  constexpr int kEach = kAttentionWidest / kWarp;
  const int64_t row = block_x(), b = row / p.place.S, at = p.place.at(b, row % p.place.S);
  const int which = static_cast<int>(block_y());
  for (int h = warp(); h < p.C / p.D; h += kWarps) {
    const T* from = p.qkv + row * p.qkv_row + (1 + which) * p.C + h * p.D;
    float x[kEach];
    int top = 0;  // as integers magnitudes order like the floats do, and NaN is the largest
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int d = lane() + i * kWarp;
      x[i] = d < p.D ? to_float(from[d]) : 0.0f;
      const int magnitude = __builtin_bit_cast(int, x[i]) & 0x7fffffff;
      top = magnitude > top ? magnitude : top;
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const int other = shuffle_xor(top, offset);
      top = other > top ? other : top;
    }
    const float extreme = __builtin_bit_cast(float, top);
    const bool finite = extreme <= 3.402823466e38f;
    // Below this the inverse would overflow; such a row counts as zero.
    const bool vanishing = extreme < 1e-30f;
    const float inverse = finite && !vanishing ? 127.0f / extreme : 0.0f;
    int8_t* to =
        p.cache[which] + b * p.cache_b[which] + h * p.cache_h[which] + at * p.cache_s[which];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      // Adding 1.5 * 2^23 rounds to the nearest integer, whose byte is then the lowest of the sum.
      const float sum = fmaf(x[i], inverse, 12582912.0f);
      const int d = lane() + i * kWarp;
      if (d < p.D) to[d] = static_cast<int8_t>(finite ? __builtin_bit_cast(int, sum) : 0);
    }
    const float scale = vanishing ? 0.0f : extreme / 127.0f;
    if (lane() == 0)
      p.scales[which][b * p.scales_b[which] + h * p.scales_h[which] + at] = finite ? scale : NAN;
  }
}

template <class T, class KV>
void append(const DecoderPlace& place, const TensorView& qkv, const DecoderCache& cache,
            int64_t layer) {
  Append<T, KV> p{};
  p.place = place_of(place);
  p.qkv = qkv.as<const T>(), p.qkv_row = qkv.strides[0];
  p.C = static_cast<int>(qkv.shape[1] / 3), p.D = static_cast<int>(cache.keys.shape[4]);
  bool vectors = p.D % Vec<T>::kSize == 0 && aligned<16>(p.qkv, p.qkv_row);
  const TensorView* rows[2] = {&cache.keys, &cache.values};
  const TensorView* scales[2] = {&cache.key_scales, &cache.value_scales};
  for (int i = 0; i < 2; ++i) {
    const int64_t* s = rows[i]->strides;
    p.cache[i] = rows[i]->as<KV>() + layer * s[0];
    p.cache_b[i] = s[1], p.cache_h[i] = s[2], p.cache_s[i] = s[3];
    for (const int64_t stride : {s[1], s[2], s[3]})
      vectors = vectors && aligned<16>(p.cache[i], stride);
    s = scales[i]->strides;
    p.scales[i] = scales[i]->as<float>() + layer * s[0];
    p.scales_b[i] = s[1], p.scales_h[i] = s[2];
  }
  const Launch l{.grid_x = qkv.shape[0], .grid_y = 2, .threads = kThreads, .like = qkv};
  if constexpr (sizeof(KV) == 1) launch("decoder", l, &decoder_append_int8_kernel<T>, p);
  else if (vectors) launch("decoder", l, &decoder_append_kernel<T, Vec<T>::kSize>, p);
  else launch("decoder", l, &decoder_append_kernel<T, 1>, p);
}

template <class T>
void append(const DecoderPlace& place, const TensorView& qkv, const DecoderCache& cache,
            int64_t layer) {
  if (cache.key_scales) append<T, int8_t>(place, qkv, cache, layer);
  else append<T, T>(place, qkv, cache, layer);
}

// ---- the greedy token ---------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads)
    decoder_choose_kernel(const Place place, const T* logits, int64_t row_stride, int V) {
  Candidate* const found = shared<Candidate>();
  const int64_t b = block_x();
  const T* row = logits + b * row_stride;
  Candidate best{-INFINITY, kNoToken};
#pragma unroll 4
  for (int v = thread(); v < V; v += kThreads) best.take({to_float(row[v]), v});
  best = best_of_warp(best);
  if (lane() == 0) found[warp()] = best;
  block_barrier();
  if (thread() != 0) return;
  for (int w = 1; w < kWarps; ++w) best.take(found[w]);
  const int64_t next = place.at(b, place.S);
  if (next < place.total) place.tokens[b * place.tokens_b + next] = best.token;
  place.length[b] = next;
}

template <class T>
void choose(const DecoderPlace& place, const TensorView& logits) {
  launch("decoder",
         {.grid_x = logits.shape[0],
          .threads = kThreads,
          .shared = kWarps * sizeof(Candidate),
          .like = logits},
         &decoder_choose_kernel<T>, place_of(place), logits.as<const T>(), logits.strides[0],
         static_cast<int>(logits.shape[1]));
}

// ---- views --------------------------------------------------------------------------------------

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

void project(const Projection& p, const TensorView& x, const TensorView& residual,
             const TensorView& y, const TensorView& unpacked,
             Activation activation = Activation::none) {
  GemmProductArgs args{x, p.weight, p.bias, residual, y, {}, activation};
  TensorView& b = args.b;
  if (p.weight) {
    if (p.weight_kn) std::swap(b.shape[0], b.shape[1]), std::swap(b.strides[0], b.strides[1]);
    return gemm_product_cuda(args);
  }
  if (x.shape[0] > kPackedCudaRows) {
    b = unpacked;
    b.ndim = 2;
    b.shape[0] = p.packed.N, b.shape[1] = p.packed.K;
    b.strides[0] = p.packed.K, b.strides[1] = 1;
  }
  packed_gemm_cuda({args, p.packed});
}

}  // namespace

void decoder_embed_cuda(const DecoderEmbedArgs& args) {
  if (args.x.dtype == DType::f32) embed<float, float>(args);
  if (args.x.dtype == DType::bf16) embed_weight<bf16>(args);
  if (args.x.dtype == DType::f16) embed_weight<f16>(args);
}

void decoder_append_cuda(const DecoderPlace& place, const TensorView& qkv,
                         const DecoderCache& cache, int64_t layer) {
  if (qkv.dtype == DType::f32) append<float>(place, qkv, cache, layer);
  if (qkv.dtype == DType::bf16) append<bf16>(place, qkv, cache, layer);
  if (qkv.dtype == DType::f16) append<f16>(place, qkv, cache, layer);
}

void decoder_choose_cuda(const DecoderPlace& place, const TensorView& logits) {
  if (logits.dtype == DType::f32) choose<float>(place, logits);
  if (logits.dtype == DType::bf16) choose<bf16>(place, logits);
  if (logits.dtype == DType::f16) choose<f16>(place, logits);
}

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
    c.require(!p.lora_b, "on CUDA weights must not be under LoRA");
  });
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
  const int64_t inner = w_.layers[0].fc.outputs();
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
  held("room", s.room, {rows, decoder_room(C, inner)}, w_.wte.dtype);
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
  const DecoderPlace place{s.tokens, s.length, s.padding, s.hidden, S};
  const TensorView x = columns_of(s.room, 0, C), y = columns_of(s.room, C, C);
  const TensorView heads = columns_of(s.room, 2 * C, C);
  const TensorView qkv = columns_of(s.room, 3 * C, 3 * C), wide = columns_of(s.room, 3 * C, inner);
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
    else decoder_embed_cuda({place, w_.wte, w_.wpe, layer.norm1, x, y, embeddings_scale_, w_.eps});
    project(layer.qkv, y, none, qkv, s.unpacked);
    decoder_append_cuda(place, qkv, s.cache, l);
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
    project(layer.proj, heads, x, x, s.unpacked);
    norm(layer.norm2, x, y);
    project(layer.fc, y, none, wide, s.unpacked, w_.activation);
    project(layer.out, wide, x, x, s.unpacked);
  }
  TensorView last = x;  // each sequence's last row
  last.data = x.as<char>() + (S - 1) * x.strides[0] * bytes_of(x.dtype);
  last.shape[0] = B;
  last.strides[0] = S * x.strides[0];
  TensorView normed = y;
  normed.shape[0] = B;
  norm(w_.norm, last, normed);
  project(w_.head, normed, none, s.logits, s.unpacked);
  decoder_choose_cuda(place, s.logits);
}

}  // namespace cgpt
