"""Gradients of layer_norm and add_layer_norm on the CPU: every tier, row length, thread count."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cgpt_kernels import backends, ops
from cgpt_kernels.ops.layer_norm.cases import AddLayerNormCase, LayerNormCase
from cgpt_kernels.testing import hold_to_rule, run
from cgpt_kernels.timing import threads

_C = backends._C
if _C is None:
    pytest.skip(backends._C_REASON, allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = [(LayerNormCase, ops.layer_norm), (AddLayerNormCase, ops.add_layer_norm)]
layer_norm = functools.partial(ops.layer_norm, backend="cpu")


@pytest.mark.usefixtures("nan_filled_memory")
@settings(max_examples=10)
@given(
    rows=st.integers(1, 80),
    C=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    fp32_parameters=st.booleans(),
    offset=st.sampled_from([0.0, 20.0]),
)
def test_every_tier_keeps_the_rule(tier, rows, C, dtype, **options):
    for cls, function in OPS:
        one = cls(name="", why="", rows=(rows,), C=C, **options)
        draws = [one.inputs(dtype, seed=seed) for seed in range(10, 17)]
        hold_to_rule(function, one.inputs(dtype), gradients=True, draws=draws, backend="cpu")


SHAPES = [(1, 768), (33, 5120), (3000, 17), (67, 1023), (2, 50257)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_long_and_many_rows_keep_the_rule(shape, dtype):
    for cls, function in OPS:
        inputs = cls(name="", why="", rows=shape[:1], C=shape[1]).inputs(dtype)
        hold_to_rule(function, inputs, gradients=True, backend="cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_bit_depends_on_the_thread_count(shape, dtype):
    for cls, function in OPS:
        inputs = cls(name="", why="", rows=shape[:1], C=shape[1]).inputs(dtype)
        found = {}
        for count in (1, 2, 3, 5):
            with threads(count):
                found[count] = run(function, inputs, gradients=True, backend="cpu")
        for count in (2, 3, 5):
            for what, value in found[1].items():
                assert torch.equal(value, found[count][what]), (what, count)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 5)], ids=str)
def test_empty_rows_give_zero_gradients(shape):
    x = torch.randn(shape, requires_grad=True)
    weight, bias = (torch.randn(shape[-1], requires_grad=True) for _ in range(2))
    layer_norm(x, weight, bias).sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any() and not bias.grad.any()


def test_expanded_and_strided_gradients_are_read_as_they_are():
    x = torch.randn(6, 40)[:, ::2].requires_grad_()
    weight, bias = torch.randn(20, requires_grad=True), torch.randn(20, requires_grad=True)
    leaves = [x, weight, bias]
    ones = torch.autograd.grad(layer_norm(x, weight, bias).sum(), leaves)
    wide = torch.ones(6, 50)[:, 5:25]  # rows further apart than they are long
    grads = torch.autograd.grad(layer_norm(x.contiguous(), weight, bias), leaves, wide)
    for a, b in zip(ones, grads, strict=True):
        assert torch.equal(a, b)


def test_only_what_is_asked_for_gets_a_gradient():
    inputs = AddLayerNormCase(name="", why="", rows=(40,), C=70).inputs(torch.float32)
    whole = run(ops.add_layer_norm, inputs, gradients=True, backend="cpu")
    g = torch.Generator().manual_seed(1)
    directions = [torch.randint(-31, 32, (40, 70), generator=g) / 8 for _ in range(2)]
    for name in ("x", "residual", "weight", "bias"):
        leaf = inputs[name].detach().requires_grad_()
        outputs = ops.add_layer_norm(**{**inputs, name: leaf}, backend="cpu")
        if name in ("weight", "bias"):  # the sum does not depend on them
            (grad,) = torch.autograd.grad(outputs[0], [leaf], directions[0])
        else:
            (grad,) = torch.autograd.grad(outputs, [leaf], directions)
        assert torch.equal(grad, whole[f"grad of {name}"]), name


@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_of_one_output_only(which):
    inputs = AddLayerNormCase(name="", why="", rows=(9,), C=30).inputs(torch.float64)
    found = []
    for dtype, backend in ((torch.float64, "eager"), (torch.float32, "cpu")):
        given = {n: t.to(dtype) for n, t in inputs.items()}
        x = given["x"].requires_grad_()
        y = ops.add_layer_norm(**given, backend=backend)[which]
        found.append(torch.autograd.grad((y * y).sum(), x)[0].double())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_written_outside_the_outputs(dtype):
    rows, C, gap, sentinel = 37, 51, 5, 77.0
    x, dy = torch.randn(2, rows, C).to(dtype)
    mean, rstd = x.float().mean(1), x.float().var(1, correction=0).add(1e-5).rsqrt()
    arenas = [torch.full((n + 2, C + gap), sentinel, dtype=dtype) for n in (rows, 1, 1)]
    dx, dweight, dbias = (whole[1:-1, :C] for whole in arenas)
    _C.layer_norm_bwd(dy, None, x, torch.ones(C), mean, rstd, dx, dweight[0], dbias[0])
    for whole in arenas:
        assert torch.isfinite(whole[1:-1, :C]).all()
        whole[1:-1, :C] = sentinel
        assert (whole == sentinel).all()


def test_the_binding_names_what_is_wrong():
    x, weight, stat = torch.randn(2, 3), torch.randn(3), torch.randn(2)
    dx = torch.empty(2, 3)
    with pytest.raises(ValueError, match=r"layer_norm_bwd: dy must have shape \(2, 3\), got \(2, "):
        _C.layer_norm_bwd(x[:, :2], None, x, weight, stat, stat, dx, None, None)
    with pytest.raises(ValueError, match="layer_norm_bwd: rstd must be float32, got float64"):
        _C.layer_norm_bwd(x, None, x, weight, stat, stat.double(), dx, None, None)
