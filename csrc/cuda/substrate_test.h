#pragma once

#include <string>

#include "../common/tensor_view.h"

namespace cgpt::cuda {

// Runs a kernel of substrate_test.cu by name. Throws std::invalid_argument for an unknown one.
void substrate_test(const std::string& name, const TensorView& a, const TensorView& b,
                    const TensorView& out);

}  // namespace cgpt::cuda
