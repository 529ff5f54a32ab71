"""Every instruction-set tier that this machine can run, forced, on a few cases of each op."""

import pytest
import torch

from cgpt_kernels import backends
from cgpt_kernels.ops import registry
from cgpt_kernels.testing import hold_to_rule, run

CASES = {
    "layer_norm": ["odd_tail", "c_3", "fp32_parameters"],
    "add_layer_norm": ["odd_tail"],
    "gemm": ["odd", "odd_kn", "vector", "m_4", "all_kn", "long_k", "blocks", "vocabulary"],
    "attention": ["causal", "d_7", "decode", "long_keys", "alibi", "dropout_all", "bias_b11k"],
    "linear_cross_entropy": ["odd", "bias", "spread", "vocabulary"],
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TIERS = [] if backends._C is None else backends._C.cpu_isas()

PARAMETERS = [
    pytest.param(case, id=f"{case.op}-{case.name}")
    for case in registry.cases("test")
    if case.name in CASES[case.op] and backends.implementation(case.op, "cpu")[1] is None
]


on_tiers = pytest.mark.parametrize("tier", TIERS, indirect=True)


def test_the_tier_in_use_is_one_of_the_machines():
    backends._C.set_cpu_isa("auto")
    assert backends._C.cpu_isa() in TIERS
    assert "scalar" in TIERS
    assert backends._C.cpu_isa() != "amx_emulated", "emulated tiles are for tests only"


@on_tiers
def test_a_forced_tier_is_the_one_in_use(tier):
    assert backends._C.cpu_isa() == tier


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", PARAMETERS)
@on_tiers
def test_every_tier_is_as_exact_as_eager(tier, case, dtype):
    hold_to_rule(registry.FUNCTIONS[case.op], case.inputs(dtype), backend="cpu")


@pytest.mark.parametrize("case", PARAMETERS)
@on_tiers
def test_every_tier_repeats_its_bits(tier, case):
    function, inputs = registry.FUNCTIONS[case.op], case.inputs(torch.bfloat16)
    first = run(function, inputs, backend="cpu")
    again = run(function, inputs, backend="cpu")
    assert all(torch.equal(first[what], again[what]) for what in first)


def test_an_unknown_tier_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="scalar"):
        backends._C.set_cpu_isa("avx1024")
    assert backends._C.cpu_isa() in TIERS
