// hopper.cuh as g++ sees it: its names on the host implementation (hopper_host.cpp).
//
// Copies come as early as the hardware may bring them, products are made as late: at the wait. A
// stage that is released or overwritten too early, and registers that change under a product, show
// as wrong numbers; a barrier that nobody completes is reported with its thread. Accesses by TMA
// and wgmma are not seen by the search for races.
#pragma once

#include "../common/tensor_view.h"
#include "host.h"

#define CGPT_GRID_CONSTANT

namespace cgpt::cuda {

using host::Barrier;
using host::barrier_init;
using host::barrier_wait;
using host::copy_box;
using host::group_barrier;
using host::TensorMap;
using host::wgmma_end;

inline TensorMap tensor_map(const char*, const TensorView& t, int rows) {
  TensorMap map{static_cast<const uint16_t*>(t.data), {}, {}, rows};
  for (int i = 0; i < 4; ++i) map.shape[i] = t.shape[i], map.strides[i] = t.strides[i];
  return map;
}

inline void barriers_ready() {}
inline void barrier_arrive(Barrier& b) { host::barrier_arrive(b, 0); }
inline void barrier_expect(Barrier& b, int bytes) { host::barrier_arrive(b, bytes); }
template <int n>
void more_registers() {}
template <int n>
void fewer_registers() {}

inline uint64_t operand(const void* shared, int next = 16) {
  return operand_at(host::shared_offset(shared), static_cast<uint32_t>(next));
}
inline void wgmma_begin() {}
template <int kGroups>
void wgmma_wait() {
  host::wgmma_wait(kGroups);
}
template <int n>
void wgmma_result(float (&)[n]) {}
template <class T, int N>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
  host::wgmma({d, nullptr, a, b, N, add, __is_same(T, bf16)});
}
template <class T, int N>
void wgmma_rows(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
  host::wgmma({d, a, 0, b, N, true, __is_same(T, bf16)});
}

}  // namespace cgpt::cuda
