// Small kernels that ask the substrate itself: what its instructions give, and whether the host
// implementation notices what is wrong. Built into the test-only modules, called by
// tests/test_cuda_host.py; each takes up to two tensors and leaves its answer in `out`.
#include "hopper.cuh"
#include "launch.h"
#include "substrate_test.h"

namespace cgpt::cuda {
namespace {

constexpr int kThreads = 128;

struct Shared {
  alignas(16) uint16_t a[16][24];
  alignas(16) uint16_t b[16][24];
  alignas(16) uint16_t bt[8][24];
  alignas(16) float values[kThreads];
  float scratch[2 * kThreads / kWarp];
};

// ---- what instructions give ---------------------------------------------------------------------

// out[2][16, 8] = a[16, 16] b[16, 8] in the first warp: b read through ldmatrix_trans, then its
// transpose through ldmatrix.
template <class T>
__global__ void __launch_bounds__(kThreads) mma_kernel(const T* a, const T* b, float* out) {
  Shared& s = *shared<Shared>();
  if (warp() != 0) return;
  const int i = lane(), g = i / 4, t = i % 4;
  copy_async<16>(&s.a[i / 2][i % 2 * 8], a + i * 8);
  copy_async<16>(&s.b[i / 2][i % 2 * 8], b + (i / 2) * 8, i % 2 == 0);
  copy_async_commit();
  copy_async_wait<0>();
  warp_barrier();
  for (int j = i; j < 128; j += kWarp) s.bt[j % 8][j / 8] = s.b[j / 8][j % 8];
  warp_barrier();
  for (int way = 0; way < 2; ++way, out += 128) {
    uint32_t left[4], right[2];
    float d[4] = {};
    ldmatrix(left, &s.a[i % 16][i / 16 * 8]);
    if (way == 0) ldmatrix_trans(right, &s.b[i % 16][0]);
    else ldmatrix(right, &s.bt[i % 8][i / 8 % 2 * 8]);
    mma<T>(d, left, right);
    store(out + g * 8 + 2 * t, Vec<float, 2>{{d[0], d[1]}});
    store(out + (g + 8) * 8 + 2 * t, Vec<float, 2>{{d[2], d[3]}});
  }
}

// out[6][128]: shuffles of in, the ballot of in > 0 and the block's sum and largest value.
__global__ void __launch_bounds__(kThreads) warp_kernel(const float* in, float* out) {
  Shared& s = *shared<Shared>();
  const int i = thread();
  const float x = in[i];
  out[i] = shuffle_xor(x, 5);
  out[kThreads + i] = shuffle_down(x, 3);
  out[2 * kThreads + i] = shuffle_up(x, 2) + shuffle(x, 31 - lane());
  out[3 * kThreads + i] = static_cast<float>(ballot(x > 0) >> lane() & 1u);
  out[4 * kThreads + i] = block_sum<kThreads>(x, s.scratch);
  out[5 * kThreads + i] = block_max<kThreads>(x, s.scratch);
}

// The words of elements 4 * thread + 0..3 under seed 2^40 + 7 without their low 8 bits, which a
// float has no room for.
__global__ void __launch_bounds__(kThreads) philox_kernel(float* out) {
  const philox::Words w = philox::words((uint64_t{1} << 40) + 7, static_cast<uint64_t>(thread()));
  for (int j = 0; j < 4; ++j) out[4 * thread() + j] = static_cast<float>(w.word[j] >> 8);
}

// out[blocks][128]: what the next block wrote before they met, twice; shared memory stays.
__global__ void __launch_bounds__(kThreads)
    grid_kernel(const float* in, float* room, float* out, unsigned* state, int missing) {
  Shared& s = *shared<Shared>();
  const int i = thread(), b = static_cast<int>(block_x()), n = static_cast<int>(blocks_x());
  s.values[i] = in[i] + static_cast<float>(b);
  room[b * kThreads + i] = s.values[i];
  if (b == missing) return;
  grid_barrier(state);
  const float next = room[(b + 1) % n * kThreads + i];
  grid_barrier(state);
  room[b * kThreads + i] = next + s.values[i ^ 1];
  grid_barrier(state);
  out[b * kThreads + i] = room[(b + 1) % n * kThreads + i];
}

// ---- what is wrong ------------------------------------------------------------------------------

enum class Wrong {
  race_between_warps,
  race_within_a_warp,
  race_write_after_read,
  missed_barrier,
  early_return,
  divergent_shuffle,
  different_collectives,
  shared_out_of_bounds,
  copy_not_waited_for,
  copy_read_by_another,
  unaligned,
  global_out_of_bounds,
  barrier_nobody_completes,
  none,
};

constexpr const char* kNames[] = {
    "race_between_warps",
    "race_within_a_warp",
    "race_write_after_read",
    "missed_barrier",
    "early_return",
    "divergent_shuffle",
    "different_collectives",
    "shared_out_of_bounds",
    "copy_not_waited_for",
    "copy_read_by_another",
    "unaligned",
    "global_out_of_bounds",
    "barrier_nobody_completes",
    "none",
};

template <Wrong wrong>
__global__ void __launch_bounds__(kThreads) wrong_kernel(const float* in, float* out, int n) {
  Shared& s = *shared<Shared>();
  const int i = thread();
  float* v = s.values;
  v[i] = in[i];
  if constexpr (wrong == Wrong::race_between_warps) {
    warp_barrier();  // orders the warp only
    out[i] = v[(i + 32) % kThreads];
  } else if constexpr (wrong == Wrong::race_within_a_warp) {
    out[i] = shuffle_xor(v[i], 1) + v[i ^ 1];  // a shuffle orders no memory
  } else if constexpr (wrong == Wrong::race_write_after_read) {
    block_barrier();
    const float x = v[(i + 1) % kThreads];
    v[i] = x;
    out[i] = x;
  } else if constexpr (wrong == Wrong::missed_barrier) {
    if (i != 77) block_barrier();
    else warp_barrier();
    out[i] = v[i];
  } else if constexpr (wrong == Wrong::early_return) {
    if (i == 5) return;
    block_barrier();
    out[i] = v[i];
  } else if constexpr (wrong == Wrong::divergent_shuffle) {
    out[i] = lane() < 9 ? shuffle_xor(v[i], 1) : 0.0f;
  } else if constexpr (wrong == Wrong::different_collectives) {
    if (lane() < 16) out[i] = shuffle_xor(v[i], 1);
    else out[i] = static_cast<float>(ballot(true));
  } else if constexpr (wrong == Wrong::shared_out_of_bounds) {
    block_barrier();
    out[i] = shared<float>()[sizeof(Shared) / 4 + static_cast<unsigned>(i) - 127];
  } else if constexpr (wrong == Wrong::copy_not_waited_for) {
    block_barrier();
    copy_async<4>(&v[i], in + i);
    copy_async_commit();
    out[i] = v[i];
  } else if constexpr (wrong == Wrong::copy_read_by_another) {
    block_barrier();
    copy_async<4>(&v[i], in + i);
    copy_async_commit();
    copy_async_wait<0>();
    out[i] = v[i ^ 1];  // waited for by its thread, but no barrier since
  } else if constexpr (wrong == Wrong::unaligned) {
    out[i] = load<4>(in + i % 2)[0];
  } else if constexpr (wrong == Wrong::global_out_of_bounds) {
    out[i] = in[i + n];
  } else if constexpr (wrong == Wrong::barrier_nobody_completes) {
    Barrier& b = *shared<Barrier>();
    block_barrier();
    if (i == 0) barrier_init(b, 2);
    block_barrier();
    if (i == 0) barrier_arrive(b);
    if (i == 9) barrier_wait(b, 0);
    out[i] = in[i];
  } else {
    block_barrier();
    out[i] = v[(i + 1) % kThreads];
  }
}

template <int i>
void launch_wrong(int which, const TensorView& in, const TensorView& out) {
  if constexpr (i <= static_cast<int>(Wrong::none)) {
    if (which != i) return launch_wrong<i + 1>(which, in, out);
    launch("substrate_test",
           {.grid_x = 3, .threads = kThreads, .shared = sizeof(Shared), .like = out},
           &wrong_kernel<static_cast<Wrong>(i)>, in.as<const float>(), out.as<float>(), 1);
  }
}

template <class T>
void launch_mma(const TensorView& a, const TensorView& b, const TensorView& out) {
  launch("substrate_test", {.threads = kThreads, .shared = sizeof(Shared), .like = out},
         &mma_kernel<T>, a.as<const T>(), b.as<const T>(), out.as<float>());
}

}  // namespace

void substrate_test(const std::string& name, const TensorView& a, const TensorView& b,
                    const TensorView& out) {
  if (name == "mma" && a.dtype == DType::bf16) return launch_mma<bf16>(a, b, out);
  if (name == "mma" && a.dtype == DType::f16) return launch_mma<f16>(a, b, out);
  const Launch one{.threads = kThreads, .shared = sizeof(Shared), .like = out};
  if (name == "warp")
    return launch("substrate_test", one, &warp_kernel, a.as<const float>(), out.as<float>());
  if (name == "philox") return launch("substrate_test", one, &philox_kernel, out.as<float>());
  if (name.rfind("grid", 0) == 0) {  // in: 128 values, then the state; out: the room, then out
    const int64_t blocks = out.numel() / 2 / kThreads;
    const Launch grid{.grid_x = blocks,
                      .threads = kThreads,
                      .shared = sizeof(Shared),
                      .like = out,
                      .cooperative = name != "grid_not_cooperative"};
    return launch("substrate_test", grid, &grid_kernel, a.as<const float>(), out.as<float>(),
                  out.as<float>() + blocks * kThreads,
                  reinterpret_cast<unsigned*>(a.as<float>() + kThreads),
                  name == "grid_missed" ? 1 : -1);
  }
  for (int i = 0; i <= static_cast<int>(Wrong::none); ++i)
    if (name == kNames[i]) return launch_wrong<0>(i, a, out);
  throw std::invalid_argument("substrate_test: unknown name '" + name + "'");
}

}  // namespace cgpt::cuda
