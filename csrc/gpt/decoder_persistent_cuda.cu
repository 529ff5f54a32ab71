// The launch of the persistent kernel (decoder_persistent.cuh), and what it can take.
#include "../cuda/launch.h"
#include "decoder_cuda.h"
#include "decoder_persistent.cuh"

namespace cgpt {
namespace {

constexpr int64_t kMostShared = 163 * 1024;  // of a block, on sm_80 and sm_90

int64_t most_chunks(int64_t total) { return (total + kChunk - 1) / kChunk; }

template <class T, int kRows>
int64_t shared_bytes(const DecoderWeights& w) {
  const int64_t C = w.wte.shape[1], inner = w.layers[0].fc.outputs();
  return static_cast<int64_t>(sizeof(PersistentShared<T, kRows>)) +
         kRows * (inner > C ? inner : C) * static_cast<int64_t>(sizeof(T));
}

int64_t shared_bytes(const DecoderWeights& w, int64_t B) {
  if (w.wte.dtype == DType::f32)
    return B == 1 ? shared_bytes<float, 1>(w) : shared_bytes<float, kPersistentRows>(w);
  return B == 1 ? shared_bytes<bf16, 1>(w) : shared_bytes<bf16, kPersistentRows>(w);
}

bool aligned_or_none(const TensorView& v) { return !v || aligned<16>(v.as<char>()); }

template <class T, int kRows>
void step(const DecoderPersistentArgs& a) {
  const DecoderWeights& w = a.weights;
  const CudaDecoderStep& s = a.step;
  Persistent<T> p{};
  int phase = 0, norm = 0;
  const auto weight = [&](const Projection& of) {
    p.weight[phase] = of.weight.as<const T>();
    p.bias[phase++] = of.bias ? of.bias.data : nullptr;
    if (of.bias) p.bias_f32 = of.bias.dtype == DType::f32;
  };
  const auto parameters = [&](const NormWeights& of) {
    p.norm_weight[norm] = of.weight.data;
    p.norm_bias[norm++] = of.bias ? of.bias.data : nullptr;
  };
  for (const DecoderLayer& layer : w.layers) {
    p.attention_scale[p.L++] = layer.attention_scale;
    parameters(layer.norm1), parameters(layer.norm2);
    weight(layer.qkv), weight(layer.proj), weight(layer.fc), weight(layer.out);
  }
  weight(w.head), parameters(w.norm);
  p.norm_f32 = w.layers[0].norm1.weight.dtype == DType::f32;
  p.last_norm_f32 = w.norm.weight.dtype == DType::f32;
  p.wte = w.wte.as<const T>(), p.wte_row = w.wte.strides[0];
  p.wpe = w.wpe.as<const T>(), p.wpe_row = w.wpe.strides[0];
  p.tokens = s.tokens.as<int64_t>(), p.length = s.length.as<int64_t>();
  p.padding = s.padding.as<const int64_t>(), p.hidden = s.hidden.as<uint8_t>();
  p.total = s.tokens.shape[1];
  p.keys = s.cache.keys.as<T>(), p.values = s.cache.values.as<T>(), p.logits = s.logits.as<T>();
  p.B = static_cast<int>(s.tokens.shape[0]), p.C = static_cast<int>(w.wte.shape[1]);
  p.H = static_cast<int>(w.heads), p.D = p.C / p.H, p.lanes = lanes_of(p.D),
  p.V = static_cast<int>(w.wte.shape[0]);
  p.widest = static_cast<int>(w.layers[0].fc.outputs());
  p.x = s.room.as<T>(), p.heads = p.x + 2 * p.C, p.row = s.room.strides[0];
  p.q = p.inner = p.x + 3 * p.C;  // q is read before fc writes
  p.eps = w.eps, p.embeddings_scale = a.embeddings_scale, p.activation = w.activation;
  p.most_chunks = static_cast<int>(most_chunks(p.total));
  int32_t* state = a.state.as<int32_t>();
  p.meeting = reinterpret_cast<unsigned*>(state), state += 2;
  p.arrived = state, state += p.B * p.H;
  p.best = reinterpret_cast<Candidate*>(state), state += 2 * kPersistentBlocks * kPersistentRows;
  p.parts = reinterpret_cast<float*>(state);

  const auto kernel = &decoder_persistent_kernel<T, kRows>;
  Launch l{.threads = kThreads,
           .shared = shared_bytes<T, kRows>(w),
           .like = s.room,
           .cooperative = true};
  l.grid_x = most_blocks("decoder", l, kernel);
  if (l.grid_x > kPersistentBlocks) l.grid_x = kPersistentBlocks;
  if (l.grid_x == 0) fail("decoder: one launch takes more shared memory than this GPU has");
  launch("decoder", l, kernel, p);
}

template <class T>
void step_rows(const DecoderPersistentArgs& a) {
  if (a.step.tokens.shape[0] == 1) step<T, 1>(a);
  else step<T, kPersistentRows>(a);
}

}  // namespace

bool decoder_persistent_fits(const DecoderWeights& w, int64_t B) {
  const int64_t C = w.wte.shape[1], D = C / w.heads, inner = w.layers[0].fc.outputs();
  const DType T = w.wte.dtype, norm = w.layers[0].norm1.weight.dtype;
  bool fits = B <= kPersistentRows && static_cast<int64_t>(w.layers.size()) <= kMostLayers &&
              D % kLaneValues == 0 && inner % 8 == 0 && w.wte.strides[0] % 8 == 0 &&
              w.wpe.strides[0] % 8 == 0 && aligned_or_none(w.wte) && aligned_or_none(w.wpe) &&
              shared_bytes(w, B) <= kMostShared;
  DType bias = DType::other;  // one for all
  const auto weight = [&](const Projection& p) {
    fits = fits && p.weight && !p.lora_b && !p.weight_kn &&
           p.weight.strides[0] == p.weight.shape[1] && aligned_or_none(p.weight);
    if (!p.bias) return;
    fits = fits && (bias == DType::other || bias == p.bias.dtype);
    bias = p.bias.dtype;
  };
  const auto parameters = [&](const NormWeights& n, DType dtype) {
    fits = fits && n.weight.dtype == dtype && aligned_or_none(n.weight) && aligned_or_none(n.bias);
  };
  for (const DecoderLayer& l : w.layers) {
    weight(l.qkv), weight(l.proj), weight(l.fc), weight(l.out);
    parameters(l.norm1, norm), parameters(l.norm2, norm);
  }
  weight(w.head), parameters(w.norm, w.norm.weight.dtype);
  return fits && (T == DType::f32 || T == DType::bf16 || T == DType::f16);
}

int64_t decoder_persistent_state(int64_t B, int64_t H, int64_t total, int64_t D) {
  return 2 + B * H + 2 * kPersistentBlocks * kPersistentRows + B * H * most_chunks(total) * (D + 2);
}

void decoder_persistent_cuda(const DecoderPersistentArgs& args) {
  const DType T = args.weights.wte.dtype;
  if (T == DType::f32) step_rows<float>(args);
  if (T == DType::bf16) step_rows<bf16>(args);
  if (T == DType::f16) step_rows<f16>(args);
}

}  // namespace cgpt
