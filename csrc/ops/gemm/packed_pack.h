// Packing and unpacking of one panel of 32 columns, element by element: done once per weight.
#pragma once

#include "../../cpu/vmath.h"
#include "packed.h"

namespace cgpt::CGPT_TIER {
namespace {

constexpr int kColumns = static_cast<int>(kPanelColumns);

// Scales and sums behind an int8 panel's weights.
struct Int8Tail {
  float scale[kColumns];
  int32_t sum[kColumns];
};

// Where element (k, column) of a panel lies, in elements (bytes for int4).
CGPT_INLINE int64_t pair_index(int64_t k, int c) { return (k / 2 * kColumns + c) * 2 + k % 2; }
CGPT_INLINE int64_t quad_index(int64_t k, int c) { return (k / 4 * kColumns + c) * 4 + k % 4; }
CGPT_INLINE int64_t group_bytes(int64_t group) { return group / 2 * kColumns + kColumns * 2; }

// Nearest, ties to even.
CGPT_INLINE VecF round_nearest(VecF v) {
  const VecF shift = set1(12582912.0f);  // 1.5 * 2^23
  return (v + shift) - shift;
}

// One panel of a dense weight as fp32 [K][32]; columns beyond N are 0.
template <class T>
inline void read_panel(const T* w, int64_t stride_n, int64_t stride_k, int64_t K, int columns,
                       float* dst) {
  if (stride_n == 1) {
    for (int64_t k = 0; k < K; ++k)
      for (int c = 0; c < kColumns; c += kLanes)
        store(dst + k * kColumns + c,
              c < columns ? load_n(w + k * stride_k + c, columns - c) : zero());
    return;
  }
  constexpr int64_t kBlock = 64;  // lines of the source that stay in cache while 32 rows pass
  for (int64_t k0 = 0; k0 < K; k0 += kBlock) {
    const int64_t k1 = k0 + kBlock < K ? k0 + kBlock : K;
    for (int c = 0; c < kColumns; ++c)
      for (int64_t k = k0; k < k1; ++k)
        dst[k * kColumns + c] = c < columns ? to_float(w[c * stride_n + k * stride_k]) : 0.0f;
  }
}

template <class T>
inline void write_panel(const float* src, int64_t stride_n, int64_t stride_k, int64_t K,
                        int columns, T* out) {
  for (int64_t k = 0; k < K; ++k)
    for (int c = 0; c < columns; ++c)
      out[c * stride_n + k * stride_k] = from_float<T>(src[k * kColumns + c]);
}

template <class H>
inline void encode_pairs(const float* w, int64_t K, int64_t Kp, H* dst) {
  for (int64_t k = 0; k < Kp; k += 2)
    for (int c = 0; c < kColumns; c += kLanes) {
      H even[kLanes], odd[kLanes];
      store(even, k < K ? load(w + k * kColumns + c) : zero());
      store(odd, k + 1 < K ? load(w + (k + 1) * kColumns + c) : zero());
      for (int i = 0; i < kLanes; ++i) {
        dst[pair_index(k, c + i)] = even[i];
        dst[pair_index(k + 1, c + i)] = odd[i];
      }
    }
}

// scale = max |w| / 127 of a column, w ~ scale * q.
inline void encode_int8(const float* w, int64_t K, int64_t Kp, int8_t* dst) {
  Int8Tail tail;
  float inverse[kColumns];
  for (int c = 0; c < kColumns; c += kLanes) {
    VecF largest = zero();
    for (int64_t k = 0; k < K; ++k) {
      const VecF v = load(w + k * kColumns + c);
      largest = max(largest, max(v, -v));
    }
    store(tail.scale + c, largest / set1(127.0f));
  }
  for (int c = 0; c < kColumns; ++c) {
    tail.sum[c] = 0;
    inverse[c] = tail.scale[c] > 0 ? 1.0f / tail.scale[c] : 0.0f;
  }
  for (int64_t k = 0; k < Kp; ++k) {
    float q[kColumns];
    for (int c = 0; c < kColumns; c += kLanes) {
      const VecF v = k < K ? load(w + k * kColumns + c) * load(inverse + c) : zero();
      store(q + c, min(set1(127.0f), max(set1(-127.0f), round_nearest(v))));
    }
    for (int c = 0; c < kColumns; ++c) {
      const int value = static_cast<int>(q[c]);
      dst[quad_index(k, c)] = static_cast<int8_t>(value);
      tail.sum[c] += value;
    }
  }
  __builtin_memcpy(dst + Kp * kColumns, &tail, sizeof(tail));
}

// One group: w ~ scale * q, q in -8 .. 7. The value of largest magnitude takes -8; of the scales
// around it the one of the smallest squared error is kept.
inline void encode_int4_group(const float* w, int64_t rows, int64_t group, uint8_t* dst) {
  float scales[kColumns];
  for (int c = 0; c < kColumns; c += kLanes) {
    VecF extreme = zero();
    for (int64_t k = 0; k < rows; ++k) {
      const VecF v = load(w + k * kColumns + c);
      extreme = select(max(v, -v) > max(extreme, -extreme), v, extreme);
    }
    VecF best = zero(), best_error = set1(__builtin_inff());
    // Divisors of the extreme: 8 keeps it exactly, larger ones give finer steps and clip it.
    constexpr float kDivisors[] = {-8.0f,  -8.5f, -9.0f, -9.5f, -10.0f,
                                   -10.5f, 7.0f,  7.5f,  8.0f,  8.5f};
    for (const float divisor : kDivisors) {
      bf16 rounded[kLanes];
      store(rounded, extreme / set1(divisor));
      const VecF scale = load(rounded);
      const VecF inverse = select(scale != zero(), set1(1.0f) / scale, zero());
      VecF error = zero();
      for (int64_t k = 0; k < rows; ++k) {
        const VecF v = load(w + k * kColumns + c);
        const VecF q = min(set1(7.0f), max(set1(-8.0f), round_nearest(v * inverse)));
        const VecF d = v - q * scale;
        error = fmadd(d, d, error);
      }
      const VecI better = error < best_error;
      best = select(better, scale, best);
      best_error = select(better, error, best_error);
    }
    store(scales + c, best);
  }
  for (int64_t k = 0; k < group; ++k)
    for (int c = 0; c < kColumns; ++c) {
      const float inverse = scales[c] != 0 ? 1.0f / scales[c] : 0.0f;
      float q = k < rows ? __builtin_rintf(w[k * kColumns + c] * inverse) : 0.0f;
      q = q > 7 ? 7 : q < -8 ? -8 : q;
      const uint8_t nibble = static_cast<uint8_t>(static_cast<int>(q) + 8);
      uint8_t& byte = dst[quad_index(k / 8 * 4 + k % 4, c)];
      byte = k / 4 % 2 == 0 ? nibble : static_cast<uint8_t>(byte | nibble << 4);
    }
  bf16 stored[kColumns];
  for (int c = 0; c < kColumns; ++c) stored[c] = from_float<bf16>(scales[c]);
  __builtin_memcpy(dst + group / 2 * kColumns, stored, sizeof(stored));
}

inline void encode_panel(const PackedWeight& p, const float* w, void* dst) {
  const int64_t Kp = packed_k(p.format, p.K, p.group);
  switch (p.format) {
    case WeightFormat::f32:
      if (p.K > 0) __builtin_memcpy(dst, w, static_cast<size_t>(p.K) * kColumns * 4);
      return;
    case WeightFormat::bf16: return encode_pairs(w, p.K, Kp, static_cast<bf16*>(dst));
    case WeightFormat::f16: return encode_pairs(w, p.K, Kp, static_cast<f16*>(dst));
    case WeightFormat::int8: return encode_int8(w, p.K, Kp, static_cast<int8_t*>(dst));
    case WeightFormat::int4:
      for (int64_t k = 0; k < Kp; k += p.group)
        encode_int4_group(w + k * kColumns, p.K - k < p.group ? p.K - k : p.group, p.group,
                          static_cast<uint8_t*>(dst) + k / p.group * group_bytes(p.group));
  }
}

// The two bf16 of each 32-bit lane.
CGPT_INLINE VecF first_bf16(VecI pair) { return bit_cast<VecF>(pair << 16); }
CGPT_INLINE VecF second_bf16(VecI pair) {
  return bit_cast<VecF>(pair & set1i(static_cast<int32_t>(0xffff0000u)));
}

// fp16 in the low halves of 32-bit lanes: the exponent is moved into place and rescaled, exact for
// denormals too.
CGPT_INLINE VecF widen_f16(VecI half) {
  const VecI magnitude = half & set1i(0x7fff), sign = (half & set1i(0x8000)) << 16;
  const VecF finite = bit_cast<VecF>(magnitude << 13) * bit_cast<VecF>(set1i(0x77800000));  // 2^112
  const VecF special = bit_cast<VecF>((magnitude << 13) | set1i(0x7f800000));
  const VecF value = select(magnitude >= set1i(0x7c00), special, finite);
  return bit_cast<VecF>(bit_cast<VecI>(value) | sign);
}

CGPT_INLINE VecF to_floats(VecI v) { return __builtin_convertvector(v, VecF); }

CGPT_INLINE VecI load_words(const void* p) {
  VecI v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

// k0 .. k1 of a packed panel as fp32 [k1 - k0][32], dequantized. k0 is a multiple of 64, and so is
// k1 or it is K. A 32-bit word of a panel holds 1, 2, 4 or 8 values of k of one column.
inline void decode_panel(const PackedWeight& p, const void* panel, int64_t k0, int64_t k1,
                         float* dst) {
  const int64_t count = k1 - k0;
  const auto put = [&](int64_t k, int c, VecF v) __attribute__((always_inline)) {
    if (k < count) store(dst + k * kColumns + c, v);
  };
  switch (p.format) {
    case WeightFormat::f32:
      if (count > 0)
        __builtin_memcpy(dst, static_cast<const float*>(panel) + k0 * kColumns,
                         static_cast<size_t>(count) * kColumns * 4);
      return;
    case WeightFormat::bf16:
    case WeightFormat::f16: {
      const bool wide = p.format == WeightFormat::bf16;
      const int32_t* words = static_cast<const int32_t*>(panel) + k0 / 2 * kColumns;
      for (int64_t k = 0; k < count; k += 2, words += kColumns)
        for (int c = 0; c < kColumns; c += kLanes) {
          const VecI v = load_words(words + c);
          put(k, c, wide ? first_bf16(v) : widen_f16(v & set1i(0xffff)));
          put(k + 1, c, wide ? second_bf16(v) : widen_f16((v >> 16) & set1i(0xffff)));
        }
      return;
    }
    case WeightFormat::int8: {
      const int8_t* bytes = static_cast<const int8_t*>(panel);
      Int8Tail tail;
      __builtin_memcpy(&tail, bytes + packed_k(p.format, p.K, 0) * kColumns, sizeof(tail));
      bytes += k0 * kColumns;
      for (int64_t k = 0; k < count; k += 4, bytes += 4 * kColumns)
        for (int c = 0; c < kColumns; c += kLanes) {
          const VecI v = load_words(bytes + 4 * c);
          const VecF scale = load(tail.scale + c);
          put(k, c, to_floats(v << 24 >> 24) * scale);
          put(k + 1, c, to_floats(v << 16 >> 24) * scale);
          put(k + 2, c, to_floats(v << 8 >> 24) * scale);
          put(k + 3, c, to_floats(v >> 24) * scale);
        }
      return;
    }
    case WeightFormat::int4: {
      const int64_t size = group_bytes(p.group);
      for (int64_t g = 0; g < count; g += p.group) {
        const uint8_t* bytes = static_cast<const uint8_t*>(panel) + (k0 + g) / p.group * size;
        bf16 stored[kColumns];
        __builtin_memcpy(stored, bytes + p.group / 2 * kColumns, sizeof(stored));
        for (int64_t k = g; k < g + p.group; k += 8, bytes += 4 * kColumns)
          for (int c = 0; c < kColumns; c += kLanes) {
            const VecI v = load_words(bytes + 4 * c), low = set1i(15), eight = set1i(8);
            const VecF scale = load(stored + c);
            for (int r = 0; r < 4; ++r) {
              put(k + r, c, to_floats((v >> (8 * r) & low) - eight) * scale);
              put(k + 4 + r, c, to_floats((v >> (8 * r + 4) & low) - eight) * scale);
            }
          }
      }
      return;
    }
  }
}

}  // namespace
}  // namespace cgpt::CGPT_TIER
