// The low-rank term of both gemm kernels against a double-precision loop, on every tier of this
// machine, without Python.
#include <cmath>
#include <vector>

#include "../../common/test.h"
#include "packed.h"

namespace {

using namespace cgpt;

constexpr float kScale = 0.75f;

struct Problem {
  int64_t M, K, N, rank;
  std::vector<float> x, weight, u, v, residual;
  Problem(int64_t m, int64_t k, int64_t n, int64_t r)
      : M(m), K(k), N(n), rank(r), x(m * k), weight(n * k), u(m * r), v(n * r), residual(m * n) {
    test::fill(x, 1), test::fill(weight, 2), test::fill(u, 3), test::fill(v, 4);
    test::fill(residual, 5);
  }
  // v is stored [r, N] where v_rows, as the transpose of a weight is.
  LowRankTerm term(bool v_rows) {
    LowRankTerm t{test::view(u, {M, rank}), test::view(v, {N, rank}), kScale};
    if (v_rows) t.v.strides[0] = 1, t.v.strides[1] = N;
    return t;
  }
  void check(const std::vector<float>& y, bool v_rows) const {
    const double tolerance = 2e-6 * (4 + std::sqrt(static_cast<double>(K + rank)));
    for (int64_t i = 0; i < M; ++i)
      for (int64_t n = 0; n < N; ++n) {
        double sum = 0, low = 0;
        for (int64_t k = 0; k < K; ++k) sum += double{x[i * K + k]} * weight[n * K + k];
        for (int64_t r = 0; r < rank; ++r)
          low += double{u[i * rank + r]} * v[v_rows ? r * N + n : n * rank + r];
        const double pre = sum + double{kScale} * low;
        test::close(y[i * N + n], (pre > 0 ? pre : 0) + residual[i * N + n], tolerance);
      }
  }
};

void both_kernels_add_it(int64_t M, int64_t K, int64_t N, int64_t rank, bool v_rows) {
  Problem p(M, K, N, rank);
  std::vector<float> y(M * N, NAN);
  const TensorView weight = test::view(p.weight, {N, K}), residual = test::view(p.residual, {M, N});
  GemmArgs args{test::view(p.x, {M, K}), weight,          {}, residual,
                test::view(y, {M, N}),   Activation::relu};
  args.low_rank = p.term(v_rows);
  gemm_check(args);
  gemm_fwd_cpu(args);
  p.check(y, v_rows);

  std::vector<char> buffer(static_cast<size_t>(packed_bytes(WeightFormat::f32, N, K, 64)));
  const PackWeightArgs pack{weight, false, WeightFormat::f32, 64, buffer.data()};
  pack_weight_cpu(pack);
  y.assign(y.size(), NAN);
  PackedGemmArgs packed{args.x, packed_weight_of(pack), {}, residual, args.y, Activation::relu};
  packed.low_rank = args.low_rank;
  for (int64_t first = 0; first < panel_count(N); first += 2) {  // as threads of a team do
    packed.first_panel = first;
    packed.panels = first + 2 < panel_count(N) ? 2 : panel_count(N) - first;
    packed_gemm_check(packed);
    packed_gemm_fwd_cpu(packed);
  }
  p.check(y, v_rows);
}

void wrong_factors_are_named() {
  Problem p(2, 3, 4, 5);
  std::vector<float> y(8);
  GemmArgs args{
      test::view(p.x, {2, 3}), test::view(p.weight, {4, 3}), {}, {}, test::view(y, {2, 4})};
  args.low_rank = p.term(false);
  args.low_rank.v.shape[1] = 4;
  test::throws("gemm: v must have shape (4, 5), got (4, 4)", [&] { gemm_check(args); });
  args.low_rank.u = {};
  test::throws("gemm: v needs u beside it", [&] { gemm_check(args); });
}

}  // namespace

int main() {
  wrong_factors_are_named();
  return test::on_every_tier([] {
    for (bool v_rows : {false, true}) {
      for (int64_t M : {0, 1, 7, 17, 40})
        for (int64_t N : {1, 33, 160})
          for (int64_t rank : {0, 1, 8, 19}) both_kernels_add_it(M, 50, N, rank, v_rows);
      both_kernels_add_it(150, 1700, 400, 64, v_rows);  // several blocks of K and of columns
    }
  });
}
