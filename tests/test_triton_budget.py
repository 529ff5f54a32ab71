"""Every Triton kernel and launch configuration, compiled for three GPUs that need not be there.

Held against tests/triton_budget.json: registers and shared memory at most what stands there, no
spill, and tensor-core instructions where they stand there. `python tests/test_triton_budget.py`
writes the file; a change of it belongs into the review of the change that made it.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from cgpt_kernels.ops.layer_norm import layer_norm_triton  # noqa: E402
from cgpt_kernels.triton_substrate import launch, machine_code  # noqa: E402

if launch.INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

BUDGET = Path(__file__).with_name("triton_budget.json")
BF16, FP32 = torch.bfloat16, torch.float32


def layer_norm(C, dtype=BF16):
    x, w = torch.empty(512, C, dtype=dtype), torch.empty(C, dtype=dtype)
    mean = torch.empty(512)
    layer_norm_triton.layer_norm_fwd(x, x, w, w, x, x, mean, mean, 1e-5)
    layer_norm_triton.layer_norm_bwd(x, x, x, w, w, mean, mean, (True, True, True))


# One call per launch configuration, at the shapes of the models that it is for.
CALLS = {
    "layer_norm C=128": lambda: layer_norm(128),
    "layer_norm C=768": lambda: layer_norm(768),
    "layer_norm C=1536": lambda: layer_norm(1536),
    "layer_norm C=2560": lambda: layer_norm(2560),
    "layer_norm C=5120": lambda: layer_norm(5120),
    "layer_norm C=5120 fp32": lambda: layer_norm(5120, FP32),
}


def compiled(name, capability):
    """{kernel: what ptxas made of it} for the launches of one call."""
    found = {}
    for launched in machine_code.record(CALLS[name], capability):
        code = machine_code.inspect(machine_code.compile_launch(launched, capability))
        found[launched.kernel.fn.__name__] = code
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


def write():
    kernels = {}
    for name in CALLS:
        for capability in launch.CAPABILITIES:
            for kernel, code in compiled(name, capability).items():
                row = asdict(code)
                if row.pop("spilled"):
                    print(f"SPILLS: {name}: {kernel} for {capability}", file=sys.stderr)
                kernels.setdefault(f"{name}: {kernel}", {})[capability] = row
    lines = ",\n".join(
        f"  {json.dumps(key)}: {{\n"
        + ",\n".join(f"   {json.dumps(c)}: {json.dumps(row)}" for c, row in rows.items())
        + "\n  }"
        for key, rows in kernels.items()
    )
    BUDGET.write_text(
        f'{{\n "triton": {json.dumps(triton.__version__)},\n "kernels": {{\n{lines}\n }}\n}}\n'
    )


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    write()
