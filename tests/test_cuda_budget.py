"""Every CUDA kernel, compiled for two GPUs that need not be there; those for Hopper for that one.

Held against tests/cuda_budget.json: registers and static shared memory at most what stands there,
no spill, and the instructions that make a kernel fast where they stand there: tensor cores, and
accesses of 16 bytes to memory and shared memory; NARROW says why some kernels have none. The file
is written by `python tests/test_cuda_budget.py`, or by the same with the names of some ops'
folders; a change of the file belongs into the review of the change that made it.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUDGET = Path(__file__).with_name("cuda_budget.json")
SOURCES = {  # by op, and what is composed of ops
    p.stem.removesuffix("_cuda"): p
    for folder in ("ops/*", "gpt")
    for p in sorted(ROOT.glob(f"csrc/{folder}/*_cuda.cu"))
}
HOPPER = {p.stem: p for p in sorted(ROOT.glob("csrc/ops/*/*_hopper.cu"))}
SOURCES |= HOPPER
ARCHITECTURES = ("sm_80", "sm_90a")
COMPILED = [(op, a) for op in SOURCES for a in ARCHITECTURES if op not in HOPPER or a == "sm_90a"]

# Name in the budget: what the disassembler shows.
INSTRUCTIONS = {
    "mma": r"\bHMMA\b",
    "wgmma": r"\bHGMMA\b",
    "tma": r"\bUTMALDG\b",
    "ldmatrix": r"\bLDSM\b",
    "copy_async_16": r"\bLDGSTS\S*\.128\b",
    "load_16": r"\bLDG(?!STS)\S*\.128\b",
    "store_16": r"\bSTG\S*\.128\b",
    "shared_load_16": r"\bLDS\S*\.128\b",
}
# What brings 16 bytes a thread, or a whole box, from memory.
WIDE = {"load_16", "copy_async_16", "tma"}
# Kernels that have none of these, and why.
NARROW = {
    # the other instance takes aligned tensors
    r"layer_norm_(fwd|bwd)_kernel<.*, false>": "views that are not aligned to 16 bytes",
    r"linear_cross_entropy_(fwd|logit_gradient)_kernel<.*, false>": "the same",
    r"gemm_(rows|float_rows|activation_bwd)_kernel<.*, false>": "the same",
    r"decoder_embed_kernel<.*, false>": "the same",
    r"decoder_append_kernel<\w+, 1>": "the same",
    # a warp reads 128 neighbouring bytes, and as many blocks as there are count for more
    r"add_shares_kernel": "a lane a column: with four columns a width of 768 would have 6 blocks",
    r"attention_join_kernel": "a lane a column of at most 64 parts of a row",
    r"linear_cross_entropy_join_kernel": "a thread a row: 12 bytes a chunk, at most 64 chunks",
    r"layer_norm_bwd_columns_kernel": "a thread a column; rows beyond 8192 values only",
    r"layer_norm_(fwd|bwd)_any_kernel": "rows beyond 8192 values, wider than any model's here",
    r"unpack_kernel": "the packed layout keeps 4 bytes of a column together, of 32 columns 128",
    r"decoder_activate_kernel": "the hidden values of a few tokens, a few KB",
    r"decoder_append_int8_kernel": "a token's keys and values, a few KB",
    r"decoder_choose_kernel": "one row of logits a sequence, read once from L2",
}


def setup_script():
    spec = importlib.util.spec_from_file_location("cgpt_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toolkit(op, monkeypatch=None):
    """nvcc and the flags of the build; skips where there is none."""
    script = setup_script()
    if monkeypatch:
        monkeypatch.delenv("CGPT_CUDA", raising=False)
    nvcc = script.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    if op != "gemm_hopper":
        return nvcc, script.NVCC_FLAGS
    headers = script.cutlass_flags()
    if not headers:
        pytest.skip(f"{script.CUTLASS} is not installed")
    return nvcc, [*script.NVCC_FLAGS, *headers]


def output_of(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def disassembler(nvcc):
    """cuobjdump of the toolkit, or the one that comes with Triton; skips where there is none."""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(Path(nvcc).parent))
    if found is None:
        triton = importlib.util.find_spec("triton")
        folders = triton.submodule_search_locations if triton else []
        beside = [Path(folder) / "backends/nvidia/bin/cuobjdump" for folder in folders]
        found = next((str(path) for path in beside if path.exists()), None)
    if found is None:
        pytest.skip("cuobjdump is not installed, neither with CUDA nor with Triton")
    return found


def plain_names(mangled):
    """Kernels as a reader writes them: without namespaces, arguments and the file's number."""
    shown = output_of("c++filt", *mangled).splitlines()
    names = {}
    for symbol, name in zip(mangled, shown, strict=True):
        name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|cgpt::|cuda::|^void ", "", name)
        names[symbol] = re.sub(r"\([^()]*\)$", "", re.sub(r"\((?:int|bool)\)", "", name))
    return names


def compiled(op, architecture, nvcc, flags):
    """{kernel: {"registers", "shared", "spills", "instructions"}} of one op's source."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "op.cubin"
        command = [nvcc, *flags, "-cubin", f"-arch={architecture}", "-Xptxas", "-v"]
        report = output_of(*command, SOURCES[op], "-o", cubin)
        code = output_of(disassembler(nvcc), "-sass", cubin)
    # What ptxas says where the products of a warp group cannot run beside anything else.
    assert "wgmma.mma_async instructions are serialized" not in report, report[-4000:]
    found = {}
    for part in report.split("Compiling entry function '")[1:]:
        symbol = part.split("'", 1)[0]
        shared = re.search(r"(\d+) bytes smem", part)
        found[symbol] = {
            "registers": int(re.search(r"Used (\d+) registers", part)[1]),
            "shared": int(shared[1]) if shared else 0,
            "spills": sum(map(int, re.findall(r"(\d+) bytes spill", part))),
        }
    for part in code.split("Function : ")[1:]:
        symbol, body = part.split("\n", 1)
        found[symbol.strip()]["instructions"] = [
            name for name, pattern in INSTRUCTIONS.items() if re.search(pattern, body)
        ]
    names = plain_names(sorted(found))
    return {names[symbol]: row for symbol, row in sorted(found.items())}


def version_of(nvcc):
    return re.search(r"release ([\d.]+)", output_of(nvcc, "--version"))[1]


@pytest.mark.parametrize("op, architecture", COMPILED)
def test_machine_code_stays_within_its_budget(op, architecture, monkeypatch):
    nvcc, flags = toolkit(op, monkeypatch)
    budget = json.loads(BUDGET.read_text())
    allowed = budget["kernels"].get(op, {})
    found = compiled(op, architecture, nvcc, flags)
    assert sorted(found) == sorted(allowed), f"write it: python tests/test_cuda_budget.py {op}"
    for kernel, code in found.items():
        row = allowed[kernel][architecture]
        what = f"{kernel} for {architecture}: {code}, budget {row}"
        assert code["spills"] == 0, what
        assert code["instructions"] == row["instructions"], what
        if version_of(nvcc) == budget["nvcc"]:  # another one allocates registers its own way
            assert code["registers"] <= row["registers"], what
            assert code["shared"] <= row["shared"], what


def test_every_kernel_reads_16_bytes_at_a_time_or_says_why_not():
    unused = set(NARROW)
    for op, kernels in json.loads(BUDGET.read_text())["kernels"].items():
        for kernel, rows in kernels.items():
            found = {p for p in NARROW if re.match(p, kernel)}
            unused -= found
            for architecture, row in rows.items():
                wide = bool(WIDE & {*row["instructions"]})
                assert wide != bool(found), f"{kernel} of {op} for {architecture}: {row}"
    assert not unused, "no such kernel is narrow any more"


def test_kernels_of_16_bit_products_use_tensor_cores_and_16_byte_copies():
    kernels = json.loads(BUDGET.read_text())["kernels"]["cross_entropy"]
    for kernel, rows in kernels.items():
        if "16, true" in kernel:
            for architecture, row in rows.items():
                assert {"mma", "ldmatrix", "copy_async_16"} <= {*row["instructions"]}, (
                    f"{kernel} for {architecture}"
                )


def test_tiles_of_gemm_use_tensor_cores_and_16_byte_copies_and_few_rows_load_16_bytes():
    for kernel, rows in json.loads(BUDGET.read_text())["kernels"]["gemm"].items():
        wanted = set()
        if kernel.startswith("gemm_mma_kernel"):
            wanted = {"mma", "ldmatrix", "copy_async_16"}
        if kernel.startswith("gemm_float_kernel"):
            wanted = {"copy_async_16", "shared_load_16", "store_16"}
        if kernel.startswith("packed_gemm_rows") or re.match(r"gemm_rows.*true, true>", kernel):
            wanted = {"mma", "load_16"}
        for architecture, row in rows.items():
            assert wanted <= {*row["instructions"]}, f"{kernel} for {architecture}"


def test_attention_of_16_bits_uses_tensor_cores_and_16_byte_copies():
    for kernel, rows in json.loads(BUDGET.read_text())["kernels"]["attention"].items():
        if "Shape<bf16" in kernel or "Shape<f16" in kernel:
            for architecture, row in rows.items():
                assert {"mma", "ldmatrix", "copy_async_16"} <= {*row["instructions"]}, (
                    f"{kernel} for {architecture}"
                )


@pytest.mark.parametrize("op", HOPPER)
def test_kernels_for_hopper_copy_by_tma_and_multiply_by_warp_groups(op):
    for kernel, rows in json.loads(BUDGET.read_text())["kernels"][op].items():
        assert {"wgmma", "tma"} <= {*rows["sm_90a"]["instructions"]}, kernel


def test_aligned_layer_norm_moves_16_bytes_at_a_time():
    for kernel, rows in json.loads(BUDGET.read_text())["kernels"]["layer_norm"].items():
        if kernel.endswith(", true>"):
            for architecture, row in rows.items():
                assert {"load_16", "store_16"} <= {*row["instructions"]}, (
                    f"{kernel} for {architecture}"
                )


def write(ops):
    """Compile the ops anew; the others keep what stands."""
    kernels = json.loads(BUDGET.read_text())["kernels"] if BUDGET.exists() else {}
    for op in ops or SOURCES:
        kernels[op] = {}
        nvcc, flags = toolkit(op)
        for architecture in [a for source, a in COMPILED if source == op]:
            for kernel, code in compiled(op, architecture, nvcc, flags).items():
                if code.pop("spills"):
                    print(f"SPILLS: {kernel} for {architecture}", file=sys.stderr)
                kernels[op].setdefault(kernel, {})[architecture] = code
    text = ",\n".join(
        f"  {json.dumps(op)}: {{\n"
        + ",\n".join(
            f"   {json.dumps(kernel)}: {{\n"
            + ",\n".join(f"    {json.dumps(a)}: {json.dumps(row)}" for a, row in by_arch.items())
            + "\n   }"
            for kernel, by_arch in sorted(kernels[op].items())
        )
        + "\n  }"
        for op in sorted(kernels)
        if op in SOURCES
    )
    nvcc, _ = toolkit("")
    BUDGET.write_text(
        f'{{\n "nvcc": {json.dumps(version_of(nvcc))},\n "kernels": {{\n{text}\n }}\n}}\n'
    )


if __name__ == "__main__":
    write(sys.argv[1:])
