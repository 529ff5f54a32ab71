"""Gradients of attention by the CPU kernel: the numerics rule on every tier, at the borders of its
blocks, and what holds to the bit."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cgpt_kernels import backends, ops
from cgpt_kernels.ops.attention.cases import AttentionCase
from cgpt_kernels.testing import hold_to_rule, run

pytestmark = [
    pytest.mark.usefixtures("nan_filled_memory"),
    pytest.mark.skipif(backends._C is None, reason="cgpt_kernels._C is not built"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TIERS = [] if backends._C is None else backends._C.cpu_isas()


on_tiers = pytest.mark.parametrize("tier", TIERS, indirect=True)
in_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def case(**shape):
    return AttentionCase(**{"name": "any", "why": "", "B": 1, "H": 2, "D": 16, **shape})


def gradients(given, **options):
    found = run(ops.attention, given, gradients=True, backend="cpu", **options)
    return {what: g for what, g in found.items() if what.startswith("grad")}


def same_bits(found, wanted):
    for what in wanted:
        assert torch.equal(found[what], wanted[what]), what


# ---- the rule -----------------------------------------------------------------------------------


@settings(max_examples=12)
@given(
    B=st.integers(1, 3),
    H=st.integers(1, 3),
    Sq=st.integers(1, 80),
    Sk=st.integers(1, 80),
    D=st.sampled_from([1, 3, 8, 17, 40, 64]),
    dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
    layout=st.sampled_from(["bhsd", "bshd"]),
    padding=st.sampled_from([None, "left", "right", "all"]),
    bias=st.sampled_from([None, "qk", "BHqk", "B11k", "1Hqk"]),
    bias_kind=st.sampled_from(["T", "fp32", "bool"]),
    alibi=st.booleans(),
    scale=st.sampled_from([None, 0.5, -0.25, 0.0]),
    dropout_p=st.sampled_from([0.0, 0.0, 0.4]),
)
@on_tiers
def test_gradients_of_any_shape_on_every_tier(tier, dtype, **shape):
    any_case = case(**shape)
    # With a handful of elements eager may hit the truth by luck: its error on other draws counts.
    draws = [any_case.inputs(dtype, seed=seed) for seed in range(10, 14)]
    inputs = any_case.inputs(dtype)
    hold_to_rule(ops.attention, inputs, gradients=True, draws=draws, backend="cpu")


BORDERS = {
    "strip": dict(Sq=57, Sk=57),  # one query more than a strip of AVX-512
    "two_strips": dict(Sq=129, Sk=129),  # and than two of AMX
    "block": dict(Sq=3, Sk=257, causal=False),  # one key more than a block
    "diagonal": dict(Sq=90, Sk=301),  # strips that see a part of the second block
    "part": dict(Sq=70, Sk=1025, D=8),  # one key more than a part of a head
    "wide": dict(Sq=20, Sk=40, D=256),
    "wider": dict(Sq=20, Sk=40, D=300),
    "late_rows": dict(Sq=200, Sk=30),  # whole strips of queries that see nothing
    "dropout": dict(Sq=60, Sk=261, dropout_p=0.3),
    "masks": dict(B=2, Sq=60, Sk=261, padding="left", bias="1Hqk", alibi=True, dropout_p=0.1),
}


@in_dtypes
@pytest.mark.parametrize("border", BORDERS)
def test_gradients_at_the_borders_of_blocks(border, dtype):
    hold_to_rule(
        ops.attention, case(**BORDERS[border]).inputs(dtype), gradients=True, backend="cpu"
    )


@in_dtypes
@pytest.mark.parametrize("bias", ["BHqk", "B11k", "1Hq1", "qk"])
def test_gradient_of_a_bias_beyond_one_tile(bias, dtype):
    inputs = case(B=2, Sq=300, Sk=280, D=8, bias=bias, bias_kind="fp32").inputs(dtype)
    hold_to_rule(ops.attention, inputs, gradients=True, backend="cpu")


@in_dtypes
@pytest.mark.parametrize("bias", ["1Hq1", "1111"])
def test_a_bias_that_all_keys_share_gets_rounding_for_a_gradient(bias, dtype):
    # Softmax does not see it: the true gradient is 0, of which no share can be asked.
    inputs = case(B=2, Sq=60, Sk=70, bias=bias, bias_kind="fp32").inputs(dtype)
    found = gradients(inputs)["grad of attn_bias"]
    inputs["attn_bias"] = inputs["attn_bias"].detach().expand(2, 2, 60, 70).contiguous()
    added = gradients(inputs)["grad of attn_bias"].abs().sum_to_size(found.shape)
    assert found.abs().le(2e-6 * added).all()


@in_dtypes
@pytest.mark.parametrize("keys, values, S", [(3, 3, 300), (10, 10, 100), (0, 10, 100)])
def test_what_keys_and_values_have_in_common_costs_no_digits(dtype, keys, values, S):
    inputs = case(Sq=S, Sk=S, D=64).inputs(dtype)
    inputs["k"] += keys
    inputs["v"] += values
    hold_to_rule(ops.attention, inputs, gradients=True, backend="cpu")


@in_dtypes
def test_other_forwards_leave_no_row_stats_and_have_the_same_gradients(dtype):
    inputs = case(Sq=70, Sk=90, alibi=True, dropout_p=0.2).inputs(dtype)
    wanted = gradients(inputs)
    args = [inputs[n] for n in "qkv"] + [None, None, inputs["alibi_slopes"]]
    options = 0.25, True, 0.2, torch.tensor(inputs["seed"])
    out, lse, stats = torch.ops.cgpt.attention(*args, *options, "cpu")
    directions = torch.randint(-31, 32, out.shape, generator=torch.Generator().manual_seed(1))
    dout, empty = directions.to(out) / 8, stats.new_empty(0)
    found = torch.ops.cgpt.attention_bwd(
        dout, *args[:3], out, lse, empty, *args[3:], *options, False, "wafer"
    )
    for name, grad in zip("qkv", found, strict=False):
        unit = torch.finfo(dtype).eps
        scale = wanted[f"grad of {name}"].abs().max().item()
        torch.testing.assert_close(grad, wanted[f"grad of {name}"], rtol=0, atol=8 * unit * scale)


# ---- to the bit ---------------------------------------------------------------------------------


THREADED = {
    "parts": dict(H=1, Sq=40, Sk=2100, D=8),
    "bias": dict(B=2, Sq=70, Sk=300, D=8, bias="11q1"),
    "many_heads": dict(B=3, H=5, Sq=30, Sk=30, dropout_p=0.2),
}


@in_dtypes
@pytest.mark.parametrize("shape", THREADED)
def test_the_number_of_threads_changes_no_bit(shape, dtype):
    inputs = case(**THREADED[shape]).inputs(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = gradients(inputs)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            same_bits(gradients(inputs), wanted)
    finally:
        torch.set_num_threads(before)


@in_dtypes
@on_tiers
def test_batch_entries_do_not_touch_each_others_gradients(tier, dtype):
    inputs = case(B=3, Sq=37, Sk=45, padding="right").inputs(dtype)
    found = gradients(inputs)
    generator = torch.Generator().manual_seed(1)
    dout = torch.randint(-31, 32, inputs["q"].shape, generator=generator).to(dtype) / 8
    for b in range(3):
        one = {n: t[b : b + 1] if isinstance(t, torch.Tensor) else t for n, t in inputs.items()}
        leaves = [one[n].detach().clone().requires_grad_() for n in "qkv"]
        out = ops.attention(**{**one, **dict(zip("qkv", leaves, strict=True))}, backend="cpu")
        alone = torch.autograd.grad(out, leaves, dout[b : b + 1])
        for name, grad in zip("qkv", alone, strict=True):
            assert torch.equal(grad[0], found[f"grad of {name}"][b]), name


@in_dtypes
@on_tiers
def test_padded_keys_may_hold_anything_and_take_no_gradient(tier, dtype):
    inputs = case(B=4, Sq=30, Sk=70, padding="all", causal=False).inputs(dtype)
    wanted = gradients(inputs)
    hidden = inputs["key_padding_mask"][:, None, :, None]
    for value in (float("nan"), float("inf")):
        spoilt = {**inputs, **{n: inputs[n].masked_fill(hidden, value) for n in "kv"}}
        found = gradients(spoilt)
        same_bits(found, wanted)
        for name in "kv":
            assert (found[f"grad of {name}"].masked_select(hidden) == 0).all()


@in_dtypes
def test_memory_order_of_a_packed_projection_is_kept(dtype):
    inputs = case(B=2, Sq=24, Sk=24, layout="packed").inputs(dtype)
    inputs.pop("scale")
    leaves = [inputs[n].requires_grad_() for n in "qkv"]
    out = ops.attention(**inputs, backend="cpu")
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad.transpose(1, 2).is_contiguous()


# ---- beside torch -------------------------------------------------------------------------------


def test_gradients_are_those_of_scaled_dot_product_attention():
    inputs = case(B=2, Sq=150, Sk=150, D=64).inputs(torch.float32)
    leaves = [inputs[n].requires_grad_() for n in "qkv"]
    dout = torch.randn(2, 2, 150, 64)
    wanted = torch.autograd.grad(
        F.scaled_dot_product_attention(*leaves, is_causal=True), leaves, dout
    )
    found = torch.autograd.grad(ops.attention(*leaves, backend="cpu"), leaves, dout)
    for grad, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(grad, true, rtol=1e-4, atol=1e-5)


def test_a_backward_through_sum_reads_an_expanded_gradient():
    inputs = case(Sq=9, Sk=9).inputs(torch.float32)
    q = inputs["q"].requires_grad_()
    (found,) = torch.autograd.grad(ops.attention(q, inputs["k"], inputs["v"]).sum(), q)
    q_eager = inputs["q"].detach().requires_grad_()
    out = ops.attention(q_eager, inputs["k"], inputs["v"], backend="eager")
    (wanted,) = torch.autograd.grad(out.sum(), q_eager)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
