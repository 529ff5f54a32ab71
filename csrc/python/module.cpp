// The extension module cgpt_kernels._C: no torch header, no torch library. See dlpack.h.
//
// The binding lists, one header per op, meet in this one translation unit: reading pybind11's
// headers is most of their compile time.
#include "../cpu/isa.h"
#include "../cpu/peak.h"
#include "bind_attention.h"
#include "bind_cross_entropy.h"
#include "bind_decoder.h"
#include "bind_gemm.h"
#include "bind_layer_norm.h"
#include "bind_wafer.h"
#ifdef CGPT_CUDA
  #include "cuda_kernels.h"
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of cgpt_kernels, called through cgpt_kernels.ops.";
  m.def(
      "cpu_isa", [] { return cgpt::isa_name(cgpt::active_isa()); },
      "Name of the instruction-set tier in use.");
  m.def(
      "cpu_isas",
      [] {
        py::list names;
        for (int i = 0; i < static_cast<int>(cgpt::Isa::count); ++i)
          if (cgpt::isa_supported(static_cast<cgpt::Isa>(i)))
            names.append(cgpt::isa_name(static_cast<cgpt::Isa>(i)));
        return names;
      },
      "Names of the tiers that this processor can run.");
  m.def("set_cpu_isa", &cgpt::set_isa, py::arg("name"),
        "Force a tier by name for the process; 'auto' returns to the best one.");
  m.def("peak_rate", &cgpt::peak_rate, py::arg("format"), py::arg("seconds"),
        py::call_guard<py::gil_scoped_release>(),
        "Highest operations per second of the calling thread in 'fp32', 'bf16' or 'int8'; 0 where "
        "the tier in use has no instruction for it.");
  m.def(
      "read_seconds",
      [](cgpt::python::Tensor data, int passes) {
        const auto bytes = static_cast<size_t>(data.numel());
        if (data.ndim != 1 || data.dtype != cgpt::DType::u8 || bytes % 256)
          cgpt::fail("read_seconds: data must be bytes, a multiple of 256 of them");
        const py::gil_scoped_release release;
        return cgpt::read_seconds(data.data, bytes, passes);
      },
      py::arg("data"), py::arg("passes"),
      "Seconds in which the calling thread reads data so many times.");
  m.def("cuda_built", [] {
#ifdef CGPT_CUDA
    return true;
#else
    return false;
#endif
  });
  cgpt::python::bind_attention(m);
  cgpt::python::bind_cross_entropy(m);
  cgpt::python::bind_gemm(m);
  cgpt::python::bind_decoder(m);
  cgpt::python::bind_layer_norm(m);
  cgpt::python::bind_wafer(m);
#ifdef CGPT_CUDA
  cgpt::python::bind_cuda(m);
#endif
}
