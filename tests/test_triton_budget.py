"""Every Triton kernel and launch configuration, compiled for three GPUs that need not be there.

Held against tests/triton_budget.json: registers and shared memory at most what stands there, no
spill, and tensor-core instructions where they stand there. The file is written by
`python tests/test_triton_budget.py`, or by the same with the start of a call's name for a part of
it; a change of the file belongs into the review of the change that made it.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from cgpt_kernels import tune  # noqa: E402
from cgpt_kernels.triton_substrate import launch, machine_code  # noqa: E402
from cgpt_kernels.tune import CALLS  # noqa: E402

if launch.INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

BUDGET = Path(__file__).with_name("triton_budget.json")


def compiled(name, capability):
    """{kernel: what ptxas made of it} for the launches of one call, numbered where it has more."""
    found = {}
    for launched in machine_code.record(CALLS[name], capability):
        code = machine_code.inspect(machine_code.compile_launch(launched, capability))
        kernel = launched.kernel.fn.__name__
        count = sum(key.split("#")[0] == kernel for key in found)
        found[f"{kernel}#{count + 1}" if count else kernel] = code
    return found


def committed():
    return json.loads(BUDGET.read_text())


@pytest.mark.parametrize("capability", launch.CAPABILITIES)
@pytest.mark.parametrize("name", CALLS)
def test_machine_code_stays_within_its_budget(name, capability):
    budget = committed()
    for kernel, code in compiled(name, capability).items():
        allowed = budget["kernels"][f"{name}: {kernel}"][capability]
        what = f"{kernel} of {name} for {capability}: {code}, budget {allowed}"
        assert not code.spilled, what
        assert list(code.tensor_core) == allowed["tensor_core"], what
        if triton.__version__ == budget["triton"]:  # another one allocates registers its own way
            assert code.registers <= allowed["registers"], what
            assert code.shared <= allowed["shared"], what


# Triton takes a size of 1 as a constant, on which what a number can do does not compile.
ONES = {
    "layer_norm": lambda: tune.layer_norm(1, rows=1),
    "gemm": lambda: tune.gemm(1, 1, 1),
    "cross_entropy": lambda: tune.cross_entropy(1, 1, 1),
    "attention": lambda: tune.attention(8, S_q=1, S_k=1, B=1, H=1, bias=True, dropout_p=0.1),
    "decode": lambda: tune.attention(8, S_q=1, S_k=600, B=1, H=1, masks=True),
}


@pytest.mark.parametrize("name", ONES)
def test_sizes_of_1_compile(name):
    for launched in machine_code.record(ONES[name], "9.0"):
        machine_code.compile_launch(launched, "9.0")


def test_the_values_of_8_0_fit_the_shared_memory_of_8_6_and_12_0():
    for kernel, by_capability in committed()["kernels"].items():
        assert by_capability["8.0"]["shared"] <= 99 * 1024, kernel


def write(prefix=""):
    """Compile the calls whose name starts with prefix anew; the others keep what stands."""
    found = {name: {} for name in CALLS}
    for name in (name for name in CALLS if name.startswith(prefix)):
        for capability in launch.CAPABILITIES:
            for kernel, code in compiled(name, capability).items():
                row = asdict(code)
                if row.pop("spilled"):
                    print(f"SPILLS: {name}: {kernel} for {capability}", file=sys.stderr)
                found[name].setdefault(f"{name}: {kernel}", {})[capability] = row
    for key, rows in (committed()["kernels"] if prefix else {}).items():
        name = key.rpartition(": ")[0]
        if name in CALLS and not name.startswith(prefix):
            found[name][key] = rows
    lines = ",\n".join(
        f"  {json.dumps(key)}: {{\n"
        + ",\n".join(f"   {json.dumps(c)}: {json.dumps(row)}" for c, row in rows.items())
        + "\n  }"
        for kernels in found.values()
        for key, rows in kernels.items()
    )
    BUDGET.write_text(
        f'{{\n "triton": {json.dumps(triton.__version__)},\n "kernels": {{\n{lines}\n }}\n}}\n'
    )


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    write(*sys.argv[1:])
