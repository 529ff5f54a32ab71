"""Hugging Face GPT-2 after `replace`: the same tokens, state, gradients and habits as before.

B batch, S tokens, V vocabulary.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Model
from transformers.cache_utils import StaticCache
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Block
from transformers.pytorch_utils import Conv1D

import cgpt_kernels as ck
from cgpt_kernels.replace import hf_gpt2
from cgpt_kernels.replace.swap import Replaced

V = 97  # odd, as GPT-2's own vocabulary


def make(cls=GPT2LMHeadModel, **options):
    """A small model whose outputs differ enough between positions for wrong masks to show."""
    torch.manual_seed(0)
    config = {
        "n_layer": 2,
        "n_embd": 48,
        "n_head": 3,
        "vocab_size": V,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    }
    return cls(GPT2Config(**(config | options))).eval()


def tokens(B=2, S=9):
    return torch.randint(2, V, (B, S), generator=torch.Generator().manual_seed(1))


def left_padded(B=2, S=9, padding=4):
    ids, mask = tokens(B, S), torch.ones(B, S, dtype=torch.long)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return ids, mask


def close(a, b, tol=2e-5):
    """Equal to fp32 rounding: relative to the larger tensor's scale."""
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= tol * max(1.0, b.abs().max())


@torch.no_grad()
def logits(model, *args, **kwargs):
    return model(*args, **kwargs).logits


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
