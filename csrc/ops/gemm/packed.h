// y = activation(x W^T + scale u v^T + bias) + residual with W packed once: the contract, and the
// layout of the packed buffer, which is the same for every tier.
//
// W [N, K] lies in panels of 32 columns (rows of W), one after the other, zero padded:
//
//   f32         [K][32]
//   bf16, f16   [K / 2][32][2]           K padded to 32: one AMX tile row
//   int8        [K / 4][32][4]           K padded to 64, then 32 scales (f32) and 32 column sums
//   (i32) int4        per group of 32 or 64 k: [group / 8][32][4] bytes, then 32 scales (bf16); a
//   byte
//               holds k in its low and k + 4 in its high nibble, offset by 8
//
// A panel is a whole number of 64-byte lines, so a range of panels is one contiguous aligned
// stream.
#pragma once

#include "gemm.h"

namespace cgpt {

enum class WeightFormat : uint8_t { f32, bf16, f16, int8, int4 };

constexpr int64_t kPanelColumns = 32;

// always_inline: tier code uses these too, and must not emit them outside its namespace.
#define CGPT_LAYOUT inline constexpr __attribute__((always_inline)) int64_t

CGPT_LAYOUT round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// K as it lies in a panel.
CGPT_LAYOUT packed_k(WeightFormat format, int64_t K, int64_t group) {
  switch (format) {
    case WeightFormat::f32: return K;
    case WeightFormat::bf16:
    case WeightFormat::f16: return round_up(K, 32);
    case WeightFormat::int8: return round_up(K, 64);
    case WeightFormat::int4: return round_up(K, group);
  }
  return 0;
}

CGPT_LAYOUT panel_bytes(WeightFormat format, int64_t K, int64_t group) {
  const int64_t k = packed_k(format, K, group);
  switch (format) {
    case WeightFormat::f32: return k * kPanelColumns * 4;
    case WeightFormat::bf16:
    case WeightFormat::f16: return k * kPanelColumns * 2;
    case WeightFormat::int8: return k * kPanelColumns + kPanelColumns * 8;
    case WeightFormat::int4: return k / group * (group / 2 * kPanelColumns + kPanelColumns * 2);
  }
  return 0;
}

CGPT_LAYOUT panel_count(int64_t N) { return (N + kPanelColumns - 1) / kPanelColumns; }

// Bytes of the packed buffer; `group` (32 or 64) counts for int4 only.
CGPT_LAYOUT packed_bytes(WeightFormat format, int64_t N, int64_t K, int64_t group) {
  return panel_count(N) * panel_bytes(format, K, group);
}

#undef CGPT_LAYOUT

// A packed weight in somebody's memory, best aligned to 64 bytes.
struct PackedWeight {
  WeightFormat format = WeightFormat::f32;
  int64_t N = 0, K = 0;
  int64_t group = 64;  // k per scale, int4 only
  const void* data = nullptr;
};

struct PackedGemmArgs {
  TensorView x;         // [M, K], T in fp32, bf16, fp16; any row stride
  PackedWeight weight;  // of any format, whatever T
  TensorView bias;      // [N], T or fp32, or none
  TensorView residual;  // [M, N] T, or none; may be y itself
  TensorView y;         // [M, N], T or fp32
  Activation activation = Activation::none;
  // Columns to compute, in panels: all of them, or a part, for callers that are a thread of a team.
  int64_t first_panel = 0;
  int64_t panels = -1;
  LowRankTerm low_rank{};
};

struct PackWeightArgs {
  TensorView weight;  // [N, K], or [K, N] where weight_kn; fp32, bf16 or fp16
  bool weight_kn = false;
  WeightFormat format = WeightFormat::f32;
  int64_t group = 64;
  void* data = nullptr;  // packed_bytes() of it
};

struct UnpackWeightArgs {
  PackedWeight weight;
  TensorView out;  // [N, K], or [K, N] where weight_kn; fp32, bf16 or fp16
  bool weight_kn = false;
};

}  // namespace cgpt

#ifndef CGPT_TIER
namespace cgpt {

inline WeightFormat weight_format_of(const std::string& name) {
  if (name == "f32") return WeightFormat::f32;
  if (name == "bf16") return WeightFormat::bf16;
  if (name == "f16") return WeightFormat::f16;
  if (name == "int8") return WeightFormat::int8;
  if (name == "int4") return WeightFormat::int4;
  fail("packed_gemm: unknown format '" + name + "'. Known: f32, bf16, f16, int8, int4.");
}

inline void packed_weight_check(const Checker& c, const PackedWeight& w) {
  c.require(w.N >= 0 && w.K >= 0, [&] {
    return "N and K must not be negative, got " + std::to_string(w.N) + " and " +
           std::to_string(w.K);
  });
  c.require(w.format != WeightFormat::int4 || w.group == 32 || w.group == 64,
            [&] { return "group must be 32 or 64, got " + std::to_string(w.group); });
  // 255 * 127 * K must fit the 32 bits in which products of bytes are summed.
  c.require(w.format != WeightFormat::int8 || w.K <= 65536,
            [&] { return "K must be at most 65536 for int8, got " + std::to_string(w.K); });
}

// The buffer of a packed weight: dense bytes, exactly as many as its format takes.
inline void packed_buffer_check(const Checker& c, const TensorView& buffer, const PackedWeight& w) {
  packed_weight_check(c, w);
  c.tensor("packed", buffer, {packed_bytes(w.format, w.N, w.K, w.group)});
  c.dtype("packed", buffer, {DType::u8});
  c.dense_rows("packed", buffer);
}

inline void packed_gemm_check(const PackedGemmArgs& a) {
  const Checker c{"packed_gemm"};
  packed_weight_check(c, a.weight);
  const int64_t N = a.weight.N, K = a.weight.K;
  c.require(a.x && a.x.ndim == 2, "x must have shape (M, K)");
  const int64_t M = a.x.shape[0];
  c.tensor("x", a.x, {M, K});
  c.floating("x", a.x);
  c.tensor("y", a.y, {M, N});
  c.dtype("y", a.y, {a.x.dtype, DType::f32});
  if (a.bias) {
    c.tensor("bias", a.bias, {N});
    c.dtype("bias", a.bias, {a.x.dtype, DType::f32});
  }
  if (a.residual) {
    c.tensor("residual", a.residual, {M, N});
    c.dtype("residual", a.residual, {a.x.dtype});
  }
  c.dense_rows("x", a.x);
  c.dense_rows("bias", a.bias);
  c.dense_rows("residual", a.residual);
  c.dense_rows("y", a.y);
  const int64_t panels = a.panels < 0 ? panel_count(N) - a.first_panel : a.panels;
  c.require(a.first_panel >= 0 && panels >= 0 && a.first_panel + panels <= panel_count(N),
            [&] { return "panels must lie in the weight's " + std::to_string(panel_count(N)); });
  low_rank_check(c, a.low_rank, M, N, a.x.dtype);
}

inline void dense_weight_check(const Checker& c, const char* name, const TensorView& t, int64_t N,
                               int64_t K, bool weight_kn) {
  if (weight_kn) c.tensor(name, t, {K, N});
  else c.tensor(name, t, {N, K});
  c.floating(name, t);
  c.dense_rows(name, t);
}

inline PackedWeight packed_weight_of(const PackWeightArgs& a) {
  const Checker c{"pack_weight"};
  c.require(a.weight && a.weight.ndim == 2, "weight must have 2 dimensions");
  const int64_t N = a.weight.shape[a.weight_kn], K = a.weight.shape[!a.weight_kn];
  const PackedWeight w{a.format, N, K, a.group, a.data};
  packed_weight_check(c, w);
  dense_weight_check(c, "weight", a.weight, N, K, a.weight_kn);
  return w;
}

inline void unpack_weight_check(const UnpackWeightArgs& a) {
  const Checker c{"unpack_weight"};
  packed_weight_check(c, a.weight);
  dense_weight_check(c, "out", a.out, a.weight.N, a.weight.K, a.weight_kn);
}

}  // namespace cgpt
#endif

namespace cgpt {
CGPT_CPU_ENTRY(packed_gemm_fwd, PackedGemmArgs)
CGPT_CPU_ENTRY(pack_weight, PackWeightArgs)
CGPT_CPU_ENTRY(unpack_weight, UnpackWeightArgs)
}  // namespace cgpt
