"""What users do to a Hugging Face GPT-2 goes on after `replace`: hooks, LoRA, training, compile."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")
from small_gpt2 import V, close, left_padded, logits, make, tokens

import cgpt_kernels as ck
from cgpt_kernels.replace.swap import Replaced

# ---- hooks, wrappers and others' modules ---------------------------------------------------------

HOOKED = ["", ".ln_1", ".attn", ".attn.c_attn", ".attn.c_proj", ".attn.resid_dropout", ".ln_2"]
HOOKED += [".mlp", ".mlp.c_fc", ".mlp.act", ".mlp.c_proj", ".mlp.dropout"]


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_see_what_they_saw(name):
    model = make()
    module = model.get_submodule("transformer.h.1" + name)
    seen = []
    module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    module.register_forward_hook(lambda m, args, out: seen.append(out))
    expected = logits(model, tokens())
    before, seen[:] = list(seen), []
    ck.replace(model)
    close(logits(model, tokens()), expected)
    assert len(seen) == len(before) == 2
    for a, b in zip(seen, before, strict=True):
        close(a[0], b[0]) if isinstance(a, tuple) else close(a, b)


def test_hooks_may_change_outputs():
    model = make()
    for name in ("attn.c_proj", "mlp.c_fc", "ln_2"):
        module = model.get_submodule(f"transformer.h.0.{name}")
        module.register_forward_hook(lambda m, args, out: out * 0.5)
    expected = logits(model, tokens())
    ck.replace(model)
    close(logits(model, tokens()), expected)


def test_global_hooks_see_every_module():
    model = make()
    seen = set()
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, o: seen.add(m))
    try:
        logits(model, tokens())
        expected, seen = seen, set()
        ck.replace(model)
        logits(model, tokens())
    finally:
        handle.remove()
    assert seen == expected and model.transformer.h[1].mlp.c_fc in seen


def test_output_capture():
    model = make(attn_implementation="eager")
    args = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        expected = model(tokens(), **args)
        ck.replace(model)
        out = model(tokens(), **args)
        again = model(tokens())
    for name in ("attentions", "hidden_states"):
        captured, wanted = getattr(out, name), getattr(expected, name)
        assert len(captured) == len(wanted) > 0
        for a, b in zip(captured, wanted, strict=True):
            close(a, b)
    close(again.logits, expected.logits)


def test_a_bool_mask_under_eager_attention_does_what_it_did():
    """The "eager" implementation adds any mask of 4 dimensions, 1 where a bool one is True."""
    model = make(attn_implementation="eager")
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    expected = logits(model, tokens(), attention_mask=mask)
    ck.replace(model)
    close(logits(model, tokens(), attention_mask=mask), expected)


def test_a_patched_forward_is_left_alone():
    model = make()
    fc = model.transformer.h[0].mlp.c_fc
    original = fc.forward
    fc.forward = lambda x: original(x) + 1.0  # as accelerate wraps modules
    expected = logits(model, tokens())
    row = next(r for r in ck.replace(model).table if r.name.endswith("h.0.mlp.c_fc"))
    assert row.replaced_by is None and "patched" in row.reason
    close(logits(model, tokens()), expected)


def test_a_forward_patched_after_replace_is_called():
    model = make()
    ck.replace(model)
    fc = model.transformer.h[0].mlp.c_fc
    before = logits(model, tokens())
    original = fc.forward
    fc.forward = lambda x: original(x) + 1.0
    assert not torch.allclose(logits(model, tokens()), before)


def lora(model):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(
        r=4,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        init_lora_weights=False,  # random, so that the adapter changes the outputs
    )
    torch.manual_seed(3)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("order", ["replace then lora", "lora then replace"])
def test_lora(order):
    eager = lora(make()).eval()
    expected = logits(eager, tokens())
    assert not torch.allclose(expected, logits(make(), tokens()))
    model = make()
    if order == "replace then lora":
        ck.replace(model)
        model = lora(model).eval()
    else:
        model = lora(model).eval()
        ck.replace(model)
    assert list(model.state_dict()) == list(eager.state_dict())
    close(logits(model, tokens()), expected)

    model.train(), eager.train()
    eager.base_model.model.config.use_cache = model.base_model.model.config.use_cache = False
    for m in (model, eager):
        for module in m.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        m(tokens(), labels=tokens()).loss.backward()
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            close(p.grad, q.grad, 1e-4)

    merged = model.eval().merge_and_unload()
    assert any(isinstance(m, Replaced) for m in merged.modules())
    close(logits(merged, tokens()), expected, 1e-4)
    ck.restore(merged)
    assert not any(isinstance(m, Replaced) for m in merged.modules())
    close(logits(merged, tokens()), expected, 1e-4)


# ---- training ------------------------------------------------------------------------------------


def gradients(model, **options):
    model.zero_grad()
    ids, mask = left_padded(3, 12)
    labels = ids.masked_fill(mask == 0, -100)
    loss = model(ids, attention_mask=mask, labels=labels, **options).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    "checkpointing", [None, False, True], ids=["off", "non-reentrant", "reentrant"]
)
def test_loss_and_gradients_equal_eager(checkpointing):
    model = make(resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0).train()
    loss, grads = gradients(model)
    ck.replace(model)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    replaced_loss, replaced_grads = gradients(model, use_cache=False)
    close(replaced_loss, loss)
    for name, g in grads.items():
        close(replaced_grads[name], g, 1e-4)


def test_dropout_acts_in_training_only():
    model = make(n_layer=1, attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0)
    ck.replace(model)
    expected = logits(model, tokens())
    assert torch.equal(logits(model, tokens()), expected)
    model.train()
    torch.manual_seed(7)
    first = logits(model, tokens())
    assert not torch.allclose(first, logits(model, tokens()))
    torch.manual_seed(7)
    assert torch.equal(logits(model, tokens()), first), "torch.manual_seed must govern dropout"


def test_dropout_statistics_follow_eager():
    """Mean and spread over many draws of one block's output, attention and residual dropout on."""
    model = make(n_layer=1, attn_pdrop=0.3, resid_pdrop=0.2)
    block = model.transformer.h[0].train()
    x = torch.randn(1, 6, 48).expand(3000, 6, 48)
    keep = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    with torch.no_grad():
        eager = block(x, attention_mask=keep)
        ck.replace(model)
        ours = block(x, attention_mask=keep)
    spread = eager.std(0)
    error = (ours.mean(0) - eager.mean(0)).abs() / (spread * (2 / 3000) ** 0.5 + 1e-9)
    assert error.max() < 6, "the means differ by more than six standard errors"
    assert ((ours.std(0) - spread).abs() <= 0.15 * spread + 1e-4).all()


def test_residual_dropout_in_training_is_the_references_mask_for_mask():
    found = []
    for backend in ("eager", "cpu"):
        model = make(attn_pdrop=0.2, resid_pdrop=0.3, embd_pdrop=0.1).train()
        ck.replace(model, backend=backend)
        torch.manual_seed(11)
        found.append(gradients(model, use_cache=False))
    (loss, grads), (ours, our_grads) = found
    close(ours, loss)
    for name, g in grads.items():
        close(our_grads[name], g, 1e-4)


def test_quantized_weights_leave_dropout_to_torch():
    model = make(n_layer=1, attn_pdrop=0.0, resid_pdrop=0.3, embd_pdrop=0.0).train()
    ck.replace(model, quantize="int8")
    torch.manual_seed(7)
    first = logits(model, tokens())
    assert not torch.allclose(first, logits(model, tokens()))


def test_checkpointed_dropout_repeats_its_mask():
    model = make(n_layer=1, attn_pdrop=0.4, resid_pdrop=0.3, embd_pdrop=0.0).train()
    ck.replace(model)
    torch.manual_seed(11)
    loss, grads = gradients(model, use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(11)
    again, recomputed = gradients(model, use_cache=False)
    assert torch.equal(loss, again)
    for name, g in grads.items():
        close(recomputed[name], g, 1e-5)


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_compile_fullgraph(implementation):
    model = make(attn_implementation=implementation)
    ids, mask = left_padded()
    expected = logits(model, ids, attention_mask=mask)
    ck.replace(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = logits(compiled, ids, attention_mask=mask, use_cache=False)
    close(out[mask == 1], expected[mask == 1])


def test_compile_fullgraph_training():
    model = make(n_layer=1, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0).train()
    ids, target = tokens(), torch.randn(2, 9, V)
    (model(ids, use_cache=False).logits * target).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    ck.replace(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    (compiled(ids, use_cache=False).logits * target).sum().backward()
    for name, p in model.named_parameters():
        close(p.grad, expected[name], 1e-4)
