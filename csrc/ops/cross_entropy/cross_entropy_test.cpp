// Linear cross-entropy against a double-precision loop, on every tier of this machine, without
// Python.
#include "cross_entropy.h"

#include <omp.h>

#include <cmath>
#include <limits>
#include <vector>

#include "../../common/test.h"

namespace {

using namespace cgpt;

struct Problem {
  int64_t M, K, V;
  std::vector<float> x, weight, bias, loss, lse;
  std::vector<int64_t> target;

  Problem(int64_t M, int64_t K, int64_t V)
      : M(M), K(K), V(V), x(M * K), weight(V * K), bias(V), loss(M, NAN), lse(M, NAN), target(M) {
    test::fill(x, 1), test::fill(weight, 2), test::fill(bias, 3);
    for (int64_t i = 0; i < M; ++i) target[i] = (i * 7919 + V - 1) % V;
  }
  LinearCrossEntropyArgs args(float smoothing = 0.0f) {
    LinearCrossEntropyArgs a{test::view(x, {M, K}), test::view(weight, {V, K}),
                             test::view(bias, {V}), test::view(target, {M}),
                             test::view(loss, {M}), test::view(lse, {M})};
    a.label_smoothing = smoothing;
    return a;
  }
  void run(float smoothing = 0.0f) {
    linear_cross_entropy_check(args(smoothing));
    linear_cross_entropy_check_targets(args(smoothing));
    linear_cross_entropy_fwd_cpu(args(smoothing));
  }
};

void matches_the_formula(int64_t M, int64_t K, int64_t V, float smoothing) {
  Problem p(M, K, V);
  if (M > 2) p.target[1] = -100;
  p.run(smoothing);
  std::vector<double> z(V);
  const double tolerance = 1e-5 * (1 + K / 64.0);  // the sums of K products round
  for (int64_t i = 0; i < M; ++i) {
    double sum = 0, total = 0;
    for (int64_t v = 0; v < V; ++v) {
      z[v] = p.bias[v];
      for (int64_t k = 0; k < K; ++k) z[v] += double{p.x[i * K + k]} * p.weight[v * K + k];
      sum += std::exp(z[v]);
      total += z[v];
    }
    const double lse = std::log(sum);
    test::close(p.lse[i], lse, tolerance);
    if (p.target[i] == -100) test::close(p.loss[i], 0, 0);
    else
      test::close(p.loss[i],
                  (1 - smoothing) * (lse - z[p.target[i]]) + smoothing * (lse - total / V),
                  2 * tolerance);
  }
}

// dx, dweight and dbias of the mean over the rows that count.
void gradients_match_the_formula(int64_t M, int64_t K, int64_t V, float smoothing) {
  Problem p(M, K, V);
  if (M > 2) p.target[1] = -100;
  std::vector<float> dx(M * K, NAN), dweight(V * K, NAN), dbias(V, NAN);
  auto args = p.args(smoothing);
  const double count = static_cast<double>(M > 2 ? M - 1 : M);
  args.scale = static_cast<float>(1 / count);
  args.dx = test::view(dx, {M, K}), args.dweight = test::view(dweight, {V, K});
  args.dbias = test::view(dbias, {V});
  linear_cross_entropy_check(args);
  linear_cross_entropy_grads_cpu(args);
  std::vector<double> z(V), wanted_dx(M * K), wanted_dweight(V * K), wanted_dbias(V);
  for (int64_t i = 0; i < M; ++i) {
    if (p.target[i] == -100) continue;
    double sum = 0;
    for (int64_t v = 0; v < V; ++v) {
      z[v] = p.bias[v];
      for (int64_t k = 0; k < K; ++k) z[v] += double{p.x[i * K + k]} * p.weight[v * K + k];
      sum += std::exp(z[v]);
    }
    for (int64_t v = 0; v < V; ++v) {
      double g = std::exp(z[v]) / sum - smoothing / static_cast<double>(V);
      if (v == p.target[i]) g -= 1 - smoothing;
      wanted_dbias[v] += g / count;
      for (int64_t k = 0; k < K; ++k) {
        wanted_dx[i * K + k] += g / count * p.weight[v * K + k];
        wanted_dweight[v * K + k] += g / count * p.x[i * K + k];
      }
    }
  }
  const double tolerance = 1e-5 * (1 + K / 64.0);
  for (int64_t i = 0; i < M * K; ++i) test::close(dx[i], wanted_dx[i], tolerance);
  for (int64_t i = 0; i < V * K; ++i) test::close(dweight[i], wanted_dweight[i], tolerance);
  for (int64_t v = 0; v < V; ++v) test::close(dbias[v], wanted_dbias[v], tolerance);
}

void threads_do_not_change_a_bit() {
  Problem one(70, 64, 3001), many(70, 64, 3001);
  const int threads = omp_get_max_threads();
  omp_set_num_threads(1);
  one.run(0.1f);
  omp_set_num_threads(5);
  many.run(0.1f);
  omp_set_num_threads(threads);
  if (one.loss != many.loss || one.lse != many.lse) test::failed("threads changed the result");
}

// Classes shut out by a bias of -inf count nothing, also where they fill whole tiles.
void minus_infinity_is_left_out() {
  Problem p(20, 8, 1000), rest(20, 8, 10);
  for (int64_t v = 0; v < 990; ++v) p.bias[v] = -std::numeric_limits<float>::infinity();
  for (int64_t v = 0; v < 10; ++v) {
    rest.bias[v] = p.bias[990 + v];
    for (int64_t k = 0; k < 8; ++k) rest.weight[v * 8 + k] = p.weight[(990 + v) * 8 + k];
  }
  for (int64_t i = 0; i < 20; ++i) p.target[i] = 990 + (rest.target[i] = i % 10);
  p.run(), rest.run();
  for (int64_t i = 0; i < 20; ++i) {
    test::close(p.lse[i], rest.lse[i], 1e-6);
    test::close(p.loss[i], rest.loss[i], 1e-6);
  }
}

void a_bad_target_is_named_and_nothing_is_written() {
  for (int64_t bad : {int64_t{5}, int64_t{-1}, int64_t{1} << 40}) {
    Problem p(3, 4, 5);
    p.target[2] = bad;
    test::throws("linear_cross_entropy: target[2] must be in [0, 5) or ignore_index = -100, got " +
                     std::to_string(bad),
                 [&] { p.run(); });
    for (float loss : p.loss)
      if (!std::isnan(loss)) test::failed("loss was written");
  }
}

void wrong_shapes_are_named() {
  Problem p(3, 4, 5);
  test::throws("linear_cross_entropy: weight must have shape (5, 4), got (5, 3)", [&] {
    auto args = p.args();
    args.weight.shape[1] = 3;
    linear_cross_entropy_check(args);
  });
}

}  // namespace

int main() {
  a_bad_target_is_named_and_nothing_is_written();
  wrong_shapes_are_named();
  return test::on_every_tier([] {
    // Rows around the dot form's limit, a panel and a row block; vocabularies around a block.
    for (int64_t M : {0, 1, 4, 7, 16, 17, 33, 515})
      for (int64_t V : {1, 111, 225})
        for (float smoothing : {0.0f, 0.1f}) matches_the_formula(M, 19, V, smoothing);
    matches_the_formula(3, 512, 501, 0.0f);   // K whose row stride needs a copy, by dots
    matches_the_formula(40, 512, 501, 0.0f);  // and by panels
    for (int64_t M : {1, 16, 33, 130})
      for (float smoothing : {0.0f, 0.1f}) gradients_match_the_formula(M, 19, 451, smoothing);
    gradients_match_the_formula(70, 3, 30001, 0.1f);  // groups of rows, super-blocks of words
    threads_do_not_change_a_bit();
    minus_infinity_is_left_out();
  });
}
