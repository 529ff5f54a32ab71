// What a kernel may use of the machine. One source, two compilers:
//
//   nvcc   the instructions of sm_80 and later (csrc/cuda/instructions.cuh);
//   g++    a host implementation (csrc/cuda/emulated.h): each thread of a block is a fiber, and
//          barriers and warp collectives are rendezvous; threads, lanes and blocks run in an order
//          shuffled by CGPT_CUDA_HOST_SEED (0: by index). Misuse ends the launch with an error that
//          names block and thread: a barrier or a warp collective that not all threads reach,
//          shared memory beyond the launch's bytes, two unordered accesses to the same shared
//          bytes.
//
// How to write a kernel; csrc/ops/layer_norm/layer_norm_cuda.cu is the worked example.
//
//   struct Shared {                           // all shared memory of a block, in one struct
//     float scratch[kThreads / cuda::kWarp];
//     alignas(16) bf16 tile[64][72];          // rows 144 bytes apart: ldmatrix has no conflicts
//   };
//   template <class T>
//   __global__ void __launch_bounds__(kThreads) my_fwd_kernel(const Params<T> p) {
//     Shared& s = *cuda::shared<Shared>();    // of a size known at launch: cuda::shared<float>()
//     const int64_t row = cuda::block_x();    // blocks have up to three coordinates, threads one
//     for (int c = cuda::thread(); ...; c += kThreads) ...
//     const float total = cuda::block_sum<kThreads>(x, s.scratch);
//   }
//   cuda::launch("my_op", {.grid_x = rows, .threads = kThreads, .shared = sizeof(Shared),
//                          .like = args.x}, my_fwd_kernel<T>, params);
//
// Rules:
//   - <op>_cuda.cu includes this file, launch.h and <op>.h, and nothing of CUDA. threadIdx, asm,
//     __shared__, <<<>>> and intrinsics stay in csrc/cuda. expf, sqrtf, fmaf, erff, tanhf are fine.
//   - The number of threads is a multiple of 32. All 32 lanes reach every warp collective
//     (shuffle_*, ballot, warp_*, mma, ldmatrix), all threads every block_barrier: no early return
//     before the last of them.
//   - A collective orders no memory. Between lanes of a warp warp_barrier() does, between warps
//     block_barrier(). copy_async needs copy_async_wait by the thread that issued it, and then a
//     barrier before others read.
//   - Fresh shared memory is NaN on the host (0xff bytes).
//   - 16-byte accesses want 16-byte alignment: test pointers and strides with aligned<16>() in the
//     launcher and instantiate load_part<kAligned> both ways. Shapes choose the kernel and the
//     order of sums, alignment only the width of accesses: strides change no bit of a result.
//   - No atomics on results: the same inputs give the same bits. Work is divided by constants, and
//     not by the number of multiprocessors.
//   - Up to 99 KB shared memory a block runs on every sm_80 and later, 163 KB on sm_80 and sm_90.
//   - One source per op: what grows beyond 400 lines goes into headers <op>_*.cuh beside it. Each
//     template instance costs seconds under nvcc, twice (sm_80, sm_90a).
//   - `python tests/test_cuda_budget.py <op>` compiles the op for both and writes down registers
//     and instructions, which the test of that name holds it to: no spills.
//   - Outputs and workspaces are allocated by the caller: a function of ops/<op>/<op>_cuda.py.
//     Bindings: csrc/python/cuda_<op>.h, listed in cuda_kernels.h.
//
// Running it: `CGPT_CUDA=host python setup.py build_ext --inplace` builds the host implementation;
// `CGPT_CUDA_HOST=1 pytest -k cuda-my_op tests/test_ops.py` then runs the op's cases on CPU
// tensors: in such a process backend="cuda" takes CPU tensors everywhere.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/philox.h"

namespace cgpt::cuda {

constexpr int kWarp = 32;

}  // namespace cgpt::cuda

#ifdef CGPT_CUDA_HOST
  #include "emulated.h"
#else
  #include "instructions.cuh"
#endif

// Both give, in namespace cgpt::cuda:
//
//   int      thread() warp() lane() threads()       within the block; warp() = thread() / 32
//   unsigned block_x() block_y() block_z()
//   unsigned blocks_x()                             how many there are along x
//   T*       shared<T>(bytes = 0)                   the block's shared memory, from an offset on
//   void     block_barrier() warp_barrier()
//   void     grid_barrier(unsigned* state)          all threads of a cooperative launch, whose
//            global memory it orders; state: two words, 0 before the first launch;
//            not beside what hopper.cuh has
//   X        shuffle(x, lane) shuffle_xor(x, mask) shuffle_down(x, n) shuffle_up(x, n)
//                                                   X of 4 bytes: float, int, uint32_t
//   uint32_t ballot(bool)                           bit i: what lane i said
//   void     mma<T>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
//                                                   d[16, 8] += a[16, 16] b[16, 8], T bf16 or f16
//   void     ldmatrix(uint32_t (&r)[1|2|4], const void* row)     lane 8 i + j points to row j of
//            ldmatrix_trans(...)                    the 8 x 8 matrix i: 16 bytes of shared memory
//   void     copy_async<4|8|16>(void* shared, const void* global, bool valid = true)
//                                                   zeros, and no read, where not valid
//   void     copy_async_commit() copy_async_wait<n>()   wait until at most n groups are under way
//   float    to_float(T)   T from_float<T>(float)   uint32_t pack<T>(float low, float high)
//   float    exp2_fast(float)                       ex2.approx: 2 ulp
//   int      atomic_add(int*, int)  void fence()    for counters of finished blocks
//
// Fragments of mma with g = lane() / 4, t = lane() % 4, two values a register, the lower k or
// column in the low half:
//   a: {a[g][2t..], a[g + 8][2t..], a[g][2t + 8..], a[g + 8][2t + 8..]}
//   b: {b[2t..][g], b[2t + 8..][g]}
//   d: {d[g][2t], d[g][2t + 1], d[g + 8][2t], d[g + 8][2t + 1]}
// ldmatrix leaves of matrix i in r[i]: {m[g][2t], m[g][2t + 1]}, and with trans
// {m[2t][g], m[2t + 1][g]}.

namespace cgpt::cuda {

// ---- vectors ------------------------------------------------------------------------------------

// N values that move in one access of 2, 4, 8 or 16 bytes, or in several of 16.
template <class T, int N = 16 / sizeof(T)>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Vec {
  static constexpr int kSize = N;
  T value[N];

  __device__ T& operator[](int i) { return value[i]; }
  __device__ const T& operator[](int i) const { return value[i]; }
};

template <int N, class T>
__device__ inline Vec<T, N> load(const T* p) {
  if constexpr (N * sizeof(T) <= 16) {
    return read_vector<Vec<T, N>>(p);
  } else {
    constexpr int kEach = 16 / sizeof(T);
    Vec<T, N> v;
#pragma unroll
    for (int i = 0; i < N; i += kEach) {
      const auto part = read_vector<Vec<T, kEach>>(p + i);
#pragma unroll
      for (int j = 0; j < kEach; ++j) v[i + j] = part[j];
    }
    return v;
  }
}
template <class T, int N>
__device__ inline void store(T* p, const Vec<T, N>& v) {
  if constexpr (N * sizeof(T) <= 16) {
    write_vector(p, v);
  } else {
    constexpr int kEach = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < N; i += kEach) {
      Vec<T, kEach> part;
#pragma unroll
      for (int j = 0; j < kEach; ++j) part[j] = v[i + j];
      write_vector(p + i, part);
    }
  }
}
// 16 bytes.
template <class T>
__device__ inline Vec<T> load16(const T* p) {
  return load<16 / sizeof(T)>(p);
}

// N values from p on of which `count` are there (zero and no access beyond): in one access where
// kAligned, which promises p aligned and all of them or none there, else one by one.
template <bool kAligned, int N, class T>
__device__ inline Vec<T, N> load_part(const T* p, int64_t count) {
  if constexpr (kAligned) {
    return count > 0 ? load<N>(p) : Vec<T, N>{};
  } else {
    Vec<T, N> v{};
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) v[i] = p[i];
    return v;
  }
}
template <bool kAligned, class T, int N>
__device__ inline void store_part(T* p, const Vec<T, N>& v, int64_t count) {
  if constexpr (kAligned) {
    if (count > 0) store(p, v);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) p[i] = v[i];
  }
}

// ---- sums over a warp and a block ---------------------------------------------------------------

template <class F>
__device__ inline float warp_reduce(float x, F&& combine) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = combine(x, shuffle_xor(x, offset));
  return x;
}
__device__ inline float warp_sum(float x) {
  return warp_reduce(x, [](float a, float b) { return a + b; });
}
__device__ inline float warp_max(float x) {
  return warp_reduce(x, [](float a, float b) { return fmaxf(a, b); });
}
__device__ inline bool warp_any(bool x) { return ballot(x) != 0; }
__device__ inline bool warp_all(bool x) { return ballot(x) == ~0u; }

// Over a block of kThreads, given to every thread, in a fixed order. `scratch` holds one float per
// warp in shared memory; calls may follow each other without a barrier between them.
template <int kThreads, class F>
__device__ inline float block_reduce(float x, float identity, float* scratch, F&& combine) {
  static_assert(kThreads % kWarp == 0 && kThreads <= kWarp * kWarp);
  constexpr int kWarps = kThreads / kWarp;
  x = warp_reduce(x, combine);
  if constexpr (kWarps == 1) return x;
  block_barrier();
  if (lane() == 0) scratch[warp()] = x;
  block_barrier();
  return warp_reduce(lane() < kWarps ? scratch[lane()] : identity, combine);
}
template <int kThreads>
__device__ inline float block_sum(float x, float* scratch) {
  return block_reduce<kThreads>(x, 0.0f, scratch, [](float a, float b) { return a + b; });
}
// Several sums for the two barriers of one; `scratch` holds n floats per warp.
template <int kThreads, int n>
__device__ inline void block_sums(float (&x)[n], float* scratch) {
  static_assert(kThreads % kWarp == 0 && kThreads <= kWarp * kWarp);
  constexpr int kWarps = kThreads / kWarp;
#pragma unroll
  for (int i = 0; i < n; ++i) x[i] = warp_sum(x[i]);
  if constexpr (kWarps > 1) {
    block_barrier();
    if (lane() == 0)
#pragma unroll
      for (int i = 0; i < n; ++i) scratch[i * kWarps + warp()] = x[i];
    block_barrier();
#pragma unroll
    for (int i = 0; i < n; ++i)
      x[i] = warp_sum(lane() < kWarps ? scratch[i * kWarps + lane()] : 0.0f);
  }
}
template <int kThreads>
__device__ inline float block_max(float x, float* scratch) {
  return block_reduce<kThreads>(x, -INFINITY, scratch,
                                [](float a, float b) { return fmaxf(a, b); });
}

}  // namespace cgpt::cuda
