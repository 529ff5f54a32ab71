"""Every op on every backend and case: forward, backward, registration, layouts, empty tensors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cgpt_kernels import backends, ops
from cgpt_kernels.ops import registry
from cgpt_kernels.ops.attention.cases import AttentionCase
from cgpt_kernels.ops.cross_entropy.cases import LinearCrossEntropyCase
from cgpt_kernels.ops.gemm.cases import GemmCase
from cgpt_kernels.ops.layer_norm.cases import AddLayerNormCase, LayerNormCase
from cgpt_kernels.testing import differentiable, hold_to_rule, run

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
COMPILED = [name for name in backends.BACKENDS if name not in ("eager", "wafer")]
CASES = registry.cases("test")


def on_backends(cases):
    """The cases on each backend that has the op, as arguments (case, backend)."""
    there = [
        pytest.param(case, backend, id=f"{backend}-{label(case)}")
        for backend in COMPILED
        for case in cases
        if any(backend in backends.runnable(case.op, device) for device in DEVICES)
    ]
    return pytest.mark.parametrize("case, backend", there)


def label(value):
    if hasattr(value, "name"):
        return f"{value.op}-{value.name}"
    return str(value).removeprefix("torch.")


# Registration and memory are asked about once per code path, not once per shape.
PATHS = {
    "layer_norm": ["odd_tail", "no_bias", "fp32_parameters"],
    "add_layer_norm": ["odd_tail", "fp32_parameters"],
    "gemm": ["odd", "all_kn", "residual", "vector", "dropout_all"],
    "attention": ["packed", "decode_padded", "bias_qk", "bias_bool", "alibi", "dropout_all"],
    "linear_cross_entropy": ["bias", "ignored", "smoothing"],
}
PATH_CASES = [case for case in CASES if case.name in PATHS[case.op]]

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def inputs_for(case, backend, dtype):
    """The case's inputs on the backend's device; skips with the reason where it cannot run."""
    device = "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
    inputs = case.inputs(dtype, device)
    tensors = tuple(v for v in inputs.values() if isinstance(v, torch.Tensor))
    reason = backends.why_not(case.op, backend, tensors)
    interpreted = backend == "triton" and device == "cpu"
    if interpreted and dtype != torch.float32 and max(t.numel() for t in tensors) > 1 << 18:
        reason = "the interpreter takes a minute; in float32 this shape is run"
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    return inputs


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("op", registry.FUNCTIONS)
def test_backend_has_the_op(op, backend):
    _, reason = backends.implementation(op, backend)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@on_backends(CASES)
def test_forward_and_gradients_are_as_exact_as_eager(case, backend, dtype):
    inputs = inputs_for(case, backend, dtype)
    function = registry.FUNCTIONS[case.op]
    hold_to_rule(function, inputs, gradients=True, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@on_backends(CASES)
def test_forward_without_gradients_gives_the_same(case, backend, dtype):
    inputs = inputs_for(case, backend, dtype)
    function = registry.FUNCTIONS[case.op]
    hold_to_rule(function, inputs, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_eager_gives_finite_outputs_and_gradients(case, dtype):
    found = run(registry.FUNCTIONS[case.op], case.inputs(dtype), gradients=True, backend="eager")
    for what, tensor in found.items():
        assert torch.isfinite(tensor).all(), what


@on_backends(PATH_CASES)
def test_library_path_gives_the_same_bits_as_the_lean_path(case, backend):
    inputs = inputs_for(case, backend, torch.float32)
    function = registry.FUNCTIONS[case.op]

    class Nothing(torch.overrides.TorchFunctionMode):  # any mode closes the lean path
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    lean = run(function, inputs, gradients=True, backend=backend)
    with Nothing():
        library = run(function, inputs, gradients=True, backend=backend)
    for what in lean:
        assert torch.equal(lean[what], library[what]), what


def library_calls(case, inputs, backend):
    """(op in torch.ops.cgpt, its arguments) for a case."""
    i = inputs
    if case.op == "layer_norm":
        yield torch.ops.cgpt.layer_norm, (i["x"], i["weight"], i.get("bias"), 1e-5, backend)
    if case.op == "add_layer_norm":
        args = (i["x"], i["residual"], i["weight"], i.get("bias"), 1e-5, backend)
        yield torch.ops.cgpt.add_layer_norm, args
    if case.op == "gemm":
        p, seed = i.get("dropout_p", 0.0), i.get("seed")
        seed = None if seed is None else torch.tensor(seed)
        options = (i["activation"], i["weight_layout"], p, seed, True, backend)
        args = (i["x"], i["weight"], i.get("bias"), i.get("residual"), *options)
        yield torch.ops.cgpt.gemm, args
    if case.op == "attention":
        masks = (i.get("key_padding_mask"), i.get("attn_bias"), i.get("alibi_slopes"))
        p = i.get("dropout_p", 0.0)
        seed = torch.tensor(i["seed"]) if p else None
        args = (i["q"], i["k"], i["v"], *masks, 0.125, i["causal"], p, seed, backend)
        yield torch.ops.cgpt.attention, args
    if case.op == "linear_cross_entropy":
        options = (i["ignore_index"], i["label_smoothing"], backend)
        args = (i["x"], i["weight"], i["target"], i.get("bias"), *options)
        yield torch.ops.cgpt.linear_cross_entropy, args
        if backend == "cpu":
            need = tuple(name in i for name in ("x", "weight", "bias"))
            args = (*args[:-2], i["label_smoothing"], True, need, backend)
            yield torch.ops.cgpt.linear_cross_entropy_grads, args


@on_backends(PATH_CASES)
def test_opcheck(case, backend):
    inputs = inputs_for(case, backend, torch.float32)
    for name in differentiable(inputs):
        inputs[name].requires_grad_()
    for op, args in library_calls(case, inputs, backend):
        torch.library.opcheck(op.default, args)


def same_bits(wanted, found):
    """Outputs bit for bit; gradients, whose products are torch's, up to its choice of kernel."""
    for what in wanted:
        if what.startswith("grad"):
            torch.testing.assert_close(found[what], wanted[what], msg=what)
        else:
            assert torch.equal(wanted[what], found[what]), what


@on_backends(PATH_CASES)
def test_non_contiguous_inputs_give_the_same_bits(case, backend):
    inputs = inputs_for(case, backend, torch.float32)

    def spread(t):
        """The same values with every dimension strided, behind an offset."""
        big = t.new_zeros([2 * s + 1 for s in t.shape])
        view = big[tuple(slice(1, None, 2) for _ in t.shape)]
        return view.copy_(t)

    strided = {k: spread(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    function = registry.FUNCTIONS[case.op]
    wanted = run(function, inputs, gradients=True, backend=backend)
    found = run(function, strided, gradients=True, backend=backend)
    same_bits(wanted, found)


@on_backends(PATH_CASES)
def test_row_strides_and_offsets_are_read_in_place(case, backend):
    inputs = inputs_for(case, backend, torch.float32)

    def pad(t):
        """The same values in rows that are longer than needed."""
        big = t.new_full([*t.shape[:-1], t.shape[-1] + 3], True if t.dtype == torch.bool else 7)
        return big[..., 2:-1].copy_(t)

    wide = {
        k: pad(v) if isinstance(v, torch.Tensor) and v.ndim > 1 else v for k, v in inputs.items()
    }
    function = registry.FUNCTIONS[case.op]
    wanted = run(function, inputs, gradients=True, backend=backend)
    found = run(function, wide, gradients=True, backend=backend)
    same_bits(wanted, found)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 1)], ids=str)
def test_expanded_leading_dimensions(shape, backend):
    inputs = inputs_for(GemmCase(name="", M=(3, 4), N=8, K=8, why=""), backend, torch.float32)
    x = inputs["x"][: shape[0], : shape[1]].expand(3, 4, 8)
    whole = x.contiguous()
    for call in (
        lambda x: ops.gemm(x, inputs["weight"], residual=x, backend=backend),
        lambda x: ops.layer_norm(x, inputs["bias"], backend=backend),
        lambda x: ops.add_layer_norm(x, x, inputs["bias"], backend=backend)[0],
    ):
        assert torch.equal(call(x), call(whole))


WRITTEN = [
    LayerNormCase(name="batch", rows=(2, 3), C=8, why=""),
    AddLayerNormCase(name="batch", rows=(2, 3), C=8, why=""),
    GemmCase(name="batch", M=(2, 3), N=8, K=4, activation="gelu", why=""),
]  # attention's is needed for its gradients


@on_backends(WRITTEN)
def test_outputs_may_be_written_into(case, backend):
    inputs = inputs_for(case, backend, torch.float32)
    leaves = [inputs[name].requires_grad_() for name in differentiable(inputs)]
    grads = []
    for write in (False, True):
        out = registry.FUNCTIONS[case.op](**inputs, backend=backend)
        out = out[0] if isinstance(out, tuple) else out
        out = out.add_(1) if write else out
        grads.append(torch.autograd.grad(out.sum(), leaves))
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("backend", COMPILED)
def test_layer_norm_takes_weight_and_bias_of_different_dtypes(backend):
    case = LayerNormCase(name="mixed", rows=(3,), C=24, why="")
    inputs = inputs_for(case, backend, torch.bfloat16)
    inputs["bias"] = inputs["bias"].float()
    hold_to_rule(ops.layer_norm, inputs, gradients=True, backend=backend)


EMPTY = [
    LayerNormCase(name="no_rows", rows=(0, 3), C=8, why=""),
    LayerNormCase(name="no_width", rows=(3,), C=0, why=""),
    AddLayerNormCase(name="no_rows", rows=(2, 0), C=8, why=""),
    GemmCase(name="no_rows", M=(2, 0), N=3, K=4, residual=True, activation="gelu", why=""),
    GemmCase(name="no_columns", M=2, N=0, K=4, residual=True, why=""),
    AttentionCase(name="no_batch", B=0, H=2, Sq=3, Sk=3, D=8, why=""),
    AttentionCase(name="no_heads", B=2, H=0, Sq=3, Sk=3, D=8, alibi=True, why=""),
    AttentionCase(name="no_queries", B=2, H=2, Sq=0, Sk=3, D=8, why=""),
    AttentionCase(name="no_keys", B=2, H=2, Sq=3, Sk=0, D=8, causal=False, why=""),
    AttentionCase(name="no_pairs", B=2, H=2, Sq=0, Sk=0, D=8, why=""),
    LinearCrossEntropyCase(name="no_rows", M=(0, 2), K=8, V=5, reduction="none", why=""),
    LinearCrossEntropyCase(name="no_rows_mean", M=0, K=8, V=5, why=""),
    LinearCrossEntropyCase(name="no_rows_sum", M=0, K=8, V=5, reduction="sum", why=""),
]


@on_backends(EMPTY)
def test_empty_tensors(case, backend):
    inputs = inputs_for(case, backend, torch.float32)
    hold_to_rule(registry.FUNCTIONS[case.op], inputs, gradients=True, backend=backend)


K_0 = [GemmCase(name=s, M=3, N=5, K=1, layout=s, residual=True, why="") for s in ("nk", "kn")]


@on_backends(K_0)
def test_gemm_without_a_reduced_dimension_is_bias_and_residual(case, backend):
    inputs = inputs_for(case, backend, torch.float32)
    inputs["x"] = inputs["x"][:, :0]
    inputs["weight"] = inputs["weight"].new_empty((5, 0) if case.layout == "nk" else (0, 5))
    wanted = inputs["bias"] + inputs["residual"]
    assert torch.equal(ops.gemm(**inputs, backend=backend), wanted)


# ---- hypothesis: shapes, strides, dtypes --------------------------------------------------------


def hold_any_to_rule(function, case, dtype):
    """The rule for a case that may have a single element: eager's error over eight draws."""
    inputs = inputs_for(case, "cpu", dtype)
    draws = [case.inputs(dtype, seed=seed) for seed in range(10, 17)]
    hold_to_rule(function, inputs, gradients=True, draws=draws, backend="cpu")


sizes = st.integers(1, 40)
dtypes = st.sampled_from(DTYPES)


@given(rows=st.integers(1, 9), C=st.integers(1, 200), dtype=dtypes, bias=st.booleans())
def test_layer_norm_of_any_shape(rows, C, dtype, bias):
    for cls, function in (
        (LayerNormCase, ops.layer_norm),
        (AddLayerNormCase, ops.add_layer_norm),
    ):
        case = cls(name="any", rows=(rows,), C=C, bias=bias, why="")
        hold_any_to_rule(function, case, dtype)


@given(
    M=sizes,
    N=st.integers(1, 90),
    K=st.integers(1, 150),
    dtype=dtypes,
    activation=st.sampled_from([None, "gelu", "gelu_tanh", "relu"]),
    bias=st.booleans(),
    residual=st.booleans(),
    layout=st.sampled_from(["nk", "kn"]),
)
def test_gemm_of_any_shape(M, N, K, dtype, activation, bias, residual, layout):
    case = GemmCase(
        name="any",
        M=M,
        N=N,
        K=K,
        activation=activation,
        bias=bias,
        residual=residual,
        layout=layout,
        why="",
    )
    hold_any_to_rule(ops.gemm, case, dtype)


@given(
    B=st.integers(1, 3),
    H=st.integers(1, 3),
    Sq=sizes,
    Sk=sizes,
    D=st.sampled_from([1, 3, 8, 16, 33, 64]),
    dtype=dtypes,
    causal=st.booleans(),
    layout=st.sampled_from(["bhsd", "bshd"]),
    padding=st.sampled_from([None, "left", "right", "all"]),
    bias=st.sampled_from([None, "qk", "BHqk", "B11k", "1H1k"]),
    bias_kind=st.sampled_from(["T", "fp32", "bool"]),
    alibi=st.booleans(),
)
def test_attention_of_any_shape(dtype, **shape):
    case = AttentionCase(name="any", why="", **shape)
    hold_any_to_rule(ops.attention, case, dtype)


@given(
    M=sizes,
    K=st.integers(1, 90),
    V=st.integers(1, 150),
    dtype=dtypes,
    bias=st.booleans(),
    ignored=st.sampled_from([0.0, 0.3]),
    smoothing=st.sampled_from([0.0, 0.2]),
    reduction=st.sampled_from(["sum", "none"]),
)
def test_linear_cross_entropy_of_any_shape(dtype, **shape):
    case = LinearCrossEntropyCase(name="any", why="", **shape)
    hold_any_to_rule(ops.linear_cross_entropy, case, dtype)


# ---- the reference against torch's own functions ------------------------------------------------


def double(case):
    return case.inputs(torch.float64)


def test_reference_attention_is_scaled_dot_product_attention():
    i = double(AttentionCase(name="", why="", B=2, H=3, Sq=5, Sk=5, D=8))
    wanted = F.scaled_dot_product_attention(i["q"], i["k"], i["v"], is_causal=True)
    torch.testing.assert_close(ops.attention(i["q"], i["k"], i["v"]), wanted)


def test_reference_attention_with_masks_is_softmax_of_masked_logits():
    shape = dict(B=4, H=2, Sq=6, Sk=9, D=8, padding="right", bias="1Hqk", alibi=True)
    i = double(AttentionCase(name="", why="", **shape))
    mask = i["attn_bias"].repeat(4, 1, 1, 1)
    for b in range(4):
        for h in range(2):
            for row in range(6):
                for j in range(9):
                    mask[b, h, row, j] -= i["alibi_slopes"][h] * abs(row + 3 - j)
                    if j > row + 3 or i["key_padding_mask"][b, j]:
                        mask[b, h, row, j] = float("-inf")
    wanted = F.scaled_dot_product_attention(i["q"], i["k"], i["v"], attn_mask=mask)
    torch.testing.assert_close(ops.attention(**i), torch.nan_to_num(wanted))


def test_reference_cross_entropy_is_torchs():
    shape = dict(M=(4, 5), K=8, V=11, bias=True, ignored=0.3, smoothing=0.2)
    i = double(LinearCrossEntropyCase(name="", why="", **shape))
    logits = F.linear(i["x"], i["weight"], i["bias"]).flatten(0, 1)
    wanted = F.cross_entropy(logits, i["target"].flatten(), label_smoothing=0.2)
    torch.testing.assert_close(ops.linear_cross_entropy(**i), wanted)


@pytest.mark.parametrize("case", PATH_CASES, ids=label)
def test_gradcheck_of_the_reference(case):
    inputs = double(case)
    names = differentiable(inputs)
    function = registry.FUNCTIONS[case.op]

    def call(*leaves):
        return function(**{**inputs, **dict(zip(names, leaves, strict=True))}, backend="eager")

    leaves = [inputs[n].requires_grad_() for n in names]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
