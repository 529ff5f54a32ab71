"""Hugging Face GPT-2 after `replace`: the same logits, tokens and state as before.

B batch, S tokens, V vocabulary.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")
from small_gpt2 import V, close, left_padded, logits, make, tokens
from transformers import (
    AttentionInterface,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
)
from transformers.cache_utils import StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Block
from transformers.pytorch_utils import Conv1D

import cgpt_kernels as ck
from cgpt_kernels.replace import hf_gpt2
from cgpt_kernels.replace.swap import Replaced

# ---- what is computed ----------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_function": "gelu"},
        {"activation_function": "gelu_pytorch_tanh"},
        {"activation_function": "relu"},
        {"activation_function": "silu"},  # not one of gemm's: applied by the module itself
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
        {"add_cross_attention": True},
        {"n_inner": 80, "layer_norm_epsilon": 0.1},
    ],
    ids=lambda o: ",".join(o) or "defaults",
)
def test_logits_equal_eager(options, implementation):
    model = make(attn_implementation=implementation, **options)
    ids, mask = left_padded()
    plain, padded = logits(model, tokens()), logits(model, ids, attention_mask=mask)
    ck.replace(model)
    close(logits(model, tokens()), plain)
    # What padding positions compute is nobody's business: a fully masked row is zeros here.
    close(logits(model, ids, attention_mask=mask)[mask == 1], padded[mask == 1])


def test_cross_attention_equals_eager():
    model = make(add_cross_attention=True)
    states = torch.randn(2, 5, 48)
    seen = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    args = {"encoder_hidden_states": states, "encoder_attention_mask": seen}
    expected = logits(model, tokens(), **args)
    replacement = ck.replace(model)
    close(logits(model, tokens(), **args), expected)
    row = next(r for r in replacement.table if r.name.endswith("crossattention"))
    assert row.replaced_by is None and "cross-attention" in row.reason


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_custom_4d_masks_equal_eager(implementation):
    model = make(attn_implementation=implementation)
    keep = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril().triu(-3)
    added = torch.zeros(1, 1, 9, 9).masked_fill(~keep, torch.finfo(torch.float32).min)
    masks = [added] if implementation == "eager" else [added, keep]
    expected = [logits(model, tokens(), attention_mask=m) for m in masks]
    ck.replace(model)
    for mask, e in zip(masks, expected, strict=True):
        close(logits(model, tokens(), attention_mask=mask), e)


def test_other_attention_implementations_are_called():
    def halved(module, q, k, v, mask, **kwargs):
        out, weights = sdpa_attention_forward(module, q, k, v, mask, **kwargs)
        return out * 0.5, weights

    AttentionInterface.register("halved", halved)
    model = make()
    model.set_attn_implementation("halved")
    expected = logits(model, tokens())
    rows = {row.name: row for row in ck.replace(model).table}
    assert "'halved' runs as it is" in rows["transformer.h.0.attn"].reason
    close(logits(model, tokens()), expected)
    model.set_attn_implementation("sdpa")  # may change at any time
    close(logits(model, tokens()), logits(make(), tokens()))


@pytest.mark.parametrize("cls", [GPT2Model, GPT2ForSequenceClassification])
def test_other_heads_equal_eager(cls):
    model = make(cls)
    ids, mask = left_padded()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask)[0]
        ck.replace(model)
        out = model(ids, attention_mask=mask)[0]
    if cls is GPT2Model:
        out, expected = out[mask == 1], expected[mask == 1]
    close(out, expected)


def test_bf16_error_is_at_most_twice_eagers():
    model = make(n_embd=96, n_head=3)
    ids = tokens(2, 33)
    exact = logits(copy.deepcopy(model).double(), ids)
    model.bfloat16()
    eager_error = (logits(model, ids).double() - exact).abs().max()
    ck.replace(model)
    error = (logits(model, ids).double() - exact).abs().max()
    assert error <= 2 * eager_error + 1e-6 * exact.abs().max()


@pytest.mark.parametrize("cast", ["to_bf16", "half", "double"])
def test_casting_after_replace(cast):
    model, eager = make(), make()
    ck.replace(model)
    for m in (model, eager):
        m.to(torch.bfloat16) if cast == "to_bf16" else getattr(m, cast)()
    a, b = logits(model, tokens()), logits(eager, tokens())
    assert a.dtype == b.dtype
    tol = {"to_bf16": 0.06, "half": 0.01, "double": 1e-12}[cast]
    assert (a - b).abs().max() <= tol * b.abs().max()


def test_dtype_casts_the_model():
    model = make()
    replacement = ck.replace(model, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.transformer.wte.weight
    replacement.restore()  # classes go back, the cast stays
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_autocast_dtypes_and_values_follow_eager():
    model = make()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected = model(tokens(), output_hidden_states=True)
        ck.replace(model)
        out = model(tokens(), output_hidden_states=True)
    for a, b in zip(out.hidden_states, expected.hidden_states, strict=True):
        assert a.dtype == b.dtype
        assert (a.float() - b.float()).abs().max() <= 0.05 * b.abs().max()
    assert out.logits.dtype == expected.logits.dtype


def test_empty_batch():
    model = make()
    ck.replace(model)
    assert logits(model, torch.zeros(0, 5, dtype=torch.long)).shape == (0, 5, V)


def test_meta_device():
    model = make(pad_token_id=None, attn_implementation="eager").to("meta")
    ck.replace(model)
    ids = torch.zeros(2, 5, dtype=torch.long, device="meta")
    assert logits(model, ids, attention_mask=torch.ones_like(ids)).shape == (2, 5, V)


# ---- generate ------------------------------------------------------------------------------------

GENERATE = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "no cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", GENERATE)
def test_generate_gives_eagers_tokens(kind, implementation):
    model = make(attn_implementation=implementation)
    ids, mask = left_padded()

    def run():
        torch.manual_seed(5)
        return model.generate(ids, attention_mask=mask, max_new_tokens=24, **GENERATE[kind])

    expected = run()
    with ck.replace(model):
        assert torch.equal(run(), expected)
    assert len(expected[:, 9:].unique()) > 5, "degenerate text proves little"


def test_prompt_continues_a_cache():
    model = make()
    ids = tokens()
    expected = logits(model, ids)
    ck.replace(model)
    with torch.no_grad():
        first = model(ids[:, :4], use_cache=True)
        then = model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    close(torch.cat([first.logits, then.logits], 1), expected)


def test_static_cache():
    model = make()
    ids = tokens()
    expected = logits(model, ids)
    ck.replace(model)
    cache = StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        first = model(ids[:, :8], past_key_values=cache, use_cache=True).logits
        last = model(ids[:, 8:], past_key_values=cache, use_cache=True).logits
    close(torch.cat([first, last], 1), expected)


# ---- the module tree stays what it was -----------------------------------------------------------


def test_state_stays_the_same_objects():
    model = make()
    names = list(model.state_dict())
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    modules = dict(model.named_modules())
    ck.replace(model)
    assert list(model.state_dict()) == names
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert len(list(model.parameters())) == len(parameters)
    assert dict(model.named_buffers()).keys() == buffers.keys()
    assert all(m is modules[n] for n, m in model.named_modules())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert isinstance(model.transformer.h[0], GPT2Block)
    assert isinstance(model.transformer.h[0].attn, GPT2Attention)
    assert isinstance(model.transformer.h[0].mlp.c_fc, Conv1D)


def test_save_pretrained_round_trip(tmp_path):
    model = make()
    ck.replace(model)
    expected = logits(model, tokens())
    model.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert not any(isinstance(m, Replaced) for m in loaded.modules())
    assert loaded.state_dict().keys() == model.state_dict().keys()
    ck.replace(loaded)
    assert torch.equal(logits(loaded, tokens()), expected)


def test_load_state_dict_into_a_replaced_model():
    model, other = make(), make()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.9)
    ck.replace(model)
    model.load_state_dict(other.state_dict())
    close(logits(model, tokens()), logits(other, tokens()))


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_clones_stay_replaced_and_can_be_restored(clone):
    model = make()
    eager = logits(model, tokens())
    ck.replace(model, backend="eager")
    twin = clone(model)
    assert type(twin.transformer.h[0]) is hf_gpt2.FusedGPT2Block
    assert twin.transformer.h[0].kernel_backend == "eager"
    assert torch.equal(logits(twin, tokens()), logits(model, tokens()))
    ck.restore(twin)
    assert torch.equal(logits(twin, tokens()), eager)
    assert type(model.transformer.h[0]) is hf_gpt2.FusedGPT2Block


def test_restore_gives_bit_identical_outputs():
    model = make()
    expected = logits(model, tokens())
    replacement = ck.replace(model)
    replacement.restore()
    assert torch.equal(logits(model, tokens()), expected)
    assert not any(isinstance(m, Replaced) for m in model.modules())
    assert not any("kernel_backend" in m.__dict__ for m in model.modules())


def test_table_says_what_happened_to_every_module():
    model = make(activation_function="silu")
    table = ck.replace(model).table
    rows = {row.name: row for row in table}
    assert rows["transformer.h.0.mlp.c_fc"].replaced_by == "FusedConv1D"
    assert rows["transformer.h.0.mlp.c_fc"].cls == "Conv1D"
    assert "SiLU" in rows["transformer.h.1.mlp"].reason
    assert rows["transformer.wte"].replaced_by is None and rows["transformer.wte"].reason
    assert all(row.replaced_by or row.reason for row in table)
    names = {n for n, m in model.named_modules() if not isinstance(m, nn.ModuleList)}
    assert rows.keys() == names
    assert "transformer.h.*.attn.c_attn (x2)" in str(table)
