// Attention on CUDA: which kernel takes a call, with which tiles.
//
// The tiles are chosen so that the registers of a thread hold the sums (255 at most, no spills) and
// a block's shared memory stays below 99 KB, what every processor from sm_80 on has. None of the
// choices is measured: no GPU was at hand.
#include "attention_cuda_bwd.cuh"
#include "attention_cuda_decode.cuh"
#include "attention_cuda_fwd.cuh"

namespace cgpt {
namespace {

// D is padded with zeros to the next width that has kernels.
template <class T, class F>
void with_width(int64_t D, F&& f) {
  if (D <= 64) return f.template operator()<64>();
  if (sizeof(T) == 2 && D <= 80) return f.template operator()<sizeof(T) == 2 ? 80 : 128>();
  if (D <= 128) return f.template operator()<128>();
  f.template operator()<256>();
}

// Shape<T, D, warps, 16-row tiles of a warp, streamed rows>. A multiprocessor of sm_80 reads 128
// bytes of shared memory a clock and takes two clocks for a mma: with one tile of 16 rows a warp
// the two balance, with two the products are the limit.
template <class T, int kD>
struct Tiles {
  using Fwd = Shape<T, kD, 4, kD <= 80 ? 2 : 1,
                    kD <= 64    ? 48
                    : kD <= 80  ? 32
                    : kD <= 128 ? 64
                                : 32>;
  using Bwd = Shape<T, kD, 4, 1, kD == 80 ? 48 : kD <= 128 ? 32 : 16>;
  using Dbias = Shape<T, kD, 4, 1, kD <= 64 ? 64 : Bwd::kN>;
};
template <int kD>
struct Tiles<float, kD> {
  using Fwd = Shape<float, kD, kD <= 128 ? 4 : 2, 1, kD <= 64 ? 32 : kD <= 128 ? 16 : 8>;
  using Bwd = Shape<float, kD, kD <= 64 ? 4 : 2, 1, kD <= 64 ? 32 : kD <= 128 ? 16 : 8>;
  using Dbias = Bwd;
};

constexpr int64_t kSharedEverywhere = 99 * 1024;

template <class S, int kHeld, class Kernel, class... P>
void go(const AttentionArgs& a, int64_t blocks, int64_t grid_y, Kernel kernel, const P&... params) {
  using Bytes = Shared<S, kHeld>;
  static_assert(sizeof(Bytes) <= kSharedEverywhere);
  launch("attention",
         {.grid_x = blocks,
          .grid_y = grid_y,
          .threads = S::kThreads,
          .shared = sizeof(Bytes),
          .like = a.q},
         kernel, params...);
}

int64_t over(int64_t n, int64_t size) { return (n + size - 1) / size; }

template <class KV>
Stored<KV> stored_of(const AttentionArgs& a) {
  return {heads_of<const KV>(a.k),     heads_of<const KV>(a.v), a.k_scale.as<const float>(),
          a.v_scale.as<const float>(), a.k_scale.strides[0],    a.k_scale.strides[1],
          a.v_scale.strides[0],        a.v_scale.strides[1]};
}

template <class T>
void forward(const AttentionArgs& a, float* work) {
  const int64_t B = a.q.shape[0], H = a.q.shape[1], S_q = a.q.shape[2], D = a.q.shape[3];
  const int64_t S_k = a.k.shape[2], rows = B * H * S_q;
  const Result<T> result = result_of<T>(a);
  if (S_q > kAttentionFewQueries) {
    if (a.k_scale) fail("attention: keys in int8 take at most 8 queries on cuda");
#ifdef CGPT_HOPPER
    if (attention_fwd_hopper(a)) return;
#endif
    const auto c = call_of<T>(a, false);
    return with_width<T>(D, [&]<int kD>() {
      using S = typename Tiles<T, kD>::Fwd;
      go<S, 1>(a, B * H * over(S_q, S::kM), 1, &attention_fwd_kernel<S, T>, c, result);
    });
  }
  Parts parts{};
  parts.rows = rows;
  parts.chunk = static_cast<int>(attention_chunk(S_k));
  parts.chunks = static_cast<int>(attention_chunks(S_q, S_k));
  parts.lanes = lanes_of(D);
  parts.sums = work;
  if (work) {
    parts.top = work + parts.chunks * rows * D;
    parts.total = parts.top + parts.chunks * rows;
  }
  const auto c = call_of<T>(a, true);
  const auto go = [&](const auto& kv, auto kernel) {
    launch("attention",
           {.grid_x = rows,
            .grid_y = parts.chunks,
            .threads = kDecodeThreads,
            .shared = sizeof(DecodeShared),
            .like = a.q},
           kernel, c, kv, result, parts);
  };
  if (a.k_scale) go(stored_of<int8_t>(a), &attention_decode_kernel<T, int8_t>);
  else go(stored_of<T>(a), &attention_decode_kernel<T, T>);
  if (parts.chunks > 1)
    launch("attention", {.grid_x = rows, .threads = kDecodeThreads, .like = a.q},
           &attention_join_kernel<T>, c, result, parts);
}

template <class T>
void backward(const AttentionGradArgs& a) {
  const AttentionArgs& f = a.fwd;
  const int64_t B = f.q.shape[0], H = f.q.shape[1], S_q = f.q.shape[2], D = f.q.shape[3];
  const int64_t S_k = f.k.shape[2], rows = B * H * S_q;
  const auto c = call_of<T>(f, true);
  Gradients<T> grad{};
  grad.dout = heads_of<const T>(a.dout), grad.out = heads_of<const T>(f.out);
  grad.dq = heads_of<T>(a.dq), grad.dk = heads_of<T>(a.dk), grad.dv = heads_of<T>(a.dv);
  grad.lse = f.lse.as<const float>();
  grad.lse_b = f.lse.strides[0], grad.lse_h = f.lse.strides[1], grad.lse_s = f.lse.strides[2];
  grad.top = a.stats.as<float>(), grad.share = grad.top + rows, grad.delta = grad.share + rows;
  grad.B = static_cast<int>(B);
  grad.exact = sizeof(T) == 4 || adds_bias(f);
  if (a.dbias) {
    grad.dbias = a.dbias.as<float>();
    grad.bias_B = static_cast<int>(a.dbias.shape[0]);
    grad.bias_H = static_cast<int>(a.dbias.shape[1]);
  }
  with_width<T>(D, [&]<int kD>() {
    using S = typename Tiles<T, kD>::Bwd;
    go<S, 2>(f, B * H * over(S_q, S::kM), 1, &attention_dq_kernel<S, T>, c, grad);
    go<S, 2>(f, B * H * over(S_k, S::kM), over(D, S::kOut), &attention_dkdv_kernel<S, T>, c, grad);
    if (!a.dbias) return;
    using Tile = typename Tiles<T, kD>::Dbias;
    go<Tile, 2>(f, grad.bias_B * grad.bias_H * over(S_q, Tile::kM) * over(S_k, Tile::kN), 1,
                &attention_dbias_kernel<Tile, T>, c, grad);
  });
}

}  // namespace

void attention_fwd_cuda(const AttentionArgs& args, float* work) {
  if (args.q.numel() == 0) return;
  if (args.q.dtype == DType::f32) forward<float>(args, work);
  if (args.q.dtype == DType::bf16) forward<bf16>(args, work);
  if (args.q.dtype == DType::f16) forward<f16>(args, work);
}

void attention_bwd_cuda(const AttentionGradArgs& args) {
  if (args.fwd.q.numel() == 0 || args.fwd.k.numel() == 0) return;
  if (args.fwd.q.dtype == DType::f32) backward<float>(args);
  if (args.fwd.q.dtype == DType::bf16) backward<bf16>(args);
  if (args.fwd.q.dtype == DType::f16) backward<f16>(args);
}

}  // namespace cgpt
