"""ops.gemm with LoRA factors: the numerics rule, gradients, packed weights, every way in."""

import pytest
import torch

from cgpt_kernels import backends, ops
from cgpt_kernels.ops.gemm import pack_weight, reference
from cgpt_kernels.testing import FORWARD_FACTOR, compare, hold_to_rule

pytestmark = [
    pytest.mark.skipif(backends._C is None, reason="cgpt_kernels._C is not built"),
    pytest.mark.usefixtures("nan_filled_memory"),
]
TIERS = [] if backends._C is None else backends._C.cpu_isas()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALE = 0.7  # no power of two: scaling rounds


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def inputs(dtype, M=(2, 9), K=70, N=50, r=5, *, layout="nk", factors=None, x_low=False):
    """What `gemm` below takes; factors: dtype of A and B, that of x by default."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=dtype, std=1.0):
        return (torch.randn(shape, generator=generator) * std).to(dtype)

    factors = factors or dtype
    given = {
        "x": draw(*M, K),
        "weight": draw(*((N, K) if layout == "nk" else (K, N)), std=K**-0.5),
        "bias": draw(N),
        "residual": draw(*M, N),
        "A": draw(r, K, std=K**-0.5, dtype=factors),
        "B": draw(N, r, std=r**-0.5, dtype=factors),
        "weight_layout": layout,
    }
    if x_low:
        given["x_low"] = draw(*M, K)
    return given


def gemm(x, weight, A, B, x_low=None, scale=SCALE, **options):
    return ops.gemm(x, weight, lora=(A, B, scale, x_low), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("M", [(1,), (13,), (3, 15)], ids=str)
@pytest.mark.parametrize("layout", ["nk", "kn"])
def test_every_tier_keeps_the_rule(tier, layout, M, dtype):
    given = inputs(dtype, M, layout=layout)
    hold_to_rule(gemm, {**given, "activation": "gelu"}, backend="cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("x_low", [False, True], ids=["", "dropped"])
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
@pytest.mark.parametrize("layout", ["nk", "kn"])
def test_gradients_keep_the_rule(layout, activation, x_low, dtype):
    given = inputs(dtype, layout=layout, x_low=x_low)
    hold_to_rule(gemm, {**given, "activation": activation}, gradients=True, backend="cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("x_low", [False, True], ids=["", "dropped"])
def test_fp32_factors_beside_narrow_weights_keep_the_rule(x_low, dtype):
    given = inputs(dtype, layout="kn", factors=torch.float32, x_low=x_low)
    hold_to_rule(gemm, given, gradients=True, backend="cpu")


@pytest.mark.parametrize("r", [1, 2, 33, 64])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
def test_any_rank(dtype, r):
    hold_to_rule(gemm, inputs(dtype, (150,), 200, 300, r), gradients=True, backend="cpu")


@pytest.mark.parametrize("M", [1, 40])
@pytest.mark.parametrize("format", ["f32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
def test_packed_and_quantized_weights_take_factors(tier, dtype, format, M):
    """The term is added to what the packed weight gives without it."""
    given = inputs(dtype, (M,), K=128, N=75)
    A, B, x = given["A"], given["B"], given["x"]
    packed = pack_weight(given["weight"], format)
    options = {name: given[name] for name in ("bias", "residual")}
    y = ops.gemm(x, packed, lora=(A, B, SCALE), **options)
    wide = {name: t.double() for name, t in options.items()}
    low = (x.double() @ A.double().t() @ B.double().t()) * SCALE
    base = ops.gemm(x.float(), packed)  # fp32: rounded nowhere but where rows are quantized
    truth = base.double() + low + sum(wide.values())
    eager = (base + low.float()).to(dtype) + options["bias"] + options["residual"]
    comparison = compare("y", y, eager, truth, FORWARD_FACTOR)
    # rows quantized from bf16 and from the same numbers in fp32 are the same rows
    assert comparison.ok, str(comparison)


def test_strides_and_one_dimension_are_taken():
    given = inputs(torch.float32, (6,))
    expected = gemm(**given)
    strided = {**given, "A": given["A"].t().contiguous().t(), "B": given["B"].t().contiguous().t()}
    torch.testing.assert_close(gemm(**strided), expected)
    one = {**given, "x": given["x"][2], "residual": given["residual"][2]}
    torch.testing.assert_close(gemm(**one), expected[2])


def test_no_rows_give_no_rows():
    given = inputs(torch.float32, (0,))
    leaves = {n: t.requires_grad_() for n, t in given.items() if isinstance(t, torch.Tensor)}
    y = gemm(**{**given, **leaves})
    assert y.shape == (0, 50)
    y.sum().backward()
    assert not leaves["A"].grad.any() and not leaves["B"].grad.any()


def test_the_same_bits_every_time():
    given = inputs(torch.bfloat16, (150,), 200, 300, 8)
    first = gemm(**given)
    assert all(torch.equal(gemm(**given), first) for _ in range(20))


def test_frozen_weights_cost_no_gradient(monkeypatch):
    given = inputs(torch.float32)
    for name in ("x", "A", "B"):
        given[name].requires_grad_()
    from cgpt_kernels.ops.gemm import lora

    monkeypatch.setattr(lora, "gemm_bwd_cpu", None)  # dweight and dbias would call it
    gemm(**given).sum().backward()
    assert given["weight"].grad is None and given["A"].grad is not None


@pytest.mark.parametrize("activation", [None, "relu"])
def test_compile_and_other_backends_agree(activation):
    given = {**inputs(torch.float32), "activation": activation}
    expected = gemm(**given, backend="eager")
    torch.testing.assert_close(gemm(**given, backend="wafer"), expected)
    compiled = torch.compile(gemm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given), expected)


def test_compiled_gradients_agree():
    def gradients(function):
        given = inputs(torch.float32)
        leaves = [given[n].requires_grad_() for n in ("x", "A", "B")]
        return torch.autograd.grad(function(**given).square().sum(), leaves)

    compiled = torch.compile(gemm, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled), gradients(gemm), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_autocast_runs_in_its_dtype():
    given = inputs(torch.float32)
    del given["residual"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = gemm(**given)
    narrow = {n: t.bfloat16() if isinstance(t, torch.Tensor) else t for n, t in given.items()}
    assert torch.equal(y, gemm(**narrow))


def test_vmap_and_forward_mode_go_through_the_reference():
    given = inputs(torch.float32, (4,))
    x = given.pop("x")
    del given["residual"]
    y, tangent = torch.func.jvp(lambda x: gemm(x, **given), (x,), (x,))
    torch.testing.assert_close(tangent, y - given["bias"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.ones(5, 3)}, r"gemm: A of lora must have shape \(5, 70\) = \(r, K\)"),
        ({"B": torch.ones(50, 4)}, r"gemm: B of lora must have shape \(50, 5\) = \(N, r\)"),
        ({"x_low": torch.ones(2, 9, 4)}, r"gemm: x' of lora must have shape \(2, 9, 70\)"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        gemm(**{**inputs(torch.float32), **change})


def test_wrong_types_are_named():
    given = inputs(torch.float32)
    with pytest.raises(TypeError, match="lora must be None or a tuple"):
        ops.gemm(given["x"], given["weight"], lora=[given["A"], given["B"], 1.0])
    with pytest.raises((TypeError, ValueError), match="B of lora must"):
        gemm(**{**given, "B": given["B"].half()})


def test_the_reference_is_the_formula():
    given = inputs(torch.float64)
    x, w, A, B = (given[n] for n in ("x", "weight", "A", "B"))
    y = reference.gemm(x, w, given["bias"], None, None, "nk", (A, B, SCALE, None))
    torch.testing.assert_close(y, x @ (w + SCALE * B @ A).t() + given["bias"])
