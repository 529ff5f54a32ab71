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
  });
}
