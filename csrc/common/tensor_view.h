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

// [..., C] as [rows, C], in place; v itself where its strides or an absent tensor do not allow it.
inline TensorView rows_of(const TensorView& v) {
  if (v.ndim <= 2) return v;
  TensorView r = v;
  const int last = v.ndim - 1;
  int64_t rows = 1, stride = v.strides[last - 1];
  for (int d = last - 1; d >= 0; --d) {
    if (v.shape[d] != 1 && rows > 1 && v.strides[d] != stride * rows) return v;
    if (v.shape[d] != 1 && rows == 1) stride = v.strides[d];
    rows *= v.shape[d];
  }
  r.ndim = 2;
  r.shape[0] = rows, r.shape[1] = v.shape[last];
  r.strides[0] = stride, r.strides[1] = v.strides[last];
  return r;
}

// [...] as [n], in place; v itself where it is not dense.
inline TensorView flat_of(const TensorView& v) {
  if (v.ndim <= 1) return v;
  TensorView r = v;
  int64_t dense = 1;
  for (int d = v.ndim - 1; d >= 0; dense *= v.shape[d], --d)
    if (v.shape[d] != 1 && v.strides[d] != dense) return v;
  r.ndim = 1;
  r.shape[0] = dense, r.strides[0] = 1;
  return r;
}

}  // namespace cgpt
