// The machine as g++ sees it: the names of device.cuh on the host implementation.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/dtype.h"
#include "host.h"

#define __global__
#define __device__
#define __launch_bounds__(...)

namespace cgpt::cuda {

inline int thread() { return host::current->index; }
inline int threads() { return host::place.threads; }
inline int warp() { return host::current->warp; }
inline int lane() { return host::current->lane; }
inline unsigned block_x() { return host::place.block[0]; }
inline unsigned block_y() { return host::place.block[1]; }
inline unsigned block_z() { return host::place.block[2]; }
inline unsigned blocks_x() { return host::place.grid[0]; }

template <class T>
T* shared(int64_t bytes = 0) {
  return reinterpret_cast<T*>(host::place.shared + bytes);
}

// A type that moves in one access, so that the compiler's instrumentation sees one.
template <int kBytes>
struct Raw {
  typedef uint32_t type __attribute__((vector_size(kBytes), may_alias));
};
template <>
struct Raw<2> {
  typedef uint16_t type __attribute__((may_alias));
};

inline void check_alignment(const void* p, int bytes) {
  if (reinterpret_cast<uintptr_t>(p) % static_cast<unsigned>(bytes) != 0)
    host::misuse("an access of " + std::to_string(bytes) + " bytes is not aligned");
}

template <class V, class T>
V read_vector(const T* p) {
  check_alignment(p, sizeof(V));
  const auto raw = *reinterpret_cast<const typename Raw<sizeof(V)>::type*>(p);
  return __builtin_bit_cast(V, raw);
}
template <class T, class V>
void write_vector(T* p, const V& v) {
  check_alignment(p, sizeof(V));
  using R = typename Raw<sizeof(V)>::type;
  *reinterpret_cast<R*>(p) = __builtin_bit_cast(R, v);
}

template <int kBytes>
void copy_async(void* shared, const void* global, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  check_alignment(shared, kBytes);
  check_alignment(global, kBytes);
  host::copy_async(shared, global, kBytes, valid);
}
inline void copy_async_commit() { host::copy_async_commit(); }
template <int kGroups>
void copy_async_wait() {
  host::copy_async_wait(kGroups);
}
inline int atomic_add(int* p, int n) { return host::atomic_add(p, n); }
inline void fence() {}  // one thread runs at a time

inline void block_barrier() { host::block_barrier(); }
inline void grid_barrier(unsigned*) { host::grid_barrier(); }
inline void warp_barrier() { host::warp_barrier(); }

template <class X>
X shuffle_of(host::Shuffle kind, X x, int operand) {
  static_assert(sizeof(X) == 4);
  return __builtin_bit_cast(X, host::shuffle(kind, __builtin_bit_cast(uint32_t, x), operand));
}
template <class X>
X shuffle(X x, int from) {
  return shuffle_of(host::Shuffle::index, x, from);
}
template <class X>
X shuffle_xor(X x, int mask) {
  return shuffle_of(host::Shuffle::exclusive_or, x, mask);
}
template <class X>
X shuffle_down(X x, int n) {
  return shuffle_of(host::Shuffle::down, x, n);
}
template <class X>
X shuffle_up(X x, int n) {
  return shuffle_of(host::Shuffle::up, x, n);
}
inline uint32_t ballot(bool x) { return host::ballot(x); }

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (__is_same(T, bf16)) host::mma_bf16(d, a, b);
  else host::mma_f16(d, a, b);
}
template <int kMatrices>
void ldmatrix(uint32_t (&r)[kMatrices], const void* row) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);
  host::ldmatrix(r, kMatrices, false, row);
}
template <int kMatrices>
void ldmatrix_trans(uint32_t (&r)[kMatrices], const void* row) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);
  host::ldmatrix(r, kMatrices, true, row);
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return __builtin_bit_cast(float, uint32_t{x.bits} << 16); }
inline float to_float(f16 x) { return host::to_float(x.bits); }

// Round to nearest even; NaN stays NaN.
inline uint16_t bf16_bits(float x) {
  const uint32_t u = __builtin_bit_cast(uint32_t, x);
  if (x != x) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
template <class T>
T from_float(float x) {
  if constexpr (sizeof(T) == 4) return x;
  else if constexpr (__is_same(T, bf16)) return {bf16_bits(x)};
  else return {host::to_f16(x)};
}
template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t{from_float<T>(high).bits} << 16;
}

inline float exp2_fast(float x) { return ::exp2f(x); }

}  // namespace cgpt::cuda
