"""The two builds agree, and the CMake one passes its own tests.

setup.py (ninja, the Python module) and CMakeLists.txt (static library, ctest) find the same sources
by suffix and compile them with the same tier flags; every symbol that a tier's object exports lies
in that tier's namespace, so that the linker can never hand AVX-512 code to an older processor.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def tool(name):
    """A build tool from this environment or the machine; skips, naming it, when there is none."""
    beside = Path(sys.executable).with_name(name)
    path = str(beside) if beside.exists() else shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


@pytest.fixture(scope="session")
def setup_module():
    spec = importlib.util.spec_from_file_location("cgpt_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cmake_build():
    """The CMake build folder, compiled."""
    build = ROOT / "build" / "cmake"
    ninja = tool("ninja")
    subprocess.run(
        [tool("cmake"), "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"],
        check=True,
        capture_output=True,
    )
    done = subprocess.run([ninja, "-C", build], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    return build


def machine_flags(command):
    """What decides the code of an object: -m, -f and -D options of a compiler command."""
    kept = re.findall(r"(?<=\s)-(?:m|f|D)\S+", command)
    drop = {"-fPIC", "-fopenmp", "-fvisibility=hidden", "-DNDEBUG"}
    return tuple(sorted(f for f in kept if f not in drop))


def test_setup_and_cmake_compile_the_same_sources(setup_module, cmake_build):
    text = setup_module.ninja_text(Path("_C.so"), [], None)
    ninja = set()
    for target in re.finditer(r"^build \S+: cxx (\S+)(?:\n  flags = (.*))?", text, re.MULTILINE):
        source = str(Path(target[1]).relative_to(ROOT))
        if not source.startswith("csrc/python/"):
            ninja.add((source, machine_flags(" " + (target[2] or ""))))
    cmake = set()
    for entry in json.loads((cmake_build / "compile_commands.json").read_text()):
        source = str(Path(entry["file"]).relative_to(ROOT))
        if not source.endswith("_test.cpp"):
            cmake.add((source, machine_flags(entry["command"])))
    assert ninja == cmake


def cuda_flags(command):
    """What decides an object of nvcc: macros, the standard, real and virtual architectures."""
    codes = re.findall(r"arch=(\w+),code=\[?([\w,]+)", command)
    return (
        {*re.findall(r"-DCGPT_\w+", command), *re.findall(r"-std=\S+|-O\d|--expt-\S+", command)},
        {(virtual, *sorted(real.split(","))) for virtual, real in codes},
    )


@pytest.mark.parametrize("cutlass", [False, True], ids=["without CUTLASS", "with CUTLASS"])
def test_setup_and_cmake_compile_the_same_cuda_sources(
    cutlass, setup_module, monkeypatch, tmp_path
):
    for name in ("CGPT_CUDA", "CGPT_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    nvcc = setup_module.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    headers = [*setup_module.CUTLASS_FLAGS, "-isystem", str(tmp_path)] if cutlass else []
    monkeypatch.setattr(setup_module, "cutlass_flags", lambda: headers)
    text = setup_module.ninja_text(Path("_C.so"), [], nvcc)
    rule = re.search(r"^rule nvcc\n  command = (.*)", text, re.MULTILINE)[1]
    ninja = {
        str(Path(source).relative_to(ROOT)): cuda_flags(f"{rule} {flags}")
        for source, flags in re.findall(r"^build \S+: nvcc (\S+)\n  flags = (.*)", text, re.M)
    }
    options = [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    options += ["-DCGPT_CUDA=ON", f"-DCGPT_CUTLASS={tmp_path if cutlass else ''}"]
    command = [tool("cmake"), "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    cmake = {
        str(Path(entry["file"]).relative_to(ROOT)): cuda_flags(entry["command"])
        for entry in json.loads((tmp_path / "build" / "compile_commands.json").read_text())
        if entry["file"].endswith(".cu")
    }
    assert ninja == cmake and ninja


def test_cpp_tests_pass(cmake_build):
    ctest = [tool("ctest"), "--test-dir", cmake_build, "--output-on-failure"]
    done = subprocess.run(ctest, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    for source in (*ROOT.glob("csrc/ops/*/*_test.cpp"), *ROOT.glob("csrc/wafer/*_test.cpp")):
        assert source.stem in done.stdout


def test_tier_objects_define_nothing_outside_their_namespace(setup_module, cmake_build):
    checked = 0
    for tier in setup_module.TIERS:
        for obj in cmake_build.glob(f"CMakeFiles/tier_{tier}.dir/**/*.o"):
            command = [tool("nm"), "--demangle", "--defined-only", "--extern-only", obj]
            names = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for line in filter(None, names.splitlines()):
                symbol = line.split(" ", 2)[2]
                inside = f"cgpt::{tier}::" in symbol
                assert inside or symbol.startswith("DW.ref."), f"{obj.name} ({tier}): {symbol}"
            checked += 1
    assert checked >= len(setup_module.TIERS) * len(list(ROOT.glob("csrc/ops/*/*_cpu.cpp")))


def test_module_links_no_torch_and_includes_no_torch_header():
    import cgpt_kernels._C as module

    command = [tool("readelf"), "-d", module.__file__]
    needed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    libraries = re.findall(r"NEEDED.*\[(.*)\]", needed)
    assert libraries and not [x for x in libraries if re.search("torch|cuda|c10", x)]
    for source in ROOT.glob("csrc/**/*"):
        if source.is_file():
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", source.read_text()), source


@pytest.mark.parametrize(
    "value, expected",
    [("maybe", "CGPT_CUDA must be auto, on, off"), ("on", "nvcc was not found")],
)
def test_cuda_option_errors_say_what_to_do(setup_module, monkeypatch, value, expected):
    monkeypatch.setenv("CGPT_CUDA", value)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(setup_module.Path, "exists", lambda path: False)
    with pytest.raises(SystemExit, match=expected):
        setup_module.find_nvcc()


@pytest.mark.parametrize("value", ["", "banana", "80;", "80,90a", "sm_80", "75", "9.0"])
def test_architectures_that_are_none_are_refused(setup_module, monkeypatch, value):
    monkeypatch.setenv("CGPT_CUDA_ARCHS", value)
    with pytest.raises(SystemExit, match=f"such as '80;90a', got {re.escape(repr(value))}"):
        setup_module.cuda_architectures()
    for fine in ("80", "80;90a", "86;100a", "120f"):
        monkeypatch.setenv("CGPT_CUDA_ARCHS", fine)
        assert setup_module.cuda_architectures() == fine.split(";")


@pytest.mark.parametrize(
    "asked, ptx", [("80;90a", "80"), ("90a", "90"), ("86;80", "86"), ("100a;90", "90")]
)
def test_every_build_keeps_ptx_that_later_gpus_can_use(setup_module, asked, ptx):
    codes = cuda_flags(" ".join(setup_module.nvcc_codes(asked.split(";"))))[1]
    made = {code for _, *found in codes for code in found}
    assert made == {f"compute_{ptx}", *(f"sm_{a}" for a in asked.split(";"))}
    assert all(code.partition("_")[2] == at.partition("_")[2] for at, *c in codes for code in c)


def test_an_unknown_tier_in_the_environment_is_named():
    code = "import cgpt_kernels._C as c\ntry: c.cpu_isa()\nexcept ValueError as e: print(e)"
    env = {**os.environ, "CGPT_CPU_ISA": "sse9"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.startswith("CGPT_CPU_ISA: unknown tier 'sse9'. Available here: auto, scalar")


def test_wheel_holds_the_module_and_the_checkpoint(tmp_path):
    """Built as pip builds it for a user, in an isolated environment without torch, CPU only."""
    env = {**os.environ, "CGPT_CUDA": "off"}
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (wheel,) = tmp_path.glob("cgpt_kernels-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(re.match(r"cgpt_kernels/_C\..*\.so$", n) for n in names)
    assert "cgpt_kernels/assets/tiny/model.safetensors" in names
    assert not [n for n in names if n.startswith(("tests/", "bench/", "csrc/"))]
