"""Packed weights: layout, exactness on every tier, what quantization adds, who may use them."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cgpt_kernels import backends, ops
from cgpt_kernels.ops.gemm import PackedWeight, pack_weight, reference
from cgpt_kernels.ops.gemm.packed import FORMATS
from cgpt_kernels.testing import FORWARD_FACTOR, compare

pytestmark = [
    pytest.mark.skipif(backends._C is None, reason="cgpt_kernels._C is not built"),
    pytest.mark.usefixtures("nan_filled_memory"),
]
TIERS = [] if backends._C is None else backends._C.cpu_isas()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT_FORMATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
KINDS = ["f32", "bf16", "f16", "int8", ("int4", 32), ("int4", 64)]
SHAPES = [(1, 1, 1), (37, 50, 1), (96, 160, 32), (65, 67, 5), (33, 300, 17), (300, 130, 70)]


def name_of(value):
    if isinstance(value, tuple):
        return "-".join(map(str, value))
    return str(value).removeprefix("torch.")


def options_of(kind):
    return {"format": kind[0], "group": kind[1]} if isinstance(kind, tuple) else {"format": kind}


on_kinds = pytest.mark.parametrize("kind", KINDS, ids=name_of)


# ---- the layout ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["nk", "kn"])
@pytest.mark.parametrize("format", FLOAT_FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (31, 33), (50, 7), (96, 64)], ids=str)
def test_float_formats_come_back_bit_for_bit(tier, shape, format, layout):
    weight = torch.randn(shape).to(FLOAT_FORMATS[format])
    given = weight if layout == "nk" else weight.t().contiguous()
    packed = pack_weight(given, weight_layout=layout)
    assert packed.format == format
    assert torch.equal(packed.unpack(weight.dtype), weight)
    assert torch.equal(packed.unpack(weight.dtype, "kn"), weight.t())


@on_kinds
def test_every_tier_packs_the_same_bytes(kind):
    weight = torch.randn(70, 150)
    found = []
    for name in TIERS:
        backends._C.set_cpu_isa(name)
        found.append(pack_weight(weight, **options_of(kind)).data)
    backends._C.set_cpu_isa("auto")
    assert all(torch.equal(found[0], data) for data in found)


@on_kinds
@pytest.mark.parametrize("shape", [(1, 1), (31, 33), (50, 130)], ids=str)
def test_the_plain_reader_sees_what_the_kernels_unpack(tier, shape, kind):
    packed = pack_weight(torch.randn(shape), **options_of(kind))
    plain = reference.unpack(packed.data, packed.format, packed.N, packed.K, packed.group)
    assert torch.equal(packed.unpack(), plain)


def test_the_buffer_is_little_more_than_its_bits():
    weight = torch.randn(2304, 768)
    bits = {
        kind: 8 * pack_weight(weight, **options_of(kind)).nbytes / weight.numel() for kind in KINDS
    }
    assert bits["f32"] == 32 and bits["bf16"] == bits["f16"] == 16
    assert bits["int8"] < 8.1 and bits["int4", 64] == 4.25 and bits["int4", 32] == 4.5


def test_buffers_share_mappings_and_outlive_each_other():
    sizes = [1, 100, 4097, 3 << 20, 3 << 20, 40 << 20, 0]
    buffers = [torch.from_dlpack(backends._C.allocate_buffer(n)) for n in sizes]
    for i, (buffer, n) in enumerate(zip(buffers, sizes, strict=True)):
        assert buffer.dtype == torch.uint8 and buffer.numel() == n
        assert n == 0 or buffer.data_ptr() % 64 == 0
        assert not buffer.any()
        buffer.fill_(i + 1)
    del buffers[::2]
    for i, buffer in zip((1, 3, 5), buffers, strict=True):
        assert (buffer == i + 1).all()


def test_a_buffer_nobody_takes_is_freed():
    for _ in range(200):  # 200 x 1 GiB of address space would show
        backends._C.allocate_buffer(1 << 30)


# ---- quantization -------------------------------------------------------------------------------


def test_int8_rounds_to_the_nearest_step_of_its_channel():
    weight = torch.randn(50, 130) * torch.logspace(-4, 4, 50)[:, None]
    step = weight.abs().amax(1, keepdim=True) / 127
    error = (pack_weight(weight, "int8").unpack() - weight).abs()
    assert (error <= step * 0.5001).all()


@pytest.mark.parametrize("group", [32, 64])
def test_int4_is_better_than_plain_rounding_to_sixteen_steps(group):
    weight = torch.randn(64, 256)
    groups = weight.view(64, -1, group)
    scale = groups.abs().amax(2, keepdim=True) / 7
    plain = (torch.round(groups / scale) * scale).view_as(weight)
    packed = pack_weight(weight, "int4", group=group).unpack()
    assert (packed - weight).square().mean() < 0.85 * (plain - weight).square().mean()


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_zero_channels_stay_zero(format):
    weight = torch.randn(40, 64)
    weight[3] = 0
    packed = pack_weight(weight, format)
    assert (packed.unpack()[3] == 0).all()
    assert (ops.gemm(torch.randn(2, 64), packed)[:, 3] == 0).all()


# ---- the product --------------------------------------------------------------------------------


def product(x, weight, bias, residual, activation):
    return reference.gemm(x, weight, bias, residual, activation, "nk")


def allowed_by_quantized_rows(x, weight, few):
    """What quantizing the rows of x may add to each sum, at most: half a step of the row times the
    sum of |w|. The step is max |x| / 16319 for few rows and max |x| / 127 for many."""
    step = x.double().abs().amax(1, keepdim=True) / (16319 if few else 127)
    return (0.5 * step * weight.double().abs().sum(1)).max().item()


FEW_ROWS = 16


def hold_packed_to_rule(packed, x, bias=None, residual=None, activation=None):
    """The numerics rule against the dequantized weight, plus what quantized rows of x add."""
    dense = packed.unpack(torch.float64)
    truth = product(
        *(t if t is None else t.double() for t in (x, dense, bias, residual)), activation
    )
    eager = product(x, dense.to(x.dtype), bias, residual, activation)
    ours = ops.gemm(x, packed, bias, residual=residual, activation=activation, backend="cpu")
    found = compare("out", ours, eager, truth, FORWARD_FACTOR)
    extra = 0.0
    if packed.format in ("int8", "int4"):
        # gelu's slope reaches 1.13
        extra = 1.13 * allowed_by_quantized_rows(x, dense, x.shape[0] <= FEW_ROWS)
        if packed.format == "int4" and x.shape[0] > FEW_ROWS:
            extra = 0.0
    assert found.error <= found.allowed + extra, f"{found} + {extra:.3e}"


@on_kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_product_is_as_exact_as_eager(tier, shape, dtype, kind):
    N, K, M = shape
    packed = pack_weight(torch.randn(N, K) * K**-0.5, **options_of(kind))
    x = torch.randn(M, K).to(dtype)
    hold_packed_to_rule(packed, x)
    hold_packed_to_rule(packed, x, torch.randn(N), torch.randn(M, N).to(dtype), "gelu")


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "relu"])
@on_kinds
def test_epilogue(kind, activation):
    packed = pack_weight(torch.randn(45, 80) / 9, **options_of(kind))
    x = torch.randn(6, 80)
    hold_packed_to_rule(packed, x, torch.randn(45), torch.randn(6, 45), activation)


@on_kinds
def test_odd_vocabulary(tier, kind):
    packed = pack_weight(torch.randn(50257, 16) / 4, **options_of(kind))
    hold_packed_to_rule(packed, torch.randn(3, 16).bfloat16())


@given(
    M=st.integers(1, 40),
    N=st.integers(1, 90),
    K=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    activation=st.sampled_from([None, "gelu", "gelu_tanh", "relu"]),
    bias=st.booleans(),
)
def test_packed_product_of_any_shape(M, N, K, dtype, kind, activation, bias):
    # eager's error on one draw of few elements may be 0 by luck: the rule is held on eight columns
    packed = pack_weight(torch.randn(N + 7, K) * K**-0.5, **options_of(kind))
    x, b = torch.randn(M + 7, K).to(dtype), torch.randn(N + 7) if bias else None
    hold_packed_to_rule(packed, x, b, None, activation)


@on_kinds
@pytest.mark.parametrize("rows", [1, 5, 16, 40])
def test_rows_do_not_touch_each_other(tier, rows, kind):
    packed = pack_weight(torch.randn(70, 96), **options_of(kind))
    x = torch.randn(rows, 96).bfloat16()
    wanted = ops.gemm(x, packed)
    x[0] = float("nan")
    found = ops.gemm(x, packed)
    assert found[0].isnan().all()
    assert torch.equal(found[1:], wanted[1:])


@on_kinds
def test_a_row_of_a_small_batch_is_the_row_alone(tier, kind):
    packed = pack_weight(torch.randn(70, 96), **options_of(kind))
    x = torch.randn(FEW_ROWS, 96).bfloat16()
    # AMX tiles, from five rows on, round bf16 sums in an order of their own
    for few, many in ((1, 4), (3, 4), (5, FEW_ROWS), (8, FEW_ROWS)):
        assert torch.equal(ops.gemm(x[:few], packed), ops.gemm(x[:many], packed)[:few])
    if tier != "amx" or kind != "bf16":
        assert torch.equal(ops.gemm(x[:1], packed), ops.gemm(x, packed)[:1])


@pytest.mark.parametrize("kind", ["bf16", "int8", ("int4", 64)], ids=name_of)
def test_where_tiles_pause_does_not_show(tier, kind):
    # On AMX 500 rows go in sections of K and groups of columns, 100 rows do not.
    if not tier.startswith("amx"):
        pytest.skip("other tiers take the whole of K at once")
    packed = pack_weight(torch.randn(1090, 2100) * 2100**-0.5, **options_of(kind))
    x = torch.randn(500, 2100).bfloat16()
    hold_packed_to_rule(packed, x, torch.randn(1090), torch.randn(500, 1090).bfloat16())
    for rows in (17, 100):
        assert torch.equal(ops.gemm(x[:rows], packed), ops.gemm(x, packed)[:rows])


@on_kinds
def test_the_same_bits_run_after_run(tier, kind):
    packed = pack_weight(torch.randn(200, 300), **options_of(kind))
    for M in (1, 60):
        x = torch.randn(M, 300).bfloat16()
        first = ops.gemm(x, packed)
        assert all(torch.equal(first, ops.gemm(x, packed)) for _ in range(5))


@on_kinds
def test_extreme_rows(tier, kind):
    packed = pack_weight(torch.randn(40, 64), **options_of(kind))
    x = torch.zeros(3, 64)
    x[1] = 1e30
    x[2, 5] = float("inf")
    y = ops.gemm(x, packed)
    assert (y[0] == 0).all()
    wanted = x[1:2].double() @ packed.unpack(torch.float64).t()
    torch.testing.assert_close(y[1:2].double(), wanted, rtol=1e-2, atol=1e28)
    assert not y[2].isfinite().any()


def test_logits_may_be_wider_than_x(tier):
    weight = torch.randn(70, 96)
    x = torch.randn(3, 96).bfloat16()
    for kind in KINDS:
        packed = pack_weight(weight, **options_of(kind))
        y = torch.empty(3, 70)
        backends._C.packed_gemm_fwd(
            x, packed.data, 70, 96, packed.format, packed.group or 0, None, None, y, "none"
        )
        wanted = x.double() @ packed.unpack(torch.float64).t()
        assert (y - wanted).abs().max() < 1e-3 * wanted.abs().max(), kind


@on_kinds
def test_nothing_is_written_outside_the_output(tier, kind):
    packed = pack_weight(torch.randn(45, 70), **options_of(kind))
    for M in (2, 33):
        room = torch.full((M + 2, 45 + 5), 7.0)
        y = room[1:-1, 2:-3]
        backends._C.packed_gemm_fwd(
            torch.randn(M, 70), packed.data, 45, 70, packed.format, packed.group or 0,
            None, None, y, "none",
        )  # fmt: skip
        inside = torch.zeros_like(room, dtype=torch.bool)
        inside[1:-1, 2:-3] = True
        assert (room[~inside] == 7).all() and (room[inside] != 7).all()


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (4, 5, 0)], ids=str)
@on_kinds
def test_empty_products(shape, kind):
    N, K, M = shape
    packed = pack_weight(torch.randn(N, K), **options_of(kind))
    x, bias = torch.randn(M, K), torch.randn(N)
    assert torch.equal(ops.gemm(x, packed, bias), F.linear(x, torch.zeros(N, K), bias))


# ---- in Python ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(96,), (4, 96), (2, 3, 96), (0, 96)], ids=str)
def test_leading_dimensions(shape):
    packed, x = pack_weight(torch.randn(40, 96)), torch.randn(shape)
    torch.testing.assert_close(ops.gemm(x, packed), F.linear(x, packed.unpack()))


def test_strided_inputs_give_the_same():
    packed, bias = pack_weight(torch.randn(40, 96)), torch.randn(80)[::2]
    x = torch.randn(6, 192)[:, ::2]
    assert torch.equal(ops.gemm(x, packed, bias), ops.gemm(x.contiguous(), packed, bias.clone()))


@on_kinds
def test_eager_unpacks_and_multiplies(kind):
    packed, x = pack_weight(torch.randn(40, 96), **options_of(kind)), torch.randn(5, 96)
    wanted = F.linear(x, packed.unpack())
    assert torch.equal(ops.gemm(x, packed, backend="eager"), wanted)


def test_library_path_gives_the_same_bits():
    class Nothing(torch.overrides.TorchFunctionMode):  # any mode closes the lean path
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    packed = pack_weight(torch.randn(40, 96), "int8")
    x, residual = torch.randn(2, 3, 96), torch.randn(2, 3, 40)
    lean = ops.gemm(x, packed, residual=residual, activation="gelu")
    with Nothing():
        assert torch.equal(ops.gemm(x, packed, residual=residual, activation="gelu"), lean)


def test_opcheck():
    packed = pack_weight(torch.randn(40, 96), "int4", group=32)
    args = (packed.data, 40, 96, "int4", 32, torch.randn(40), None, "relu", "cpu")
    torch.library.opcheck(torch.ops.cgpt.packed_gemm.default, (torch.randn(3, 96), *args))


@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_a_compiled_call_gives_the_same_bits(format):
    packed, x = pack_weight(torch.randn(40, 96), format), torch.randn(3, 96).bfloat16()
    compiled = torch.compile(lambda x: ops.gemm(x, packed, activation="relu"), backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), ops.gemm(x, packed, activation="relu"))


def test_autocast_narrows_x():
    packed = pack_weight(torch.randn(40, 96), "bf16")
    x = torch.randn(3, 96)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.gemm(x, packed)
    assert y.dtype == torch.bfloat16 and torch.equal(y, ops.gemm(x.bfloat16(), packed))


@on_kinds
def test_copies_pickles_and_checkpoints(kind):
    packed = pack_weight(torch.randn(40, 96), **options_of(kind))
    file = io.BytesIO()
    torch.save({"weight": packed}, file)
    file.seek(0)
    others = [copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))]
    others.append(torch.load(file, weights_only=True)["weight"])
    for other in others:
        assert isinstance(other, PackedWeight) and other.data is not packed.data
        assert torch.equal(other.unpack(), packed.unpack())
        assert (other.format, other.N, other.K, other.group) == (
            packed.format, packed.N, packed.K, packed.group,
        )  # fmt: skip


def test_a_packed_weight_is_for_inference():
    packed = pack_weight(torch.randn(40, 96))
    x = torch.randn(3, 96, requires_grad=True)
    with pytest.raises(RuntimeError, match="a packed weight is for inference"):
        ops.gemm(x, packed)
    with torch.no_grad():
        assert not ops.gemm(x, packed).requires_grad


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda w: pack_weight(w.double()), TypeError, "weight must be float32, bfloat16"),
        (lambda w: pack_weight(w[0]), ValueError, "weight must have 2 dimensions"),
        (lambda w: pack_weight(w, "int5"), ValueError, "format must be .*'int4', got 'int5'"),
        (lambda w: pack_weight(w, "int4", group=48), ValueError, "group must be 32 or 64, got 48"),
        (lambda w: pack_weight(w, weight_layout="km"), ValueError, "weight_layout must be"),
        (lambda w: pack_weight(w).unpack(torch.int8), ValueError, "dtype must be"),
        (lambda w: ops.gemm(w[:, :5], pack_weight(w)), ValueError, r"\(\.\.\., 96\) ="),
        (lambda w: ops.gemm(w, pack_weight(w), w[0]), ValueError, r"bias must have shape \(40,\)"),
        (lambda w: ops.gemm(w, pack_weight(w), weight_layout="kn"), ValueError, "pack_weight"),
        (lambda w: ops.gemm(w, pack_weight(w), backend="wafer"), ValueError, "cannot run"),
        (lambda w: ops.gemm(w, pack_weight(w), residual=w), ValueError, "residual must have shape"),
    ],
)  # fmt: skip
def test_errors_name_argument_expected_and_got(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(40, 96))


def test_a_buffer_of_the_wrong_size_is_refused():
    packed = pack_weight(torch.randn(40, 96), "int8")
    with pytest.raises(ValueError, match=r"packed must have shape \(\d+,\), got"):
        backends._C.packed_gemm_fwd(
            torch.randn(1, 96), packed.data[:-1], 40, 96, "int8", 0, None, None,
            torch.empty(1, 40), "none",
        )  # fmt: skip


assert set(FORMATS) == {k[0] if isinstance(k, tuple) else k for k in KINDS}
