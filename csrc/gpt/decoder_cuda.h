// The decoder's step (decoder.h) on CUDA. Where it stands, in tokens, positions and cache, lies in
// device memory: every step of one token is the same launches with the same arguments, so that one
// CUDA graph serves them all, and nothing is allocated.
//
// B sequences, S new tokens each, total tokens there is room for, C width, H heads, D = C / H, L
// layers, V vocabulary.
#pragma once

#include "../ops/attention/attention_cuda.h"
#include "../ops/gemm/packed_gemm_cuda.h"
#include "decoder_check.h"

namespace cgpt {

struct DecoderCache {
  TensorView keys;                      // [L, B, H, total, D] T, or int8 with scales
  TensorView values;                    // likewise
  TensorView key_scales, value_scales;  // [L, B, H, total] fp32 of int8, or none
};

struct CudaDecoderStep {
  // [B, total] int64, contents in [0, V). A step reads S of them from `length` on and writes the
  // greedy one behind them, where there is room.
  TensorView tokens;
  TensorView length;   // [B] int64: tokens in the cache, all the same; a step adds S
  TensorView padding;  // [B] int64: leading tokens that are padding; positions count from there
  TensorView hidden;   // [B, total] bool: true before the step's first token only where padding
                       // lies, true from there on
  DecoderCache cache;
  TensorView room;       // [B * S, CudaDecoder::room()] T to work in
  TensorView unpacked;   // [CudaDecoder::unpacked(B * S, B)] T to work in
  TensorView attention;  // [B * H * attention_work(1, total, D)] fp32 to work in
  TensorView logits;     // [B, V] T: of each sequence's last token
};

class CudaDecoder {
 public:
  // embeddings_scale: multiplies token + position embeddings (muP). Packed weights are int8 or int4
  // beside bf16 or fp16; the factors of LoRA are dense. Throws std::invalid_argument naming what
  // does not fit.
  CudaDecoder(DecoderWeights weights, float embeddings_scale, Device device);

  // S = 1, or S > 1 on an empty cache.
  void step(const CudaDecoderStep& step) const;

  // The residual stream, its norm, the heads' outputs, q k v or the MLP's inner values, and what A
  // of LoRA leaves of a row.
  int64_t room() const;

  // Elements of the largest packed weight that a step of so many rows writes out before it
  // multiplies: with more rows than the products of integers take.
  int64_t unpacked(int64_t rows, int64_t B) const;

  // S = 1 in one launch, where decoder_persistent_fits. state: [decoder_persistent_state(...)]
  // int32, 0 before the first step.
  void step_at_once(const CudaDecoderStep& step, const TensorView& state) const;
  bool at_once_fits(int64_t B) const;

 private:
  void check(const CudaDecoderStep& step) const;

  DecoderWeights w_;
  float embeddings_scale_;
  Device device_;
};

// The persistent kernel (decoder_persistent.cuh): what it can run, and the words of memory that it
// keeps from step to step: meetings and counters, the blocks' candidates, attention's shares.
constexpr int64_t kPersistentRows = 4;
constexpr int64_t kPersistentBlocks = 1024;
bool decoder_persistent_fits(const DecoderWeights& weights, int64_t B);
int64_t decoder_persistent_state(int64_t B, int64_t H, int64_t total, int64_t D);
struct DecoderPersistentArgs {
  const DecoderWeights& weights;
  const CudaDecoderStep& step;
  TensorView state;
  float embeddings_scale = 1.0f;
};
void decoder_persistent_cuda(const DecoderPersistentArgs& args);

}  // namespace cgpt
