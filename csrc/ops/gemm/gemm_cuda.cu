// gemm on CUDA: which kernel makes a product, and how it is launched.
//
//   gemm_mma.cuh             bf16, fp16: tiles on tensor cores
//   gemm_rows.cuh            bf16, fp16, at most 16 rows of x: bound by reading the weight
//   gemm_packed.cuh          int8 and int4 weights beside those
//   gemm_float.cuh           fp32: tiles on the FMA units
//   gemm_float_rows.cuh      fp32, at most 16 rows of x
//   gemm_activation_bwd.cuh  what comes before the two products of a backward
//
// Forward: y = x W^T. Backward: dx = g W and dW = g^T x (x^T g where W is [K, N]), the same kernels
// with the factors read along other strides.
#include "../../cuda/launch.h"
#include "../../cuda/shares.cuh"
#include "gemm_activation_bwd.cuh"
#include "gemm_float.cuh"
#include "gemm_float_rows.cuh"
#include "gemm_mma.cuh"
#include "gemm_packed.cuh"
#include "gemm_rows.cuh"

namespace cgpt {
namespace {

int64_t tiles(int64_t rows, int64_t each) { return (rows + each - 1) / each; }

// Large tiles from as many of them on as an A100 has multiprocessors; below that the small ones
// keep more of them busy. Unmeasured.
constexpr int64_t kEnoughTiles = 108;

template <class T>
bool vectors(const TensorView& v) {
  return v.shape[1] % 8 == 0 && aligned<16>(v.as<T>(), v.strides[0]);
}

// Dense along K where it can be, unless the other factor is not: that pair has no kernel.
bool is_dense_k(const TensorView& v, bool rather) {
  const bool k = v.shape[1] <= 1 || v.strides[1] == 1, rows = v.shape[0] <= 1 || v.strides[0] == 1;
  return rather ? k : k && !rows;
}

template <class T>
Operand<T> operand_of(const TensorView& v, bool dense_k) {
  Operand<T> o{v.as<T>(), v.shape[0], v.strides[0], v.strides[1], false};
  // a dimension of size 1 may have any stride
  (dense_k ? o.k_stride : o.row_stride) = 1;
  o.vectors = dense_k ? v.shape[1] % 8 == 0 && aligned<16>(o.data, o.row_stride)
                      : v.shape[0] % 8 == 0 && aligned<16>(o.data, o.k_stride);
  return o;
}

template <class T, class Tile, bool kDenseA, bool kDenseB>
void launch_mma(const Product<T>& p, const TensorView& like) {
  launch("gemm",
         {.grid_x = tiles(p.a.rows, Tile::kM) * tiles(p.b.rows, Tile::kN),
          .threads = kMmaThreads,
          .shared = kMmaShared<Tile>,
          .like = like},
         &gemm_mma_kernel<T, Tile, kDenseA, kDenseB>, p);
}

template <class T, bool kDenseA, bool kDenseB>
void launch_tiles(const Product<T>& p, const TensorView& like) {
  const bool large =
      tiles(p.a.rows, LargeTile::kM) * tiles(p.b.rows, LargeTile::kN) >= kEnoughTiles &&
      p.a.vectors && p.b.vectors;
  if (large) launch_mma<T, LargeTile, kDenseA, kDenseB>(p, like);
  else launch_mma<T, SmallTile, kDenseA, kDenseB>(p, like);
}

template <class T, bool kDenseK>
void launch_rows(const Product<T>& p, const TensorView& like) {
  constexpr int kColumns = kRowsColumns<kDenseK>;
  const auto go = [&](auto kernel) {
    launch("gemm",
           {.grid_x = tiles(p.b.rows, kColumns),
            .threads = kRowsThreads,
            .shared = kRowsWarps * kFewRows * kColumns * 4,
            .like = like},
           kernel, p);
  };
  if (p.a.vectors && p.b.vectors) go(&gemm_rows_kernel<T, kDenseK, true>);
  else go(&gemm_rows_kernel<T, kDenseK, false>);
}

template <bool kDenseK>
void launch_float_rows(const Product<float>& p, const TensorView& like) {
  const auto go = [&](auto kernel) {
    launch("gemm",
           {.grid_x = tiles(p.a.rows, kFloatRows) * tiles(p.b.rows, kFloatRowsColumns<kDenseK>),
            .threads = kFloatRowsThreads,
            .shared = kFloatRowsShared<kDenseK>,
            .like = like},
           kernel, p);
  };
  if (p.a.vectors && p.b.vectors) go(&gemm_float_rows_kernel<kDenseK, true>);
  else go(&gemm_float_rows_kernel<kDenseK, false>);
}

template <class T>
void set_epilogue(Product<T>& p, const GemmProductArgs& args) {
  if (args.bias && args.bias.dtype == DType::f32) p.bias_f32 = args.bias.as<const float>();
  else if (args.bias) p.bias = args.bias.as<const T>();
  p.vectors = vectors<T>(args.y) && aligned<16>(args.bias.as<char>());
  p.y = args.y.as<T>(), p.y_stride = args.y.strides[0];
  if (args.residual) {
    p.residual = args.residual.as<const T>(), p.residual_stride = args.residual.strides[0];
    p.vectors = p.vectors && vectors<T>(args.residual);
  }
  if (args.pre) {
    p.pre = args.pre.as<T>(), p.pre_stride = args.pre.strides[0];
    p.vectors = p.vectors && vectors<T>(args.pre);
  }
  p.activation = args.activation;
}

template <class T>
void product(const GemmProductArgs& args) {
  const TensorView &a = args.a, &b = args.b;
  const bool dense_a = is_dense_k(a, true), dense_b = is_dense_k(b, dense_a);
  Product<T> p{};
  p.a = operand_of<T>(a, dense_a);
  p.b = operand_of<T>(b, dense_b);
  p.K = a.shape[1];
  set_epilogue(p, args);
  const bool few = dense_a && p.a.rows <= kFewRows;
  if constexpr (sizeof(T) == 4) {
    if (few && dense_b) return launch_float_rows<true>(p, a);
    if (few) return launch_float_rows<false>(p, a);
    launch("gemm",
           {.grid_x = tiles(p.a.rows, kFloatTile) * tiles(p.b.rows, kFloatTile),
            .threads = kFloatThreads,
            .shared = kFloatShared,
            .like = a},
           &gemm_float_kernel, p);
  } else {
    if (!dense_a && dense_b) fail("gemm: x may be dense along M only where weight is along N");
    if (few && dense_b) return launch_rows<T, true>(p, a);
    if (few) return launch_rows<T, false>(p, a);
#ifdef CGPT_CUTLASS
    if (p.a.vectors && p.b.vectors && p.vectors && gemm_product_hopper(args, dense_a, dense_b))
      return;
#endif
    if (!dense_a) {
      launch_tiles<T, false, false>(p, a);
    } else if (dense_b) {
      launch_tiles<T, true, true>(p, a);
    } else {
      launch_tiles<T, true, false>(p, a);
    }
  }
}

template <class T, bool kInt4>
void packed_product(const PackedGemmCudaArgs& args) {
  const GemmProductArgs& g = args.product;
  const PackedWeight& w = args.weight;
  PackedProduct<T> q{};
  q.packed = static_cast<const uint8_t*>(w.data);
  q.panel_bytes = panel_bytes(w.format, w.K, w.group);
  q.padded_k = packed_k(w.format, w.K, w.group);
  q.group = static_cast<int>(w.group);
  q.p.K = w.K;
  q.p.a = {g.a.as<const T>(), g.a.shape[0], g.a.strides[0], 1,
           w.K % 8 == 0 && aligned<16>(g.a.as<T>(), g.a.strides[0])};
  q.p.b.rows = w.N;
  if (g.a.shape[0] > kPackedCudaRows) {
    q.p.vectors = vectors<T>(g.b);
    launch("packed_gemm",
           {.grid_x = panel_count(w.N),
            .grid_y = (w.K + 8 * kPackedWarps - 1) / (8 * kPackedWarps),
            .threads = kPackedThreads,
            .like = g.a},
           &unpack_kernel<T, kInt4>, q, g.b.as<T>(), g.b.strides[0]);
    return product<T>(g);
  }
  set_epilogue(q.p, g);
  launch("packed_gemm",
         {.grid_x = panel_count(w.N),
          .threads = kPackedThreads,
          .shared = kPackedWarps * kPackedCudaRows * kPanel * 4,
          .like = g.a},
         &packed_gemm_rows_kernel<T, kInt4>, q);
}

template <class T>
void activation_bwd(const GemmActivationBwdArgs& args) {
  Slope<T> p{};
  p.dy = args.dy.as<const T>(), p.dy_stride = args.dy.strides[0];
  p.M = args.dy.shape[0], p.N = args.dy.shape[1];
  p.activation = args.activation;
  bool aligned_all = vectors<T>(args.dy);
  if (args.pre) {
    p.pre = args.pre.as<const T>(), p.pre_stride = args.pre.strides[0];
    p.g = args.g.as<T>(), p.g_stride = args.g.strides[0];
    aligned_all = aligned_all && vectors<T>(args.pre) && vectors<T>(args.g);
  }
  if (args.shares) p.shares = args.shares.as<float>();
  const auto go = [&](auto kernel) {
    launch("gemm_bwd",
           {.grid_x = gemm_bwd_shares(p.M),
            .grid_y = tiles(p.N, kSlopeColumns),
            .threads = kSlopeThreads,
            .shared = kSlopeThreads / kWarp * kSlopeColumns * 4,
            .like = args.dy},
           kernel, p);
  };
  if (aligned_all) go(&gemm_activation_bwd_kernel<T, true>);
  else go(&gemm_activation_bwd_kernel<T, false>);
  if (!args.dbias) return;
  const ShareSum sum{p.shares, args.dbias.data, args.dbias.dtype};
  add_shares("gemm_bwd", {{sum, {}}, gemm_bwd_shares(p.M), p.N}, args.dy);
}

}  // namespace

void gemm_product_cuda(const GemmProductArgs& args) {
  if (args.y.numel() == 0) return;
  if (args.a.dtype == DType::f32) product<float>(args);
  if (args.a.dtype == DType::bf16) product<bf16>(args);
  if (args.a.dtype == DType::f16) product<f16>(args);
}

void packed_gemm_cuda(const PackedGemmCudaArgs& args) {
  if (args.product.y.numel() == 0) return;
  const bool int4 = args.weight.format == WeightFormat::int4;
  if (args.product.a.dtype == DType::bf16)
    int4 ? packed_product<bf16, true>(args) : packed_product<bf16, false>(args);
  if (args.product.a.dtype == DType::f16)
    int4 ? packed_product<f16, true>(args) : packed_product<f16, false>(args);
}

void gemm_activation_bwd_cuda(const GemmActivationBwdArgs& args) {
  if (args.dy.dtype == DType::f32) activation_bwd<float>(args);
  if (args.dy.dtype == DType::bf16) activation_bwd<bf16>(args);
  if (args.dy.dtype == DType::f16) activation_bwd<f16>(args);
}

}  // namespace cgpt
