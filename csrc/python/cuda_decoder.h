#pragma once

#include "../gpt/decoder_cuda.h"
#include "cuda.h"
#include "decoder_weights.h"

namespace cgpt::python {

inline void bind_cuda_decoder(py::module_& m) {
  // module_local: _C and _cuda_host, loaded in one process, both have it
  py::class_<CudaDecoder>(m, "CudaDecoder", "The inference step of a GPT-2-class model on CUDA.",
                          py::module_local())
      .def(py::init([](Tensor wte, Tensor wpe, const py::list& layers, const py::tuple& norm,
                       const py::tuple& head, int64_t heads, float eps,
                       const std::string& activation, float embeddings_scale) {
        return CudaDecoder(
            decoder_weights_of(wte, wpe, layers, norm, head, heads, eps, activation, kCudaDevice),
            embeddings_scale, kCudaDevice);
      }))
      .def("step",
           [](const CudaDecoder& decoder, Tensor tokens, Tensor length, Tensor padding,
              Tensor hidden, Tensor keys, Tensor values, Tensor key_scales, Tensor value_scales,
              Tensor room, Tensor unpacked, Tensor attention, Tensor logits, Tensor state) {
             py::gil_scoped_release release;
             const CudaDecoderStep step{
                 tokens, length,   padding,   hidden, {keys, values, key_scales, value_scales},
                 room,   unpacked, attention, logits};
             if (state) decoder.step_at_once(step, state);
             else decoder.step(step);
           })
      .def("room", &CudaDecoder::room)
      .def("unpacked", &CudaDecoder::unpacked)
      .def("at_once_fits", &CudaDecoder::at_once_fits);
  m.def("decoder_persistent_state_cuda", &decoder_persistent_state);
  m.def("decoder_attention_cuda",
        [](int64_t total, int64_t D) { return attention_work(1, total, D); });
}

}  // namespace cgpt::python
