// What a kernel may use of Hopper beyond device.cuh: barriers in shared memory that count bytes,
// copies of boxes of a tensor by the tensor memory accelerator (TMA), products of a warp group by
// wgmma. sm_90a alone has these instructions; on the host hopper_emulated.h stands for them.
//
// A warp group is 128 threads from a multiple of 128 on. Operands of wgmma lie in shared memory in
// lines of 128 bytes (64 values), 8 lines an atom of 1024 bytes, the 16-byte chunks of a line mixed
// with its number: what TMA writes under its 128-byte swizzle. A box of 64 columns and any number
// of rows is a column of such atoms.
//
//   TensorMap tensor_map(op, data, dtype, shape[4], strides[4], rows)   on the host side: boxes of
//                                    [1, 1, rows, 64] of a tensor [B, H, S, D], zeros outside it
//   bool      mappable(TensorView)   whether TMA can read it: alignment, positive strides
//   Barrier                          init(arrivals); a phase ends when all have arrived and all
//                                    expected bytes have come
//   void      barrier_init(b, arrivals) barriers_ready()      by one thread, then a block barrier
//   void      barrier_arrive(b) barrier_expect(b, bytes)      expect arrives too
//   void      barrier_wait(b, parity)         until the phase of that parity (0 first) has ended
//   void      copy_box(shared, map, b, column, row, head, batch)        by one thread
//   void      group_barrier(id, threads)      of `threads` threads, id 1 to 15
//   void      more_registers<n>() fewer_registers<n>()        by all threads of a warp group
//   uint64_t  operand(shared, next)  describes an operand; `next`: bytes from 64 of its columns to
//                                    the next 64, where the columns are not the summed dimension
//   void      wgmma<T, N>(float (&d)[N / 2], a, b, add)       d[64, N] (+)= a[64, 16] b[N, 16]^T,
//                                    a and b by operand(), the summed dimension along lines
//   void      wgmma_rows<T, N>(float (&d)[N / 2], const uint32_t (&a)[4], b)  d += a b[16, N], a in
//                                    registers as for mma, b by operand(), N along lines
//   void      wgmma_begin() wgmma_end() wgmma_wait<n>()       around a group of them; wait until at
//                                    most n groups are under way
//   void      wgmma_result(float (&d)[n])     after the wait: keeps the compiler from reading d
//                                    before
//
// Warp w of a group has rows 16 w .. 16 w + 15 of d, laid out over its lanes as by mma, N / 8
// fragments of four in a row.
#pragma once

#include "device.cuh"
#include "launch.h"

namespace cgpt::cuda {

constexpr int kGroup = 128;
constexpr int kLine = 64;  // 16-bit values of a line

// The address in units of 16 bytes, the steps from one 64 columns to the next and from one 8 lines
// to the next, and the swizzle (PTX ISA, matrix descriptor of wgmma).
__device__ inline uint64_t operand_at(uint32_t address, uint32_t next) {
  const uint64_t low = (address & 0x3ffff) >> 4 | (next >> 4) << 16;
  return low | uint64_t{1024 >> 4 | 1u << 30} << 32;
}

}  // namespace cgpt::cuda

#ifdef CGPT_CUDA_HOST
  #include "hopper_emulated.h"
#else
  #include "hopper_instructions.cuh"
#endif

namespace cgpt::cuda {

// Whether TMA can read a tensor [B, H, S, D] of 16-bit values in place.
inline bool mappable(const TensorView& t) {
  if (!aligned<16>(static_cast<const char*>(t.data))) return false;
  for (int i = 0; i < 3; ++i)
    if (t.shape[i] > 1 &&
        (t.strides[i] <= 0 || t.strides[i] % 8 != 0 || t.strides[i] >= int64_t{1} << 38))
      return false;
  return true;
}

}  // namespace cgpt::cuda
