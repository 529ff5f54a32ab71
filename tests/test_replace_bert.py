"""Hugging Face BERT after `replace`: bidirectional attention, padding masks, decoders."""

import copy
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
)

import cgpt_kernels as ck
from cgpt_kernels.replace import hf_bert
from cgpt_kernels.replace.swap import Replaced

V = 97


def make(cls=BertForMaskedLM, **options):
    torch.manual_seed(0)
    config = {
        "num_hidden_layers": 2,
        "hidden_size": 48,
        "num_attention_heads": 3,
        "intermediate_size": 80,
        "vocab_size": V,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    return cls(BertConfig(**(config | options))).eval()


def padded(B=3, S=11):
    ids = torch.randint(2, V, (B, S), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(B, S, dtype=torch.long)
    mask[0, 7:], mask[1, 3:] = 0, 0
    return ids.masked_fill(mask == 0, 0), mask


def close(a, b, tol=2e-5):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= tol * max(1.0, b.abs().max())


@torch.no_grad()
def logits(model, *args, **kwargs):
    return model(*args, **kwargs)[0]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu", "silu"])
def test_padded_logits_equal_eager(act, implementation):
    model = make(hidden_act=act, attn_implementation=implementation)
    ids, mask = padded()
    full, expected = logits(model, ids), logits(model, ids, attention_mask=mask)
    ck.replace(model)
    close(logits(model, ids), full)
    close(logits(model, ids, attention_mask=mask), expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_fused_forward_runs(implementation, monkeypatch):
    # A keyword that transformers adds to its calls must not send every layer back to its original.
    model = make(attn_implementation=implementation)
    ids, mask = padded()
    ck.replace(model)
    ran = []
    heads = hf_bert._heads
    monkeypatch.setattr(hf_bert, "_heads", lambda *a: ran.append(a) or heads(*a))
    logits(model, ids, attention_mask=mask)
    assert len(ran) == model.config.num_hidden_layers


def test_padding_tokens_change_nothing():
    model = make()
    ck.replace(model)
    ids, mask = padded()
    expected = logits(model, ids, attention_mask=mask)
    other = torch.where(mask == 1, ids, 5)
    assert torch.equal(logits(model, other, attention_mask=mask)[mask == 1], expected[mask == 1])


@pytest.mark.parametrize("cls", [BertModel, BertForSequenceClassification])
def test_other_heads_equal_eager(cls):
    model = make(cls)
    ids, mask = padded()
    expected = logits(model, ids, attention_mask=mask)
    ck.replace(model)
    close(logits(model, ids, attention_mask=mask), expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_chunked_feed_forward(implementation):
    model = make(chunk_size_feed_forward=1, attn_implementation=implementation)
    ids, mask = padded()
    expected = logits(model, ids, attention_mask=mask)
    ck.replace(model)
    close(logits(model, ids, attention_mask=mask), expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_decoder_with_cache_equals_eager(implementation):
    model = make(BertLMHeadModel, is_decoder=True, attn_implementation=implementation)
    ids = padded()[0]
    expected = logits(model, ids)
    tokens = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    ck.replace(model)
    close(logits(model, ids), expected)
    assert torch.equal(
        model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0), tokens
    )


def test_cross_attention_equals_eager():
    model = make(BertLMHeadModel, is_decoder=True, add_cross_attention=True)
    args = {
        "encoder_hidden_states": torch.randn(3, 5, 48),
        "encoder_attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]),
    }
    ids = padded()[0]
    expected = logits(model, ids, **args)
    ck.replace(model)
    close(logits(model, ids, **args), expected)


def test_bf16_error_is_at_most_twice_eagers():
    model = make(hidden_size=96)
    ids, mask = padded(4, 33)
    exact = logits(copy.deepcopy(model).double(), ids, attention_mask=mask)
    model.bfloat16()
    eager_error = (logits(model, ids, attention_mask=mask).double() - exact).abs().max()
    ck.replace(model)
    error = (logits(model, ids, attention_mask=mask).double() - exact).abs().max()
    assert error <= 2 * eager_error + 1e-6 * exact.abs().max()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_hooks_see_what_they_saw(implementation):
    model = make(attn_implementation=implementation)
    ids, mask = padded()
    seen = {}
    for name in ("", ".attention", ".attention.self", ".attention.output", ".intermediate"):
        for layer in range(2):
            module = model.get_submodule(f"bert.encoder.layer.{layer}{name}")
            module.register_forward_hook(
                lambda m, args, out: seen.update({m: out[0] if isinstance(out, tuple) else out})
            )
    expected = logits(model, ids, attention_mask=mask)
    before, seen = seen, {}
    ck.replace(model)
    close(logits(model, ids, attention_mask=mask), expected)
    assert seen.keys() == before.keys()
    for m, out in seen.items():
        close(out, before[m])


@pytest.mark.parametrize("name", ["dense", "LayerNorm", "dropout"])
def test_hooks_inside_a_fused_part_are_called(name):
    model = make()
    for part in ("attention.output", "output"):
        module = model.get_submodule(f"bert.encoder.layer.0.{part}.{name}")
        module.register_forward_hook(lambda m, args, out: out * 0.5)
    ids, mask = padded()
    expected = logits(model, ids, attention_mask=mask)
    ck.replace(model)
    close(logits(model, ids, attention_mask=mask), expected)


def test_output_capture():
    model = make(attn_implementation="eager")
    ids, mask = padded()
    args = {"attention_mask": mask, "output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        expected = model(ids, **args)
        ck.replace(model)
        out = model(ids, **args)
    for name in ("attentions", "hidden_states"):
        captured, wanted = getattr(out, name), getattr(expected, name)
        assert len(captured) == len(wanted) > 0
        for a, b in zip(captured, wanted, strict=True):
            close(a, b)


def test_state_clones_and_restore():
    model = make()
    ids, mask = padded()
    eager = logits(model, ids, attention_mask=mask)
    names, parameters = list(model.state_dict()), dict(model.named_parameters())
    replacement = ck.replace(model)
    assert list(model.state_dict()) == names
    assert all(p is parameters[n] for n, p in model.named_parameters())
    decoder = model.cls.predictions.decoder
    assert decoder.weight is model.bert.embeddings.word_embeddings.weight
    ours = logits(model, ids, attention_mask=mask)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.bert.encoder.layer[0]) is hf_bert.FusedBertLayer
        assert torch.equal(logits(twin, ids, attention_mask=mask), ours)
    replacement.restore()
    assert torch.equal(logits(model, ids, attention_mask=mask), eager)
    assert not any(isinstance(m, Replaced) for m in model.modules())


def test_empty_batch():
    model = make()
    ck.replace(model)
    assert logits(model, torch.zeros(0, 5, dtype=torch.long)).shape == (0, 5, V)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_loss_and_gradients_equal_eager(checkpointing, implementation):
    model = make(
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation=implementation,
    ).train()
    ids, mask = padded()
    labels = ids.masked_fill(mask == 0, -100)

    def gradients():
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}

    loss, grads = gradients()
    ck.replace(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    replaced_loss, replaced_grads = gradients()
    close(replaced_loss, loss)
    for name, g in grads.items():
        close(replaced_grads[name], g, 1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dropout_statistics_follow_eager(implementation):
    model = make(attn_implementation=implementation, hidden_dropout_prob=0.2)
    layer = model.bert.encoder.layer[0].train()
    x = torch.randn(1, 6, 48).expand(3000, 6, 48)
    with torch.no_grad():
        eager = layer(x)
        ck.replace(model)
        ours = layer(x)
    spread = eager.std(0)
    error = (ours.mean(0) - eager.mean(0)).abs() / (spread * (2 / 3000) ** 0.5 + 1e-9)
    assert error.max() < 6, "the means differ by more than six standard errors"
    assert ((ours.std(0) - spread).abs() <= 0.15 * spread + 1e-4).all()


@pytest.mark.parametrize("order", ["replace then lora", "lora then replace"])
def test_lora(order):
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def lora(model):
        torch.manual_seed(3)
        targets = ["query", "value", "output.dense"]
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        return peft.get_peft_model(model, config).eval()

    ids, mask = padded()
    expected = logits(lora(make()), ids, attention_mask=mask)
    model = make()
    if order == "replace then lora":
        ck.replace(model)
        model = lora(model)
    else:
        model = lora(model)
        ck.replace(model)
    close(logits(model, ids, attention_mask=mask), expected)
    close(logits(model.merge_and_unload(), ids, attention_mask=mask), expected, 1e-4)


def test_dynamic_quantization_of_others_is_left_alone():
    """torch.ao swaps nn.Linear for its own class: the fused parts call that module."""
    model = make()
    dense = model.bert.encoder.layer[0].output.dense

    class Quantized(nn.Linear):
        def forward(self, x):
            return super().forward(x).mul(4).round().div(4)

    dense.__class__ = Quantized
    ids, mask = padded()
    expected = logits(model, ids, attention_mask=mask)
    row = next(r for r in ck.replace(model).table if r.name.endswith("layer.0.output.dense"))
    assert row.replaced_by is None and "subclass of Linear" in row.reason
    close(logits(model, ids, attention_mask=mask), expected)


def test_compile_fullgraph():
    model = make()
    ids, mask = padded()
    expected = logits(model, ids, attention_mask=mask)
    ck.replace(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(logits(compiled, ids, attention_mask=mask), expected)
