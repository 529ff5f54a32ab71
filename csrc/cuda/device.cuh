// Device-side pieces: conversions of the 16-bit types and sums over a block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/dtype.h"

namespace cgpt::cuda {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }
__device__ inline float to_float(f16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
__device__ inline T from_float(float x) {
  if constexpr (sizeof(T) == 4) return x;
  else if constexpr (__is_same(T, bf16)) return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  else return {__half_as_ushort(__float2half_rn(x))};
}

constexpr int kWarp = 32;

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// The sum over a block of kThreads, given to every thread, in a fixed order. `scratch` holds one
// float per warp; calls may follow each other without a barrier between them.
template <int kThreads>
__device__ inline float block_sum(float x, float* scratch) {
  static_assert(kThreads % kWarp == 0 && kThreads <= kWarp * kWarp);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  x = warp_sum(x);
  __syncthreads();
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  return warp_sum(lane < kThreads / kWarp ? scratch[lane] : 0.0f);
}

}  // namespace cgpt::cuda
