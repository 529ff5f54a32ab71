// Element types that cross the binding, and the 16-bit storage types of the CPU kernels.
#pragma once

#include <cstdint>

namespace cgpt {

enum class DType : uint8_t { f32, bf16, f16, f64, i64, i32, i8, u8, boolean, other };

// Storage only: arithmetic happens in fp32 after a load (csrc/cpu/simd.h).
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline const char* dtype_name(DType t) {
  switch (t) {
    case DType::f32: return "float32";
    case DType::bf16: return "bfloat16";
    case DType::f16: return "float16";
    case DType::f64: return "float64";
    case DType::i64: return "int64";
    case DType::i32: return "int32";
    case DType::i8: return "int8";
    case DType::u8: return "uint8";
    case DType::boolean: return "bool";
    case DType::other: break;
  }
  return "an unsupported dtype";
}

}  // namespace cgpt
