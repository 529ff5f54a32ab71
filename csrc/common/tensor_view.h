// A borrowed tensor: pointer, dtype, shape, strides in elements, device. Owns nothing, copies
// freely.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace cgpt {

enum class Device : uint8_t { cpu, cuda, other };

struct TensorView {
  static constexpr int kMaxDims = 6;

  void* data = nullptr;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};
  int ndim = -1;  // -1: no tensor was given (Python's None)
  DType dtype = DType::other;
  Device device = Device::cpu;
  int device_index = 0;
  void* stream = nullptr;  // the framework's current stream on a CUDA device

  explicit operator bool() const { return ndim >= 0; }

  int64_t numel() const {
    int64_t n = 1;
    for (int d = 0; d < ndim; ++d) n *= shape[d];
    return n;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

}  // namespace cgpt
