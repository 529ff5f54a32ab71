"""Builds cgpt_kernels._C through ninja: every csrc source by its suffix, CPU sources once per
instruction-set tier. No torch is needed; CUDA sources join when nvcc is found.

Environment:
  CGPT_CUDA=auto|on|off    build CUDA sources if nvcc is found (default) | require nvcc | never
  CGPT_CUDA=host|host_asan build, instead of _C, the test-only module of that name: CUDA sources
                           compiled by g++ (csrc/cuda/device.cuh); host finds races, host_asan has
                           the address and undefined-behaviour sanitizers
  CGPT_CUDA_ARCHS          real architectures, default "80;90a"; PTX, which later processors compile
                           for themselves, is always kept, of the newest one without a letter (of 90
                           beside 90a alone: what has a letter runs nowhere else); with 90a come the
                           kernels that use Hopper's own instructions (csrc/cuda/hopper.h)
  CGPT_DEBUG=1             -O1 -g and address checks of the standard library
  MAX_JOBS                 parallel compile jobs, default one per core
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.build_meta import *  # noqa: F403  pip's hooks: pyproject.toml names this file
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

BASELINE = "-std=c++20 -fPIC -fopenmp -fvisibility=hidden -Wall -Wextra".split()
# -fno-math-errno lets sqrt be one instruction; contraction into FMA is spelled out in the kernels,
# so that every compiler rounds alike; NaN and infinity keep their meaning (no -ffast-math).
# GCC 12 takes the undefined operands inside its own AVX-512 headers for our mistakes.
TIER_FLAGS = (
    "-fno-math-errno -ffp-contract=off -Wno-uninitialized -Wno-maybe-uninitialized"
).split()

X86 = "-mavx2 -mfma -mf16c -mbmi2".split()
AVX512 = [*X86, *"-mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512".split()]
VNNI = [*AVX512, "-mavx512vnni"]
BF16 = [*VNNI, *"-mavx512bf16 -mavx512vbmi".split()]
TIERS = {  # name: (level, flags); CMakeLists.txt has the same table, tests/test_build.py compares
    "scalar": (0, []),
    "avx2": (1, X86),
    "avx512": (2, AVX512),
    "avx512_vnni": (3, VNNI),
    "avx512_bf16": (4, BF16),
    "amx": (5, [*BF16, *"-mamx-tile -mamx-bf16 -mamx-int8".split()]),
    "amx_emulated": (5, [*BF16, "-DCGPT_AMX_EMULATED", "-O1"]),  # for tests: quick to build
}
if platform.machine().lower() not in ("x86_64", "amd64"):
    TIERS = {"scalar": TIERS["scalar"]}

NVCC_FLAGS = "-std=c++20 -O3 -DNDEBUG -Xcompiler -fPIC,-fvisibility=hidden".split()

# Headers of the Hopper gemm. Asked for where they are used: with what pip brings along they are 75
# MB to download, of which the headers are 6. Without them gemm's other kernels take every call.
CUTLASS = "nvidia-cutlass==4.2.0.0"
CUTLASS_FLAGS = "-DCGPT_CUTLASS --expt-relaxed-constexpr".split()

# Test-only modules of the CUDA sources compiled by g++, by the value of CGPT_CUDA: name, flags of
# the kernels, flags of everything. The thread sanitizer's instrumentation is used, not its library:
# csrc/cuda/shadow.cpp defines what it calls. They run where they were built, hence native.
HOST_MODULES = {
    "host": ("_cuda_host", "-fsanitize=thread --param=tsan-instrument-func-entry-exit=0", ""),
    "host_asan": (
        "_cuda_host_asan",
        "",
        "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
    ),
}


def sources(pattern):
    """Sources of the module by suffix, relative to the project, sorted; C++ tests are none."""
    found = (ROOT / "csrc").glob(pattern)
    return sorted(str(p.relative_to(ROOT)) for p in found if not p.name.endswith("_test.cpp"))


def cuda_wanted():
    """CGPT_CUDA, checked."""
    want, known = os.environ.get("CGPT_CUDA", "auto"), ("auto", "on", "off", *HOST_MODULES)
    if want not in known:
        raise SystemExit(f"CGPT_CUDA must be {', '.join(known[:-1])} or {known[-1]}, got {want!r}")
    return want


def find_nvcc():
    """Path of nvcc as CGPT_CUDA asks for it, or None."""
    want = cuda_wanted()
    if want == "off" or want in HOST_MODULES:
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    candidates += [Path(p) for p in [shutil.which("nvcc")] if p]
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    nvcc = next((str(p) for p in candidates if p.exists()), None)
    if nvcc is None and want == "on":
        raise SystemExit(
            "CGPT_CUDA=on but nvcc was not found: put it on PATH, set CUDA_HOME, or use auto"
        )
    return nvcc


def cuda_architectures():
    """CGPT_CUDA_ARCHS, e.g. ["80", "90a"], checked."""
    asked = os.environ.get("CGPT_CUDA_ARCHS", "80;90a")
    found = asked.split(";")
    if not all(re.fullmatch(r"([89]|1\d)\d[af]?", a) for a in found):
        raise SystemExit(
            "CGPT_CUDA_ARCHS must be compute capabilities from 80 on with semicolons between them, "
            f"such as '80;90a', got {asked!r}"
        )
    return found


def nvcc_codes(architectures):
    """nvcc's flags for machine code of each architecture and PTX for later ones."""
    ptx = max([a for a in architectures if a.isdigit()] or [a[:-1] for a in architectures], key=int)
    made = {a: [f"sm_{a}"] for a in architectures}
    made.setdefault(ptx, []).append(f"compute_{ptx}")
    return [f"-gencode arch=compute_{a},code=[{','.join(codes)}]" for a, codes in made.items()]


def cutlass_flags():
    """nvcc's flags for CUTLASS's headers, or none and why they are not there."""
    found = importlib.util.find_spec("cutlass_library")
    for folder in found.submodule_search_locations if found else ():
        include = Path(folder) / "source" / "include"
        if (include / "cutlass" / "cutlass.h").exists():
            return [*CUTLASS_FLAGS, "-isystem", str(include)]
    print(f"No Hopper gemm in this build: its headers come with `pip install {CUTLASS}`")
    return []


def get_requires_for_build_wheel(config_settings=None):
    """What pip installs beside pyproject.toml's list before it builds."""
    return [CUTLASS] if find_nvcc() and "90a" in cuda_architectures() else []


get_requires_for_build_editable = get_requires_for_build_wheel


class NinjaBuild(build_ext):
    """build_ext that writes one build.ninja and runs it."""

    def build_extension(self, ext):
        import pybind11
        import tvm_ffi.libinfo

        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        # One folder for pip's isolated build and for `build_ext --inplace`: the second compiles
        # only the binding again, whose include paths differ.
        want = cuda_wanted()
        host = HOST_MODULES.get(want)
        build = ROOT / "build" / (f"ninja_{want}" if host else "ninja")
        build.mkdir(parents=True, exist_ok=True)
        includes = [
            pybind11.get_include(),
            tvm_ffi.libinfo.find_dlpack_include_path(),
            sysconfig.get_paths()["include"],
        ]
        text = host_text(out, includes, *host) if host else ninja_text(out, includes, find_nvcc())
        (build / "build.ninja").write_text(text)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        ninja = shutil.which("ninja") or str(Path(sys.executable).with_name("ninja"))
        command = [ninja, "-C", str(build), "-j", jobs]
        if not self.verbose:
            command.append("--quiet")
        subprocess.run(command, check=True)


def ninja_text(out, includes, nvcc):
    """The build.ninja that makes `out`; see the module docstring for what goes in."""
    cxx = os.environ.get("CXX", "g++")
    debug = os.environ.get("CGPT_DEBUG") == "1"
    # The kernels are vectorised by hand: -O3 runs them no faster and takes twice as long to build.
    optimise = "-O1 -g -D_GLIBCXX_ASSERTIONS" if debug else "-O2 -DNDEBUG"
    architectures = cuda_architectures()
    hopper = nvcc and "90a" in architectures
    cutlass = cutlass_flags() if hopper else []
    built = ["-DCGPT_CUDA"] * bool(nvcc) + ["-DCGPT_HOPPER"] * bool(hopper) + cutlass[:1]
    binding = " ".join([*(f"-isystem {i}" for i in includes), *built])
    lines = [
        "ninja_required_version = 1.5",
        "rule cxx",
        f"  command = {cxx} -MMD -MF $out.d {' '.join(BASELINE)} {optimise} $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = CXX $out",
    ]
    objects = []

    def add(rule, source, suffix="", flags=""):
        # The whole path with its extension: x.cpp and x.cu must not meet in one object.
        target = source.replace("/", ".") + suffix + ".o"
        lines.append(f"build {target}: {rule} {ROOT / source}")
        if flags:
            lines.append(f"  flags = {flags}")
        objects.append(target)

    for source in [*sources("cpu/*.cpp"), *sources("gpt/*.cpp"), *sources("wafer/*.cpp")]:
        add("cxx", source)
    add("cxx", "csrc/python/module.cpp", flags=binding)
    for source in sources("ops/*/*_cpu.cpp"):
        for tier, (level, flags) in TIERS.items():
            defines = f"-DCGPT_TIER={tier} -DCGPT_TIER_LEVEL={level}"
            add("cxx", source, f".{tier}", " ".join([defines, *TIER_FLAGS, *flags]))
    host_compiler = cxx.split()[-1]  # nvcc takes no launcher such as ccache in front of it
    if nvcc:
        lines += [
            "rule nvcc",
            f"  command = {nvcc} -MMD -MF $out.d -ccbin {host_compiler} {' '.join(NVCC_FLAGS)}"
            f" {' '.join(built)} $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = NVCC $out",
        ]
        for source in [*sources("gpt/*_cuda.cu"), *sources("ops/*/*_cuda.cu")]:
            add("nvcc", source, flags=" ".join(nvcc_codes(architectures)))
        for source in sources("ops/*/*_hopper.cu") if hopper else ():
            code = "-gencode arch=compute_90a,code=sm_90a"
            add("nvcc", source, flags=" ".join([code, *cutlass[1:]]))
    link = f"{cxx} -shared -fopenmp"
    if nvcc:  # nvcc knows its libraries; the static runtime loads where there is no CUDA at all
        link = f"{nvcc} -ccbin {host_compiler} -shared -cudart static -Xcompiler -fopenmp"
    lines += [
        "rule link",
        f"  command = {link} -o $out $in",
        "  description = LINK $out",
        f"build {out}: link {' '.join(objects)}",
        f"default {out}",
    ]
    return "\n".join(lines) + "\n"


def host_text(out, includes, name, kernel_flags, flags):
    """The build.ninja of a module of HOST_MODULES."""
    cxx = os.environ.get("CXX", "g++")
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else ""
    everything = f"-O2 {native} {flags} -DCGPT_CUDA_HOST={name} -DCGPT_HOPPER"
    binding = " ".join(f"-isystem {i}" for i in includes)
    lines = [
        "ninja_required_version = 1.5",
        "rule cxx",
        f"  command = {cxx} -MMD -MF $out.d {' '.join(BASELINE)} {everything} $flags"
        " -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = CXX $out",
        "rule link",
        f"  command = {cxx} -shared {flags} -o $out $in",
        "  description = LINK $out",
    ]
    objects = []
    for pattern, own in (
        ("cuda/*.cpp", ""),
        ("python/cuda_host.cpp", binding),
        ("cuda/*_test.cu", f"-Wno-unknown-pragmas {kernel_flags}"),
        ("gpt/*_cuda.cu", f"-Wno-unknown-pragmas {kernel_flags}"),
        ("ops/*/*_cuda.cu", f"-Wno-unknown-pragmas {kernel_flags}"),
        ("ops/*/*_hopper.cu", f"-Wno-unknown-pragmas {kernel_flags}"),
    ):
        for source in sources(pattern):
            objects.append(source.replace("/", ".") + ".o")
            lines += [f"build {objects[-1]}: cxx {ROOT / source}", f"  flags = {own}"]
    lines += [f"build {out}: link {' '.join(objects)}", f"default {out}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    module, *_ = HOST_MODULES.get(cuda_wanted(), ("_C",))
    setup(
        ext_modules=[Extension(f"cgpt_kernels.{module}", sources=[])],
        cmdclass={"build_ext": NinjaBuild},
    )
