"""Structured pruning of MLP neurons: smaller, and nearly as good."""

import pytest
import torch
from typer.testing import CliRunner

import cgpt_kernels as ck
from cgpt_kernels.assets import TINY
from cgpt_kernels.cli import app
from cgpt_kernels.prune import prune_mlp
from cgpt_kernels.train import loss_of

CONFIG = ck.GPTConfig(
    vocab_size=97, n_positions=64, n_embd=48, n_layer=2, n_head=3, initializer_range=0.2
)


def make(config=CONFIG):
    torch.manual_seed(0)
    model = ck.GPT(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.2)
    return model


def ids(n=500):
    return torch.randint(97, (n,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_neurons_that_do_nothing_or_never_change_go_first_and_cost_nothing():
    """Half of the neurons have no way out, or a constant value: the outputs stay."""
    model = make()
    inner = model.config.n_inner
    for block in model.transformer.h:
        idle = torch.randperm(inner)[: inner // 2]
        block.mlp.c_proj.weight[:, idle[: inner // 4]] = 0
        block.mlp.c_fc.weight[idle[inner // 4 :]] = 0  # its activation is that of its bias
    small, report = prune_mlp(model, 0.5, ids())
    assert (report.neurons, report.kept) == (192, 96)
    assert small.config.n_inner == 96
    x = ids(60)[None]
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-4)


def test_the_model_itself_is_left_as_it_was():
    model = make()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    small, report = prune_mlp(model, 0.3, ids())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    removed = report.neurons - report.kept
    assert report.parameters - report.kept_parameters == 2 * removed * (2 * 48 + 1)
    assert small.lm_head.weight is small.transformer.wte.weight


def test_a_replaced_model_is_pruned_too_and_the_result_can_be_replaced():
    model = make()
    expected, _ = prune_mlp(model, 0.5, ids())
    with ck.replace(model):
        found, _ = prune_mlp(model, 0.5, ids())
    for name, t in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], t, rtol=1e-4, atol=1e-5)
    x = ids(40)[None]
    with torch.no_grad():
        wanted = expected(x)
        ck.replace(expected)
        torch.testing.assert_close(expected(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("share", "text", "message"),
    [
        (0.0, ids(), "share must lie between 0 and 1, got 0.0"),
        (0.01, ids(), "removes none"),
        (0.5, ids(1), "at least 2 tokens, got 1"),
    ],
)
def test_what_cannot_be_pruned_is_named(share, text, message):
    with pytest.raises(ValueError, match=message):
        prune_mlp(make(), share, text)
    with pytest.raises(TypeError, match=r"cgpt_kernels\.GPT, got Linear"):
        prune_mlp(torch.nn.Linear(2, 2), 0.5, ids())


def test_the_shipped_model_loses_little_and_beats_random_pruning(tmp_path):
    found = CliRunner().invoke(
        app, ["prune", "--out", str(tmp_path / "small"), "--share", "0.17", "--tokens", "6000"]
    )
    assert found.exit_code == 0, found.output
    assert "768 -> 640 neurons" in found.output
    from cgpt_kernels import quantize
    from cgpt_kernels.train.data import read_tokenizer

    text = quantize.encode(TINY, read_tokenizer(TINY, "test"), quantize.held_out_text(8_000))
    model = ck.GPT.from_pretrained(TINY, dtype=torch.float32)
    small = ck.GPT.from_pretrained(tmp_path / "small", dtype=torch.float32)
    assert small.config.n_inner == 640
    before, after = loss_of(model, text), loss_of(small, text)
    assert after - before < 0.2

    keep = torch.randperm(768, generator=torch.Generator().manual_seed(0))[:640]
    state = small.state_dict()
    for layer, block in enumerate(model.transformer.h):
        name = f"transformer.h.{layer}.mlp."
        state[name + "c_fc.weight"] = block.mlp.c_fc.weight[keep]
        state[name + "c_fc.bias"] = block.mlp.c_fc.bias[keep]
        state[name + "c_proj.weight"] = block.mlp.c_proj.weight[:, keep]
        state[name + "c_proj.bias"] = block.mlp.c_proj.bias
    small.load_state_dict(state)
    assert loss_of(small, text) - before > 1.5 * (after - before)
