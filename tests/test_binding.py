"""What reaches the kernels and what does not: NumPy, errors, the ways into an op, compilation."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

import cgpt_kernels as ck
from cgpt_kernels import backends, ops
from cgpt_kernels.ops import registry
from cgpt_kernels.testing import run

HAVE = {op: backends.implementation(op, "cpu")[1] is None for op in registry.FUNCTIONS}
BACKENDS = ["eager", "cpu"]
TYPICAL = {
    "layer_norm": "odd_tail",
    "add_layer_norm": "odd_tail",
    "gemm": "all_kn",
    "attention": "packed",
    "linear_cross_entropy": "ignored",
}
ALL_OPS = pytest.mark.parametrize("op", list(registry.FUNCTIONS))


def case_of(op, name=None):
    wanted = name or TYPICAL[op]
    return next(c for c in registry.CASES if c.op == op and c.name == wanted)


def typical(op, dtype=torch.float32):
    return case_of(op).inputs(dtype)


def need_kernel(op):
    if not HAVE[op]:
        pytest.skip(f"cpu: {backends.implementation(op, 'cpu')[1]}")


# ---- NumPy --------------------------------------------------------------------------------------


def to_numpy(inputs):
    return {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


@ALL_OPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_numpy_in_numpy_out(op, dtype):
    inputs, function = typical(op, dtype), registry.FUNCTIONS[op]
    wanted, found = function(**inputs), function(**to_numpy(inputs))
    if not isinstance(wanted, tuple):
        wanted, found = (wanted,), (found,)
    for a, b in zip(wanted, found, strict=True):
        assert isinstance(b, np.ndarray)
        assert np.array_equal(a.numpy(), b)


def test_numpy_arrays_are_read_in_place(monkeypatch):
    need_kernel("gemm")
    seen = []
    lean = ops.gemm.__globals__["_lean"]
    kernel = lean["auto", torch.float32]

    def look_and_run(*args):
        seen.append(args[0].data_ptr())
        return kernel(*args)

    monkeypatch.setitem(lean, ("auto", torch.float32), look_and_run)
    x = np.ones((3, 8), np.float32)
    ops.gemm(x, np.ones((4, 8), np.float32))
    assert seen == [x.ctypes.data]


def test_numpy_views_with_odd_strides_and_read_only_arrays():
    x = np.random.default_rng(0).standard_normal((6, 16)).astype(np.float32)
    weight = np.ones(8, np.float32)
    wanted = ops.layer_norm(np.ascontiguousarray(x[::-2, ::2]), weight)
    x.setflags(write=False)
    assert np.array_equal(ops.layer_norm(x[::-2, ::2], weight), wanted)


def test_a_numpy_dtype_unknown_to_torch_is_an_error():
    with pytest.raises(TypeError, match="layer_norm: a NumPy array must have a dtype that torch"):
        ops.layer_norm(np.array(["a"]), np.ones(1, np.float32))


@ALL_OPS
def test_kernels_take_numpy_arrays_themselves(op):
    """The module _C speaks DLPack to NumPy too."""
    if op != "layer_norm":
        pytest.skip("one op shows the binding")
    need_kernel(op)
    x, weight = np.random.rand(3, 8).astype(np.float32), np.ones(8, np.float32)
    y = np.empty_like(x)
    backends._C.layer_norm_fwd(x, None, weight, None, y, None, None, None, 1e-5)
    assert np.array_equal(y, ops.layer_norm(x, weight, backend="cpu"))


# ---- errors: argument, expected, got ------------------------------------------------------------

f32 = torch.ones
X, W, Q = f32(2, 3, 8), f32(5, 8), f32(2, 3, 4, 8)
TARGET = torch.zeros(2, 3, dtype=torch.int64)
WRONG = {
    "weight shape": (
        lambda b: ops.layer_norm(X, f32(7), backend=b),
        r"layer_norm: weight must have shape \(8,\) = \(C,\), got \(7,\)",
    ),
    "bias shape": (
        lambda b: ops.layer_norm(X, f32(8), f32(8, 1), backend=b),
        r"layer_norm: bias must have shape \(8,\) = \(C,\), got \(8, 1\)",
    ),
    "weight dtype": (
        lambda b: ops.layer_norm(X, f32(8).half(), backend=b),
        "layer_norm: weight must be float32 beside this x, got float16",
    ),
    "integer x": (
        lambda b: ops.layer_norm(X.long(), f32(8), backend=b),
        "layer_norm: x must be float32, bfloat16, float16 or float64, got int64",
    ),
    "0-d x": (
        lambda b: ops.layer_norm(f32(()), f32(8), backend=b),
        r"layer_norm: x must have at least 1 dimension \(..., C\), got shape \(\)",
    ),
    "list": (
        lambda b: ops.layer_norm([1.0], f32(1), backend=b),
        "layer_norm: x must be a torch.Tensor or a NumPy array, got list",
    ),
    "sparse": (
        lambda b: ops.layer_norm(X.to_sparse(), f32(8), backend=b),
        "layer_norm: x must be a dense tensor, got layout sparse_coo",
    ),
    "residual shape": (
        lambda b: ops.add_layer_norm(X, X.transpose(0, 1), f32(8), backend=b),
        r"add_layer_norm: residual must have shape \(2, 3, 8\) = the shape of x, got \(3, 2, 8\)",
    ),
    "residual dtype": (
        lambda b: ops.add_layer_norm(X, X.bfloat16(), f32(8), backend=b),
        "add_layer_norm: residual must be float32 as x, got bfloat16",
    ),
    "K": (
        lambda b: ops.gemm(X, f32(5, 7), backend=b),
        r"gemm: weight must have shape \(5, 8\) = \(N, K\), got \(5, 7\)",
    ),
    "K in kn": (
        lambda b: ops.gemm(X, f32(5, 8), weight_layout="kn", backend=b),
        r"gemm: weight must have shape \(8, 8\) = \(K, N\), got \(5, 8\)",
    ),
    "3-d weight": (
        lambda b: ops.gemm(X, f32(1, 5, 8), backend=b),
        r"gemm: weight must have 2 dimensions \(N, K\), got shape \(1, 5, 8\)",
    ),
    "gemm bias": (
        lambda b: ops.gemm(X, W, f32(8), backend=b),
        r"gemm: bias must have shape \(5,\) = \(N,\), got \(8,\)",
    ),
    "gemm residual": (
        lambda b: ops.gemm(X, W, residual=f32(3, 2, 5), backend=b),
        r"gemm: residual must have shape \(2, 3, 5\) = \(..., N\), got \(3, 2, 5\)",
    ),
    "gemm weight dtype": (
        lambda b: ops.gemm(X, W.bfloat16(), backend=b),
        "gemm: weight must be float32 as x, got bfloat16",
    ),
    "activation": (
        lambda b: ops.gemm(X, W, activation="silu", backend=b),
        "gemm: activation must be None, 'gelu', 'gelu_tanh' or 'relu', got 'silu'",
    ),
    "layout": (
        lambda b: ops.gemm(X, W, weight_layout="mn", backend=b),
        "gemm: weight_layout must be 'nk' or 'kn', got 'mn'",
    ),
    "3-d q": (
        lambda b: ops.attention(Q[0], Q[0], Q[0], backend=b),
        r"attention: q must have 4 dimensions \(B, H, S_q, D\), got shape \(3, 4, 8\)",
    ),
    "heads of k": (
        lambda b: ops.attention(Q, Q[:, :1], Q, backend=b),
        r"attention: k must have shape \(2, 3, 4, 8\) = \(B, H, S_k, D\), got \(2, 1, 4, 8\)",
    ),
    "length of v": (
        lambda b: ops.attention(Q, Q, Q[:, :, 1:], backend=b),
        r"attention: v must have shape \(2, 3, 4, 8\) = \(B, H, S_k, D\), got \(2, 3, 3, 8\)",
    ),
    "padding mask of integers": (
        lambda b: ops.attention(Q, Q, Q, key_padding_mask=torch.ones(2, 4).long(), backend=b),
        "attention: key_padding_mask must be bool, got int64",
    ),
    "padding mask shape": (
        lambda b: ops.attention(
            Q, Q, Q, key_padding_mask=torch.ones(4, 2, dtype=torch.bool), backend=b
        ),
        r"attention: key_padding_mask must have shape \(2, 4\) = \(B, S_k\), got \(4, 2\)",
    ),
    "attn_bias shape": (
        lambda b: ops.attention(Q, Q, Q, attn_bias=f32(3, 4, 5), backend=b),
        r"attention: attn_bias must be broadcastable to \(2, 3, 4, 4\)",
    ),
    "attn_bias dtype": (
        lambda b: ops.attention(Q, Q, Q, attn_bias=f32(4, 4).long(), backend=b),
        "attention: attn_bias must be float32 or bool beside this q, got int64",
    ),
    "alibi shape": (
        lambda b: ops.attention(Q, Q, Q, alibi_slopes=f32(4), backend=b),
        r"attention: alibi_slopes must have shape \(3,\) = \(H,\), got \(4,\)",
    ),
    "alibi gradient": (
        lambda b: ops.attention(Q, Q, Q, alibi_slopes=f32(3).requires_grad_(), backend=b),
        "attention: alibi_slopes must not require a gradient",
    ),
    "dropout 1": (
        lambda b: ops.attention(Q, Q, Q, dropout_p=1.0, backend=b),
        r"attention: dropout_p must be in \[0, 1\), got 1.0",
    ),
    "seed": (
        lambda b: ops.attention(Q, Q, Q, dropout_p=0.5, seed=-1, backend=b),
        r"attention: seed must be in \[0, 2\^63\), got -1",
    ),
    "seed without dropout": (
        lambda b: ops.attention(Q, Q, Q, seed=1.5, backend=b),
        "attention: seed must be an int or None, got float",
    ),
    "target dtype": (
        lambda b: ops.linear_cross_entropy(X, W, TARGET.int(), backend=b),
        "linear_cross_entropy: target must be int64, got int32",
    ),
    "target shape": (
        lambda b: ops.linear_cross_entropy(X, W, TARGET.t(), backend=b),
        r"linear_cross_entropy: target must have shape \(2, 3\)",
    ),
    "reduction": (
        lambda b: ops.linear_cross_entropy(X, W, TARGET, reduction="avg", backend=b),
        "linear_cross_entropy: reduction must be 'mean', 'sum' or 'none', got 'avg'",
    ),
    "smoothing": (
        lambda b: ops.linear_cross_entropy(X, W, TARGET, label_smoothing=1.5, backend=b),
        r"linear_cross_entropy: label_smoothing must be in \[0, 1\], got 1.5",
    ),
    "device": (
        lambda b: ops.layer_norm(X, f32(8, device="meta"), backend=b),
        "layer_norm: weight must be on cpu as x is, got meta; move it with",
    ),
}


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("what", WRONG)
def test_errors_name_argument_expected_and_got(what, backend):
    call, message = WRONG[what]
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call(backend)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", [5, -1, 10**9])
def test_a_target_outside_the_vocabulary_is_an_error(target):
    need_kernel("linear_cross_entropy")
    wrong = TARGET.clone()
    wrong[1, 1] = target
    with pytest.raises((ValueError, IndexError), match="target"):
        ops.linear_cross_entropy(X, W, wrong, backend="cpu")


def test_an_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"backend must be 'auto', 'cpu', .* got 'gpu'"):
        ops.layer_norm(X, f32(8), backend="gpu")


def test_a_backend_asked_for_by_name_runs_or_raises():
    need_kernel("layer_norm")
    with pytest.raises(ValueError, match=r"layer_norm: backend 'cuda' cannot run: .* Available"):
        ops.layer_norm(X, f32(8), backend="cuda")
    with pytest.raises(ValueError, match=r"cannot run: x is float64, .* Available here: eager"):
        ops.layer_norm(X.double(), f32(8).double(), backend="cpu")
    with pytest.raises(ValueError, match="cannot run: x is on meta"):
        ops.layer_norm(X.to("meta"), f32(8, device="meta"), backend="cpu")


@ALL_OPS
def test_meta_tensors_give_meta_tensors(op):
    inputs = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in typical(op).items()}
    out = registry.FUNCTIONS[op](**inputs)
    wanted = registry.FUNCTIONS[op](**typical(op))
    for a, b in zip(*(o if isinstance(o, tuple) else (o,) for o in (out, wanted)), strict=True):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "meta")


def test_kernels_check_their_arguments_themselves():
    need_kernel("layer_norm")
    y = torch.full((3, 8), 7.0)
    for wrong in (
        (f32(3, 8), None, f32(7), None, y),
        (f32(3, 8), None, f32(8), None, y[:2]),
        (f32(3, 8), None, f32(8), None, y.half()),
        (f32(3, 8, device="meta"), None, f32(8), None, y),
        (f32(8, 3).t(), None, f32(8), None, y),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            backends._C.layer_norm_fwd(*wrong, None, None, None, 1e-5)
    assert (y == 7.0).all()


# ---- which way in -------------------------------------------------------------------------------


@pytest.fixture
def lean_only(monkeypatch):
    """Fails a test whose call leaves the lean path."""

    def closed(*args, **kwargs):
        raise AssertionError("left the lean path")

    for function in registry.FUNCTIONS.values():
        monkeypatch.setitem(function.__globals__, "_general", closed)


@pytest.mark.parametrize("gradients", [False, True])
@ALL_OPS
def test_plain_calls_take_the_lean_path(op, gradients, lean_only):
    need_kernel(op)
    for case in registry.cases("test", op):
        inputs = case.inputs(torch.bfloat16)
        if not inputs.get("dropout_p"):  # a seed is drawn on the general path
            run(registry.FUNCTIONS[op], inputs, gradients=gradients)


@ALL_OPS
def test_parameters_and_inference_mode_take_the_lean_path(op, lean_only):
    need_kernel(op)
    inputs = typical(op)
    wrapped = {
        k: nn.Parameter(v) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    with torch.inference_mode():
        registry.FUNCTIONS[op](**wrapped)
    registry.FUNCTIONS[op](**wrapped)


@ALL_OPS
@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_tensors_know_shape_dtype_and_strides(op, backend):
    if backend == "cpu":
        need_kernel(op)
    from torch._subclasses import FakeTensorMode

    inputs = typical(op)
    wanted = registry.FUNCTIONS[op](**inputs, backend=backend)
    with FakeTensorMode() as mode:
        fakes = {
            k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()
        }
        found = registry.FUNCTIONS[op](**fakes, backend=backend)
    for a, b in zip(*(o if isinstance(o, tuple) else (o,) for o in (found, wanted)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if backend == "cpu":
            assert a.stride() == b.stride()


@ALL_OPS
def test_forward_mode_derivatives_are_not_dropped(op):
    inputs = typical(op)
    name = "q" if op == "attention" else "x"
    tangent = torch.ones_like(inputs[name])
    with torch.autograd.forward_ad.dual_level():
        inputs[name] = torch.autograd.forward_ad.make_dual(inputs[name], tangent)
        out = registry.FUNCTIONS[op](**inputs)
        out = out[0] if isinstance(out, tuple) else out
        assert torch.autograd.forward_ad.unpack_dual(out).tangent is not None


def test_a_named_backend_refuses_forward_mode_derivatives():
    need_kernel("layer_norm")
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(X, X)
        with pytest.raises(ValueError, match="carries a forward-mode derivative"):
            ops.layer_norm(x, f32(8), backend="cpu")


@ALL_OPS
def test_function_transforms(op):
    inputs = typical(op)
    name = "q" if op == "attention" else "x"
    x = inputs.pop(name)

    def total(x):
        out = registry.FUNCTIONS[op](**{name: x}, **inputs)
        return sum(o.square().sum() for o in (out if isinstance(out, tuple) else (out,)))

    found = torch.func.grad(total)(x)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(total(leaf), leaf)
    torch.testing.assert_close(found, wanted)
    found = torch.func.vmap(total)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(found, torch.stack([total(x), total(2 * x)]))


@ALL_OPS
def test_a_second_derivative_is_refused_not_wrong(op):
    need_kernel(op)
    inputs = typical(op)
    name = "q" if op == "attention" else "x"
    inputs[name].requires_grad_()
    out = registry.FUNCTIONS[op](**inputs, backend="cpu")
    out = out[0] if isinstance(out, tuple) else out
    (first,) = torch.autograd.grad(out.square().sum(), inputs[name], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), inputs[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_runs_products_in_its_dtype(backend):
    x, w, q = torch.randn(3, 8), torch.randn(5, 8), torch.randn(1, 2, 4, 8)
    for op in ("gemm", "attention", "linear_cross_entropy"):
        if backend == "cpu":
            need_kernel(op)
    low = torch.bfloat16
    with torch.autocast("cpu", dtype=low):
        y = ops.gemm(x, w, activation="gelu", backend=backend)
        out = ops.attention(q, q, q, backend=backend)
        loss = ops.linear_cross_entropy(x, w, torch.zeros(3).long(), backend=backend)
        wide = ops.gemm(x, w, residual=torch.randn(3, 5), backend=backend)
        norm = ops.layer_norm(y, torch.ones(5), backend=backend)
        _, total = ops.add_layer_norm(y, wide, torch.ones(5), backend=backend)
    assert (y.dtype, out.dtype, loss.dtype) == (low, low, torch.float32)
    assert (wide.dtype, norm.dtype, total.dtype) == (torch.float32, low, torch.float32)
    wanted = ops.gemm(x.to(low), w.to(low), activation="gelu", backend=backend)
    assert torch.equal(y, wanted)


@ALL_OPS
def test_autocast_gives_gradients_in_the_dtype_of_the_parameters(op):
    inputs = typical(op)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(registry.FUNCTIONS[op], inputs, gradients=True)
    for name, value in inputs.items():
        if f"grad of {name}" in found:
            assert found[f"grad of {name}"].dtype == value.dtype


@ALL_OPS
def test_the_registered_op_casts_under_autocast(op):
    need_kernel(op)
    if op != "gemm":
        pytest.skip("one op shows the registration")
    args = (torch.randn(3, 8), torch.randn(5, 8), None, None, None, "nk", 0.0, None, False, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.ops.cgpt.gemm(*args)[0].dtype == torch.bfloat16


# ---- torch.compile ------------------------------------------------------------------------------


class Block(nn.Module):
    """All five ops in one graph."""

    def __init__(self, C=16, V=37):
        super().__init__()
        self.norm, self.qkv, self.head = nn.LayerNorm(C), nn.Linear(C, 3 * C), nn.Linear(C, V)

    def forward(self, x, target):
        B, S, C = x.shape
        h = ops.layer_norm(x, self.norm.weight, self.norm.bias)
        qkv = ops.gemm(h, self.qkv.weight, self.qkv.bias).view(B, S, 3, 2, C // 2)
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        a = ops.attention(q, k, v).transpose(1, 2).reshape(B, S, C)
        y, total = ops.add_layer_norm(a, x, self.norm.weight, self.norm.bias)
        y = ops.gemm(y, self.qkv.weight[:C], activation="gelu", residual=total)
        return ops.linear_cross_entropy(y, self.head.weight, target, self.head.bias)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_takes_all_ops_in_one_graph(dynamic):
    torch.manual_seed(0)
    block = Block()
    compiled = torch.compile(
        copy.deepcopy(block), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for S in (5, 9) if dynamic else (5,):
        x, target = torch.randn(2, S, 16), torch.randint(37, (2, S))
        wanted, found = block(x, target), compiled(x, target)
        torch.testing.assert_close(found, wanted)
        wanted.backward()
        found.backward()
        for a, b in zip(block.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad)
            a.grad = b.grad = None


def test_inductor_compiles_all_ops():
    block = Block()
    x, target = torch.randn(2, 5, 16), torch.randint(37, (2, 5))
    with torch.no_grad():
        found = torch.compile(block, fullgraph=True)(x, target)
        torch.testing.assert_close(found, block(x, target))


def test_compiled_dropout_draws_anew_and_follows_the_seed():
    q = torch.randn(1, 2, 8, 8)

    def call(seed=None):
        return ops.attention(q, q, q, dropout_p=0.5, seed=seed)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(7), call(7))
    torch.manual_seed(1)
    first, second = compiled(), compiled()
    assert not torch.equal(first, second)


def test_export_keeps_the_ops():
    need_kernel("gemm")
    need_kernel("layer_norm")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 4)

        def forward(self, x):
            h = ops.layer_norm(x, self.norm.weight, self.norm.bias)
            return ops.gemm(h, self.fc.weight, self.fc.bias, activation="relu")

    net, x = Net(), torch.randn(3, 8)
    program = torch.export.export(net, (x,))
    assert "cgpt.gemm" in program.graph_module.code
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(x), net(x))


# ---- explain ------------------------------------------------------------------------------------


def test_explain_says_what_runs_and_why_not():
    need_kernel("gemm")
    said = ck.explain("gemm", X, W)
    assert said.backend == "cpu"
    assert [row[0] for row in said.rows] == list(backends.BACKENDS)
    assert backends._C.cpu_isa() in str(said)
    assert ck.explain(ops.gemm, X.double(), W.double()).backend == "eager"
    assert "x is float64" in str(ck.explain("gemm", X.double(), W.double()))
    assert "no file ops/gemm/gemm_triton.py" in str(said) or "triton" in str(said)


def test_explain_lists_the_ops_it_knows():
    with pytest.raises(ValueError, match=r"'layer_norm'.* got 'conv'"):
        ck.explain("conv", X)
    with pytest.raises(ValueError, match="pass the tensors of the call, q first"):
        ck.explain("attention")


# ---- overhead -----------------------------------------------------------------------------------


def test_overhead_of_a_tiny_call_is_that_of_torchs_own():
    """Interleaved minima: a tiny layer_norm costs no more than twice F.layer_norm's dispatch.

    bench/test_overhead.py has the figures; this is the tripwire, wide enough for a busy machine.
    """
    need_kernel("layer_norm")
    from timeit import timeit

    x, weight, bias = torch.randn(4, 8), torch.ones(8), torch.zeros(8)
    pairs = [
        (
            timeit(lambda: ops.layer_norm(x, weight, bias), number=200),
            timeit(lambda: torch.nn.functional.layer_norm(x, (8,), weight, bias), number=200),
        )
        for _ in range(40)
    ]
    ours, torchs = (min(column) for column in zip(*pairs, strict=True))
    assert ours < 2 * torchs
