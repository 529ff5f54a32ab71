"""Wrong arguments of public functions: one line that names the argument and what came, and nothing
changed. What each op's tensors must be is tested in test_properties.py."""

import numpy as np
import pytest
import torch
from torch import nn

import cgpt_kernels as ck

SHAPE = dict(vocab_size=50, n_positions=32, n_embd=32, n_layer=1, n_head=2)
x, weight, q = torch.randn(4, 16), torch.randn(8, 16), torch.randn(1, 2, 3, 8)
target, ids = torch.zeros(4, dtype=torch.long), torch.arange(12).view(2, 6)
ragged = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(2, 16)])


def model():
    torch.manual_seed(0)
    return ck.GPT(ck.GPTConfig(**SHAPE)).eval()


def refused(call, names):
    with pytest.raises((ValueError, TypeError)) as info:
        call()
    text = str(info.value)
    assert "\n" not in text and text.startswith(names), text


OPS = [
    ("layer_norm: eps must be a number, got 'a'", "layer_norm", (x, x[0]), {"eps": "a"}),
    ("layer_norm: x must be a dense tensor, got layout nested", "layer_norm", (ragged, x[0]), {}),
    ("gemm: x must be a dense tensor, got layout nested", "gemm", (ragged, weight), {}),
    ("gemm: dropout_p must be a number, got None", "gemm", (x, weight), {"dropout_p": None}),
    (
        "gemm: scale of lora must be a number, got 's'",
        "gemm",
        (x, weight),
        {"lora": (x[:2], weight[:, :2], "s")},
    ),
    ("attention: scale must be a number or None", "attention", (q, q, q), {"scale": "big"}),
    ("attention: causal must be True or False", "attention", (q, q, q), {"causal": "no"}),
    (
        "linear_cross_entropy: ignore_index must be an int in 64 bits, got 1.5",
        "linear_cross_entropy",
        (x, weight, target),
        {"ignore_index": 1.5},
    ),
]


@pytest.mark.parametrize("names,op,args,options", OPS, ids=[case[0].split(",")[0] for case in OPS])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_ops_refuse_values_of_another_kind(names, op, args, options, backend):
    refused(lambda: getattr(ck.ops, op)(*args, **options, backend=backend), names)


@pytest.mark.parametrize(
    "op,args", [(case[1], case[2]) for case in OPS if case[2][0] is not ragged]
)
def test_a_backend_that_is_no_name_is_told(op, args):
    refused(
        lambda: getattr(ck.ops, op)(*args, backend=["cpu"]), f"{op}: backend must be 'auto', 'cpu'"
    )


def test_numpy_arrays_of_any_layout_are_read():
    a, w = np.random.default_rng(0).random((2, 8, 16), dtype=np.float32)
    expected = ck.ops.gemm(a, w)
    records = np.zeros((8, 16), dtype=[("value", "f4"), ("flag", "u1")])
    records["value"] = a
    for same in (a.astype(">f4"), records["value"], a[::-1, ::-1].copy()[::-1, ::-1]):
        np.testing.assert_array_equal(ck.ops.gemm(same, w), expected)
    low = ck.ops.gemm(a, w, lora=(a[:2], w[:, :2], 0.5))
    assert isinstance(low, np.ndarray)
    np.testing.assert_allclose(low, expected + 0.5 * (a @ a[:2].T) @ w[:, :2].T, rtol=1e-4)


def test_explain_refuses_what_is_no_tensor_or_op():
    refused(lambda: ck.explain("gemm", "x"), "explain: tensors[0] must be a torch.Tensor")
    refused(lambda: ck.explain(3, x), "explain: op must be 'attention'")


@pytest.mark.parametrize(
    "field,value",
    [
        ("n_layer", True),
        ("attn_pdrop", "x"),
        ("resid_pdrop", None),
        ("initializer_range", "a"),
        ("layer_norm_epsilon", -1.0),
        ("mup_width_scale", 0),
        ("mup_output_alpha", float("nan")),
        ("mup_scale_qk_dot_by_d", "no"),
    ],
)
def test_configurations_that_cannot_be_computed_are_refused(field, value):
    refused(lambda: ck.GPTConfig(**(SHAPE | {field: value})), f"GPTConfig: {field} must be")


@pytest.mark.parametrize("replaced", [False, True])
def test_the_models_forward_refuses_and_its_cache_stays(replaced):
    m = model()
    if replaced:
        ck.replace(m)
    cache = m.new_cache(2)
    for names, bad, options in (
        ("GPT: input_ids must be a torch.Tensor, got list", [[1, 2]], {}),
        ("GPT: input_ids must be int64 or int32, got float32", ids.float(), {}),
        ("GPT: attention_mask must be a torch.Tensor or None", ids, {"attention_mask": [[1] * 6]}),
        ("GPT: position_ids must lie in [0, 32)", ids, {"position_ids": ids + 30}),
        ("GPT: position_ids must be broadcastable", ids, {"position_ids": ids[:, :5]}),
        ("GPT: position_ids must be int64", ids, {"position_ids": ids.float()}),
        ("GPT: targets must have shape (2, 6)", ids, {"targets": ids[:, :5]}),
        ("GPT: targets must be int64", ids, {"targets": ids.float()}),
        (
            "linear_cross_entropy: target[0] must be in [0, 50)"
            if replaced
            else "GPT: targets must lie in [0, 50) = vocab_size or be -100, got 50",
            ids,
            {"targets": ids + 50},
        ),
    ):
        given = options if "targets" in options else options | {"cache": cache}
        refused(lambda bad=bad, given=given: m(bad, **given), names)
    assert cache.length == 0
    refused(lambda: ck.GPT("gpt2"), "GPT: config must be a GPTConfig, got str; GPTConfig.from_name")


@pytest.mark.parametrize("replaced", [False, True])
def test_generate_refuses_before_the_first_step(replaced):
    m, seen = model(), []
    if replaced:
        ck.replace(m)
    for names, options in (
        ("max_new_tokens must be an int, got 2.5", {"max_new_tokens": 2.5}),
        ("max_new_tokens must be an int, got None", {"max_new_tokens": None}),
        ("input_ids must be a torch.Tensor, got list", {"input_ids": [[1, 2]]}),
        ("input_ids must be int64 or int32, got float32", {"input_ids": ids.float()}),
        ("input_ids must hold tokens", {"input_ids": ids.to("meta")}),
        ("attention_mask must be a torch.Tensor or None", {"attention_mask": [[1] * 6] * 2}),
        ("attention_mask must be on cpu", {"attention_mask": torch.ones(2, 6, device="meta")}),
        ("temperature must be a number, got 'hot'", {"temperature": "hot"}),
        ("top_k must be an int, got 1.5", {"temperature": 1.0, "top_k": 1.5}),
        ("top_p must be a number or None", {"temperature": 1.0, "top_p": "all"}),
        ("seed must be an int, got 'a'", {"seed": "a"}),
        ("seed must lie in [-2^63, 2^63)", {"seed": 2**64}),
        ("eos_token_id must be an int, several or None", {"eos_token_id": "</s>"}),
        ("eos_token_id must be an int, several or None", {"eos_token_id": []}),
    ):
        given = {"input_ids": ids, "max_new_tokens": 2, "stream": seen.append} | options
        refused(lambda given=given: ck.generate(m, **given), f"generate: {names}")
    assert not seen
    ck.generate(m, ids, np.int64(2), eos_token_id=torch.tensor(3))


def test_replace_leaves_what_no_kernel_takes():
    m = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64), nn.Linear(4, 4), nn.LayerNorm(4))
    refused(lambda: ck.replace(m, keep_original="no"), "replace: keep_original must be True or")
    table = ck.replace(m).table
    assert [row.reason for row in table if row.name == "0"] == ["its weight is complex64"]
    m[0](torch.ones(2, 4, dtype=torch.complex64))
    ragged = torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(2, 4)])
    assert m[1:](ragged).is_nested


def test_quantize_refuses_other_models_and_dtypes(tmp_path):
    names = "quantize: model must be a cgpt_kernels.GPT, got Linear"
    refused(lambda: ck.quantize.measure(nn.Linear(2, 2), "int8", ids[0]), names)
    model().save_pretrained(tmp_path)
    load = ck.GPT.from_pretrained
    refused(
        lambda: load(tmp_path, dtype=torch.int8),
        "from_pretrained: dtype must be None or a floating one",
    )
