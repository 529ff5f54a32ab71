"""The CUDA gemm on the host implementation: every kernel, alignment and order of threads.

The cases of the op suite run with `CGPT_CUDA_HOST=1 pytest -k cuda-gemm tests/test_ops.py`; here
is what they do not reach: both tile sizes, all strides of the factors, refusals.
"""

import pytest
import torch

from cgpt_kernels import backends, ops
from cgpt_kernels.ops.gemm import gemm_cuda, pack_weight
from cgpt_kernels.ops.gemm.cases import GemmCase
from cgpt_kernels.testing import FORWARD_FACTOR, compare, hold_to_rule

BUILD = "CGPT_CUDA=host python setup.py build_ext --inplace"
host = pytest.importorskip("cgpt_kernels._cuda_host", reason=f"not built: {BUILD}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOW = DTYPES[1:]


@pytest.fixture(autouse=True)
def cuda_is_the_host_implementation(monkeypatch):
    caches = backends.implementation, backends.own
    monkeypatch.setattr(backends, "_CUDA_HOST", host)
    for cache in caches:
        cache.cache_clear()
    yield
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


@pytest.fixture(params=("0", "1", "2"))
def order_of_threads(request, monkeypatch):
    monkeypatch.setenv("CGPT_CUDA_HOST_SEED", request.param)


def laid_out(t, dense, aligned):
    """t [rows, K] with a stride of 1 along "k" or "rows", each line 16-byte aligned or not."""
    t = t if dense == "k" else t.t()
    line = -(-t.shape[1] // 8) * 8 + (0 if aligned else 3)
    room = t.new_full((t.shape[0] * line + 8,), 7.0)
    view = room[0 if aligned else 1 :].as_strided(t.shape, (line, 1))
    view.copy_(t)
    return view if dense == "k" else view.t()


def product(a, b, bias=None, residual=None, pre=None, activation="none"):
    y = torch.full((a.shape[0], b.shape[0]), float("nan"), dtype=a.dtype)
    host.gemm_product_cuda(a, b, bias, residual, y, pre, activation)
    return y


def hold_product(y, a, b):
    """y against fp64, by eager's error in the same dtype."""
    compared = compare("y", y, a @ b.t(), a.double() @ b.double().t(), FORWARD_FACTOR)
    assert compared.ok, str(compared)


LAYOUTS = [("k", "k"), ("k", "rows"), ("rows", "rows")]
# M, N, K and what they reach
SHAPES = [
    (1, 40, 96),  # few rows, the slices of K not the same number for every warp
    (16, 72, 1064),  # few rows, more slices than loads under way
    (17, 64, 32),  # one slice
    (80, 136, 200),  # tiles with tails in every dimension
    (33, 8, 8),  # K below a slice
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_alignment_change_no_bit(dtype, shape):
    M, N, K = shape
    a, b = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype)
    wanted = product(a, b)
    hold_product(wanted, a, b)
    for dense_a, dense_b in LAYOUTS:
        if M <= 16 and dense_a == "rows":
            continue  # another kernel, with another order of sums
        for aligned in (True, False):
            x, w = laid_out(a, dense_a, aligned), laid_out(b, dense_b, aligned)
            if M > 16 or dtype == torch.float32 or dense_b == "k":
                assert torch.equal(product(x, w), wanted), (dense_a, dense_b, aligned)
            hold_product(product(x, w), a, b)


@pytest.mark.parametrize("dense", ["k", "rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_few_is_the_row_alone(dtype, dense):
    a, b = torch.randn(11, 300).to(dtype), laid_out(torch.randn(40, 300).to(dtype), dense, True)
    together = product(a, b)
    for row in (0, 5, 10):
        assert torch.equal(product(a[row : row + 1], b)[0], together[row])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_large_tiles_give_the_bits_of_small_ones(layout):
    a, b = (torch.randn(1304, 40).to(torch.bfloat16) for _ in range(2))
    small = [laid_out(t, dense, False) for t, dense in zip((a, b), layout, strict=True)]
    large = [laid_out(t, dense, True) for t, dense in zip((a, b), layout, strict=True)]
    assert torch.equal(product(*small), product(*large))


@pytest.mark.parametrize("shape", [(5, 50, 300), (70, 90, 150)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_order_of_threads_gives_the_same_bits(dtype, shape, monkeypatch):
    M, N, K = shape
    a, b = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype)
    found = []
    for seed in ("0", "1", "2"):
        monkeypatch.setenv("CGPT_CUDA_HOST_SEED", seed)
        found.append(product(a, b))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


EPILOGUES = [
    GemmCase(name="few", M=3, N=41, K=35, activation="gelu", residual=True, why=""),
    GemmCase(name="few_kn", M=16, N=64, K=64, activation="relu", layout="kn", why=""),
    GemmCase(name="tile", M=66, N=72, K=40, activation="gelu_tanh", residual=True, why=""),
    GemmCase(name="tile_kn", M=66, N=72, K=40, residual=True, layout="kn", why=""),
    GemmCase(name="odd", M=67, N=33, K=41, activation="gelu", layout="kn", why=""),
    GemmCase(name="one_row", M=1, N=1, K=1, why=""),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", EPILOGUES, ids=lambda c: c.name)
def test_outputs_and_gradients_keep_the_rule_in_every_order(case, dtype, order_of_threads):
    draws = [case.inputs(dtype, seed=seed) for seed in range(10, 14)]
    options = dict(gradients=True, draws=draws, backend="cuda")
    hold_to_rule(ops.gemm, case.inputs(dtype), **options)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_lora_factors_are_added_by_products_of_the_backend(dtype):
    case = GemmCase(name="lora", M=20, N=33, K=24, activation="gelu", why="")
    inputs = case.inputs(dtype)
    inputs["lora"] = torch.randn(4, 24) / 5, torch.randn(33, 4) / 2, 0.5

    def call(**given):
        if given["x"].dtype == torch.float64:
            A, B, scale = given["lora"]
            given["lora"] = A.double(), B.double(), scale
        return ops.gemm(**given)

    hold_to_rule(call, inputs, gradients=True, backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_activation_is_applied_to_what_the_gradient_keeps(dtype):
    x, weight = torch.randn(20, 24).to(dtype), torch.randn(30, 24).to(dtype)
    y, pre = gemm_cuda.gemm_fwd_with_pre(x, weight, None, None, "relu", "nk")
    assert torch.equal(pre, product(x, weight))
    assert torch.equal(y, pre.relu())


def test_dbias_adds_up_more_rows_than_a_block_takes():
    dy = torch.randint(-8, 9, (200, 300)).to(torch.bfloat16)
    bias = torch.zeros(300)
    grads = gemm_cuda.gemm_bwd(
        dy, dy[:, :1], bias[:, None], bias, bias, None, "nk", (False, False, True)
    )
    assert torch.equal(grads[2], dy.float().sum(0))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_factors_that_no_kernel_reads_are_refused(dtype):
    a, b = torch.zeros(20, 32, dtype=dtype), torch.zeros(24, 32, dtype=dtype)
    with pytest.raises(ValueError, match="gemm: x may be dense along M only where weight is"):
        product(laid_out(a, "rows", True), b)
    with pytest.raises(ValueError, match="gemm: weight must have a stride of 1"):
        product(a, b[:, ::2].repeat(1, 2)[::2].expand(12, 32).as_strided((24, 32), (2, 2)))
    with pytest.raises(ValueError, match=r"gemm: pre must have shape \(20, 24\), got \(20, 23\)"):
        product(a, b, pre=torch.zeros(20, 23, dtype=dtype))


# ---- int8 and int4 weights ----------------------------------------------------------------------

KINDS = {"int8": ("int8", 64), "int4-32": ("int4", 32), "int4-64": ("int4", 64)}
needs_packing = pytest.mark.skipif(backends._C is None, reason="cgpt_kernels._C is not built")


@needs_packing
@pytest.mark.parametrize("M", [1, 16, 17])
@pytest.mark.parametrize("shape", [(1, 1), (50, 75), (96, 1100)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_packed_weights_keep_the_rule(dtype, kind, shape, M, order_of_threads):
    format, group = KINDS[kind]
    packed = pack_weight(torch.randn(shape), format, group=group)
    x, bias = torch.randn(M, shape[1]).to(dtype), torch.randn(shape[0])
    residual = torch.randn(M, shape[0]).to(dtype)

    def eager(dtype):
        weight, given = packed.unpack(dtype), (x.to(dtype), bias.to(dtype), residual.to(dtype))
        return torch.nn.functional.gelu(given[0] @ weight.t() + given[1]) + given[2]

    y = ops.gemm(x, packed, bias, activation="gelu", residual=residual, backend="cuda")
    compared = compare("y", y, eager(dtype), eager(torch.float64), FORWARD_FACTOR)
    assert compared.ok, str(compared)


@needs_packing
@pytest.mark.parametrize("kind", KINDS)
def test_integers_are_multiplied_exactly(kind):
    format, group = KINDS[kind]
    packed = pack_weight(torch.randn(40, 200), format, group=group)
    one = torch.eye(200, dtype=torch.float16)  # row k of y is column k of the weight
    wanted = packed.unpack(torch.float32).t().half()
    for first in range(0, 200, 16):
        rows = one[first : first + 16]
        assert torch.equal(ops.gemm(rows, packed, backend="cuda"), wanted[first : first + 16])
    assert torch.equal(ops.gemm(one, packed, backend="cuda"), wanted)


@needs_packing
def test_packed_weights_that_cuda_does_not_read_are_refused():
    x, weight = torch.randn(2, 24), torch.randn(8, 24)
    with pytest.raises(ValueError, match=r"backend 'cuda' cannot run: x is float32, .* cpu, eager"):
        ops.gemm(x, pack_weight(weight, "int8"), backend="cuda")
    with pytest.raises(ValueError, match="backend 'cuda' cannot run: the weight is packed as bf16"):
        ops.gemm(x.bfloat16(), pack_weight(weight, "bf16"), backend="cuda")
