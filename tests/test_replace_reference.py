"""The reference GPT after `replace`: logits, KV cache, muP, gradients, state."""

import copy
import pickle

import pytest
import torch

import cgpt_kernels as ck
from cgpt_kernels.replace import reference_gpt
from cgpt_kernels.replace.swap import Replaced

V = 97


def make(**options):
    torch.manual_seed(0)
    config = {
        "vocab_size": V,
        "n_positions": 64,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 3,
        "initializer_range": 0.3,
    }
    return ck.GPT(ck.GPTConfig(**(config | options))).eval()


def tokens(B=2, S=9):
    return torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(1))


def close(a, b, tol=2e-5):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= tol * max(1.0, b.abs().max())


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_function": "gelu_new"},
        {"activation_function": "relu"},
        {"n_inner": 80, "layer_norm_epsilon": 0.1},
        {"mup_scale_qk_dot_by_d": True, "mup_embeddings_scale": 10.0, "mup_width_scale": 0.3},
    ],
    ids=lambda o: ",".join(o) or "defaults",
)
def test_logits_equal_eager(options):
    model, ids = make(**options), tokens()
    mask = torch.ones(2, 9)
    mask[0, :4] = 0
    plain, padded = logits(model, ids), logits(model, ids, attention_mask=mask)
    ck.replace(model)
    close(logits(model, ids), plain)
    close(logits(model, ids, attention_mask=mask)[mask == 1], padded[mask == 1])


def test_cache_in_uneven_steps():
    model, ids = make(), tokens()
    expected = logits(model, ids)
    ck.replace(model)
    cache = model.new_cache(2, 9)
    steps = [logits(model, ids[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 8), (8, 9))]
    close(torch.cat(steps, 1), expected)


def test_bf16_error_is_at_most_twice_eagers():
    model, ids = make(n_embd=96), tokens(2, 33)
    exact = logits(copy.deepcopy(model).double(), ids)
    model.bfloat16()
    eager_error = (logits(model, ids).double() - exact).abs().max()
    ck.replace(model)
    error = (logits(model, ids).double() - exact).abs().max()
    assert error <= 2 * eager_error + 1e-6 * exact.abs().max()


def test_loss_and_gradients_equal_eager():
    model, ids = make().train(), tokens()

    def gradients():
        model.zero_grad()
        loss = model(ids, targets=ids)
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}

    loss, grads = gradients()
    ck.replace(model)
    replaced_loss, replaced_grads = gradients()
    close(replaced_loss, loss)
    for name, g in grads.items():
        close(replaced_grads[name], g, 1e-4)


def train(model, backend):
    """Loss and gradients of one training step after `replace`, dropout drawn from seed 5."""
    ck.replace(model, backend=backend)
    torch.manual_seed(5)
    loss = model(tokens(), targets=tokens())
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def test_dropout_in_training_is_the_references_mask_for_mask():
    model = make(embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.3).train()
    loss, grads = train(copy.deepcopy(model), "eager")
    ours, our_grads = train(model, "cpu")
    close(ours, loss)
    for name, g in grads.items():
        close(our_grads[name], g, 1e-4)
    assert (model(tokens(), targets=tokens()) - ours).abs() > 1e-4, "the next masks are other ones"


def test_dropout_statistics_follow_eager():
    block = make(n_layer=1, attn_pdrop=0.3, resid_pdrop=0.2).train().transformer.h[0]
    x = torch.randn(1, 6, 48).expand(3000, 6, 48)
    with torch.no_grad():
        eager = block(x, None, None)
        ck.replace(block)
        ours = block(x, None, None)
    spread = eager.std(0)
    error = (ours.mean(0) - eager.mean(0)).abs() / (spread * (2 / 3000) ** 0.5 + 1e-9)
    assert error.max() < 6, "the means differ by more than six standard errors"
    assert ((ours.std(0) - spread).abs() <= 0.15 * spread + 1e-4).all()


def test_generate_hears_dropout_in_training():
    model = make(resid_pdrop=0.5)
    ck.replace(model)
    assert reference_gpt.decoder_parts(model) is not None
    model.train()
    assert reference_gpt.decoder_parts(model) is None


def test_state_checkpoint_clones_and_restore(tmp_path):
    model, ids = make(), tokens()
    eager = logits(model, ids)
    names, parameters = list(model.state_dict()), dict(model.named_parameters())
    replacement = ck.replace(model)
    assert list(model.state_dict()) == names
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert model.lm_head.weight is model.transformer["wte"].weight
    ours = logits(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.transformer["h"][0]) is reference_gpt.FusedBlock
        assert torch.equal(logits(twin, ids), ours)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(ck.GPT.from_pretrained(tmp_path), ids), eager)
    replacement.restore()
    assert torch.equal(logits(model, ids), eager)
    assert not any(isinstance(m, Replaced) for m in model.modules())


@pytest.mark.parametrize(
    "name", ["attn", "attn.c_attn", "attn.c_proj", "ln_2", "mlp", "mlp.c_fc", "mlp.c_proj"]
)
def test_hooks_may_change_outputs(name):
    model, ids = make(), tokens()
    module = model.transformer["h"][1].get_submodule(name)
    module.register_forward_hook(lambda m, args, out: out * 0.5)
    expected = logits(model, ids)
    ck.replace(model)
    close(logits(model, ids), expected)


def test_autocast_follows_eager():
    model, ids = make(), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = logits(model, ids)
        ck.replace(model)
        out = logits(model, ids)
    assert out.dtype == expected.dtype
    assert (out.float() - expected.float()).abs().max() <= 0.05 * expected.abs().max()


def test_every_compute_module_is_replaced():
    table = ck.replace(make()).table
    assert {row.cls for row in table.left_alone} == {"Embedding"}


def test_compile_fullgraph():
    model, ids = make(), tokens()
    expected = logits(model, ids)
    ck.replace(model)
    torch._dynamo.reset()
    close(logits(torch.compile(model, fullgraph=True, backend="aot_eager"), ids), expected)
