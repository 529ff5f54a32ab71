// How Python gives a decoder's weights, whatever a projection is made of.
#pragma once

#include "../gpt/decoder.h"
#include "dlpack.h"

namespace cgpt::python {

inline NormWeights norm_of(const py::tuple& t) {
  return {t[0].cast<BorrowedTensor>(), t[1].cast<BorrowedTensor>()};
}

// How Python gives a projection: (tensor, "nk" | "kn", bias, lora), or
// (packed bytes, format, N, K, group, bias, lora); lora is None or (packed A, format, r, B, scale),
// on CUDA (A, B).
inline Projection projection_of(const py::tuple& t, Device device) {
  const Checker c{"Decoder", device};
  Projection p;
  const auto data = t[0].cast<BorrowedTensor>();
  if (t.size() == 4) {
    p.weight = data;
    p.weight_kn = t[1].cast<std::string>() == "kn";
    c.require(p.weight.ndim == 2, "a weight must have 2 dimensions");
  } else if (t.size() == 7) {
    p.packed = {weight_format_of(t[1].cast<std::string>()), t[2].cast<int64_t>(),
                t[3].cast<int64_t>(), t[4].cast<int64_t>(), data.data};
    packed_buffer_check(c, data, p.packed);
  } else {
    fail("Decoder: a projection is a tuple of 4 (a weight) or 7 (a packed one), got " +
         std::to_string(t.size()));
  }
  p.bias = t[t.size() - 2].cast<BorrowedTensor>();
  const py::object lora = t[t.size() - 1];
  if (!lora.is_none()) {
    const auto l = lora.cast<py::tuple>();
    c.require(l.size() == 5 || l.size() == 2, "lora is (packed A, format, r, B, scale) or (A, B)");
    const auto a = l[0].cast<BorrowedTensor>();
    if (l.size() == 2) {
      p.lora_down = a;
      c.require(a.ndim == 2, "A of lora must have 2 dimensions");
      p.lora_b = l[1].cast<BorrowedTensor>();
      return p;
    }
    p.lora_a = {weight_format_of(l[1].cast<std::string>()), l[2].cast<int64_t>(), p.inputs(), 0,
                a.data};
    packed_buffer_check(c, a, p.lora_a);
    p.lora_b = l[3].cast<BorrowedTensor>();
    p.lora_scale = l[4].cast<float>();
  }
  return p;
}

inline DecoderWeights decoder_weights_of(Tensor wte, Tensor wpe, const py::list& layers,
                                         const py::tuple& norm, const py::tuple& head,
                                         int64_t heads, float eps, const std::string& activation,
                                         Device device) {
  const auto projection = [&](const py::handle& t) {
    return projection_of(t.cast<py::tuple>(), device);
  };
  DecoderWeights w;
  w.wte = wte, w.wpe = wpe;
  for (const auto& item : layers) {
    const auto l = item.cast<py::tuple>();
    if (l.size() != 7) fail("Decoder: a layer is (scale, norm1, qkv, proj, norm2, fc, out)");
    w.layers.push_back({l[0].cast<float>(), norm_of(l[1]), projection(l[2]), projection(l[3]),
                        norm_of(l[4]), projection(l[5]), projection(l[6])});
  }
  w.norm = norm_of(norm);
  w.head = projection(head);
  w.heads = heads;
  w.eps = eps;
  w.activation = activation_of(activation);
  return w;
}

}  // namespace cgpt::python
