// One source, one object per instruction-set tier, chosen at run time.
//
// Every <op>_cpu.cpp is compiled once per tier with -DCGPT_TIER=<name> and that tier's machine
// flags, and defines its entry points in namespace cgpt::<name>. Everything a tier's translation
// unit emits must live in that namespace: an inline function outside it would exist once per tier
// under one name, the linker would keep any of them, and older processors would crash.
// tests/test_layout.py reads the objects' symbols and holds this true.
#pragma once

#ifdef CGPT_TIER
  // Inside a tier only its own entry point is visible.
  #define CGPT_CPU_ENTRY(fn, Args) \
    namespace CGPT_TIER {          \
    void fn(const Args&);          \
    }
#else
  #include "isa.h"
  #define CGPT_DECLARE_TIER_(tier, fn, Args) \
    namespace tier {                         \
    void fn(const Args&);                    \
    }
  #if defined(__x86_64__)
    #define CGPT_CPU_ENTRY(fn, Args)                             \
      CGPT_DECLARE_TIER_(scalar, fn, Args)                       \
      CGPT_DECLARE_TIER_(avx2, fn, Args)                         \
      CGPT_DECLARE_TIER_(avx512, fn, Args)                       \
      CGPT_DECLARE_TIER_(avx512_vnni, fn, Args)                  \
      CGPT_DECLARE_TIER_(avx512_bf16, fn, Args)                  \
      CGPT_DECLARE_TIER_(amx, fn, Args)                          \
      CGPT_DECLARE_TIER_(amx_emulated, fn, Args)                 \
      inline void fn##_cpu(const Args& args) {                   \
        switch (active_isa()) {                                  \
          case Isa::scalar: return scalar::fn(args);             \
          case Isa::avx2: return avx2::fn(args);                 \
          case Isa::avx512: return avx512::fn(args);             \
          case Isa::avx512_vnni: return avx512_vnni::fn(args);   \
          case Isa::avx512_bf16: return avx512_bf16::fn(args);   \
          case Isa::amx: return amx::fn(args);                   \
          case Isa::amx_emulated: return amx_emulated::fn(args); \
          case Isa::count: break;                                \
        }                                                        \
      }
  #else
    #define CGPT_CPU_ENTRY(fn, Args)       \
      CGPT_DECLARE_TIER_(scalar, fn, Args) \
      inline void fn##_cpu(const Args& args) { return scalar::fn(args); }
  #endif
#endif
