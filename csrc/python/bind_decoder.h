#pragma once

#include "../gpt/decoder.h"
#include "../gpt/sample.h"
#include "bind_gemm.h"
#include "decoder_weights.h"

namespace cgpt::python {
namespace {

Decoder make_decoder(Tensor wte, Tensor wpe, const py::list& layers, const py::tuple& norm,
                     const py::tuple& head, int64_t heads, float eps,
                     const std::string& activation) {
  return Decoder(
      decoder_weights_of(wte, wpe, layers, norm, head, heads, eps, activation, Device::cpu));
}

void decoder_step(Decoder& decoder, Tensor ids, Tensor positions, Tensor padding, Tensor keys,
                  Tensor values, int64_t past, Tensor logits, Tensor key_scales,
                  Tensor value_scales) {
  py::gil_scoped_release release;
  decoder.step({ids, positions, padding, keys, values, past, logits, key_scales, value_scales});
}

void sample_rows(Tensor logits, Tensor u, Tensor tokens, float temperature, int64_t top_k,
                 double top_p) {
  const Checker c{"sample"};
  c.require(logits && logits.ndim == 2 && logits.shape[1] > 0, "logits must have shape (B, V)");
  const int64_t B = logits.shape[0], V = logits.shape[1];
  c.tensor("logits", logits, {B, V});
  c.dtype("logits", logits, {DType::f32});
  c.dense_rows("logits", logits);
  c.tensor("u", u, {B});
  c.dtype("u", u, {DType::f64});
  c.dense_rows("u", u);
  c.tensor("tokens", tokens, {B});
  c.dtype("tokens", tokens, {DType::i64});
  c.dense_rows("tokens", tokens);
  c.require(temperature > 0.0f && top_k >= 0 && top_p > 0.0,
            "temperature and top_p must be positive and top_k not negative");
  py::gil_scoped_release release;
  for (int64_t b = 0; b < B; ++b)
    tokens.as<int64_t>()[b] = sample(logits.as<const float>() + b * logits.strides[0], V,
                                     {temperature, top_k, top_p}, u.as<const double>()[b]);
}

// tokens[b] = the first column with the largest logit of row b, as torch.argmax; a NaN is largest.
void argmax_rows(Tensor logits, Tensor tokens) {
  const Checker c{"argmax"};
  c.require(logits && logits.ndim == 2 && logits.shape[1] > 0, "logits must have shape (B, V)");
  c.dtype("logits", logits, {DType::f32, DType::bf16});
  c.dense_rows("logits", logits);
  const int64_t B = logits.shape[0], V = logits.shape[1];
  c.tensor("tokens", tokens, {B});
  c.dtype("tokens", tokens, {DType::i64});
  for (int64_t b = 0; b < B; ++b) {
    const int64_t row = b * logits.strides[0];
    tokens.as<int64_t>()[b * tokens.strides[0]] = logits.dtype == DType::f32
                                                      ? argmax(logits.as<const float>() + row, V)
                                                      : argmax(logits.as<const bf16>() + row, V);
  }
}

// A hash of the address and of up to 64 elements spread over a tensor: tells that a weight was
// changed in bulk.
uint64_t fingerprint(Tensor t) {
  if (!t || t.device != Device::cpu) fail("fingerprint: takes a tensor on cpu");
  const int64_t n = t.numel(), samples = n < 64 ? n : 64;
  int64_t dense = 1;
  bool contiguous = true;
  for (int d = t.ndim - 1; d >= 0; dense *= t.shape[d--])
    contiguous &= t.shape[d] == 1 || t.strides[d] == dense;
  uint64_t hash = reinterpret_cast<uintptr_t>(t.data) ^ 1469598103934665603u;  // FNV-1a, by words
  const int64_t step =
      samples > 1 ? ((n - 1) << 16) / (samples - 1) : 0;  // a division each is slow
  for (int64_t i = 0; i < samples; ++i) {
    int64_t index = i + 1 < samples ? (i * step) >> 16 : n - 1, offset = contiguous ? index : 0;
    for (int d = contiguous ? -1 : t.ndim - 1; d >= 0; --d) {
      offset += index % t.shape[d] * t.strides[d];
      index /= t.shape[d];
    }
    const uint64_t bits =
        t.dtype == DType::f32 ? t.as<const uint32_t>()[offset] : t.as<const uint16_t>()[offset];
    hash = (hash ^ bits) * 1099511628211u;
  }
  return hash;
}

}  // namespace

inline void bind_decoder(py::module_& m) {
  py::class_<Decoder>(m, "Decoder", "The inference step of a GPT-2-class model in one call.")
      .def(py::init(&make_decoder))
      .def("step", &decoder_step);
  m.def("sample", &sample_rows);
  m.def("argmax", &argmax_rows);
  m.def("fingerprint", &fingerprint);
}

}  // namespace cgpt::python
