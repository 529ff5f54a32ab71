"""The CUDA kernels of attention on the host implementation: what the op suite's shapes leave out.

tests/test_ops.py runs every case with CGPT_CUDA_HOST=1. Here: widths of D that are padded or cut,
several blocks of queries and keys with every mask at once, dropout across tiles, orders of threads.
"""

import pytest
import torch

from cgpt_kernels import backends, ops
from cgpt_kernels.ops.attention import reference
from cgpt_kernels.ops.attention.cases import AttentionCase
from cgpt_kernels.testing import hold_to_rule, run

BUILD = "CGPT_CUDA=host python setup.py build_ext --inplace"
host = pytest.importorskip("cgpt_kernels._cuda_host", reason=f"not built: {BUILD}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = ("0", "1", "2")

pytestmark = pytest.mark.usefixtures("on_the_host", "nan_filled_memory")


@pytest.fixture
def on_the_host(monkeypatch):
    """backend="cuda" takes CPU tensors, as in a process that has CGPT_CUDA_HOST=1 set."""
    looked_up = (backends.implementation, backends.own)
    monkeypatch.setattr(backends, "_CUDA_HOST", host)
    for function in looked_up:
        function.cache_clear()
    yield
    for function in looked_up:
        function.cache_clear()


def inputs(dtype=torch.float32, **shape):
    shape = {"B": 1, "H": 2, "Sq": 40, "Sk": 52, **shape}
    return AttentionCase(name="", why="", **shape).inputs(dtype)


def attend(**given):
    return ops.attention(**given, backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [65, 72, 96, 100, 136, 200, 256])
def test_every_head_size_is_as_exact_as_eager(D, dtype):
    hold_to_rule(ops.attention, inputs(dtype, D=D), gradients=True, backend="cuda")


@pytest.mark.parametrize("D", [64, 80, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_blocks_with_every_mask_are_as_exact_as_eager(dtype, D, monkeypatch):
    given = inputs(
        dtype, B=2, Sq=150, Sk=204, D=D, padding="left", bias="1Hqk", alibi=True, dropout_p=0.2
    )
    monkeypatch.setenv("CGPT_CUDA_HOST_SEED", SEEDS[1])
    hold_to_rule(ops.attention, given, gradients=True, backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Sq", [5, 90])
def test_the_order_of_threads_changes_no_bit(Sq, dtype, monkeypatch):
    given = inputs(dtype, Sq=Sq, Sk=300, D=64, padding="right", dropout_p=0.1)
    found = []
    for seed in SEEDS:
        monkeypatch.setenv("CGPT_CUDA_HOST_SEED", seed)
        found.append(run(ops.attention, given, gradients=True, backend="cuda"))
    for what, tensor in found[0].items():
        assert all(torch.equal(tensor, other[what]) for other in found[1:]), what


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [96, 99])
def test_dropout_mask_is_the_shared_one_in_every_tile(size, dtype):
    """With q = 0 and v the identity, each kept weight is 1 / (S_k (1 - p)), in out and in dv."""
    q, k = torch.zeros(2, 1, 2, size, size, dtype=dtype).unbind()
    v = torch.eye(size, dtype=dtype).expand(1, 2, size, size).clone().requires_grad_()
    out = attend(q=q, k=k, v=v, causal=False, dropout_p=0.4, seed=2**40 + 3)
    mask = reference.dropout_mask(q, k, 0.4, 2**40 + 3)
    assert torch.equal(out != 0, mask)
    (dv,) = torch.autograd.grad(out.sum(), v)
    # d(out[i, d]) / d(v[j, d]) is the weight of (i, j): dv[j, d] sums it over i
    weights = mask.double().sum(2) / (size * 0.6)
    # 60 sums in fp32; a weight more or less would be 1 / 58
    assert ((dv.double() - weights[..., None]).abs() <= 8 * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_queries_get_the_same_bits_whatever_else_is_in_the_batch(dtype):
    given = inputs(dtype, B=3, Sq=2, Sk=400, D=80, padding="left")
    whole = attend(**given)
    for b in range(3):
        one = {k: v[b : b + 1] if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        assert torch.equal(attend(**one), whole[b : b + 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Sq", [3, 33])
def test_alignment_changes_no_bit(Sq, dtype):
    given = inputs(dtype, Sq=Sq, Sk=140, D=64)

    def shifted(t):
        big = t.new_zeros(*t.shape[:-1], t.shape[-1] + 1)
        return big[..., 1:].copy_(t)

    odd = {k: shifted(v) if k in "qkv" else v for k, v in given.items()}
    wanted = run(ops.attention, given, gradients=True, backend="cuda")
    found = run(ops.attention, odd, gradients=True, backend="cuda")
    for what, tensor in wanted.items():
        assert torch.equal(tensor, found[what]), what


def test_a_query_takes_few_queries_way_to_the_same_numbers():
    given = inputs(torch.float32, Sq=9, Sk=700, D=64, alibi=True)
    whole = attend(**given)
    few = attend(**{**given, "q": given["q"][:, :, 1:]})
    torch.testing.assert_close(few, whole[:, :, 1:])


def test_wider_heads_are_refused_with_the_reason():
    given = inputs(D=257)
    with pytest.raises(ValueError, match="heads are wider than 256, got D = 257"):
        attend(**given)
