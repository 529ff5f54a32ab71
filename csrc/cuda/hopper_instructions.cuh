// hopper.cuh as nvcc sees it: one instruction behind each name. sm_90a.
#pragma once

#include <cuda.h>  // types; the library is asked for its one function at run time

namespace cgpt::cuda {

// ---- tensor maps --------------------------------------------------------------------------------

using TensorMap = CUtensorMap;
// A kernel's parameter that lies where TMA can read a map in it.
#define CGPT_GRID_CONSTANT __grid_constant__

inline TensorMap tensor_map(const char* op, const TensorView& t, int rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [&] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    require(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                             cudaEnableDefault, &result),
            op);
#else
    require(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result),
            op);
#endif
    if (!found) throw std::runtime_error(std::string(op) + ": this driver knows no tensor maps");
    return reinterpret_cast<Encode>(found);
  }();
  const cuuint64_t sizes[4] = {
      static_cast<cuuint64_t>(t.shape[3]), static_cast<cuuint64_t>(t.shape[2]),
      static_cast<cuuint64_t>(t.shape[1]), static_cast<cuuint64_t>(t.shape[0])};
  // of a dimension of size 1 any stride will do, but not every one is allowed
  const auto bytes = [&](int i) {
    return static_cast<cuuint64_t>(t.shape[i] > 1 ? t.strides[i] * 2 : 16);
  };
  const cuuint64_t strides[3] = {bytes(2), bytes(1), bytes(0)};
  const cuuint32_t box[4] = {kLine, static_cast<cuuint32_t>(rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  TensorMap map;
  const CUresult status = encode(
      &map,
      t.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      4, t.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error(std::string(op) + ": cuTensorMapEncodeTiled: error " +
                             std::to_string(status));
  return map;
}

// ---- barriers and copies ------------------------------------------------------------------------

struct Barrier {
  alignas(8) uint64_t word;
};

__device__ inline void barrier_init(Barrier& b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(&b)), "r"(arrivals)
               : "memory");
}
__device__ inline void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}
__device__ inline void barrier_arrive(Barrier& b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(&b)) : "memory");
}
__device__ inline void barrier_expect(Barrier& b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(&b)),
               "r"(bytes)
               : "memory");
}
__device__ inline void barrier_wait(Barrier& b, int parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(shared_address(&b)), "r"(parity)
        : "memory");
}
__device__ inline void copy_box(void* shared, const TensorMap& map, Barrier& b, int column, int row,
                                int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&b)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}
__device__ inline void group_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
template <int n>
__device__ inline void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(n));
}
template <int n>
__device__ inline void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(n));
}

// ---- wgmma --------------------------------------------------------------------------------------

__device__ inline uint64_t operand(const void* shared, int next = 16) {
  return operand_at(shared_address(shared), static_cast<uint32_t>(next));
}
__device__ inline void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ inline void wgmma_end() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
template <int kGroups>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kGroups) : "memory");
}
template <int n>
__device__ inline void wgmma_result(float (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The registers of d: as operands, and by the numbers that they have in the text.
#define CGPT_D8(i)                                                                            \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define CGPT_D32(i) CGPT_D8(i), CGPT_D8(i + 8), CGPT_D8(i + 16), CGPT_D8(i + 24)
#define CGPT_D64(i) CGPT_D32(i), CGPT_D32(i + 32)
#define CGPT_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define CGPT_32                                                                         \
  CGPT_8                                                                                \
  ",%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28," \
  "%29,%30,%31"
#define CGPT_64                                                                           \
  CGPT_32                                                                                 \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52," \
  "%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// list and text: of the N / 2 registers of d. i0 and on: the numbers of the operands after them.
#define CGPT_WGMMA(type, n, list, text, i0, i1, i2)                                               \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " i2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" n \
               "k16.f32." type "." type " {" text "}, " i0 ", " i1 ", p, 1, 1, 0, 0;\n}\n"        \
               : list(0)                                                                          \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)))
#define CGPT_WGMMA_ROWS(type, n, list, text, i0, i1, i2, i3, i4)                                \
  asm volatile(                                                                                 \
      "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"                                                \
      "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" text "}, {" i0 "," i1 \
      "," i2 "," i3 "}, " i4 ", p, 1, 1, 1;\n}\n"                                               \
      : list(0)                                                                                 \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

template <class T, int N>
__device__ inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
  static_assert(N == 128, "write the others as they are needed");
  if constexpr (__is_same(T, bf16))
    CGPT_WGMMA("bf16", "128", CGPT_D64, CGPT_64, "%64", "%65", "%66");
  else CGPT_WGMMA("f16", "128", CGPT_D64, CGPT_64, "%64", "%65", "%66");
}

template <class T, int N>
__device__ inline void wgmma_rows(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
  static_assert(N == 16 || N == 64 || N == 128, "write the others as they are needed");
  constexpr bool kBf16 = __is_same(T, bf16);
#define CGPT_BOTH(...)                                       \
  if constexpr (kBf16) CGPT_WGMMA_ROWS("bf16", __VA_ARGS__); \
  else CGPT_WGMMA_ROWS("f16", __VA_ARGS__)
  if constexpr (N == 16) CGPT_BOTH("16", CGPT_D8, CGPT_8, "%8", "%9", "%10", "%11", "%12");
  if constexpr (N == 64) CGPT_BOTH("64", CGPT_D32, CGPT_32, "%32", "%33", "%34", "%35", "%36");
  if constexpr (N == 128) CGPT_BOTH("128", CGPT_D64, CGPT_64, "%64", "%65", "%66", "%67", "%68");
#undef CGPT_BOTH
}

#undef CGPT_D8
#undef CGPT_D32
#undef CGPT_D64
#undef CGPT_8
#undef CGPT_32
#undef CGPT_64
#undef CGPT_WGMMA
#undef CGPT_WGMMA_ROWS

}  // namespace cgpt::cuda
