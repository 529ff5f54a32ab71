// Argument checks of the op contracts. A failed check throws std::invalid_argument (ValueError in
// Python) with a message of the form "op: what was expected, got what", before memory is touched.
//
// Not for tier code (csrc/cpu/dispatch.h): std::string's inline functions compiled with AVX-512
// flags could be the copy that the linker keeps, and would then crash older processors.
#pragma once

#ifdef CGPT_TIER
  #error "check.h belongs to baseline code, never to a tier's translation unit"
#endif

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "tensor_view.h"

namespace cgpt {

inline std::string shape_text(const int64_t* shape, int ndim) {
  std::string s = "(";
  for (int d = 0; d < ndim; ++d) s += (d ? ", " : "") + std::to_string(shape[d]);
  return s + (ndim == 1 ? ",)" : ")");
}
inline std::string shape_text(const TensorView& t) { return shape_text(t.shape, t.ndim); }

[[noreturn]] inline void fail(const std::string& message) { throw std::invalid_argument(message); }

// Checks of one op's arguments; `op` leads every message.
struct Checker {
  const char* op;
  Device device = Device::cpu;

  // `message` is a literal, or a function that makes text: only a failed check pays for strings.
  // A std::string is refused, since its making would cost a tiny call a tenth of its time.
  template <class Message>
  void require(bool ok, const Message& message) const {
    static_assert(!std::is_same_v<Message, std::string>, "wrap the message in a lambda");
    if (ok) return;
    if constexpr (std::is_invocable_v<Message>) fail(std::string(op) + ": " + message());
    else fail(std::string(op) + ": " + message);
  }

  // A given tensor of this shape on the op's device; rows must be dense in the last dimension.
  void tensor(const char* name, const TensorView& t, std::initializer_list<int64_t> shape) const {
    const auto where = [&] { return std::string(op) + ": " + name; };
    if (!t) fail(where() + " is missing");
    bool same = t.ndim == static_cast<int>(shape.size());
    for (int d = 0; same && d < t.ndim; ++d) same = t.shape[d] == shape.begin()[d];
    if (!same)
      fail(where() + " must have shape " +
           shape_text(shape.begin(), static_cast<int>(shape.size())) + ", got " + shape_text(t));
    if (t.device != device)
      fail(where() + " must be on " + (device == Device::cpu ? "cpu" : "cuda") + ", got " +
           (t.device == Device::cpu    ? "cpu"
            : t.device == Device::cuda ? "cuda"
                                       : "another device"));
  }
  void dense_rows(const char* name, const TensorView& t) const {
    if (t.ndim > 0 && t.shape[t.ndim - 1] > 1 && t.strides[t.ndim - 1] != 1)
      fail(std::string(op) + ": " + name + " must have stride 1 in its last dimension, got " +
           std::to_string(t.strides[t.ndim - 1]));
  }
  void dtype(const char* name, const TensorView& t, std::initializer_list<DType> allowed) const {
    for (DType a : allowed)
      if (t.dtype == a) return;
    std::string names;
    for (DType a : allowed) names += (names.empty() ? "" : " or ") + std::string(dtype_name(a));
    fail(std::string(op) + ": " + name + " must be " + names + ", got " + dtype_name(t.dtype));
  }
  void floating(const char* name, const TensorView& t) const {
    dtype(name, t, {DType::f32, DType::bf16, DType::f16});
  }
};

}  // namespace cgpt
