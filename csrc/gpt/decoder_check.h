// What a decoder's weights must be, wherever they lie.
#pragma once

#include "decoder.h"

namespace cgpt {

inline void decoder_norm_check(const Checker& c, const char* name, const NormWeights& n, int64_t C,
                               DType T) {
  c.tensor(name, n.weight, {C});
  c.dtype(name, n.weight, {T, DType::f32});
  c.dense_rows(name, n.weight);
  if (!n.bias) return;
  c.tensor(name, n.bias, {C});
  c.dtype(name, n.bias, {n.weight.dtype});
  c.dense_rows(name, n.bias);
}

inline void decoder_projection_check(const Checker& c, const char* name, const Projection& p,
                                     int64_t N, int64_t K, DType T) {
  c.require(p.outputs() == N && p.inputs() == K, [&] {
    return std::string(name) + " must map " + std::to_string(K) + " to " + std::to_string(N) +
           " features, got " + std::to_string(p.inputs()) + " to " + std::to_string(p.outputs());
  });
  if (p.weight) {
    c.tensor(name, p.weight, {p.weight.shape[0], p.weight.shape[1]});
    c.dtype(name, p.weight, {T});
    c.dense_rows(name, p.weight);
  }
  if (p.lora_b) {
    const int64_t taken = p.lora_down ? p.lora_down.shape[1] : p.lora_a.K;
    c.require(taken == K, [&] {
      return std::string(name) + "'s A of lora must take " + std::to_string(K) + " features, got " +
             std::to_string(taken);
    });
    if (p.lora_down) {
      c.tensor(name, p.lora_down, {p.rank(), K});
      c.dtype(name, p.lora_down, {T});
      c.dense_rows(name, p.lora_down);
    }
    c.tensor(name, p.lora_b, {N, p.rank()});
    c.dtype(name, p.lora_b, {p.lora_down ? T : DType::f32});
    c.dense_rows(name, p.lora_b);
  }
  if (!p.bias) return;
  c.tensor(name, p.bias, {N});
  c.dtype(name, p.bias, {T, DType::f32});
  c.dense_rows(name, p.bias);
}

inline void decoder_weights_check(const DecoderWeights& w, Device device = Device::cpu) {
  const Checker c{"Decoder", device};
  c.require(w.wte && w.wte.ndim == 2, "wte must have shape (V, C)");
  c.require(w.wpe && w.wpe.ndim == 2, "wpe must have shape (positions, C)");
  const int64_t V = w.wte.shape[0], C = w.wte.shape[1];
  const DType T = w.wte.dtype;
  c.floating("wte", w.wte);
  c.dtype("wpe", w.wpe, {T});
  c.tensor("wte", w.wte, {V, C});
  c.tensor("wpe", w.wpe, {w.wpe.shape[0], C});
  c.dense_rows("wte", w.wte);
  c.dense_rows("wpe", w.wpe);
  c.require(!w.layers.empty(), "layers must not be empty");
  c.require(w.heads >= 1 && C % w.heads == 0, [&] {
    return "heads must divide the width " + std::to_string(C) + ", got " + std::to_string(w.heads);
  });
  const int64_t inner = w.layers[0].fc.outputs();
  for (const DecoderLayer& layer : w.layers) {
    decoder_norm_check(c, "norm1", layer.norm1, C, T);
    decoder_projection_check(c, "qkv", layer.qkv, 3 * C, C, T);
    decoder_projection_check(c, "proj", layer.proj, C, C, T);
    decoder_norm_check(c, "norm2", layer.norm2, C, T);
    decoder_projection_check(c, "fc", layer.fc, inner, C, T);
    decoder_projection_check(c, "out", layer.out, C, inner, T);
  }
  decoder_norm_check(c, "norm", w.norm, C, T);
  decoder_projection_check(c, "head", w.head, V, C, T);
}

}  // namespace cgpt
