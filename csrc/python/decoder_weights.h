// How Python gives a decoder's weights, whatever a projection is made of.
#pragma once

#include "../gpt/decoder.h"
#include "dlpack.h"

namespace cgpt::python {

inline NormWeights norm_of(const py::tuple& t) {
  return {t[0].cast<BorrowedTensor>(), t[1].cast<BorrowedTensor>()};
}

// (weight, "nk" | "kn", bias, None)
inline Projection plain_projection_of(const py::tuple& t) {
  if (t.size() != 4)
    fail("Decoder: a weight is a tuple of 4, got " + std::to_string(t.size()) +
         " (packed ones: 7)");
  Projection p;
  p.weight = t[0].cast<BorrowedTensor>();
  p.weight_kn = t[1].cast<std::string>() == "kn";
  p.bias = t[2].cast<BorrowedTensor>();
  if (p.weight.ndim != 2) fail("Decoder: a weight must have 2 dimensions");
  return p;
}

inline DecoderWeights decoder_weights_of(Tensor wte, Tensor wpe, const py::list& layers,
                                         const py::tuple& norm, const py::tuple& head,
                                         int64_t heads, float eps, const std::string& activation,
                                         Projection (*projection_of)(const py::tuple&)) {
  DecoderWeights w;
  w.wte = wte, w.wpe = wpe;
  for (const auto& item : layers) {
    const auto l = item.cast<py::tuple>();
    if (l.size() != 7) fail("Decoder: a layer is (scale, norm1, qkv, proj, norm2, fc, out)");
    w.layers.push_back({l[0].cast<float>(), norm_of(l[1]), projection_of(l[2]), projection_of(l[3]),
                        norm_of(l[4]), projection_of(l[5]), projection_of(l[6])});
  }
  w.norm = norm_of(norm);
  w.head = projection_of(head);
  w.heads = heads;
  w.eps = eps;
  w.activation = activation_of(activation);
  return w;
}

}  // namespace cgpt::python
