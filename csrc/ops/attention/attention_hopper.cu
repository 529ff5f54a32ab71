// Attention forward on Hopper: which calls it takes, and with which tiles. Built for sm_90a alone;
// attention_cuda.cu asks it first where csrc/cuda/hopper.h says so.
#include "../../cuda/hopper.h"
#include "attention_hopper.cuh"

namespace cgpt {
namespace {

template <class S>
void run(const AttentionArgs& a) {
  using T = typename S::T;
  const int64_t blocks = (a.q.shape[2] + S::kM - 1) / S::kM;
  const HopperMaps maps{tensor_map("attention", a.q, S::kM), tensor_map("attention", a.k, S::kN),
                        tensor_map("attention", a.v, S::kN)};
  launch("attention",
         {.grid_x = a.q.shape[0] * a.q.shape[1] * blocks,
          .threads = S::kThreads,
          .shared = kHopperBytes<S>,
          .like = a.q},
         &attention_hopper_kernel<S, T>, maps, call_of<T>(a, false), result_of<T>(a));
  ++hopper_launches;
}

// Two warp groups where a row's sums take 64 registers, three where they take fewer.
template <class T>
void with_width(const AttentionArgs& a) {
  if (a.q.shape[3] == 64) return run<HopperShape<T, 64, 3>>(a);
  if (a.q.shape[3] == 80) return run<HopperShape<T, 80, 2>>(a);
  run<HopperShape<T, 128, 2>>(a);
}

}  // namespace

bool attention_fwd_hopper(const AttentionArgs& a) {
  const int64_t D = a.q.shape[3];
  const bool taken = hopper_wanted(a.q.device_index) && a.q.dtype != DType::f32 &&
                     a.k.dtype == a.q.dtype && (D == 64 || D == 80 || D == 128) &&
                     a.k.shape[2] > 0 && !a.key_padding_mask && !a.attn_bias && !a.alibi_slopes &&
                     a.dropout_p == 0.0 && a.scale > 0.0f && mappable(a.q) && mappable(a.k) &&
                     mappable(a.v);
  if (!taken) return false;
  if (a.q.dtype == DType::bf16) with_width<bf16>(a);
  else with_width<f16>(a);
  return true;
}

}  // namespace cgpt
