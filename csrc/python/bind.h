// The binding lists, one per op, that make up the module _C.
#pragma once

#include <pybind11/pybind11.h>

namespace cgpt::python {

void bind_attention(pybind11::module_& m);
void bind_cross_entropy(pybind11::module_& m);
void bind_gemm(pybind11::module_& m);
void bind_layer_norm(pybind11::module_& m);

}  // namespace cgpt::python
