"""gemm's gradients and dropout on the CPU: every tier, any thread count, odd shapes and strides."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cgpt_kernels import backends, ops
from cgpt_kernels.ops.gemm.cases import GemmCase
from cgpt_kernels.ops.gemm.reference import activate
from cgpt_kernels.ops.philox import keep_mask
from cgpt_kernels.testing import hold_to_rule, run
from cgpt_kernels.timing import threads

_C = backends._C
if _C is None:
    pytest.skip(backends._C_REASON, allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = [None, "gelu", "gelu_tanh", "relu"]
gemm = functools.partial(ops.gemm, backend="cpu")


def case(M, N, K, **options):
    return GemmCase(name="", why="", M=M, N=N, K=K, **options)


@pytest.mark.usefixtures("nan_filled_memory")
@settings(max_examples=12)
@given(
    M=st.integers(1, 70),
    N=st.integers(1, 90),
    K=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    fp32_bias=st.booleans(),
    residual=st.booleans(),
    layout=st.sampled_from(["nk", "kn"]),
    dropout_p=st.sampled_from([0.0, 0.1, 0.6]),
)
def test_every_tier_keeps_the_rule(tier, M, N, K, dtype, **options):
    one = case(M, N, K, **options)
    draws = [one.inputs(dtype, seed=seed) for seed in range(10, 17)]
    hold_to_rule(ops.gemm, one.inputs(dtype), gradients=True, draws=draws, backend="cpu")


SHAPES = [
    case(300, 130, 70, activation="gelu"),  # transposed blocks in both directions, with tails
    case(1, 200, 300, layout="kn"),  # one row: dweight is an outer product
    case(2100, 3, 40, layout="kn"),  # M beyond a block of K in dweight
    case(3, 50257, 16, bias=False),  # odd vocabulary, odd rows
    case(150, 70, 900, activation="relu", dropout_p=0.3, residual=True),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one", SHAPES, ids=lambda c: c.shape)
def test_large_and_odd_shapes_keep_the_rule(one, dtype):
    hold_to_rule(ops.gemm, one.inputs(dtype), gradients=True, backend="cpu")


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("one", SHAPES, ids=lambda c: c.shape)
def test_no_bit_depends_on_the_thread_count(one, dtype):
    found = {}
    for count in (1, 2, 3, 5):
        with threads(count):
            found[count] = run(gemm, one.inputs(dtype), gradients=True)
    for count in (2, 3, 5):
        for what, value in found[1].items():
            assert torch.equal(value, found[count][what]), (what, count)


@pytest.mark.parametrize("layout", ["nk", "kn"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_rows_without_width_and_no_rows_give_zero_gradients(layout, activation):
    for M, N, K in ((0, 5, 4), (3, 0, 4), (3, 5, 0)):
        x = torch.randn(M, K, requires_grad=True)
        weight = torch.randn((N, K) if layout == "nk" else (K, N), requires_grad=True)
        bias = torch.randn(N, requires_grad=True)
        gemm(x, weight, bias, activation=activation, weight_layout=layout).sum().backward()
        assert x.grad.shape == x.shape and weight.grad.shape == weight.shape
        if N == 0 or M == 0:
            assert not x.grad.any() and not weight.grad.any() and not bias.grad.any()


def test_expanded_gradients_and_transposed_weights_are_read_as_they_are():
    inputs = case(20, 24, 40).inputs(torch.float32)
    leaves = {n: inputs[n].requires_grad_() for n in ("x", "weight", "bias")}
    one = torch.autograd.grad(gemm(**leaves).sum(), list(leaves.values()))
    turned = {**leaves, "weight": leaves["weight"].t().contiguous().t()}
    grads = torch.autograd.grad(gemm(**turned), list(leaves.values()), torch.ones(20, 24))
    for a, b in zip(one, grads, strict=True):
        torch.testing.assert_close(a, b)


def test_only_what_is_asked_for_gets_a_gradient():
    inputs = case(9, 24, 40, activation="gelu", residual=True).inputs(torch.float32)
    whole = run(gemm, inputs, gradients=True)
    g = torch.Generator().manual_seed(1)
    direction = torch.randint(-31, 32, (9, 24), generator=g) / 8
    for name in ("x", "weight", "bias", "residual"):
        leaf = inputs[name].detach().requires_grad_()
        y = gemm(**{**inputs, name: leaf})
        (grad,) = torch.autograd.grad(y, [leaf], direction)
        assert torch.equal(grad, whole[f"grad of {name}"]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_the_values_before_the_activation_are_those_it_was_applied_to(activation, dtype):
    i = case(30, 50, 40).inputs(dtype)
    y, pre = torch.empty(30, 50, dtype=dtype), torch.empty(30, 50, dtype=dtype)
    _C.gemm_fwd_training(i["x"], i["weight"], i["bias"], None, y, pre, activation, False, 0.0, 0)
    assert torch.equal(pre, gemm(i["x"], i["weight"], i["bias"]))
    torch.testing.assert_close(y, activate(pre, activation))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
def test_nothing_is_written_outside_the_outputs(activation, dtype):
    M, N, K, gap, sentinel = 37, 51, 43, 5, 77.0
    i = case(M, N, K).inputs(dtype)

    def arena(rows, columns):
        return torch.full((rows + 2, columns + gap), sentinel, dtype=dtype)

    def inside(whole):
        return whole[1:-1, : whole.shape[1] - gap]

    arenas = [arena(M, N), arena(M, K), arena(N, K), arena(1, N), arena(M, N), arena(M, N)]
    g, dx, dweight, dbias, y, pre = map(inside, arenas)
    how = activation or "none", False, 0.25, 3
    _C.gemm_fwd_training(i["x"], i["weight"], i["bias"], None, y, pre, *how)
    dy = torch.randn(M, N).to(dtype)
    _C.gemm_bwd(dy, i["x"], i["weight"], pre, g, dx, dweight, dbias[0], *how)
    for whole in arenas:
        assert torch.isfinite(inside(whole)).all()
        inside(whole).fill_(sentinel)
        assert (whole == sentinel).all()


# ---- dropout ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "eager", "wafer"])
def test_dropout_mask_is_the_shared_one_and_survivors_grow(backend):
    i = case(6, 700, 8, activation="gelu").inputs(torch.float32)
    plain = ops.gemm(**i, backend=backend)
    dropped = ops.gemm(**i, dropout_p=0.3, seed=99, backend=backend)
    keep = keep_mask(0, 6 * 700, 0.3, 99, "cpu").view(6, 700)
    torch.testing.assert_close(dropped, plain * keep / 0.7)
    assert not dropped[~keep].any()


def test_dropout_comes_before_the_residual():
    i = case(3, 40, 8, residual=True).inputs(torch.float32)
    y = gemm(**i, dropout_p=0.5, seed=1)
    dropped = ~keep_mask(0, 120, 0.5, 1, "cpu").view(3, 40)
    assert torch.equal(y[dropped], i["residual"][dropped])


@pytest.mark.parametrize("activation", [None, "relu"])
def test_dropout_backward_uses_the_mask_of_the_forward(activation):
    i = case(5, 60, 8, activation=activation).inputs(torch.float32)
    bias = i["bias"].requires_grad_()
    y = gemm(**i, dropout_p=0.4, seed=5)
    y.sum().backward()
    alive = keep_mask(0, 300, 0.4, 5, "cpu").view(5, 60)
    if activation == "relu":
        alive &= gemm(**i) > 0
    torch.testing.assert_close(bias.grad, alive.sum(0) / 0.6)


def test_dropout_of_zero_is_no_dropout_and_draws_nothing():
    i = case(5, 60, 8).inputs(torch.float32)
    state = torch.get_rng_state()
    assert torch.equal(gemm(**i, dropout_p=0.0, seed=3), gemm(**i))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_default_generator_governs_dropout_without_a_seed():
    i = case(5, 60, 8).inputs(torch.float32)
    for need in (False, True):  # the general path, and the one with gradients
        i["x"].requires_grad_(need)
        torch.manual_seed(7)
        first, second = gemm(**i, dropout_p=0.5), gemm(**i, dropout_p=0.5)
        torch.manual_seed(7)
        assert torch.equal(gemm(**i, dropout_p=0.5), first)
        assert not torch.equal(first, second)


def test_dropout_keeps_the_mean():
    x, weight = torch.ones(400, 1), torch.ones(300, 1)
    y = gemm(x, weight, dropout_p=0.2, seed=11)
    assert abs(y.mean() - 1) < 5 * (0.2 / 0.8 / y.numel()) ** 0.5


def test_dropout_compiles_and_draws_anew_at_each_call():
    i = case(5, 60, 8, activation="gelu").inputs(torch.float32)
    i["x"].requires_grad_()
    compiled = torch.compile(functools.partial(gemm, **i), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(dropout_p=0.5, seed=4), gemm(**i, dropout_p=0.5, seed=4))
    assert not torch.equal(compiled(dropout_p=0.5), compiled(dropout_p=0.5))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"dropout_p": 1.0}, ValueError, r"gemm: dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, ValueError, r"gemm: dropout_p must be in \[0, 1\), got -0.1"),
        ({"dropout_p": 0.1, "seed": 2.0}, TypeError, "gemm: seed must be an int or None, got flo"),
        ({"dropout_p": 0.1, "seed": -1}, ValueError, r"gemm: seed must be in \[0, 2\^63\), got -1"),
    ],
)
@pytest.mark.parametrize("gradients", [False, True])
def test_wrong_dropout_arguments_are_named(options, error, message, gradients):
    x = torch.randn(2, 3, requires_grad=gradients)
    with pytest.raises(error, match=message):
        ops.gemm(x, torch.randn(4, 3), **options)


def test_a_packed_weight_refuses_dropout():
    packed = ops.gemm.__globals__["packed"].pack_weight(torch.randn(4, 3))
    with pytest.raises(ValueError, match="dropout_p must be 0 with a packed weight"):
        ops.gemm(torch.randn(2, 3), packed, dropout_p=0.5)


def test_the_binding_names_what_is_wrong():
    x, w, dy = torch.randn(2, 3), torch.randn(4, 3), torch.randn(2, 4)
    dx = torch.empty(2, 3)
    with pytest.raises(ValueError, match=r"gemm_bwd: dy must have shape"):
        _C.gemm_bwd(None, x, w, None, None, dx, None, None, "none", False, 0.0, 0)
    with pytest.raises(ValueError, match=r"gemm_bwd: weight must have shape \(4, 3\), got \(3, 4"):
        _C.gemm_bwd(dy, x, torch.randn(3, 4), None, None, dx, None, None, "none", False, 0.0, 0)
    with pytest.raises(ValueError, match=r"gemm_bwd: pre is missing"):
        _C.gemm_bwd(dy, x, w, None, dy.clone(), dx, None, None, "gelu", False, 0.0, 0)
    with pytest.raises(ValueError, match=r"gemm_bwd: g is missing"):
        _C.gemm_bwd(dy, x, w, None, None, dx, None, None, "none", False, 0.5, 0)
