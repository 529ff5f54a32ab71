// The inference step of a GPT-2-class decoder in one call: embedding, all blocks over a KV cache,
// the last layer norm and the head on each sequence's last position.
//
// It only composes ops, so it computes what the modules compute, without Python between them:
// per token and layer that is 7 op calls of about 5 us of Python each, against 40 us of memory
// traffic in a 111M model's smallest projection.
//
// B sequences, S new tokens each, T cached + new tokens, C width, H heads, D = C / H, V vocabulary.
#pragma once

#include <string>
#include <vector>

#include "../ops/attention/attention.h"
#include "../ops/gemm/packed.h"
#include "../ops/layer_norm/layer_norm.h"

namespace cgpt {

// A layer norm's parameters, [C] each, T or fp32.
struct NormWeights {
  TensorView weight, bias;
};

// A projection, packed or as its module stores it.
struct Projection {
  PackedWeight packed;  // used where `weight` is absent
  TensorView weight;    // [N, K], or [K, N] where weight_kn
  bool weight_kn = false;
  TensorView bias;  // [N], T or fp32, or none
  // LoRA: scale (x A^T) B^T is added; absent where B is.
  PackedWeight lora_a;  // [r, K]
  TensorView lora_b;    // [N, r] fp32
  float lora_scale = 1.0f;
  TensorView lora_down;  // on CUDA, A [r, K] T; lora_b is T then, and the scale in it
  int64_t rank() const { return lora_down ? lora_down.shape[0] : lora_a.N; }
  int64_t outputs() const { return weight ? weight.shape[weight_kn] : packed.N; }
  int64_t inputs() const { return weight ? weight.shape[!weight_kn] : packed.K; }
};

struct DecoderLayer {
  float attention_scale = 1.0f;
  NormWeights norm1;
  Projection qkv;   // C -> 3 C: q, k, v side by side
  Projection proj;  // C -> C
  NormWeights norm2;
  Projection fc;   // C -> inner
  Projection out;  // inner -> C
};

// Everything borrowed: the caller keeps the tensors alive and unchanged.
struct DecoderWeights {
  TensorView wte, wpe;  // [V, C], [positions, C], T
  std::vector<DecoderLayer> layers;
  NormWeights norm;  // the last one
  Projection head;   // C -> V
  int64_t heads = 1;
  float eps = 1e-5f;
  Activation activation = Activation::gelu;
};

struct DecoderStep {
  TensorView ids;        // [B, S] int64
  TensorView positions;  // [B, S] int64
  TensorView padding;    // [B, T] bool, True hides a token, or none
  TensorView keys;       // [L, B, H, capacity, D] T or int8, of which `past` tokens are filled
  TensorView values;     // likewise
  int64_t past = 0;
  TensorView logits;                    // [B, V], T or fp32 (T where the head is not packed)
  TensorView key_scales, value_scales;  // [L, B, H, capacity] fp32 of an int8 cache, or none
};

class Decoder {
 public:
  // Throws std::invalid_argument naming what does not fit.
  explicit Decoder(DecoderWeights weights);

  // Appends the step's keys and values to the cache and writes the last positions' logits. Buffers
  // are the calling thread's, kept from step to step and from decoder to decoder.
  void step(const DecoderStep& step) const;

  struct Part;     // one thread's share of a step
  struct Buffers;  // a step's memory

 private:
  // Few rows (decoding) are computed by one team of threads from the first op to the last; many by
  // one thread whose ops bring teams of their own.
  static constexpr int64_t kTeamRows = 16;

  void check(const DecoderStep& step) const;
  void run(const DecoderStep& step, const Buffers& buffers, const Part& part) const;

  DecoderWeights w_;
  int64_t inner_ = 0;
  bool all_packed_ = false;
};

}  // namespace cgpt
