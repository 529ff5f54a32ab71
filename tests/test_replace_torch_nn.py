"""torch's own modules after `replace`, alone and in models of one's own.

B batch, L queries, S keys, E width, H heads.
"""

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import cgpt_kernels as ck
from cgpt_kernels.replace import torch_nn
from cgpt_kernels.replace.swap import Replaced

B, L, E, H = 3, 7, 32, 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(a, b, tol=2e-5):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= tol * max(1.0, b.abs().max())


def compare(model, *args, tol=2e-5, **kwargs):
    """Outputs and gradients of `model` before and after replace are equal; it stays replaced."""

    def run():
        inputs = [a.clone().requires_grad_(a.is_floating_point()) for a in args]
        model.zero_grad()
        out = model(*inputs, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        return out.detach(), [i.grad for i in inputs], copy.deepcopy(grads)

    expected, expected_inputs, expected_grads = run()
    replacement = ck.replace(model)
    out, inputs, grads = run()
    close(out, expected, tol)
    for a, b in zip(inputs, expected_inputs, strict=True):
        close(a, b, 10 * tol)
    for name, g in grads.items():
        close(g, expected_grads[name], 10 * tol)
    return replacement


# ---- LayerNorm and Linear ------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_and_linear(bias):
    model = nn.Sequential(nn.LayerNorm(E, bias=bias), nn.Linear(E, 2 * E, bias=bias))
    for x in (torch.randn(E), torch.randn(B, L, E), torch.randn(0, E), torch.randn(E, B).t()):
        with ck.replace(model):
            out = model(x)
        close(out, model(x)) if out.numel() else None
        assert out.shape == model(x).shape
    replacement = compare(model, torch.randn(B, L, E))
    assert [row.replaced_by for row in replacement.table] == [None, "FusedLayerNorm", "FusedLinear"]


def test_layer_norms_the_op_cannot_do_are_left_alone():
    model = nn.Sequential(
        nn.LayerNorm((L, E)), nn.LayerNorm(E, elementwise_affine=False), nn.Linear(E, E)
    )
    rows = compare(model, torch.randn(B, L, E)).table
    assert rows[1].replaced_by is None and "2 dimensions" in rows[1].reason
    assert rows[2].replaced_by is None and "elementwise_affine" in rows[2].reason
    assert rows[3].replaced_by == "FusedLinear"


def test_subclasses_are_left_alone():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(E, E), nn.Linear(E, E))
    rows = compare(model, torch.randn(B, E)).table
    assert rows[1].replaced_by is None and "subclass of Linear" in rows[1].reason


def test_tied_and_shared_modules():
    shared = nn.Linear(E, E)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(E, E))
    model[3].weight = shared.weight
    compare(model, torch.randn(B, E))
    assert model[0] is model[2] and model[3].weight is model[0].weight


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("first", ["parametrize", "replace"])
def test_parametrized_weights(name, first):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(E, E), nn.Linear(E, E))

    parametrize = getattr(nn.utils.parametrizations, name)
    eager, model = build(), build()
    torch.manual_seed(1)
    parametrize(eager[0])
    torch.manual_seed(1)
    if first == "parametrize":
        parametrize(model[0])
        ck.replace(model)
    else:
        ck.replace(model)
        parametrize(model[0])
    x = torch.randn(B, E)
    close(model.eval()(x), eager.eval()(x))


def test_pruned_weights_after_replace():
    model = nn.Sequential(nn.Linear(E, E))
    ck.replace(model)
    prune.random_unstructured(model[0], "weight", amount=0.5)
    x = torch.randn(B, E)
    close(model(x), F.linear(x, model[0].weight, model[0].bias))


def test_functional_call():
    model = nn.Sequential(nn.LayerNorm(E), nn.Linear(E, E))
    other = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    x = torch.randn(B, E)
    expected = torch.func.functional_call(model, other, x)
    ck.replace(model)
    close(torch.func.functional_call(model, other, x), expected)


class Subclass(torch.Tensor):
    """Stands for a quantised or sharded weight, whose memory no kernel may read."""

    seen = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            cls.seen += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_weights_of_a_tensor_subclass_keep_their_own_arithmetic():
    model = nn.Sequential(nn.Linear(E, E), nn.LayerNorm(E))
    ck.replace(model)
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Subclass))
    before = Subclass.seen
    model(torch.randn(B, E))
    assert Subclass.seen == before + 1
    ck.restore(model)
    rows = ck.replace(model).table
    assert rows[1].replaced_by is None and "Subclass" in rows[1].reason


def test_no_extra_parameters_or_buffers():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, batch_first=True), 2)
    state, modules = model.state_dict(), list(model.modules())
    ck.replace(model)
    assert model.state_dict().keys() == state.keys()
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert not list(model.buffers())


# ---- MultiheadAttention --------------------------------------------------------------------------


class Attend(nn.Module):
    """Calls MultiheadAttention with fixed options, so that masks are not inputs of `compare`."""

    def __init__(self, need_weights=False, masks=None, **options):
        super().__init__()
        self.mha = nn.MultiheadAttention(E, H, **options)
        self.options = {"need_weights": need_weights, **(masks or {})}

    def forward(self, *x):
        q, k, v = x * 3 if len(x) == 1 else (x[0], x[1], x[1]) if len(x) == 2 else x
        return self.mha(q, k, v, **self.options)


def padding(S=L):
    mask = torch.zeros(B, S, dtype=torch.bool)
    mask[0, 4:], mask[2, 1:] = True, True
    return mask


CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)  # True hides
MASKS = {
    "none": {},
    "padding": {"key_padding_mask": padding()},
    "float padding": {"key_padding_mask": torch.randn(B, L)},
    "causal": {"attn_mask": CAUSAL},
    "causal hint": {"attn_mask": CAUSAL, "is_causal": True},
    "causal hint, padding": {
        "attn_mask": CAUSAL,
        "is_causal": True,
        "key_padding_mask": padding(),
    },
    "float": {"attn_mask": torch.randn(L, L)},
    "float, float padding": {"attn_mask": torch.randn(L, L), "key_padding_mask": torch.randn(B, L)},
    "bool, float padding": {"attn_mask": CAUSAL, "key_padding_mask": torch.randn(B, L)},
    "per head": {"attn_mask": torch.randn(B * H, L, L)},
    "per head, bool": {"attn_mask": torch.randn(B * H, L, L).tril(-1) > 0.3},
}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_self_attention_masks(masks, batch_first):
    model = Attend(masks=masks, batch_first=batch_first)
    x = torch.randn(B, L, E) if batch_first else torch.randn(L, B, E)
    rows = compare(model, x).table
    assert rows[1].replaced_by == "FusedMultiheadAttention"
    assert model(x)[1] is None


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("inputs", [2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_over_other_keys(inputs, bias, batch_first):
    S = 5
    masks = {"key_padding_mask": padding(S), "attn_mask": torch.rand(L, S).gt(0.8).triu(1)}
    model = Attend(masks=masks, batch_first=batch_first, bias=bias)
    x = [torch.randn(B, L, E), torch.randn(B, S, E), torch.randn(B, S, E)][:inputs]
    compare(model, *(x if batch_first else [t.transpose(0, 1) for t in x]))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kdim": 16, "vdim": 24}, "kdim"),
        ({"add_bias_kv": True}, "add_bias_kv"),
        ({"add_zero_attn": True}, "add_zero_attn"),
    ],
)
def test_attention_variants_are_left_alone(options, reason):
    model = nn.Sequential(nn.MultiheadAttention(E, H, **options), nn.Linear(E, E))
    row = ck.replace(model).table[1]
    assert row.replaced_by is None and reason in row.reason


@pytest.mark.parametrize("average", [True, False])
def test_attention_weights_come_from_torch(average):
    masks = {"average_attn_weights": average, "key_padding_mask": padding()}
    model = Attend(need_weights=True, masks=masks, batch_first=True).eval()
    x = torch.randn(B, L, E)
    expected = model(x)
    ck.replace(model)
    for a, b in zip(model(x), expected, strict=True):
        close(a, b)


def test_unbatched_attention():
    compare(Attend(), torch.randn(L, E))


def test_causal_hint_without_mask_is_refused_as_torch_does():
    model = Attend(masks={"is_causal": True})
    ck.replace(model)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        model(torch.randn(L, B, E))


def test_attention_dropout_statistics():
    model = Attend(dropout=0.3, batch_first=True).train()
    x = torch.randn(1, L, E).expand(3000, L, E)
    with torch.no_grad():
        eager = model(x)[0]
        ck.replace(model)
        ours = model(x)[0]
        assert torch.equal(model.eval()(x[:1])[0], model(x[:1])[0])
    spread = eager.std(0)
    assert ((ours.mean(0) - eager.mean(0)).abs() <= 6 * spread * (2 / 3000) ** 0.5 + 1e-9).all()
    assert ((ours.std(0) - spread).abs() <= 0.15 * spread + 1e-4).all()


# ---- TransformerEncoderLayer ---------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:Support for mismatched")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(
    "activation",
    ["relu", "gelu", nn.ReLU(), nn.GELU("tanh"), nn.SiLU(), torch.tanh],
    ids=lambda a: a if isinstance(a, str) else getattr(a, "__name__", str(a)),
)
def test_encoder_layer_trains_as_eager(activation, norm_first, batch_first):
    layer = nn.TransformerEncoderLayer(
        E, H, 48, 0.0, activation, batch_first=batch_first, norm_first=norm_first
    )
    model = nn.TransformerEncoder(layer, 2)
    x = torch.randn(B, L, E) if batch_first else torch.randn(L, B, E)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    for masks in (
        {},
        {"mask": mask, "is_causal": True},
        {"src_key_padding_mask": padding()},
        {"mask": mask, "src_key_padding_mask": padding()},
    ):
        table = compare(model, x, **masks).table
        assert any(row.replaced_by == "FusedTransformerEncoderLayer" for row in table)
        ck.restore(model)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_evaluates_as_torchs_fast_path(norm_first, nested):
    layer = nn.TransformerEncoderLayer(E, H, 48, norm_first=norm_first, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    x = torch.randn(B, L, E)
    with torch.no_grad():
        for masks in ({}, {"src_key_padding_mask": padding()}, {"mask": CAUSAL}):
            expected = model(x, **masks)
            with ck.replace(model):
                out = model(x, **masks)
            keep = ~padding() if "src_key_padding_mask" in masks else slice(None)
            close(out[keep], expected[keep])
            if nested and not norm_first:  # the nested tensor's zeros at padding stay
                close(out, expected)


@pytest.mark.parametrize("bias", [True, False])
def test_encoder_layer_without_bias_and_unbatched(bias):
    model = nn.Sequential(nn.TransformerEncoderLayer(E, H, 48, 0.0, bias=bias, batch_first=True))
    compare(model, torch.randn(B, L, E))
    ck.restore(model)
    compare(model, torch.randn(L, E))


HOOKED = ["self_attn", "linear1", "linear2", "norm1", "norm2", "dropout", "dropout1", "dropout2"]


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("name", HOOKED)
def test_encoder_layer_hooks_may_change_outputs(name, norm_first):
    model = nn.Sequential(
        nn.TransformerEncoderLayer(E, H, 48, norm_first=norm_first, batch_first=True)
    ).eval()

    def halve(module, args, out):
        return (out[0] * 0.5, None) if isinstance(out, tuple) else out * 0.5

    model[0].get_submodule(name).register_forward_hook(halve)
    compare(model, torch.randn(B, L, E))


def test_encoder_layer_dropout_statistics():
    layer = nn.TransformerEncoderLayer(E, H, 48, 0.2, batch_first=True).train()
    model = nn.Sequential(layer)
    x = torch.randn(1, L, E).expand(3000, L, E)
    with torch.no_grad():
        eager = model(x)
        ck.replace(model)
        ours = model(x)
    spread = eager.std(0)
    assert ((ours.mean(0) - eager.mean(0)).abs() <= 6 * spread * (2 / 3000) ** 0.5 + 1e-9).all()
    assert ((ours.std(0) - spread).abs() <= 0.15 * spread + 1e-4).all()


def test_whole_transformer_gains():
    model = nn.Transformer(E, H, 1, 1, 48, 0.0, batch_first=True)
    source, target = torch.randn(B, L, E), torch.randn(B, 5, E)
    table = compare(model, source, target).table
    assert sum(row.replaced_by == "FusedMultiheadAttention" for row in table) == 3


# ---- a model of one's own ------------------------------------------------------------------------


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def forward(self, x):
        q, k, v = (t.view(B, L, H, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class OwnModel(nn.Module):
    """A pre-LN block written by hand, as users of nanoGPT have it."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(E), SelfAttention(), nn.LayerNorm(E)
        self.mlp = nn.Sequential(nn.Linear(E, 4 * E), nn.GELU(), nn.Linear(4 * E, E))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


def test_a_model_of_ones_own():
    model = OwnModel()
    replacement = compare(model, torch.randn(B, L, E))
    rows = {row.name: row for row in replacement.table}
    assert {r.replaced_by for r in replacement.table.replaced} == {"FusedLayerNorm", "FusedLinear"}
    assert rows["attn"].replaced_by is None and "its own forward runs" in rows["attn"].reason


def test_clones_and_restore():
    model = OwnModel()
    x = torch.randn(B, L, E)
    eager = model(x)
    ck.replace(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.ln_1) is torch_nn.FusedLayerNorm
        assert torch.equal(twin(x), model(x))
    ck.restore(model)
    assert torch.equal(model(x), eager)
    assert not any(isinstance(m, Replaced) for m in model.modules())


def test_compile_fullgraph():
    model = nn.Sequential(
        OwnModel(), nn.TransformerEncoderLayer(E, H, 48, norm_first=True, batch_first=True)
    ).eval()
    x = torch.randn(B, L, E)
    with torch.no_grad():
        expected = model(x)
        ck.replace(model)
        torch._dynamo.reset()
        close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


def test_bf16_error_is_at_most_twice_eagers():
    model = OwnModel()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(math.sqrt(3))
    x = torch.randn(B, L, E)
    exact = copy.deepcopy(model).double()(x.bfloat16().double())
    model.bfloat16()
    eager_error = (model(x.bfloat16()).double() - exact).abs().max()
    ck.replace(model)
    error = (model(x.bfloat16()).double() - exact).abs().max()
    assert error <= 2 * eager_error + 1e-6 * exact.abs().max()
