// Layer norm against a double-precision loop, on every tier of this machine, without Python.
#include "layer_norm.h"

#include <cmath>
#include <cstdio>
#include <vector>

#include "../../common/test.h"

namespace {

using namespace cgpt;

void matches_the_formula(int64_t rows, int64_t C) {
  std::vector<float> x(rows * C), weight(C), bias(C), y(rows * C, NAN), mean(rows), rstd(rows);
  test::fill(x, 1), test::fill(weight, 2), test::fill(bias, 3);
  layer_norm_fwd_cpu({test::view(x, {rows, C}),
                      {},
                      test::view(weight, {C}),
                      test::view(bias, {C}),
                      test::view(y, {rows, C}),
                      {},
                      test::view(mean, {rows}),
                      test::view(rstd, {rows}),
                      1e-5f});
  for (int64_t i = 0; i < rows; ++i) {
    double m = 0, v = 0;
    for (int64_t c = 0; c < C; ++c) m += x[i * C + c];
    m /= C;
    for (int64_t c = 0; c < C; ++c) v += (x[i * C + c] - m) * (x[i * C + c] - m);
    const double r = 1 / std::sqrt(v / C + 1e-5);
    test::close(mean[i], m, 1e-6);
    test::close(rstd[i] / r, 1, 1e-5);
    for (int64_t c = 0; c < C; ++c)
      test::close(y[i * C + c], (x[i * C + c] - m) * r * weight[c] + bias[c], 1e-5);
  }
}

void gradients_match_the_formula(int64_t rows, int64_t C) {
  std::vector<float> x(rows * C), dy(rows * C), dtotal(rows * C), dx(rows * C, NAN);
  std::vector<float> weight(C), dweight(C, NAN), dbias(C, NAN), mean(rows), rstd(rows);
  test::fill(x, 1), test::fill(dy, 2), test::fill(dtotal, 3), test::fill(weight, 4);
  std::vector<double> dw(C), db(C);
  for (int64_t i = 0; i < rows; ++i) {
    double m = 0, v = 0;
    for (int64_t c = 0; c < C; ++c) m += x[i * C + c] / C;
    for (int64_t c = 0; c < C; ++c) v += (x[i * C + c] - m) * (x[i * C + c] - m) / C;
    mean[i] = static_cast<float>(m), rstd[i] = static_cast<float>(1 / std::sqrt(v + 1e-5));
  }
  const LayerNormBwdArgs args{
      test::view(dy, {rows, C}), test::view(dtotal, {rows, C}), test::view(x, {rows, C}),
      test::view(weight, {C}),   test::view(mean, {rows}),      test::view(rstd, {rows}),
      test::view(dx, {rows, C}), test::view(dweight, {C}),      test::view(dbias, {C})};
  layer_norm_bwd_check(args);
  layer_norm_bwd_cpu(args);
  for (int64_t i = 0; i < rows; ++i) {
    double sum_g = 0, sum_gx = 0;
    const auto xhat = [&](int64_t c) { return (double{x[i * C + c]} - mean[i]) * rstd[i]; };
    for (int64_t c = 0; c < C; ++c) {
      const double d = dy[i * C + c];
      dw[c] += d * xhat(c), db[c] += d;
      sum_g += d * weight[c], sum_gx += d * weight[c] * xhat(c);
    }
    for (int64_t c = 0; c < C; ++c) {
      const double g = double{dy[i * C + c]} * weight[c];
      const double expected = rstd[i] * (g - sum_g / C - xhat(c) * sum_gx / C) + dtotal[i * C + c];
      test::close(dx[i * C + c], expected, 2e-5);
    }
  }
  for (int64_t c = 0; c < C; ++c)
    test::close(dweight[c], dw[c], 2e-5), test::close(dbias[c], db[c], 2e-5);
}

void wrong_shapes_are_named() {
  std::vector<float> x(8), weight(3), y(8);
  test::throws("layer_norm: weight must have shape (4,), got (3,)", [&] {
    layer_norm_check({test::view(x, {2, 4}),
                      {},
                      test::view(weight, {3}),
                      {},
                      test::view(y, {2, 4}),
                      {},
                      {},
                      {},
                      1e-5f});
  });
}

}  // namespace

int main() {
  wrong_shapes_are_named();
  return test::on_every_tier([] {
    for (int64_t C : {1, 3, 16, 17, 64, 768, 1001})
      for (int64_t rows : {0, 1, 5}) matches_the_formula(rows, C);
    for (int64_t C : {1, 3, 17, 768})
      for (int64_t rows : {0, 1, 5, 131}) gradients_match_the_formula(rows, C);
  });
}
