"""The Triton kernels on CPU tensors: what the suites of all backends do not reach.

Run with TRITON_INTERPRET=1; Triton reads it once, so these tests need a process of their own.
"""

import functools

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops import triton_kernel_wrap
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch.library import wrap_triton

import cgpt_kernels as ck
from cgpt_kernels import backends, ops
from cgpt_kernels.assets import TINY
from cgpt_kernels.ops.attention.cases import AttentionCase
from cgpt_kernels.ops.cross_entropy.cases import LinearCrossEntropyCase
from cgpt_kernels.ops.philox import keep_mask
from cgpt_kernels.testing import hold_to_rule

if "triton" not in backends.runnable("layer_norm", "cpu"):
    pytest.skip("needs Triton and TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from cgpt_kernels.ops.attention import attention_triton
from cgpt_kernels.ops.attention.triton_call import halves, threshold
from cgpt_kernels.ops.attention.triton_tile import keep_tile, seed_of
from cgpt_kernels.ops.cross_entropy import cross_entropy_triton
from cgpt_kernels.triton_substrate import launch
from tests.triton_writes import writes

START = tl.constexpr(2**34 - 4)  # the element index passes 32 bits
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_gradients_do_not_depend_on_the_slabs(dtype, monkeypatch):
    monkeypatch.setattr(cross_entropy_triton, "SLAB_BYTES", 1)  # one block of rows at a time
    case = LinearCrossEntropyCase(
        name="", why="", M=75, K=24, V=131, bias=True, ignored=0.2, smoothing=0.1
    )
    hold_to_rule(ops.linear_cross_entropy, case.inputs(dtype), gradients=True, backend="triton")


def test_a_target_that_is_no_class_gives_nan_and_not_a_wrong_loss():
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    target = torch.tensor([1, 5, -2])
    loss = ops.linear_cross_entropy(x, weight, target, reduction="none", backend="triton")
    assert torch.isnan(loss).tolist() == [False, True, True]


def test_decoding_in_chunks_gives_each_sequence_the_bits_it_gets_alone():
    case = AttentionCase(name="", why="", B=3, H=2, Sq=1, Sk=700, D=16)
    given = case.inputs(torch.float32)
    whole = ops.attention(**given, backend="triton")
    for b in range(3):
        one = {k: v[b : b + 1] if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        assert torch.equal(ops.attention(**one, backend="triton"), whole[b : b + 1])


def test_chunks_of_keys_change_nothing_but_the_order_of_sums(monkeypatch):
    case = AttentionCase(name="", why="", B=2, H=2, Sq=5, Sk=900, D=24, alibi=True, padding="left")
    given = case.inputs(torch.float32)
    chunked = ops.attention(**given, backend="triton")
    monkeypatch.setattr(attention_triton, "MANY_KEYS", 10_000)
    torch.testing.assert_close(chunked, ops.attention(**given, backend="triton"))


@triton.jit
def keep_kernel(out, low, high, limit, S_k, ALIGNED: tl.constexpr):
    i, j = tl.arange(0, 8), tl.arange(0, 32)
    first = START + (i * S_k).to(tl.int64)
    keep = keep_tile(first, 0, seed_of(low, high), limit, 32, ALIGNED)
    tl.store(out + i[:, None] * S_k + j[None, :], keep, mask=(j < S_k)[None, :])


@pytest.mark.parametrize("S_k, aligned", [(16, True), (32, False), (13, False)])
@pytest.mark.parametrize("seed", [0, 5, 2**40 + 17, 2**63 - 1])
def test_the_kernels_draw_the_shared_dropout_mask(S_k, aligned, seed):
    found = torch.zeros(8 * S_k, dtype=torch.bool)
    keep_kernel[(1,)](found, *halves(seed), threshold(0.37), S_k, aligned)
    assert torch.equal(found, keep_mask(START.value, 8 * S_k, 0.37, seed, "cpu"))


def test_rows_wider_than_a_program_are_refused():
    with pytest.raises(ValueError, match="rows are wider than 8192, got 8193"):
        ops.layer_norm(torch.randn(1, 8193), torch.ones(8193), backend="triton")
    q = torch.randn(1, 1, 2, 257)
    with pytest.raises(ValueError, match="heads are wider than 256, got D = 257"):
        ops.attention(q, q, q, backend="triton")


def test_torch_compile_takes_every_op_whole():
    def block(x, gain, weight, bias):
        x = ops.layer_norm(x, gain, bias, backend="triton")
        x = ops.gemm(x, weight, bias, activation="gelu", backend="triton")
        heads = x.view(2, 3, 2, 8).transpose(1, 2)
        x = ops.attention(heads, heads, heads, backend="triton").transpose(1, 2).reshape(2, 3, 16)
        target = torch.arange(6).view(2, 3)
        return ops.linear_cross_entropy(x, weight, target, backend="triton")

    leaves = [
        torch.randn(*shape).requires_grad_() for shape in ((2, 3, 16), (16,), (16, 16), (16,))
    ]
    wanted = block(*leaves)
    found = torch.compile(block, backend="aot_eager", fullgraph=True)(*leaves)
    assert torch.equal(found, wanted)
    for g, w in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves), strict=True
    ):
        assert torch.equal(g, w)


class Traced(JITFunction):
    """A kernel as torch.compile takes it into a graph, which the interpreter runs."""

    def __init__(self, interpreted):
        super().__init__(interpreted.fn)
        self.interpreted = interpreted

    cache_key = "interpreted"
    __hash__ = object.__hash__

    def run(self, *args, grid, warmup, **options):
        return self.interpreted[grid](*args, **options)


@functools.cache
def traced_kernel(interpreted):
    return Traced(interpreted)


def test_a_graph_that_holds_the_kernels_gives_the_bits_of_eager(monkeypatch):
    """What torch.compile makes for a GPU, run here: the order of kernels and what they write."""

    def mutated(index, _, arguments, __):  # torch's own look into a kernel needs the compiler
        kernel = kernel_side_table.get_kernel(index).fn  # in an Autotuner of one configuration
        return sorted(
            writes(kernel.__name__, {k: v for k, v in arguments.items() if v is not None})
        )

    def block(x, gain, weight, bias):
        x, s = ops.add_layer_norm(x, x, gain, bias, backend="triton")
        x = ops.gemm(x, weight, bias, activation="gelu", residual=s, backend="triton")
        heads = x.view(2, 3, 2, 8).transpose(1, 2)
        x = ops.attention(heads, heads, heads, dropout_p=0.2, seed=5, backend="triton")
        x = x.transpose(1, 2).reshape(2, 3, 16)
        target = torch.arange(6).view(2, 3)
        return ops.linear_cross_entropy(x, weight, target, bias, backend="triton")

    shapes = (2, 3, 16), (16,), (16, 16), (16,)
    leaves = [torch.randn(*shape).requires_grad_() for shape in shapes]
    wanted = block(*leaves)
    wanted = wanted, *torch.autograd.grad(wanted, leaves)
    monkeypatch.setattr(
        backends, "traced", torch.compiler.assume_constant_result(lambda b: f"{b}:")
    )
    monkeypatch.setattr(launch, "wrap_triton", lambda kernel: wrap_triton(traced_kernel(kernel)))
    monkeypatch.setattr(triton_kernel_wrap, "get_mutated_tensors", mutated)
    seen = []

    def compiler(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    found = torch.compile(block, backend=backend, fullgraph=True)(*leaves)
    found = found, *torch.autograd.grad(found, leaves)
    assert sum("triton_kernel_wrapper" in name for name in seen) == 18
    assert not any("cgpt" in name for name in seen)
    assert all(map(torch.equal, found, wanted))


def test_the_shipped_model_generates_the_same_tokens():
    prompt = torch.arange(40, 52)[None]
    model = ck.GPT.from_pretrained(TINY, dtype=torch.float32).eval()
    wanted = ck.generate(model, prompt, 2)
    with ck.replace(model, backend="triton"):
        assert torch.equal(ck.generate(model, prompt, 2), wanted)


def test_the_shipped_model_trains_as_eager_does():
    torch.manual_seed(0)
    tokens = torch.randint(40, 90, (1, 9))

    def losses(replaced):
        model = ck.GPT.from_pretrained(TINY, dtype=torch.float32).train()
        if replaced:
            ck.replace(model, backend="triton")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        found = []
        for _ in range(2):
            loss = model(tokens[:, :-1], targets=tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return torch.tensor(found)

    wanted = losses(False)
    torch.testing.assert_close(losses(True), wanted, rtol=1e-4, atol=1e-5)
    assert wanted[0] != wanted[1]
