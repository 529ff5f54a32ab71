// Packed weights without Python, on every tier of this machine: what comes out of the buffer, and
// the product against a double-precision loop over exactly that.
#include "packed.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "../../common/test.h"

namespace {

using namespace cgpt;

constexpr WeightFormat kFormats[] = {WeightFormat::f32, WeightFormat::bf16, WeightFormat::f16,
                                     WeightFormat::int8, WeightFormat::int4};

struct Packed {
  std::vector<char> buffer;
  PackedWeight weight;
};

Packed pack(std::vector<float>& w, WeightFormat format, int64_t N, int64_t K, int64_t group,
            bool kn) {
  Packed p;
  p.buffer.assign(static_cast<size_t>(packed_bytes(format, N, K, group)), 0x55);
  PackWeightArgs args{test::view(w, {N, K}), kn, format, group, p.buffer.data()};
  if (kn) args.weight = test::view(w, {K, N});
  p.weight = packed_weight_of(args);
  pack_weight_cpu(args);
  return p;
}

std::vector<float> unpack(const PackedWeight& w) {
  std::vector<float> out(static_cast<size_t>(w.N * w.K), NAN);
  const UnpackWeightArgs args{w, test::view(out, {w.N, w.K}), false};
  unpack_weight_check(args);
  unpack_weight_cpu(args);
  return out;
}

// Rows of y lie `gap` floats apart; what lies between them must stay as it was.
void matches_the_formula(WeightFormat format, int64_t M, int64_t N, int64_t K, int64_t group,
                         bool kn) {
  constexpr int64_t gap = 3;
  constexpr float sentinel = 12345.0f;
  std::vector<float> x(M * K), w(N * K), bias(N), residual(M * N), y(M * (N + gap), sentinel);
  test::fill(x, 1), test::fill(w, 2), test::fill(bias, 3), test::fill(residual, 4);
  const Packed p = pack(w, format, N, K, group, kn);
  const std::vector<float> dense = unpack(p.weight);
  for (int64_t n = 0; n < N; ++n)
    for (int64_t k = 0; k < K; ++k) {
      const double given = kn ? w[k * N + n] : w[n * K + k];
      // Values reach 1: half a step of each format; int4 may clip the largest by a quarter.
      const double step = format == WeightFormat::f32    ? 0
                          : format == WeightFormat::bf16 ? 1.0 / 512
                          : format == WeightFormat::f16  ? 1.0 / 4096
                          : format == WeightFormat::int8 ? 0.5 / 127
                                                         : 0.27;
      test::close(dense[n * K + k], given, step * 1.01);
    }

  PackedGemmArgs args{test::view(x, {M, K}), p.weight, test::view(bias, {N}),
                      test::view(residual, {M, N}), test::view(y, {M, N})};
  args.activation = Activation::relu;
  args.y.strides[0] = N + gap;
  packed_gemm_check(args);
  packed_gemm_fwd_cpu(args);
  const bool quantized = format == WeightFormat::int8 || format == WeightFormat::int4;
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t n = 0; n < N; ++n) {
      double sum = bias[n], size = 0;
      for (int64_t k = 0; k < K; ++k) {
        sum += double{x[i * K + k]} * dense[n * K + k];
        size += std::fabs(dense[n * K + k]);
      }
      // Half a step of the rows of x, which reach 1, on top of fp32's rounding.
      const double rows = quantized ? size * 0.5 / (M <= 16 ? 16319 : 127) : 0;
      const double tolerance = 2e-6 * (4 + std::sqrt(static_cast<double>(K))) + rows;
      test::close(y[i * (N + gap) + n], (sum > 0 ? sum : 0) + residual[i * N + n], tolerance);
    }
    for (int64_t n = N; n < N + gap; ++n) test::close(y[i * (N + gap) + n], sentinel, 0);
  }
}

// Panels computed one range at a time, as the threads of a team do, are those computed at once.
void parts_make_the_whole(WeightFormat format) {
  const int64_t M = 3, N = 150, K = 96;
  std::vector<float> x(M * K), w(N * K), whole(M * N), parts(M * N, NAN);
  test::fill(x, 1), test::fill(w, 2);
  const Packed p = pack(w, format, N, K, 32, false);
  PackedGemmArgs args{test::view(x, {M, K}), p.weight, {}, {}, test::view(whole, {M, N})};
  packed_gemm_fwd_cpu(args);
  args.y = test::view(parts, {M, N});
  for (int64_t panel = 0; panel < panel_count(N); panel += 2) {
    args.first_panel = panel;
    args.panels = panel + 2 <= panel_count(N) ? 2 : panel_count(N) - panel;
    packed_gemm_check(args);
    packed_gemm_fwd_cpu(args);
  }
  for (int64_t i = 0; i < M * N; ++i) test::close(parts[i], whole[i], 0);
}

void wrong_arguments_are_named() {
  std::vector<float> x(6), w(8), y(4);
  const Packed p = pack(w, WeightFormat::f32, 2, 4, 64, false);
  test::throws("packed_gemm: x must have shape (2, 4), got (2, 3)", [&] {
    packed_gemm_check({test::view(x, {2, 3}), p.weight, {}, {}, test::view(y, {2, 2})});
  });
  test::throws("packed_gemm: unknown format 'int5'. Known: f32, bf16, f16, int8, int4.",
               [] { weight_format_of("int5"); });
  test::throws("pack_weight: group must be 32 or 64, got 48", [&] {
    packed_weight_of({test::view(w, {2, 4}), false, WeightFormat::int4, 48, nullptr});
  });
}

}  // namespace

int main() {
  wrong_arguments_are_named();
  return test::on_every_tier([] {
    for (WeightFormat format : kFormats) {
      for (int64_t M : {0, 1, 3, 7, 16, 17, 40})
        for (int64_t K : {0, 1, 31, 64, 130})
          for (int64_t N : {1, 33, 64}) matches_the_formula(format, M, N, K, 64, M % 2 == 0);
      matches_the_formula(format, 530, 70, 200, 32, false);
      matches_the_formula(format, 2, 70, 700, 32, true);
      parts_make_the_whole(format);
    }
  });
}
