"""peft's LoRA on a replaced model: the same numbers as peft's own forward, in one gemm."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")
import peft
from peft.tuners.lora.layer import Linear as LoraLinear
from small_gpt2 import close, left_padded, logits, make, tokens
from transformers import BertConfig, BertForSequenceClassification

import cgpt_kernels as ck
from cgpt_kernels.decoder import Decoder
from cgpt_kernels.replace import decoder_parts
from cgpt_kernels.replace.swap import Replaced, lora_factors
from cgpt_kernels.testing import FORWARD_FACTOR, GRADIENT_FACTOR, SLACK

ORDERS = ["replace then lora", "lora then replace"]


def config(**options):
    given = {
        "r": 4,
        "lora_alpha": 6,  # a scale of 1.5
        "target_modules": ["c_attn", "c_proj", "c_fc"],
        "fan_in_fan_out": True,
        "init_lora_weights": False,  # random, so that the adapter changes the outputs
    }
    return peft.LoraConfig(**(given | options))


def adapted(model=None, seed=3, **options):
    """The small GPT-2 under a LoRA adapter; weights depend on the seed only."""
    model = model or make()
    torch.manual_seed(seed)
    return peft.get_peft_model(model, config(**options)).eval()


def pair(order=ORDERS[1], **options):
    """(eager, replaced) with equal weights."""
    eager = adapted(**options)
    if order == ORDERS[0]:
        model = make()
        ck.replace(model)
        return eager, adapted(model, **options)
    model = copy.deepcopy(eager)
    ck.replace(model)
    return eager, model


@pytest.fixture
def fused_only(monkeypatch):
    """peft's own forward fails the test: call it on when eager has run."""

    def forbid():
        def refuse(self, *args, **kwargs):
            raise AssertionError("peft's forward ran")

        monkeypatch.setattr(LoraLinear, "forward", refuse)

    return forbid


@pytest.mark.parametrize("order", ORDERS)
def test_both_orders_are_fused(order, fused_only):
    eager, model = pair(order)
    expected = logits(eager, tokens())
    assert not torch.allclose(expected, logits(make(), tokens()))
    assert list(model.state_dict()) == list(eager.state_dict())
    fused_only()
    close(logits(model, tokens()), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"lora_bias": True},
        {"rank_pattern": {"c_fc": 7}, "alpha_pattern": {"c_attn": 1}},
        {"target_modules": ["c_attn"], "layers_to_transform": [1]},
    ],
    ids=lambda o: next(iter(o)),
)
@pytest.mark.parametrize("order", ORDERS)
def test_configurations_are_fused(order, options, fused_only):
    eager, model = pair(order, **options)
    for m in (eager, model):
        for name, p in m.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                nn.init.normal_(p, generator=torch.Generator().manual_seed(len(name)))
    expected = logits(eager, tokens())
    fused_only()
    close(logits(model, tokens()), expected)


def both_adapters(model):
    for seed, name in enumerate(("b", "c")):
        torch.manual_seed(seed)
        model.add_adapter(name, config(r=2 + seed, lora_alpha=5))
    return model.eval()


@pytest.mark.parametrize("order", ORDERS)
def test_adapters_switch_add_up_and_switch_off(order, fused_only):
    eager, model = (both_adapters(m) for m in pair(order))
    states = [["default"], ["b"], ["b", "c"], ["default", "b", "c"]]
    expected = []
    for m in states:
        eager.base_model.set_adapter(m)
        expected.append(logits(eager, tokens()))
    with eager.disable_adapter():
        without = logits(eager, tokens())
    fused_only()
    for m, wanted in zip(states, expected, strict=True):
        model.base_model.set_adapter(m)
        close(logits(model, tokens()), wanted)
    with model.disable_adapter():
        close(logits(model, tokens()), without)
    close(logits(model, tokens()), expected[-1])


def test_a_scale_set_later_counts(fused_only):
    eager, model = pair()
    for m in (eager, model):
        for layer in m.modules():
            if isinstance(layer, LoraLinear):
                layer.set_scale("default", 0.25)
    expected = logits(eager, tokens())
    fused_only()
    close(logits(model, tokens()), expected)


@pytest.mark.parametrize("order", ORDERS)
def test_merged_states(order):
    eager, model = pair(order)
    expected = logits(eager, tokens())
    with eager.disable_adapter():
        without = logits(eager, tokens())
    logits(model, tokens())  # packed copies are made before the merge
    model.merge_adapter()
    close(logits(model, tokens()), expected, 1e-4)
    with model.disable_adapter():  # peft unmerges here
        close(logits(model, tokens()), without, 1e-4)
    close(logits(model, tokens()), expected, 1e-4)
    merged = model.merge_and_unload()
    assert not any(isinstance(m, LoraLinear) for m in merged.modules())
    close(logits(merged, tokens()), expected, 1e-4)


def test_a_batch_that_mixes_adapters_runs_pefts_forward():
    eager, model = (both_adapters(m) for m in pair())
    names = ["b", "__base__"]
    with torch.no_grad():
        expected = eager(tokens(), adapter_names=names).logits
        close(model(tokens(), adapter_names=names).logits, expected)


def test_dora_is_left_alone_with_a_reason():
    eager, model = pair(use_dora=True)
    close(logits(model, tokens()), logits(eager, tokens()))
    rows = [r for r in ck.replace(model).table if r.cls == "Linear" and "lora" not in r.name]
    reasons = {r.reason for r in rows if r.replaced_by is None}
    assert any("Dora" in reason and "peft's forward" in reason for reason in reasons), reasons


def test_hooks_on_a_lora_layer_are_called():
    eager, model = pair()
    for m in (eager, model):
        layer = m.base_model.model.transformer.h[0].mlp.c_fc
        layer.register_forward_hook(lambda m, args, out: out * 0.5)
        layer.lora_A["default"].register_forward_hook(lambda m, args, out: out + 1.0)
    close(logits(model, tokens()), logits(eager, tokens()))


def test_hooks_on_the_base_layer_are_called():
    eager, model = pair()
    for m in (eager, model):
        base = m.base_model.model.transformer.h[0].attn.c_proj.base_layer
        base.register_forward_hook(lambda m, args, out: out * 0.5)
    close(logits(model, tokens()), logits(eager, tokens()))


# ---- training ------------------------------------------------------------------------------------


def gradients(model, seed=5):
    model.train()
    model.zero_grad()
    ids, mask = left_padded(3, 12)
    labels = ids.masked_fill(mask == 0, -100)
    torch.manual_seed(seed)
    loss = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


NO_DROPOUT = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}


@pytest.mark.parametrize("lora_dropout", [0.0, 0.4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_eagers_with_pefts_own_dropout_masks(lora_dropout, checkpointing, fused_only):
    eager = adapted(make(**NO_DROPOUT), lora_dropout=lora_dropout)
    model = copy.deepcopy(eager)
    loss, expected = gradients(eager)
    assert all("lora" in name for name in expected) and len(expected) == 16
    ck.replace(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    fused_only()
    found, grads = gradients(model)
    close(found, loss)
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        close(grads[name], grad, 1e-4)


def test_two_adapters_train_at_once():
    eager = adapted(make(**NO_DROPOUT))
    torch.manual_seed(0)
    eager.add_adapter("b", config(r=2))
    eager.base_model.set_adapter(["default", "b"])
    model = copy.deepcopy(eager)
    ck.replace(model)
    loss, expected = gradients(eager)
    found, grads = gradients(model)
    close(found, loss)
    assert any(".b." in name for name in grads) and grads.keys() == expected.keys()
    for name, grad in expected.items():
        close(grads[name], grad, 1e-4)


@pytest.mark.parametrize("narrow_adapters", [False, True], ids=["fp32 adapters", "bf16 adapters"])
def test_bf16_holds_the_numerics_rule(narrow_adapters):
    """Outputs and gradients against fp64, at most 2 and 3 times eager's error."""
    model = make(**NO_DROPOUT).bfloat16()
    torch.manual_seed(3)
    eager = peft.get_peft_model(model, config(), autocast_adapter_dtype=not narrow_adapters)
    kinds = {p.dtype for n, p in eager.named_parameters() if "lora_" in n}
    assert kinds == {torch.bfloat16 if narrow_adapters else torch.float32}
    truth, ours = copy.deepcopy(eager).double(), copy.deepcopy(eager)
    ck.replace(ours)
    exact, plain, found = (logits(m.eval(), tokens()).double() for m in (truth, eager, ours))
    error, allowed = (found - exact).abs().max(), (plain - exact).abs().max()
    assert error <= FORWARD_FACTOR * allowed + SLACK * exact.abs().max()
    exact, plain, found = (gradients(m)[1] for m in (truth, eager, ours))
    worst = max(
        (found[n].double() - exact[n]).abs().max() / (plain[n].double() - exact[n]).abs().max()
        for n in exact
    )
    assert worst <= GRADIENT_FACTOR


def test_autocast_trains():
    eager = adapted(make(**NO_DROPOUT))
    model = copy.deepcopy(eager)
    ck.replace(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, expected = gradients(eager)
        found, grads = gradients(model)
    close(found, loss, 2e-2)
    for name, grad in expected.items():
        assert grads[name].dtype is torch.float32
        assert torch.nn.functional.cosine_similarity(grads[name].ravel(), grad.ravel(), 0) > 0.99


def test_compile_fullgraph():
    eager, model = pair()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(logits(compiled, tokens(), use_cache=False), logits(eager, tokens()))


# ---- around it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_generation_uses_the_decoder_and_writes_eagers_tokens(order):
    eager, model = (both_adapters(m) for m in pair(order))
    ids, mask = left_padded(3, 12)
    for m in (["default"], ["b", "c"]):
        eager.base_model.set_adapter(m), model.base_model.set_adapter(m)
        wanted = ck.generate(eager, ids, 12, attention_mask=mask)
        assert decoder_parts(model) is not None
        assert torch.equal(ck.generate(model, ids, 12, attention_mask=mask), wanted)
    with eager.disable_adapter(), model.disable_adapter():
        assert torch.equal(ck.generate(model, ids, 12), ck.generate(eager, ids, 12))


@pytest.mark.parametrize("narrow_adapters", [False, True], ids=["fp32 adapters", "bf16 adapters"])
def test_the_decoder_holds_the_numerics_rule_in_bf16(narrow_adapters):
    eager = make().bfloat16()
    torch.manual_seed(3)
    eager = peft.get_peft_model(eager, config(), autocast_adapter_dtype=not narrow_adapters).eval()
    truth, model = copy.deepcopy(eager).double(), copy.deepcopy(eager)
    ck.replace(model)
    ids = tokens(2, 20)
    decoder = Decoder(decoder_parts(model), 2, 20)
    for part in (ids[:, :18], ids[:, 18:19], ids[:, 19:]):
        found = decoder.step(part).double()
    exact, plain = (logits(m, ids)[:, -1].double() for m in (truth, eager))
    allowed = FORWARD_FACTOR * (plain - exact).abs().max() + SLACK * exact.abs().max()
    assert (found - exact).abs().max() <= allowed


def test_generation_leaves_the_decoder_where_modules_must_be_heard():
    _, model = pair(lora_dropout=0.3)
    assert decoder_parts(model) is not None
    assert decoder_parts(model.train()) is None
    _, dora = pair(use_dora=True)
    assert decoder_parts(dora) is None
    _, hooked = pair()
    hooked.base_model.model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *a: None)
    assert decoder_parts(hooked) is None


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_adapters_on_quantized_weights(quantize, fused_only):
    """The adapter's part stays in float: the change it makes is eager's."""
    eager, model = adapted(), adapted()
    ck.replace(model, quantize=quantize)
    base = logits(eager, tokens())
    fused_only()
    found = logits(model, tokens())
    spread = (found - base).std() / base.std()
    assert spread < (0.05 if quantize == "int8" else 0.5)
    ids = tokens()
    assert ck.generate(model, ids, 5).shape == (2, 14)


@pytest.mark.parametrize(
    "options", [{"quantize": "int8"}, {"quantize": "int4"}, {"keep_original": False}]
)
def test_factors_are_not_packed(options, fused_only):
    model, same = adapted(), adapted()
    wanted = logits(model, tokens())
    base = ck.replace(make(), **options).table
    replacement = ck.replace(model, **options)
    fused_only()
    assert replacement.table.packed == base.packed > 0
    assert not [
        r for r in replacement.table if r.packed and ("lora_A" in r.name or "lora_B" in r.name)
    ]
    if "quantize" not in options:
        close(logits(model, tokens()), wanted)
    assert ck.generate(model, tokens(), 2).shape == (2, 11)
    assert replacement.table.packed == base.packed
    for name, p in peft.get_peft_model_state_dict(model).items():
        assert torch.equal(p, peft.get_peft_model_state_dict(same)[name])


def test_factors_of_any_dtype_stand_beside_quantized_weights():
    model = adapted(make().bfloat16())
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.double()
    ck.replace(model, quantize="int8")
    assert all(m.weight.dtype is torch.float64 for m in lora_factors(model))
    assert logits(model, tokens()).isfinite().all()


def test_adapters_whose_own_weights_were_given_up_run_in_pefts_forward():
    model = adapted()
    wanted = logits(model, tokens())
    ck.replace(model)
    for factor in lora_factors(model):
        ck.replace(factor, keep_original=False)
    close(logits(model, tokens()), wanted)
    assert ck.generate(model, tokens(), 2).shape == (2, 11)


def test_adapters_are_saved_and_loaded(tmp_path):
    eager, model = pair()
    model.save_pretrained(tmp_path)
    fresh = make()
    ck.replace(fresh)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    close(logits(loaded, tokens()), logits(eager, tokens()))


def test_restore_gives_pefts_classes_back():
    eager, model = pair()
    assert any(r.replaced_by == "FusedLoraLinear" for r in ck.replace(model).table)
    ck.restore(model)
    assert not any(isinstance(m, Replaced) for m in model.modules())
    assert torch.equal(logits(model, tokens()), logits(eager, tokens()))


def test_bert_and_plain_linears(fused_only):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    bert = BertForSequenceClassification(
        BertConfig(vocab_size=97, num_hidden_layers=2, num_labels=3, **sizes)
    )
    options = {"target_modules": ["query", "value", "dense"], "fan_in_fan_out": False}
    eager = adapted(bert, task_type="SEQ_CLS", **options)
    model = copy.deepcopy(eager)
    expected = logits(eager, tokens())
    ck.replace(model)
    fused_only()
    close(logits(model, tokens()), expected)
