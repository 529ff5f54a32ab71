"""Properties of the ops that need no oracle: invariances, masks, dropout, bounds, repeatability."""

import pytest
import torch

from cgpt_kernels import backends, ops
from cgpt_kernels.ops import registry
from cgpt_kernels.ops.attention import reference as attention_reference
from cgpt_kernels.ops.attention.cases import AttentionCase
from cgpt_kernels.ops.philox import keep_mask, philox_4x32
from cgpt_kernels.testing import run

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RUNNABLE = {
    op: [b for b in backends.runnable(op, "cpu") if b != "wafer"] for op in registry.FUNCTIONS
}

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def on(op):
    return pytest.mark.parametrize("backend", RUNNABLE[op])


def compiled(op):
    return pytest.mark.parametrize("backend", [b for b in RUNNABLE[op] if b != "eager"])


def qkv(dtype=torch.float32, **shape):
    shape = {"B": 2, "H": 3, "Sq": 13, "Sk": 13, "D": 16, "causal": False, **shape}
    return AttentionCase(name="", why="", **shape).inputs(dtype)


def close(found, wanted, dtype=torch.float32, factor=1.0):
    """Equal up to a few roundings of dtype."""
    unit = torch.finfo(dtype).eps
    scale = wanted.abs().max().item()
    torch.testing.assert_close(found, wanted, rtol=0, atol=factor * 8 * unit * max(scale, 1e-3))


# ---- attention ----------------------------------------------------------------------------------


@on("attention")
def test_softmax_ignores_a_shift_of_a_whole_row(backend):
    given = qkv(bias="BHqk", bias_kind="fp32")
    wanted = ops.attention(**given, backend=backend)
    given["attn_bias"] = given["attn_bias"] + 4.0 * torch.randn(2, 3, 13, 1)
    close(ops.attention(**given, backend=backend), wanted, factor=4)


@on("attention")
def test_order_of_keys_does_not_matter_without_a_mask(backend):
    given = qkv(Sk=29)
    wanted = ops.attention(**given, backend=backend)
    order = torch.randperm(29)
    given["k"], given["v"] = given["k"][:, :, order], given["v"][:, :, order]
    close(ops.attention(**given, backend=backend), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Sq, Sk", [(13, 13), (7, 40), (70, 70)])
@compiled("attention")
def test_attention_ignores_future_keys(backend, Sq, Sk, dtype):
    given = qkv(dtype, Sq=Sq, Sk=Sk, causal=True)
    wanted = ops.attention(**given, backend=backend)
    for i in (0, Sq // 2, Sq - 2):
        changed = {**given, "k": given["k"].clone(), "v": given["v"].clone()}
        changed["k"][:, :, i + 1 + Sk - Sq :] = 1e4
        changed["v"][:, :, i + 1 + Sk - Sq :] = -1e4
        found = ops.attention(**changed, backend=backend)
        assert torch.equal(found[:, :, : i + 1], wanted[:, :, : i + 1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@compiled("attention")
def test_masked_keys_may_hold_anything(backend, value):
    given = qkv(B=4, causal=False, padding="right")
    wanted = ops.attention(**given, backend=backend)
    hidden = given["key_padding_mask"][:, None, :, None]
    given["k"] = given["k"].masked_fill(hidden, value)
    given["v"] = given["v"].masked_fill(hidden, value)
    assert torch.equal(ops.attention(**given, backend=backend), wanted)


@compiled("attention")
def test_batch_entries_do_not_touch_each_other(backend):
    given = qkv(B=5, causal=True)
    wanted = ops.attention(**given, backend=backend)
    for b in range(5):
        one = {k: v[b : b + 1] if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        assert torch.equal(ops.attention(**one, backend=backend), wanted[b : b + 1])


@on("attention")
def test_padding_a_sequence_changes_nothing(backend):
    given = qkv(Sq=11, Sk=11, causal=True)
    wanted = ops.attention(**given, backend=backend)
    padded = {name: torch.nn.functional.pad(given[name], (0, 0, 6, 0), value=3.0) for name in "qkv"}
    mask = torch.zeros(2, 17, dtype=torch.bool)
    mask[:, :6] = True
    found = ops.attention(**padded, causal=True, key_padding_mask=mask, backend=backend)
    close(found[:, :, 6:], wanted)
    assert torch.equal(found[:, :, :6], torch.zeros(2, 3, 6, 16))


@on("attention")
def test_decoding_token_by_token_gives_the_rows_of_the_whole(backend):
    given = qkv(causal=True)
    whole = ops.attention(**given, backend=backend)
    for i in range(13):
        row = ops.attention(
            given["q"][:, :, i : i + 1],
            given["k"][:, :, : i + 1],
            given["v"][:, :, : i + 1],
            backend=backend,
        )
        close(row, whole[:, :, i : i + 1])


MASKS_THAT_BLIND = {
    "more_queries": dict(Sq=9, Sk=4, causal=True),
    "padding": dict(padding="all", B=4),
    "bool": dict(bias="qk", bias_kind="bool"),
    "minus_infinity": dict(bias="qk"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", MASKS_THAT_BLIND)
@on("attention")
def test_a_query_that_sees_nothing_gives_zero_and_takes_no_gradient(backend, how, dtype):
    given = qkv(dtype, **MASKS_THAT_BLIND[how])
    if how == "bool":
        given["attn_bias"][:5] = False
    if how == "minus_infinity":
        given["attn_bias"][:5] = float("-inf")
    blind = {
        "more_queries": (slice(None), slice(None), slice(0, 5)),
        "padding": (slice(2, 4),),
    }.get(how, (slice(None), slice(None), slice(0, 5)))
    found = run(ops.attention, given, gradients=True, backend=backend)
    for what, tensor in found.items():
        assert not torch.isnan(tensor).any(), what
    assert (found["out"][blind] == 0).all()
    assert (found["grad of q"][blind] == 0).all()
    assert found["out"].any() and found["grad of q"].any()


@compiled("attention")
def test_log_sum_exp_is_that_of_the_masked_logits(backend):
    given = qkv(Sq=9, Sk=7, causal=True, bias="1Hqk", alibi=True)
    q, k, v = given["q"], given["k"], given["v"]
    masks = (None, given["attn_bias"], given["alibi_slopes"])
    _, lse, _ = torch.ops.cgpt.attention(q, k, v, *masks, 0.25, True, 0.0, None, backend)
    logits = attention_reference.masked_logits(q, k, *masks, 0.25, True)
    torch.testing.assert_close(lse, torch.logsumexp(logits, -1))


# ---- dropout ------------------------------------------------------------------------------------


def test_philox_known_answers():
    """Known-answer vectors that the authors publish with Random123 1.09 (kat_vectors)."""

    def answer(counter, key):
        words = philox_4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
        return [int(w) for w in words]

    ones = 0xFFFFFFFF
    assert answer((0,) * 4, (0,) * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert answer((ones,) * 4, (ones,) * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    found = answer(pi, (0xA4093822, 0x299F31D0))
    assert found == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("start", [0, 1, 5, 2**34 - 3])
def test_dropout_mask_of_a_range_is_a_piece_of_the_whole(start):
    whole = keep_mask(start - start % 4, 64, 0.4, 2**40 + 17, "cpu")
    assert torch.equal(keep_mask(start, 30, 0.4, 2**40 + 17, "cpu"), whole[start % 4 :][:30])


@on("attention")
def test_dropout_p_0_is_no_dropout(backend):
    given = qkv()
    wanted = ops.attention(**given, backend=backend)
    assert torch.equal(ops.attention(**given, dropout_p=0.0, seed=3, backend=backend), wanted)


def dropped_probabilities(backend, **options):
    """The dropped attention weights themselves: v is the identity."""
    given = qkv(B=2, H=2, Sq=20, Sk=16, D=16)
    given["v"] = torch.eye(16).expand(2, 2, 16, 16)
    return ops.attention(**given, backend=backend, **options), given


@on("attention")
def test_dropout_mask_is_the_shared_one(backend):
    p, given = dropped_probabilities(backend, dropout_p=0.37, seed=987_654_321_987)
    whole, _ = dropped_probabilities(backend)
    mask = attention_reference.dropout_mask(given["q"], given["k"], 0.37, 987_654_321_987)
    assert torch.equal(p != 0, mask)
    close(p, whole * mask / (1 - 0.37))


@on("attention")
def test_dropout_keeps_the_mean(backend):
    whole, _ = dropped_probabilities(backend)
    total = torch.zeros_like(whole)
    for seed in range(200):
        total += dropped_probabilities(backend, dropout_p=0.25, seed=seed)[0]
    # 1280 weights of standard error sqrt(p / (1 - p) / 200) = 4 % each
    assert abs((total / 200 / whole).mean().item() - 1) < 0.006


@on("attention")
def test_dropout_backward_uses_the_mask_of_the_forward(backend):
    given = qkv(B=1, H=2, Sq=12, Sk=12, D=12)
    v = torch.eye(12).expand(1, 2, 12, 12).clone().requires_grad_()
    given["v"] = v
    out = ops.attention(**given, dropout_p=0.5, seed=11, backend=backend)
    # d(out[i, d]) / d(v[j, d]) = dropped p[i, j], and v = 1 makes out = dropped p
    (dv,) = torch.autograd.grad(out.sum(), v)
    close(dv, out.detach().sum(2)[..., None].expand_as(dv))


@on("attention")
def test_dropout_without_a_seed_follows_torch_manual_seed(backend):
    given = qkv()
    torch.manual_seed(5)
    first = ops.attention(**given, dropout_p=0.5, backend=backend)
    second = ops.attention(**given, dropout_p=0.5, backend=backend)
    torch.manual_seed(5)
    again = ops.attention(**given, dropout_p=0.5, backend=backend)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@compiled("attention")
def test_dropout_is_the_same_under_recomputation(backend):
    from torch.utils.checkpoint import checkpoint

    given = qkv()
    q = given.pop("q").requires_grad_()

    def gradient(wrap):
        torch.manual_seed(9)
        call = lambda t: ops.attention(t, **given, dropout_p=0.4, backend=backend)  # noqa: E731
        out = checkpoint(call, q, use_reentrant=False) if wrap else call(q)
        return torch.autograd.grad(out.square().sum(), q)[0]

    assert torch.equal(gradient(True), gradient(False))


# ---- layer norm ---------------------------------------------------------------------------------


@on("layer_norm")
def test_layer_norm_ignores_shift_and_scale_of_a_row(backend):
    x = torch.randn(7, 96)
    one = torch.ones(96)
    wanted = ops.layer_norm(x, one, eps=0.0, backend=backend)
    found = ops.layer_norm(x * 64.0, one, eps=0.0, backend=backend)
    close(found, wanted)
    found = ops.layer_norm(x + 8.0, one, eps=0.0, backend=backend)
    close(found, wanted, factor=8)


@on("layer_norm")
def test_layer_norm_rows_have_mean_0_and_variance_1(backend):
    y = ops.layer_norm(torch.randn(5, 333) * 3 + 2, torch.ones(333), eps=0.0, backend=backend)
    close(y.mean(-1) + 1, torch.ones(5))
    close(y.var(-1, unbiased=False), torch.ones(5))


@pytest.mark.parametrize("dtype", DTYPES)
@compiled("add_layer_norm")
def test_add_layer_norm_is_layer_norm_of_the_rounded_sum(backend, dtype):
    x, residual = torch.randn(2, 9, 70).to(dtype)
    weight, bias = torch.randn(2, 70).to(dtype)
    y, total = ops.add_layer_norm(x, residual, weight, bias, backend=backend)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, ops.layer_norm(total, weight, bias, backend=backend))


# ---- gemm ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("M", [2, 5, 37])
@compiled("gemm")
def test_gemm_layouts_agree(backend, M):
    x, weight = torch.randn(M, 48), torch.randn(40, 48)
    nk = ops.gemm(x, weight, backend=backend)
    kn = ops.gemm(x, weight.t().contiguous(), weight_layout="kn", backend=backend)
    close(kn, nk)
    assert torch.equal(ops.gemm(x, weight.t(), weight_layout="kn", backend=backend), nk)


@on("gemm")
def test_gemm_with_the_identity_copies(backend):
    x = torch.randn(9, 31)
    assert torch.equal(ops.gemm(x, torch.eye(31), backend=backend), x)


@compiled("gemm")
def test_gemm_rows_do_not_touch_each_other(backend):
    x, weight = torch.randn(6, 33), torch.randn(19, 33)
    wanted = ops.gemm(x, weight, backend=backend)
    x[3] = float("nan")
    found = ops.gemm(x, weight, backend=backend)
    assert torch.isnan(found[3]).all()
    keep = [0, 1, 2, 4, 5]
    assert torch.equal(found[keep], wanted[keep])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
@on("gemm")
def test_activations_at_their_ends(backend, activation):
    x = torch.tensor([[-1e30, -40.0, -9.0, 0.0, 9.0, 40.0, 1e30]]).t()
    y = ops.gemm(x, torch.ones(1, 1), activation=activation, backend=backend)
    wanted = x.clamp(min=0)
    torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-12)


@compiled("gemm")
def test_activations_hand_nan_on(backend):
    x = torch.full((1, 1), float("nan"))
    for activation in (None, "gelu", "gelu_tanh", "relu"):
        y = ops.gemm(x, torch.ones(1, 1), activation=activation, backend=backend)
        assert torch.isnan(y).all(), activation


# ---- cross-entropy ------------------------------------------------------------------------------


@on("linear_cross_entropy")
def test_cross_entropy_gradient_rows_sum_to_0(backend):
    # With K = V and W = 1 the gradient of x is the gradient of the logits.
    x = torch.randn(11, 40).requires_grad_()
    target = torch.randint(40, (11,))
    for smoothing in (0.0, 0.1):
        loss = ops.linear_cross_entropy(
            x, torch.eye(40), target, label_smoothing=smoothing, backend=backend
        )
        (dx,) = torch.autograd.grad(loss, x)
        assert dx.sum(-1).abs().max() < 1e-7


@on("linear_cross_entropy")
def test_cross_entropy_ignores_a_shift_of_the_logits(backend):
    x, weight, target = torch.randn(9, 16), torch.randn(50, 16), torch.randint(50, (9,))
    bias = torch.randn(50)
    call = dict(reduction="none", backend=backend)
    wanted = ops.linear_cross_entropy(x, weight, target, bias, **call)
    found = ops.linear_cross_entropy(x, weight, target, bias + 10.0, **call)
    close(found, wanted, factor=8)


@on("linear_cross_entropy")
def test_cross_entropy_of_equal_logits_is_log_v(backend):
    loss = ops.linear_cross_entropy(
        torch.zeros(4, 8), torch.randn(50257, 8), torch.arange(4), backend=backend
    )
    torch.testing.assert_close(loss, torch.tensor(50257.0).log())


@on("linear_cross_entropy")
def test_cross_entropy_ignored_rows_give_no_loss_and_no_gradient(backend):
    x = torch.randn(6, 8).requires_grad_()
    weight = torch.randn(20, 8).requires_grad_()
    target = torch.tensor([1, -100, 5, -100, 7, 19])
    rows = ops.linear_cross_entropy(x, weight, target, reduction="none", backend=backend)
    dx, dweight = torch.autograd.grad(rows.sum(), (x, weight))
    hidden = target == -100
    assert (rows[hidden] == 0).all() and (dx[hidden] == 0).all()
    kept = ops.linear_cross_entropy(x[~hidden], weight, target[~hidden], backend=backend)
    mean = ops.linear_cross_entropy(x, weight, target, backend=backend)
    torch.testing.assert_close(mean, kept)
    assert dweight.any()


@on("linear_cross_entropy")
def test_cross_entropy_mean_without_a_counting_row_is_nan_as_in_torch(backend):
    target = torch.full((3,), -100)
    loss = ops.linear_cross_entropy(torch.randn(3, 8), torch.randn(5, 8), target, backend=backend)
    assert torch.isnan(loss)


# ---- all ops ------------------------------------------------------------------------------------

EACH_COMPILED = [
    pytest.param(case, backend, id=f"{backend}-{case.op}-{case.name}")
    for case in registry.cases("test")
    if case.name in ("odd", "odd_tail", "left_padding", "long_keys", "dropout", "blocks", "bias")
    for backend in RUNNABLE[case.op]
    if backend != "eager"
]


@pytest.mark.parametrize("case, backend", EACH_COMPILED)
def test_the_same_bits_in_100_runs(case, backend):
    function = registry.FUNCTIONS[case.op]
    inputs = case.inputs(torch.float32)
    first = run(function, inputs, backend=backend)
    for _ in range(100):
        again = run(function, inputs, backend=backend)
        assert all(torch.equal(again[what], first[what]) for what in first)


# Positions of the outputs among the kernel's arguments.
OUTPUTS = {
    "layer_norm": (4, 5, 6, 7),
    "add_layer_norm": (4, 5, 6, 7),
    "gemm": (4,),
    "attention": (6, 7),
    "linear_cross_entropy": (4, 5),
}
SENTINEL, MARGIN = 0xA5, 512  # bytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case, backend", EACH_COMPILED)
def test_nothing_is_written_outside_the_outputs(case, backend, dtype, monkeypatch):
    """Each output lies between sentinels, which must survive."""
    kernel, _ = backends.implementation(case.op, backend)
    arenas = []

    def guard(t):
        nbytes = t.untyped_storage().nbytes()
        arenas.append(torch.full((nbytes + 2 * MARGIN,), SENTINEL, dtype=torch.uint8))
        return arenas[-1].view(t.dtype).as_strided(t.shape, t.stride(), MARGIN // t.itemsize)

    def guarded(*args):
        args = list(args)
        outputs = {i: args[i] for i in OUTPUTS[case.op] if args[i] is not None}
        for i, out in outputs.items():
            args[i] = guard(out)
        kernel(*args)
        for i, out in outputs.items():
            out.copy_(args[i])

    function, inputs = registry.FUNCTIONS[case.op], case.inputs(dtype)
    wanted = run(function, inputs, backend=backend)
    monkeypatch.setattr(backends, "implementation", lambda *_: (guarded, None))
    with torch.overrides.BaseTorchFunctionMode():  # closes the lean path, which keeps the kernel
        found = run(function, inputs, backend=backend)
    assert arenas
    for arena in arenas:
        assert (arena[:MARGIN] == SENTINEL).all() and (arena[-MARGIN:] == SENTINEL).all()
    assert all(torch.equal(found[what], wanted[what]) for what in wanted)
