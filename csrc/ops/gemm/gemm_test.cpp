// gemm against a double-precision loop, on every tier of this machine, without Python.
#include "gemm.h"

#include <cmath>
#include <vector>

#include "../../common/test.h"

namespace {

using namespace cgpt;

double activate(double x, Activation activation) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::gelu: return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    case Activation::gelu_tanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::relu: return x > 0 ? x : 0;
  }
  return x;
}

// Rows of y lie `gap` floats apart; what lies between them must stay as it was.
void matches_the_formula(int64_t M, int64_t K, int64_t N, bool kn, Activation activation) {
  constexpr int64_t gap = 3;
  constexpr float sentinel = 12345.0f;
  std::vector<float> x(M * K), weight(N * K), bias(N), residual(M * N), y(M * (N + gap), sentinel);
  test::fill(x, 1), test::fill(weight, 2), test::fill(bias, 3), test::fill(residual, 4);
  GemmArgs args{test::view(x, {M, K}),
                test::view(weight, {N, K}),
                test::view(bias, {N}),
                test::view(residual, {M, N}),
                test::view(y, {M, N}),
                activation,
                kn};
  if (kn) args.weight = test::view(weight, {K, N});
  args.y.strides[0] = N + gap;
  gemm_check(args);
  gemm_fwd_cpu(args);
  const double tolerance = 2e-6 * (4 + std::sqrt(static_cast<double>(K)));
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t n = 0; n < N; ++n) {
      double sum = bias[n];
      for (int64_t k = 0; k < K; ++k)
        sum += double{x[i * K + k]} * (kn ? weight[k * N + n] : weight[n * K + k]);
      test::close(y[i * (N + gap) + n], activate(sum, activation) + residual[i * N + n], tolerance);
    }
    for (int64_t n = N; n < N + gap; ++n) test::close(y[i * (N + gap) + n], sentinel, 0);
  }
}

void nan_reaches_its_row_only() {
  const int64_t M = 5, K = 40, N = 37;
  std::vector<float> x(M * K), weight(N * K), y(M * N);
  test::fill(x, 1), test::fill(weight, 2);
  x[2 * K + 7] = NAN;
  gemm_fwd_cpu({test::view(x, {M, K}), test::view(weight, {N, K}), {}, {}, test::view(y, {M, N})});
  for (int64_t i = 0; i < M; ++i)
    for (int64_t n = 0; n < N; ++n) test::close(std::isnan(y[i * N + n]), i == 2, 0);
}

void wrong_arguments_are_named() {
  std::vector<float> x(6), weight(8), y(4);
  test::throws("gemm: weight must have shape (2, 3), got (2, 4)", [&] {
    gemm_check({test::view(x, {2, 3}), test::view(weight, {2, 4}), {}, {}, test::view(y, {2, 2})});
  });
  test::throws("gemm: unknown activation 'silu'. Known: none, gelu, gelu_tanh, relu.",
               [] { activation_of("silu"); });
}

}  // namespace

int main() {
  wrong_arguments_are_named();
  return test::on_every_tier([] {
    for (bool kn : {false, true}) {
      for (int64_t M : {0, 1, 2, 4, 7, 16, 33})
        for (int64_t K : {0, 1, 31, 64, 130})
          for (int64_t N : {1, 17, 32, 65}) matches_the_formula(M, K, N, kn, Activation::none);
      for (Activation a : {Activation::gelu, Activation::gelu_tanh, Activation::relu})
        for (int64_t M : {1, 40}) matches_the_formula(M, 96, 70, kn, a);
      matches_the_formula(150, 700, 90, kn, Activation::gelu);
    }
    nan_reaches_its_row_only();
  });
}
