// CPUID detection. AMX needs three things: the CPU, the kernel's XSAVE state, and a permission that
// a process must ask for once (arch_prctl ARCH_REQ_XCOMP_PERM) or the first tile load is SIGILL.
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../common/check.h"

#if defined(__x86_64__)
  #include <cpuid.h>
  #if defined(__linux__)
    #include <sys/syscall.h>
    #include <unistd.h>
  #endif
#endif

namespace cgpt {
namespace {

constexpr const char* kNames[] = {"scalar",      "avx2", "avx512",      "avx512_vnni",
                                  "avx512_bf16", "amx",  "amx_emulated"};
constexpr int kCount = static_cast<int>(Isa::count);

struct Support {
  bool tier[kCount] = {true};
};

#if defined(__x86_64__)
unsigned long long xgetbv0() {
  unsigned lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<unsigned long long>(hi) << 32) | lo;
}

bool request_amx_permission() {
  #if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  #else
  return false;
  #endif
}

Support detect() {
  Support s;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return s;
  const bool osxsave = c & (1u << 27), fma = c & (1u << 12), f16c = c & (1u << 29);
  if (!osxsave) return s;
  const unsigned long long xcr0 = xgetbv0();
  const bool ymm = (xcr0 & 0x6) == 0x6, zmm = (xcr0 & 0xe6) == 0xe6;
  const bool tiles = (xcr0 & 0x60000) == 0x60000;
  unsigned b7 = 0, c7 = 0, d7 = 0;
  if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return s;
  const bool avx2 = b7 & (1u << 5);
  const bool avx512 =
      (b7 & (1u << 16)) && (b7 & (1u << 17)) && (b7 & (1u << 30)) && (b7 & (1u << 31));
  const bool vnni = c7 & (1u << 11), vbmi = c7 & (1u << 1);
  const bool amx_bf16 = d7 & (1u << 22), amx_tile = d7 & (1u << 24), amx_int8 = d7 & (1u << 25);
  unsigned a71 = 0;
  __get_cpuid_count(7, 1, &a71, &b, &c, &d);
  const bool bf16 = a71 & (1u << 5);

  const auto at = [&](Isa isa) -> bool& { return s.tier[static_cast<int>(isa)]; };
  at(Isa::avx2) = ymm && avx2 && fma && f16c;
  at(Isa::avx512) = at(Isa::avx2) && zmm && avx512;
  at(Isa::avx512_vnni) = at(Isa::avx512) && vnni;
  at(Isa::avx512_bf16) = at(Isa::avx512_vnni) && vbmi && bf16;
  at(Isa::amx_emulated) = at(Isa::avx512_bf16);
  at(Isa::amx) =
      at(Isa::avx512_bf16) && tiles && amx_tile && amx_bf16 && amx_int8 && request_amx_permission();
  return s;
}
#else
Support detect() { return {}; }
#endif

const Support& support() {
  static const Support s = detect();
  return s;
}

std::string supported_names() {
  std::string names;
  for (int i = 0; i < kCount; ++i)
    if (support().tier[i]) names += (names.empty() ? "" : ", ") + std::string(kNames[i]);
  return names;
}

Isa parse(const char* name, const char* source) {
  if (std::strcmp(name, "auto") == 0 || *name == '\0') {
    Isa best = Isa::scalar;
    for (int i = 0; i < static_cast<int>(Isa::amx_emulated); ++i)
      if (support().tier[i]) best = static_cast<Isa>(i);
    return best;
  }
  for (int i = 0; i < kCount; ++i)
    if (std::strcmp(name, kNames[i]) == 0) {
      if (support().tier[i]) return static_cast<Isa>(i);
      fail(std::string(source) + ": this processor cannot run tier '" + name +
           "'. Available here: auto, " + supported_names() + ".");
    }
  fail(std::string(source) + ": unknown tier '" + name + "'. Available here: auto, " +
       supported_names() + ".");
}

std::atomic<int> active{-1};

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }
bool isa_supported(Isa isa) { return support().tier[static_cast<int>(isa)]; }

Isa active_isa() {
  int isa = active.load(std::memory_order_relaxed);
  if (isa < 0) {
    const char* env = std::getenv("CGPT_CPU_ISA");
    isa = static_cast<int>(parse(env ? env : "auto", "CGPT_CPU_ISA"));
    active.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

void set_isa(const char* name) {
  active.store(static_cast<int>(parse(name, "set_cpu_isa")), std::memory_order_relaxed);
}

}  // namespace cgpt
