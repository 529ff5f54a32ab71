// The test-only module _cuda_host: the CUDA kernels compiled by g++, on CPU tensors.
#include "../cuda/substrate_test.h"
#include "cuda_kernels.h"

PYBIND11_MODULE(CGPT_CUDA_HOST, m) {
  m.doc() = "CUDA kernels of cgpt_kernels on the host implementation, for tests.";
  cgpt::python::bind_cuda(m);
  using cgpt::python::Tensor;
  m.def("substrate_test", [](const std::string& name, Tensor a, Tensor b, Tensor out) {
    cgpt::cuda::substrate_test(name, a, b, out);
  });
}
