// What the CUDA kernels of attention take beyond the contract: work space, and the gradients.
#pragma once

#include "attention.h"

namespace cgpt {

// Widest head: its sums lie in the registers of a warp.
constexpr int64_t kAttentionWidest = 256;

// Up to so many queries each row of q streams the keys by itself (attention_cuda_decode.cuh).
constexpr int64_t kAttentionFewQueries = 8;

// Keys of one chunk of those: a function of S_k alone, so that a sequence gets the same bits
// whatever else is in its batch. 128 keys of 64 in bf16 are 32 KB to read, ten times what the part
// costs to write and join; never more than 64 chunks.
inline int64_t attention_chunk(int64_t S_k) {
  const int64_t least = 128, most_chunks = 64;
  const int64_t chunk = (S_k + most_chunks - 1) / most_chunks;
  return chunk <= least ? least : (chunk + least - 1) / least * least;
}
inline int64_t attention_chunks(int64_t S_q, int64_t S_k) {
  if (S_q > kAttentionFewQueries || S_k == 0) return 1;
  const int64_t chunk = attention_chunk(S_k);
  return (S_k + chunk - 1) / chunk;
}
// Floats of work space for each row of q: D sums, the maximum and the total of each chunk.
inline int64_t attention_work(int64_t S_q, int64_t S_k, int64_t D) {
  const int64_t chunks = attention_chunks(S_q, S_k);
  return chunks > 1 ? chunks * (D + 2) : 0;
}

struct AttentionGradArgs {
  AttentionArgs fwd;  // as the forward had it, out and lse as it left them
  TensorView dout;    // [B, H, S_q, D] T
  TensorView dq;      // [B, H, S_q, D] T
  TensorView dk;      // [B, H, S_k, D] T
  TensorView dv;      // [B, H, S_k, D] T
  TensorView stats;   // [3, B, H, S_q] fp32 to work in, dense
  // [b, h, S_q, S_k] fp32, dense, b and h those of the bias before it was expanded or 1: the
  // gradient of attn_bias summed over the batch and heads that share it; or none
  TensorView dbias;
};

}  // namespace cgpt

#include <tuple>

#include "../../common/check.h"

namespace cgpt {

inline void attention_cuda_check(const AttentionArgs& a, Device device) {
  attention_check(a, device);
  const Checker c{"attention", device};
  c.require(a.q.shape[3] <= kAttentionWidest,
            [&] { return "D must be at most 256, got " + std::to_string(a.q.shape[3]); });
  for (const TensorView* t : {&a.q, &a.k})
    c.require(t->shape[2] < int64_t{1} << 30,
              [&] { return "a sequence must be below 2^30, got " + shape_text(*t); });
}

inline void attention_grad_check(const AttentionGradArgs& a, Device device) {
  attention_cuda_check(a.fwd, device);
  const Checker c{"attention_bwd", device};
  const TensorView &q = a.fwd.q, &k = a.fwd.k;
  const int64_t B = q.shape[0], H = q.shape[1], S_q = q.shape[2], S_k = k.shape[2];
  for (const auto& [name, t, like] :
       {std::tuple<const char*, const TensorView*, const TensorView*>{"dout", &a.dout, &q},
        {"dq", &a.dq, &q},
        {"dk", &a.dk, &k},
        {"dv", &a.dv, &k}}) {
    c.tensor(name, *t, {B, H, like->shape[2], q.shape[3]});
    c.dtype(name, *t, {q.dtype});
    c.dense_rows(name, *t);
  }
  const auto dense = [&](const char* name, const TensorView& t) {
    c.dtype(name, t, {DType::f32});
    c.require(!t || t.numel() == 0 || flat_of(t).ndim == 1,
              [&] { return std::string(name) + " must be dense"; });
  };
  c.require(static_cast<bool>(a.fwd.lse), "lse is missing");
  c.tensor("stats", a.stats, {3, B, H, S_q});
  dense("stats", a.stats);
  if (!a.dbias) return;
  c.require(a.dbias.ndim == 4 && a.dbias.shape[0] >= 1 && a.dbias.shape[1] >= 1 &&
                B % a.dbias.shape[0] == 0 && H % a.dbias.shape[1] == 0,
            [&] { return "dbias must have 4 dimensions, got " + shape_text(a.dbias); });
  c.tensor("dbias", a.dbias, {a.dbias.shape[0], a.dbias.shape[1], S_q, S_k});
  dense("dbias", a.dbias);
}

// Where CUDA sources are built. `work` holds B * H * S_q * attention_work(...) floats.
void attention_fwd_cuda(const AttentionArgs& args, float* work);
void attention_bwd_cuda(const AttentionGradArgs& args);

// Runs the forward on Hopper's own instructions and returns true, or does nothing and returns false
// (attention_hopper.cu).
bool attention_fwd_hopper(const AttentionArgs& args);

}  // namespace cgpt
