// The machine as nvcc sees it: one instruction behind each name of device.cuh. sm_80 and later.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/dtype.h"

namespace cgpt::cuda {

// ---- where a thread is --------------------------------------------------------------------------

__device__ inline int thread() { return static_cast<int>(threadIdx.x); }
__device__ inline int threads() { return static_cast<int>(blockDim.x); }
__device__ inline int warp() { return thread() / kWarp; }
__device__ inline int lane() { return thread() % kWarp; }
__device__ inline unsigned block_x() { return blockIdx.x; }
__device__ inline unsigned block_y() { return blockIdx.y; }
__device__ inline unsigned block_z() { return blockIdx.z; }
__device__ inline unsigned blocks_x() { return gridDim.x; }

// ---- memory -------------------------------------------------------------------------------------

template <class T>
__device__ inline T* shared(int64_t bytes = 0) {
  extern __shared__ __align__(128) unsigned char cgpt_shared_memory[];
  return reinterpret_cast<T*>(cgpt_shared_memory + bytes);
}

template <int kBytes>
struct Raw;
template <>
struct Raw<2> {
  using type = uint16_t;
};
template <>
struct Raw<4> {
  using type = uint32_t;
};
template <>
struct Raw<8> {
  using type = uint2;
};
template <>
struct Raw<16> {
  using type = uint4;
};

template <class V, class T>
__device__ inline V read_vector(const T* p) {
  using R = typename Raw<sizeof(V)>::type;
  const R raw = *reinterpret_cast<const R*>(p);
  V v;
  *reinterpret_cast<R*>(&v) = raw;
  return v;
}
template <class T, class V>
__device__ inline void write_vector(T* p, const V& v) {
  using R = typename Raw<sizeof(V)>::type;
  *reinterpret_cast<R*>(p) = *reinterpret_cast<const R*>(&v);
}

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes go past L1, which holds nothing for shared memory's sake.
template <int kBytes>
__device__ inline void copy_async(void* shared, const void* global, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
                 "l"(global), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared_address(shared)),
                 "l"(global), "n"(kBytes), "r"(bytes)
                 : "memory");
}
__device__ inline void copy_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
template <int kGroups>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kGroups) : "memory");
}

__device__ inline int atomic_add(int* p, int n) { return atomicAdd(p, n); }
__device__ inline void fence() { __threadfence(); }

// ---- block and warp -----------------------------------------------------------------------------

__device__ inline void block_barrier() { __syncthreads(); }
__device__ inline void warp_barrier() { __syncwarp(); }

// state: {blocks that have arrived, turns so far}. A block's first thread arrives for all of them;
// what the block barriers before and after order, release and acquire carry from block to block.
__device__ inline void grid_barrier(unsigned* state) {
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned turn, before, now;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(turn) : "l"(state + 1) : "memory");
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;\n"
                 : "=r"(before)
                 : "l"(state)
                 : "memory");
    if (before + 1 == gridDim.x) {
      asm volatile("st.relaxed.gpu.global.u32 [%0], 0;\n" ::"l"(state) : "memory");
      asm volatile("st.release.gpu.global.u32 [%0], %1;\n" ::"l"(state + 1), "r"(turn + 1)
                   : "memory");
    } else {
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n"
                     : "=r"(now)
                     : "l"(state + 1)
                     : "memory");
      } while (now == turn);
    }
  }
  __syncthreads();
}

template <class X>
__device__ inline X shuffle(X x, int from) {
  return __shfl_sync(~0u, x, from);
}
template <class X>
__device__ inline X shuffle_xor(X x, int mask) {
  return __shfl_xor_sync(~0u, x, mask);
}
template <class X>
__device__ inline X shuffle_down(X x, int n) {
  return __shfl_down_sync(~0u, x, static_cast<unsigned>(n));
}
template <class X>
__device__ inline X shuffle_up(X x, int n) {
  return __shfl_up_sync(~0u, x, static_cast<unsigned>(n));
}
__device__ inline uint32_t ballot(bool x) { return __ballot_sync(~0u, x); }

template <class T>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (__is_same(T, bf16))
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9},"
        " {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9},"
        " {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#define CGPT_LDMATRIX(name, trans)                                                          \
  __device__ inline void name(uint32_t (&r)[1], const void* row) {                          \
    asm volatile("ldmatrix.sync.aligned.m8n8.x1" trans ".shared.b16 {%0}, [%1];\n"          \
                 : "=r"(r[0])                                                               \
                 : "r"(shared_address(row))                                                 \
                 : "memory");                                                               \
  }                                                                                         \
  __device__ inline void name(uint32_t (&r)[2], const void* row) {                          \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" trans ".shared.b16 {%0,%1}, [%2];\n"       \
                 : "=r"(r[0]), "=r"(r[1])                                                   \
                 : "r"(shared_address(row))                                                 \
                 : "memory");                                                               \
  }                                                                                         \
  __device__ inline void name(uint32_t (&r)[4], const void* row) {                          \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" trans ".shared.b16 {%0,%1,%2,%3}, [%4];\n" \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                           \
                 : "r"(shared_address(row))                                                 \
                 : "memory");                                                               \
  }
CGPT_LDMATRIX(ldmatrix, "")
CGPT_LDMATRIX(ldmatrix_trans, ".trans")
#undef CGPT_LDMATRIX

// ---- numbers ------------------------------------------------------------------------------------

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }
__device__ inline float to_float(f16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
__device__ inline T from_float(float x) {
  if constexpr (sizeof(T) == 4) return x;
  else if constexpr (__is_same(T, bf16)) return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  else return {__half_as_ushort(__float2half_rn(x))};
}

template <class T>
__device__ inline uint32_t pack(float low, float high) {
  uint32_t r;
  if constexpr (__is_same(T, bf16))
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(r) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace cgpt::cuda
