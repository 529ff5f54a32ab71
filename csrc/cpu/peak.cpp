// Chains of independent multiply-adds on registers or tiles, and a read of memory in order. Inline
// assembly, since a compiler would fold them.
#include "peak.h"

#include <chrono>
#include <cstdint>
#include <cstring>

#include "isa.h"

namespace cgpt {
namespace {

double now() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

// The best rate of `loop`, which does `operations` as often as it is told, within `seconds`.
template <class Loop>
double best_rate(double operations, double seconds, const Loop& loop) {
  constexpr int kRepeats = 20000;  // a sample of 20 to 50 us: many fall between two interruptions
  const double start = now();
  double best = 0;
  do {
    const double from = now();
    loop(kRepeats);
    const double rate = kRepeats * operations / (now() - from);
    best = rate > best ? rate : best;
  } while (now() - start < seconds);
  return best;
}

#if defined(__x86_64__)
  #define CGPT_STEPS(dot, r) \
    ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13\n\t" dot " %%" r "14, %%" r "14, %%" r "\\i\n\t.endr"
  #define CGPT_CLOBBERS                                                                      \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
        "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"
  // 14 chains hide a latency of 7 cycles on two pipes; with 10, vdpbf16ps reached 87 % on Zen 5.
  // They hold zeros, which no processor takes longer for, and begin with them at each sample:
  // clocks are read through other code.
  #define CGPT_CHAINS(dot, r)                                                                  \
    [](int repeats) {                                                                          \
      __asm__ volatile("vzeroall" ::: CGPT_CLOBBERS);                                          \
      for (int i = 0; i < repeats; ++i) __asm__ volatile(CGPT_STEPS(dot, r)::: CGPT_CLOBBERS); \
      __asm__ volatile("vzeroupper" ::: CGPT_CLOBBERS);                                        \
    }
constexpr int kChains = 14;

  // 2 x 2 accumulators with their operands, as kernels use them: 16 rows x 64 bytes a tile.
  #define CGPT_TILES(dot)                                                                  \
    [](int repeats) {                                                                      \
      for (int i = 0; i < repeats; ++i)                                                    \
        __asm__ volatile(dot " %tmm6, %tmm4, %tmm0\n\t" dot " %tmm7, %tmm4, %tmm1\n\t" dot \
                             " %tmm6, %tmm5, %tmm2\n\t" dot " %tmm7, %tmm5, %tmm3");       \
    }

double tile_rate(bool int8, double seconds) {
  static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
  __asm__ volatile(
      "ldtilecfg %0\n\ttilezero %%tmm4\n\ttilezero %%tmm5\n\ttilezero %%tmm6\n\t"
      "tilezero %%tmm7" ::"m"(config));
  const double rate = int8 ? best_rate(4.0 * 16 * 16 * 64 * 2, seconds, CGPT_TILES("tdpbssd"))
                           : best_rate(4.0 * 16 * 16 * 32 * 2, seconds, CGPT_TILES("tdpbf16ps"));
  __asm__ volatile("tilerelease");
  return rate;
}

double register_rate(const char* format, Isa isa, double seconds) {
  if (!std::strcmp(format, "fp32") && isa == Isa::avx2)
    return best_rate(kChains * 8 * 2, seconds, CGPT_CHAINS("vfmadd231ps", "ymm"));
  if (!std::strcmp(format, "fp32") && isa >= Isa::avx512)
    return best_rate(kChains * 16 * 2, seconds, CGPT_CHAINS("vfmadd231ps", "zmm"));
  if (!std::strcmp(format, "bf16") && isa >= Isa::avx512_bf16)
    return best_rate(kChains * 32 * 2, seconds, CGPT_CHAINS("vdpbf16ps", "zmm"));
  if (!std::strcmp(format, "int8") && isa >= Isa::avx512_vnni)
    return best_rate(kChains * 64 * 2, seconds, CGPT_CHAINS("vpdpbusd", "zmm"));
  return 0;
}
#endif

}  // namespace

double peak_rate(const char* format, double seconds) {
#if defined(__x86_64__)
  const Isa isa = active_isa();
  if (isa == Isa::amx && std::strcmp(format, "fp32"))
    return tile_rate(!std::strcmp(format, "int8"), seconds);
  return register_rate(format, isa, seconds);
#else
  return 0;
#endif
}

double read_seconds(const void* data, size_t bytes, int passes) {
  const char* p = static_cast<const char*>(data);
  const double from = now();
  for (int pass = 0; pass < passes; ++pass)
    for (size_t i = 0; i < bytes; i += 256) {
#if defined(__x86_64__)  // SSE2, which every x86-64 has, would halve what AVX reads from a cache
      if (active_isa() != Isa::scalar) {
        __asm__ volatile(
            "vmovups (%0), %%ymm0\n\tvmovups 32(%0), %%ymm1\n\tvmovups 64(%0), %%ymm2\n\t"
            "vmovups 96(%0), %%ymm3\n\tvmovups 128(%0), %%ymm0\n\tvmovups 160(%0), %%ymm1\n\t"
            "vmovups 192(%0), %%ymm2\n\tvmovups 224(%0), %%ymm3" ::"r"(p + i)
            : "xmm0", "xmm1", "xmm2", "xmm3");
        continue;
      }
#endif
      uint64_t sum = 0;
      for (size_t j = 0; j < 256; j += 8) {
        uint64_t word;
        std::memcpy(&word, p + i + j, 8);
        sum += word;
      }
      __asm__ volatile("" ::"r"(sum));
    }
  return now() - from;
}

}  // namespace cgpt
