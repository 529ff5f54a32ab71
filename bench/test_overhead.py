"""What a call costs when there is nothing to compute: tiny tensors, one thread is enough.

The target is 4 us per op in inference; torch's own calls stand beside it.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.nn import Parameter

from cgpt_kernels import ops

x, residual = torch.randn(2, 1, 4, 8)
weight, bias, matrix = (
    Parameter(torch.ones(8)),
    Parameter(torch.zeros(8)),
    Parameter(torch.randn(8, 8)),
)
q = torch.randn(1, 2, 4, 8)
target = torch.randint(8, (1, 4))

CALLS = {
    "layer_norm": {
        "ours": lambda: ops.layer_norm(x, weight, bias),
        "torch": lambda: F.layer_norm(x, (8,), weight, bias),
    },
    "add_layer_norm": {
        "ours": lambda: ops.add_layer_norm(x, residual, weight, bias),
        "torch": lambda: F.layer_norm(x + residual, (8,), weight, bias),
    },
    "gemm": {
        "ours": lambda: ops.gemm(x, matrix, bias),
        "torch": lambda: F.linear(x, matrix, bias),
    },
    "gemm_gelu_residual": {
        "ours": lambda: ops.gemm(x, matrix, bias, activation="gelu", residual=residual),
        "torch": lambda: F.gelu(F.linear(x, matrix, bias)) + residual,
    },
    "attention": {
        "ours": lambda: ops.attention(q, q, q),
        "torch": lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True),
    },
    "linear_cross_entropy": {
        "ours": lambda: ops.linear_cross_entropy(x, matrix, target),
        "torch": lambda: F.cross_entropy(F.linear(x, matrix)[0], target[0]),
    },
}


@pytest.mark.parametrize("who", ["ours", "torch"])
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("op", CALLS)
def test_overhead(benchmark, op, gradients, who):
    benchmark.group = f"overhead {op} {'gradients' if gradients else 'inference'}"
    with torch.set_grad_enabled(gradients):
        benchmark(CALLS[op][who])
