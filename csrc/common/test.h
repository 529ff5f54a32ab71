// What the C++ op tests share: views of vectors, numbers, comparisons, every tier in turn.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <string>
#include <vector>

#include "../cpu/isa.h"
#include "check.h"

namespace cgpt::test {

template <class T>
constexpr DType dtype_of = DType::other;
template <>
inline constexpr DType dtype_of<float> = DType::f32;
template <>
inline constexpr DType dtype_of<bf16> = DType::bf16;
template <>
inline constexpr DType dtype_of<f16> = DType::f16;
template <>
inline constexpr DType dtype_of<int64_t> = DType::i64;
template <>
inline constexpr DType dtype_of<int8_t> = DType::i8;

// A dense row-major view.
template <class T>
TensorView view(std::vector<T>& data, std::initializer_list<int64_t> shape) {
  TensorView v;
  v.data = data.data();
  v.dtype = dtype_of<T>;
  v.ndim = static_cast<int>(shape.size());
  int64_t stride = 1;
  for (int d = v.ndim - 1; d >= 0; --d) {
    v.shape[d] = shape.begin()[d];
    v.strides[d] = stride;
    stride *= v.shape[d];
  }
  return v;
}

// Uniform in [-1, 1), the same on every machine.
inline void fill(std::vector<float>& data, uint32_t seed) {
  uint32_t state = seed * 2654435761u + 1;
  for (float& x : data) {
    state = state * 1664525u + 1013904223u;
    x = static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
  }
}

[[noreturn]] inline void failed(const std::string& what) {
  std::fprintf(stderr, "tier %s: %s\n", isa_name(active_isa()), what.c_str());
  std::exit(1);
}

inline void close(double got, double expected, double tolerance) {
  if (!(std::fabs(got - expected) <= tolerance))
    failed("got " + std::to_string(got) + ", expected " + std::to_string(expected));
}

template <class F>
void throws(const std::string& message, F&& f) {
  try {
    f();
  } catch (const std::invalid_argument& error) {
    if (error.what() != message)
      failed("error says \"" + std::string(error.what()) + "\", expected \"" + message + "\"");
    return;
  }
  failed("no error, expected \"" + message + "\"");
}

// Runs f under each tier that this machine supports; the value of main().
template <class F>
int on_every_tier(F&& f) {
  for (int i = 0; i < static_cast<int>(Isa::count); ++i) {
    if (!isa_supported(static_cast<Isa>(i))) continue;
    set_isa(isa_name(static_cast<Isa>(i)));
    f();
    std::printf("%s: passed\n", isa_name(active_isa()));
  }
  return 0;
}

}  // namespace cgpt::test
