"""Kernels for Hopper (csrc/cuda/hopper.h): attention on the host implementation, both on a GPU.

With a GPU of compute capability 9.0, `CGPT_CUDA_HOPPER=1 pytest -k cuda tests/test_ops.py` runs the
op suite on them too; tests/test_cuda_budget.py has their machine code.
"""

import contextlib

import pytest
import torch

from cgpt_kernels import backends, bench, ops
from cgpt_kernels.ops.attention.cases import AttentionCase
from cgpt_kernels.ops.gemm.cases import GemmCase
from cgpt_kernels.testing import hold_to_rule, run

LOW = [torch.bfloat16, torch.float16]
SEEDS = ("0", "1", "2")

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@contextlib.contextmanager
def switched_on(kernels):
    """The switch on; gives a list that holds, afterwards, the number of launches."""
    launches, before = [], kernels.use_hopper(True)
    first = kernels.hopper_launches()
    try:
        yield launches
    finally:
        launches.append(kernels.hopper_launches() - first)
        kernels.use_hopper(before)


# ---- on the host implementation -----------------------------------------------------------------


@pytest.fixture
def host(monkeypatch):
    """backend="cuda" takes CPU tensors, as in a process that has CGPT_CUDA_HOST=1 set."""
    build = "CGPT_CUDA=host python setup.py build_ext --inplace"
    module = pytest.importorskip("cgpt_kernels._cuda_host", reason=f"not built: {build}")
    looked_up = (backends.implementation, backends.own)
    monkeypatch.setattr(backends, "_CUDA_HOST", module)
    for function in looked_up:
        function.cache_clear()
    yield module
    for function in looked_up:
        function.cache_clear()


def attention(dtype, device="cpu", **shape):
    shape = {"B": 1, "H": 2, "Sq": 200, "Sk": 300, "D": 64, **shape}
    return AttentionCase(name="", why="", **shape).inputs(dtype, device)


SHAPES = {
    "several blocks and tiles": {"Sq": 400, "Sk": 400},
    "fewer queries than keys": {"Sq": 130, "Sk": 290},
    "rows that see no key, blocks that see none": {"Sq": 450, "Sk": 50},
    "all see all": {"Sq": 70, "Sk": 260, "causal": False},
    "packed q, k and v": {"Sq": 150, "Sk": 150, "layout": "bshd"},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("D", [64, 80, 128])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_attention_is_as_exact_as_eager(dtype, D, shape, host):
    given = attention(dtype, D=D, **shape)
    with switched_on(host) as launches:
        hold_to_rule(ops.attention, given, gradients=shape["Sq"] < 200, backend="cuda")
    assert launches == [1]


@pytest.mark.parametrize("D", [64, 128])
def test_the_order_of_threads_changes_no_bit(D, host, monkeypatch):
    given, found = attention(torch.bfloat16, D=D, Sq=210, Sk=700), []
    for seed in SEEDS:
        monkeypatch.setenv("CGPT_CUDA_HOST_SEED", seed)
        with switched_on(host) as launches:
            found.append(ops.attention(**given, backend="cuda"))
        assert launches == [1]
    wanted = ops.attention(**given, backend="eager")
    torch.testing.assert_close(found[0], wanted, atol=0.02, rtol=0)
    assert all(torch.equal(found[0], other) for other in found[1:])


LEFT = {
    "padding": {"padding": "left"},
    "a bias": {"bias": "1Hqk"},
    "slopes": {"alibi": True},
    "dropout": {"dropout_p": 0.1},
    "a width without kernels": {"D": 96},
    "few queries": {"Sq": 4},
}


@pytest.mark.parametrize("shape", LEFT.values(), ids=LEFT)
def test_other_calls_are_left_to_the_kernels_for_all(shape, host):
    given = attention(torch.bfloat16, **{"Sq": 40, "Sk": 60, **shape})
    with switched_on(host) as launches:
        hold_to_rule(ops.attention, given, backend="cuda")
    assert launches == [0]


def test_tensors_that_tma_cannot_read_are_left_to_the_kernels_for_all(host):
    given = attention(torch.bfloat16, Sq=40, Sk=60)
    wanted = ops.attention(**given, backend="cuda")
    odd = given["k"].new_zeros(1, 2, 60, 65)[..., 1:].copy_(given["k"])  # rows of 130 bytes
    with switched_on(host) as launches:
        assert torch.equal(ops.attention(**{**given, "k": odd}, backend="cuda"), wanted)
    assert launches == [0]


def test_off_unless_switched_on(host):
    before = host.hopper_launches()
    ops.attention(**attention(torch.bfloat16), backend="cuda")
    assert host.hopper_launches() == before


def test_benchmarks_switch_on_what_takes_the_call_for_its_length(host):
    taken, left = attention(torch.bfloat16), attention(torch.bfloat16, padding="left")
    assert bench._on_hopper(lambda: ops.attention(**left, backend="cuda")) is None
    call = bench._on_hopper(lambda: ops.attention(**taken, backend="cuda"))
    before = host.hopper_launches()
    call()
    assert host.hopper_launches() == before + 1
    ops.attention(**taken, backend="cuda")
    assert host.hopper_launches() == before + 1


# ---- on a GPU -----------------------------------------------------------------------------------


@pytest.fixture
def native():
    """A function: the module's kernels with one of an op for Hopper, or skip."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no GPU of compute capability 9.0")

    def kernels(op):
        module = backends.cuda_kernels()
        if op not in getattr(module, "hopper_kernels", ()):
            pytest.skip(
                f"this build has no {op} for Hopper: nvcc, or for gemm its headers, missing"
            )
        return module

    return kernels


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("D", [64, 80, 128])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_attention_on_a_gpu_is_as_exact_as_eager(dtype, D, shape, native):
    kernels, given = native("attention"), attention(dtype, "cuda", D=D, **shape)
    with switched_on(kernels) as launches:
        hold_to_rule(ops.attention, given, gradients=True, backend="cuda")
    assert launches == [1]


PRODUCTS = {
    "one tile": {"M": 128, "N": 128, "K": 64},
    "tails": {"M": 200, "N": 264, "K": 104},
    "many tiles": {"M": 2048, "N": 3072, "K": 768},
}


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("layout", ["nk", "kn"])
@pytest.mark.parametrize("shape", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_gemm_on_a_gpu_is_as_exact_as_eager(dtype, shape, layout, activation, native):
    kernels = native("gemm")
    for options in ({}, {"residual": True}, {"bias": False}, {"fp32_bias": True}):
        case = GemmCase(name="", why="", layout=layout, activation=activation, **shape, **options)
        with switched_on(kernels) as launches:
            given = case.inputs(dtype, "cuda")
            hold_to_rule(ops.gemm, given, gradients=True, backend="cuda")
        assert launches[0] >= 1


@pytest.mark.parametrize("op", ["attention", "gemm"])
def test_a_cuda_graph_holds_a_launch(op, native):
    kernels = native(op)
    if op == "attention":
        function, given = ops.attention, attention(torch.bfloat16, "cuda")
    else:
        case = GemmCase(name="", why="", M=256, N=256, K=256, residual=True)
        function, given = ops.gemm, case.inputs(torch.bfloat16, "cuda")
    with switched_on(kernels):
        wanted = run(function, given, backend="cuda")["out"]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = function(**given, backend="cuda")
    graph.replay()
    assert torch.equal(found, wanted)
