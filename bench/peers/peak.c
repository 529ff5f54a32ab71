/* What the cores and the memory can do, measured without any library: chains of independent
 * multiply-adds on registers or tiles, and a read of memory in order. One call runs on one thread
 * for about the given time and returns operations (or bytes) per second; a multiply-add counts 2.
 * Compiled and called by peaks.py. */
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

/* Ten chains hide a latency of 4-5 cycles on two pipes. `+v` keeps the compiler from folding. */
#define CHAINS(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9)
#define BEST_OF(ops_per_loop, body)                                \
  const double start = now();                                      \
  double best = 0;                                                 \
  do {                                                             \
    const double from = now();                                     \
    for (int i = 0; i < 20000; ++i) body;                          \
    const double rate = 20000.0 * (ops_per_loop) / (now() - from); \
    best = rate > best ? rate : best;                              \
  } while (now() - start < seconds);                               \
  return best;

#define DECLARE_YMM(n) __m256 a##n = _mm256_set1_ps(n);
#define DECLARE_ZMM(n) __m512 a##n = _mm512_set1_ps(n);
#define DECLARE_INT(n) __m512i a##n = _mm512_set1_epi32(n);
#define FMA_YMM(n) __asm__ volatile("vfmadd231ps %1, %1, %0" : "+x"(a##n) : "x"(x));
#define FMA_ZMM(n) __asm__ volatile("vfmadd231ps %1, %1, %0" : "+v"(a##n) : "v"(x));
#define DOT_BF16(n) __asm__ volatile("vdpbf16ps %1, %1, %0" : "+v"(a##n) : "v"(x));
#define DOT_INT8(n) __asm__ volatile("vpdpbusd %1, %1, %0" : "+v"(a##n) : "v"(x));

__attribute__((target("avx2,fma"))) double fp32_avx2(double seconds) {
  const __m256 x = _mm256_setzero_ps();
  CHAINS(DECLARE_YMM)
  BEST_OF(10 * 8 * 2, {CHAINS(FMA_YMM)})
}

__attribute__((target("avx512f"))) double fp32_avx512(double seconds) {
  const __m512 x = _mm512_setzero_ps();
  CHAINS(DECLARE_ZMM)
  BEST_OF(10 * 16 * 2, {CHAINS(FMA_ZMM)})
}

__attribute__((target("avx512f,avx512bf16"))) double bf16_avx512(double seconds) {
  const __m512 x = _mm512_setzero_ps();
  CHAINS(DECLARE_ZMM)
  BEST_OF(10 * 32 * 2, {CHAINS(DOT_BF16)})
}

__attribute__((target("avx512f,avx512vnni"))) double int8_avx512(double seconds) {
  const __m512i x = _mm512_setzero_si512();
  CHAINS(DECLARE_INT)
  BEST_OF(10 * 64 * 2, {CHAINS(DOT_INT8)})
}

/* Tiles of 16 rows x 64 bytes: 2 x 2 accumulators with their operands, as kernels use them. The
 * operating system grants tiles once per process. Returns 0 where it does not. */
static int tiles_ready(void) {
  enum { kArchReqXcompPerm = 0x1023, kTileData = 18 };
  static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t colsb[16];
    uint8_t rows[16];
  } config = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
  if (syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData)) return 0;
  __asm__ volatile("ldtilecfg %0" : : "m"(config));
  return 1;
}
#define TILE_LOOP(dot)                                                                     \
  __asm__ volatile(dot " %%tmm6, %%tmm4, %%tmm0\n\t" dot " %%tmm7, %%tmm4, %%tmm1\n\t" dot \
                       " %%tmm6, %%tmm5, %%tmm2\n\t" dot " %%tmm7, %%tmm5, %%tmm3" ::      \
                           : "memory");

double bf16_amx(double seconds) {
  if (!tiles_ready()) return 0;
  __asm__ volatile("tilezero %tmm4\n\ttilezero %tmm5\n\ttilezero %tmm6\n\ttilezero %tmm7");
  BEST_OF(4.0 * 16 * 16 * 32 * 2, {TILE_LOOP("tdpbf16ps")})
}

double int8_amx(double seconds) {
  if (!tiles_ready()) return 0;
  __asm__ volatile("tilezero %tmm4\n\ttilezero %tmm5\n\ttilezero %tmm6\n\ttilezero %tmm7");
  BEST_OF(4.0 * 16 * 16 * 64 * 2, {TILE_LOOP("tdpbssd")})
}

/* One pass over `bytes`, a multiple of 256; seconds it took. */
double read_once(const void* data, size_t bytes) {
  const double from = now();
  const char* p = data;
  for (size_t i = 0; i < bytes; i += 256)
    __asm__ volatile(
        "vmovups (%0), %%ymm0\n\tvmovups 32(%0), %%ymm1\n\tvmovups 64(%0), %%ymm2\n\t"
        "vmovups 96(%0), %%ymm3\n\tvmovups 128(%0), %%ymm0\n\tvmovups 160(%0), %%ymm1\n\t"
        "vmovups 192(%0), %%ymm2\n\tvmovups 224(%0), %%ymm3"
        :
        : "r"(p + i)
        : "xmm0", "xmm1", "xmm2", "xmm3");
  return now() - from;
}
