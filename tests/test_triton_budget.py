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
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from cgpt_kernels.ops.attention import attention_triton  # noqa: E402
from cgpt_kernels.ops.cross_entropy import cross_entropy_triton  # noqa: E402
from cgpt_kernels.ops.gemm import gemm_triton  # noqa: E402
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


def gemm(M, N, K, dtype=BF16, layout="kn"):
    """Forward for a backward, then the backward, with everything in the epilogue."""
    x, y, bias = (torch.empty(*shape, dtype=dtype) for shape in ((M, K), (M, N), (N,)))
    weight = torch.empty((K, N) if layout == "kn" else (N, K), dtype=dtype)
    gemm_triton.gemm_fwd_with_pre(x, weight, bias, y, "gelu", layout)
    needs = (True, True, True)
    gemm_triton.gemm_bwd(y, x, weight, bias, y, "gelu_tanh", layout, needs)


def attention(D, dtype=BF16, S_q=1024, S_k=1024, dropout_p=0.0, bias=False, masks=False):
    """Forward and backward of one layer of GPT-2, q, k and v as one projection leaves them."""
    B, H = 2, 12
    q = torch.empty(B, S_q, 3, H, D, dtype=dtype)[:, :, 0].transpose(1, 2)
    k, v = torch.empty(B, S_k, 3, H, D, dtype=dtype)[:, :, 1:].transpose(1, 3).unbind(2)
    out, lse = torch.empty(B, S_q, H, D, dtype=dtype).transpose(1, 2), torch.empty(B, H, S_q)
    padding = torch.empty(B, S_k, dtype=torch.bool) if masks else None
    slopes = torch.empty(H) if masks else None
    added = torch.empty(1, H, S_q, S_k, dtype=dtype) if bias else None
    wide = added.expand(B, H, S_q, S_k) if bias else None
    options = 0.125, True, dropout_p, 7
    attention_triton.attention_fwd(q, k, v, padding, wide, slopes, out, lse, *options)
    if S_q > 1:
        given = (out, q, k, v, out, lse, padding, added, slopes)
        attention_triton.attention_bwd(*given, *options, bias)


def cross_entropy(M, K, V, dtype=BF16):
    x, weight, bias = (torch.empty(*shape, dtype=dtype) for shape in ((M, K), (V, K), (V,)))
    target, row = torch.empty(M, dtype=torch.int64), torch.empty(M)
    options = -100, 0.1
    cross_entropy_triton.linear_cross_entropy_fwd(x, weight, bias, target, row, row, *options)
    given = (row, x, weight, target, bias, row)
    cross_entropy_triton.linear_cross_entropy_bwd(*given, *options, (True, True, True))


# One call per launch configuration, at the shapes of the models that it is for.
CALLS = {
    "layer_norm C=128": lambda: layer_norm(128),
    "layer_norm C=768": lambda: layer_norm(768),
    "layer_norm C=1536": lambda: layer_norm(1536),
    "layer_norm C=2560": lambda: layer_norm(2560),
    "layer_norm C=5120": lambda: layer_norm(5120),
    "layer_norm C=5120 fp32": lambda: layer_norm(5120, FP32),
    "gemm 1x3072x768": lambda: gemm(1, 3072, 768),
    "gemm 512x768x3072": lambda: gemm(512, 768, 3072),
    "gemm 8192x3072x768": lambda: gemm(8192, 3072, 768),
    "gemm 8192x3072x768 nk": lambda: gemm(8192, 3072, 768, layout="nk"),
    "gemm 4x768x768 fp32": lambda: gemm(4, 768, 768, FP32),
    "gemm 512x3072x768 fp32": lambda: gemm(512, 3072, 768, FP32),
    "cross_entropy 512x768x50257": lambda: cross_entropy(512, 768, 50257),
    "cross_entropy 512x768x50257 fp32": lambda: cross_entropy(512, 768, 50257, FP32),
    "attention D=64": lambda: attention(64),
    "attention D=128": lambda: attention(128),
    "attention D=256": lambda: attention(256),
    "attention D=64 masks": lambda: attention(64, masks=True),
    "attention D=64 dropout": lambda: attention(64, dropout_p=0.1, masks=True),
    "attention D=64 bias": lambda: attention(64, bias=True),
    "attention D=128 dropout": lambda: attention(128, dropout_p=0.1),
    "attention D=128 bias": lambda: attention(128, bias=True),
    "attention D=64 fp32": lambda: attention(64, FP32),
    "attention D=128 fp32": lambda: attention(128, FP32),
    "attention D=64 fp32 dropout": lambda: attention(64, FP32, dropout_p=0.1),
    "attention D=64 decode": lambda: attention(64, S_q=1),
    "attention D=128 decode": lambda: attention(128, S_q=1),
    "attention D=64 fp32 decode": lambda: attention(64, FP32, S_q=1),
}


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


def write(prefix=""):
    """Compile the calls whose name starts with prefix anew and keep what stands for the others."""
    before = committed()["kernels"] if prefix else {}
    kept = {name: [k for k in before if k.startswith(f"{name}: ")] for name in CALLS}
    kernels = {}
    for name in CALLS:
        if not name.startswith(prefix):
            kernels |= {key: before[key] for key in kept[name]}
            continue
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
    write(*sys.argv[1:])
