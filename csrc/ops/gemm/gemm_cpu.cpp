// y = dropout(activation(x W^T + scale u v^T + bias)) + residual on CPU, and its gradients
// (gemm_backward.h).
//
// Few rows of x (gemm_skinny.h): the weights are streamed once and used as they lie. 2 M N K FLOPs
// over K N sizeof(T) bytes: the bound is memory bandwidth.
//
// More rows: a block of W, kBlockK x (columns that fill kBlockBytes), is packed into L2 and meets
// all rows of x, kGroupRows at a time, packed too: converted, and at a stride that does not map
// every row to the same L1 sets. Packing W costs about as much as kPackRows rows of multiplication.
// Threads share nothing but what they read: each takes a rectangle of y and packs for itself.
#include "../../cpu/block_gemm.h"
#include "../../cpu/parallel.h"
#include "../../cpu/scratch.h"
#include "gemm_backward.h"
#include "gemm_skinny.h"

namespace cgpt::CGPT_TIER {
namespace {

constexpr int64_t kBlockBytes = CGPT_TIER_LEVEL >= 2 ? 524288 : 196608;
template <class C>
constexpr bool kUsesAmx = kHasAmx && sizeof(C) == 2;
template <class C>
constexpr int64_t kBlockK = kUsesAmx<C> ? 768 : 3072 / static_cast<int64_t>(sizeof(C));
template <class C>
constexpr int64_t kGroupRows = kUsesAmx<C> ? 128 : kMR;
constexpr int64_t kPackRows = 8;
// Columns of x^T packed at once: whole cache lines of x's rows, whole register tiles.
constexpr int64_t kTransposedRows = kUsesAmx<bf16> ? 128 : 8 * kMR;
// Of x^T, kept for all blocks of columns: transposing it anew for each is 3 % of a gradient of W.
constexpr int64_t kKeptBytes = int64_t{4} << 20;
// Rows accumulated in fp32 scratch while W's blocks of K pass.
constexpr int64_t kChunkRows = 512;

CGPT_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
CGPT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class C>
C* scratch(int slot, int64_t elements) {
  return static_cast<C*>(thread_scratch(slot, static_cast<size_t>(elements) * sizeof(C)));
}

// x as the kernels read it: in place where it is of compute type and each row is readable to a
// multiple of `step`, else converted into scratch.
template <class C, class T>
const C* readable_x(const GemmProblem<T>& p, int64_t step, int64_t* ldx) {
  if constexpr (__is_same(C, T))
    if (p.K % step == 0) {
      *ldx = p.ldx;
      return p.x;
    }
  *ldx = padded_k<C>(p.K);
  C* copy = scratch<C>(1, p.M * *ldx);
  pack_a(p.x, p.ldx, p.M, p.K, copy);
  return copy;
}

template <class T>
void skinny(const GemmProblem<T>& p, int64_t n0, int64_t n1) {
  using C = compute_t<T>;
  constexpr int64_t kBlock = 128;  // columns whose sums stay in L1 until they are finished
  int64_t ldx;
  const C* x = readable_x<C>(p, p.weight_kn ? 4 / sizeof(C) : 1, &ldx);
  float* c = scratch<float>(2, p.M * kBlock);
  for (int64_t n = n0; n < n1; n += kBlock) {
    const int64_t columns = smaller(kBlock, n1 - n);
    if (p.weight_kn)
      strip_gemm<kStripRows>(p.M, columns, p.K, x, ldx, p.weight + n, p.ldw, c, kBlock);
    else dot_gemm(p.M, columns, p.K, x, ldx, p.weight + n * p.ldw, p.ldw, c, kBlock);
    add_low_rank(p.low_rank, 0, p.M, n, columns, c, kBlock);
    finish(p, 0, p.M, n, columns, c, kBlock);
  }
}

template <class T>
void packed(const GemmProblem<T>& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  using C = compute_t<T>;
  constexpr int64_t kLine = 64 / sizeof(C);
  const int64_t stride_k = p.weight_kn ? p.ldw : 1, stride_n = p.weight_kn ? 1 : p.ldw;
  const int64_t steps = divide_up(p.K, kLine);
  const int64_t k_blocks = p.K > 0 ? divide_up(p.K, kBlockK<C>) : 1;
  const int64_t block_k = divide_up(steps, k_blocks) * kLine, lda = block_k + kLine;
  const int64_t panels = divide_up(n1 - n0, kNR);
  int64_t block_panels = kBlockBytes / (block_k * kNR * static_cast<int64_t>(sizeof(C)) + 1);
  block_panels = block_panels < 1 ? 1 : smaller(block_panels, panels);
  block_panels = divide_up(panels, divide_up(panels, block_panels));
  const int64_t block_n = block_panels * kNR;
  const int64_t group_rows = p.x_transposed ? kTransposedRows : kGroupRows<C>;
  const int64_t groups = divide_up(m1 - m0, group_rows);
  const int64_t group = kUsesAmx<C> ? group_rows : divide_up(m1 - m0, groups);
  const int64_t chunk = k_blocks == 1 ? group : divide_up(kChunkRows, group) * group;

  C* b = scratch<C>(0, block_k * block_n);
  const bool keeps = p.x_transposed && k_blocks == 1 &&
                     groups * group * lda * static_cast<int64_t>(sizeof(C)) <= kKeptBytes;
  C* const x_rows = scratch<C>(1, (keeps ? groups : 1) * group * lda);
  float* c = scratch<float>(2, smaller(chunk, groups * group) * block_n);
  for (int64_t n = n0; n < n1; n += block_n) {
    const int64_t columns = smaller(block_n, n1 - n);
    for (int64_t i0 = m0; i0 < m1; i0 += chunk) {
      const int64_t i1 = smaller(i0 + chunk, m1);
      for (int64_t kb = 0; kb < k_blocks; ++kb) {
        const int64_t k0 = kb * block_k, depth = smaller(block_k, p.K - k0);
        if (k_blocks > 1 || i0 == m0)
          pack_b(p.weight + k0 * stride_k + n * stride_n, stride_k, stride_n, depth, columns, b);
        for (int64_t i = i0; i < i1; i += group) {
          const int64_t rows = smaller(group, i1 - i);
          C* const a = x_rows + (keeps ? (i - m0) * lda : 0);
          if (!p.x_transposed) pack_a(p.x + i * p.ldx + k0, p.ldx, rows, depth, a, lda);
          else if (!keeps || n == n0)
            pack_a_transposed(p.x + k0 * p.ldx + i, p.ldx, rows, depth, a, lda);
          // One register tile's sums at a time, so that they are finished in L1.
          const int64_t parts = divide_up(rows, kGroupRows<C>);
          for (int64_t part = 0; part < parts; ++part) {
            const int64_t r = rows * part / parts, height = rows * (part + 1) / parts - r;
            float* out = k_blocks == 1 ? c : c + (i - i0 + r) * block_n;
            block_gemm(height, columns, depth, a + r * lda, lda, b, out, block_n, kb > 0);
            if (kb + 1 < k_blocks) continue;
            add_low_rank(p.low_rank, i + r, height, n, columns, out, block_n);
            finish(p, i + r, height, n, columns, out, block_n);
          }
        }
      }
    }
  }
}

// Rows up to which the weights are used as they lie.
template <class T>
int64_t skinny_rows(bool weight_kn) {
  return weight_kn ? kStripRows : 32;
}

template <class T>
void gemm_fwd_kernel(const GemmProblem<T>& p) {
  using C = compute_t<T>;
  if (p.M == 0 || p.N == 0) return;
  const bool few_rows = p.M <= skinny_rows<T>(p.weight_kn) && !p.x_transposed;
  // Cycles on one thread: multiplication, or reading W at 16 bytes a cycle.
  const int64_t macs = kLanes * 4 / static_cast<int64_t>(sizeof(C)) / 4 * 4;
  const int64_t multiply = p.M * p.N * (p.K + 1) / macs;
  const int64_t read = p.N * (p.K + 1) * static_cast<int64_t>(sizeof(T)) / 16;
  const int64_t cycles = multiply > read ? multiply : read;
  constexpr int64_t kCyclesPerThread = 10000;
  const int64_t threads = smaller(available_threads(), cycles / kCyclesPerThread);
  if (threads <= 1) return few_rows ? skinny(p, 0, p.N) : packed(p, 0, p.M, 0, p.N);

  // Parts of y in whole units, so that no two threads write to one cache line.
  const int64_t unit_n = few_rows ? 64 : kNR, unit_m = few_rows ? p.M : kMR;
  const int64_t units_n = divide_up(p.N, unit_n), units_m = divide_up(p.M, unit_m);
  int64_t best_m = 1, best_n = 1, best = -1;
  for (int64_t m = 1; m <= smaller(threads, units_m); ++m) {
    const int64_t n = smaller(threads / m, units_n);
    const int64_t rows = divide_up(units_m, m) * unit_m;
    // Transposing a row of x costs about as much as multiplying it by one panel.
    const int64_t cost = divide_up(units_n, n) * (rows + kPackRows) + (p.x_transposed ? rows : 0);
    if (best < 0 || cost < best) best = cost, best_m = m, best_n = n;
  }
  parallel_ranges(best_m * best_n, kParallelGrain, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t i = part / best_n, j = part % best_n;
      const int64_t m0 = smaller(p.M, units_m * i / best_m * unit_m);
      const int64_t m1 = smaller(p.M, units_m * (i + 1) / best_m * unit_m);
      const int64_t n0 = smaller(p.N, units_n * j / best_n * unit_n);
      const int64_t n1 = smaller(p.N, units_n * (j + 1) / best_n * unit_n);
      if (few_rows) skinny(p, n0, n1);
      else packed(p, m0, m1, n0, n1);
    }
  });
}

template <class T>
void gemm_bwd_kernel(const GemmBwdArgs& a) {
  const bool makes_g = a.activation != Activation::none || a.dropout_p > 0.0;
  if (makes_g || a.dbias) gemm_bwd_g(GemmGradient<T>(a));
  const TensorView& g = makes_g ? a.g : a.dy;
  if (a.dx) {  // dx = g W: the forward with the weight's other layout
    GemmArgs product{g, a.weight, {}, {}, a.dx};
    product.weight_kn = !a.weight_kn;
    gemm_fwd_kernel(GemmProblem<T>(product));
  }
  if (a.dweight) {  // g^T x, or x^T g
    GemmArgs product{a.dweight_kn ? a.x : g, a.dweight_kn ? g : a.x, {}, {}, a.dweight};
    product.weight_kn = true;
    GemmProblem<T> p(product);
    p.M = a.dweight.shape[0], p.K = g.shape[0], p.x_transposed = true;
    gemm_fwd_kernel(p);
  }
}

}  // namespace

void gemm_fwd(const GemmArgs& a) {
  if (a.x.dtype == DType::f32) gemm_fwd_kernel(GemmProblem<float>(a));
  if (a.x.dtype == DType::bf16) gemm_fwd_kernel(GemmProblem<bf16>(a));
  if (a.x.dtype == DType::f16) gemm_fwd_kernel(GemmProblem<f16>(a));
}

void gemm_bwd(const GemmBwdArgs& a) {
  if (a.x.dtype == DType::f32) gemm_bwd_kernel<float>(a);
  if (a.x.dtype == DType::bf16) gemm_bwd_kernel<bf16>(a);
  if (a.x.dtype == DType::f16) gemm_bwd_kernel<f16>(a);
}

}  // namespace cgpt::CGPT_TIER
