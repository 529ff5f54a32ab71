// gemm against a double-precision loop, on every tier of this machine, without Python.
#include "gemm.h"

#include <cmath>
#include <vector>

#include "../../common/philox.h"
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

double slope(double x, Activation activation) {
  const double h = 1e-5;
  return (activate(x + h, activation) - activate(x - h, activation)) / (2 * h);
}

// A loss sum(dy y): its gradients, and that the forward with dropout drops what the backward does.
void gradients_match_the_formula(int64_t M, int64_t K, int64_t N, bool kn, Activation activation,
                                 double dropout_p) {
  std::vector<float> x(M * K), weight(N * K), dy(M * N), pre(M * N), y(M * N), g(M * N, NAN);
  std::vector<float> dx(M * K, NAN), dweight(N * K, NAN), dbias(N, NAN);
  test::fill(x, 1), test::fill(weight, 2), test::fill(dy, 3);
  const auto matrix = [&](std::vector<float>& w) {
    return kn ? test::view(w, {K, N}) : test::view(w, {N, K});
  };
  const uint64_t seed = 0x123456789abc;
  GemmArgs forward{test::view(x, {M, K}), matrix(weight), {}, {},
                   test::view(y, {M, N}), activation,     kn};
  forward.pre = test::view(pre, {M, N}), forward.dropout_p = dropout_p, forward.seed = seed;
  gemm_check(forward);
  gemm_fwd_cpu(forward);
  const bool makes_g = activation != Activation::none || dropout_p > 0;
  const GemmBwdArgs args{test::view(dy, {M, N}),
                         test::view(x, {M, K}),
                         matrix(weight),
                         test::view(pre, {M, N}),
                         makes_g ? test::view(g, {M, N}) : TensorView{},
                         test::view(dx, {M, K}),
                         matrix(dweight),
                         test::view(dbias, {N}),
                         activation,
                         kn,
                         kn,
                         dropout_p,
                         seed};
  gemm_bwd_check(args);
  gemm_bwd_cpu(args);

  std::vector<double> grad(M * N);
  for (int64_t e = 0; e < M * N; ++e) {
    const uint32_t word = philox::words(seed, static_cast<uint64_t>(e) >> 2).word[e & 3];
    const bool kept = word >= static_cast<uint32_t>(dropout_p * 4294967296.0);
    const double factor = kept ? 1 / (1 - dropout_p) : 0;
    test::close(y[e], activate(pre[e], activation) * factor, 1e-5);
    grad[e] = dy[e] * factor * slope(pre[e], activation);
  }
  const auto at = [&](int64_t n, int64_t k) { return kn ? k * N + n : n * K + k; };
  const double tolerance = 1e-5 * (2 + std::sqrt(static_cast<double>(M > N ? M : N)));
  for (int64_t i = 0; i < M; ++i)
    for (int64_t k = 0; k < K; ++k) {
      double sum = 0;
      for (int64_t n = 0; n < N; ++n) sum += grad[i * N + n] * weight[at(n, k)];
      test::close(dx[i * K + k], sum, tolerance);
    }
  for (int64_t n = 0; n < N; ++n) {
    double sum = 0;
    for (int64_t i = 0; i < M; ++i) sum += grad[i * N + n];
    test::close(dbias[n], sum, tolerance);
    for (int64_t k = 0; k < K; ++k) {
      double product = 0;
      for (int64_t i = 0; i < M; ++i) product += grad[i * N + n] * x[i * K + k];
      test::close(dweight[at(n, k)], product, tolerance);
    }
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
  test::throws("gemm_bwd: g is missing", [&] {
    gemm_bwd_check({test::view(y, {2, 2}),
                    test::view(x, {2, 3}),
                    {},
                    test::view(y, {2, 2}),
                    {},
                    {},
                    {},
                    {},
                    Activation::gelu});
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
      for (double p : {0.0, 0.3}) {
        for (Activation a : {Activation::none, Activation::gelu, Activation::gelu_tanh})
          for (int64_t M : {0, 1, 17, 130}) gradients_match_the_formula(M, 33, 70, kn, a, p);
        gradients_match_the_formula(5, 0, 600, kn, Activation::gelu, p);
        gradients_match_the_formula(5, 3, 0, kn, Activation::gelu, p);
      }
    }
    nan_reaches_its_row_only();
  });
}
