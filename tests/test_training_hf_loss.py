"""Labels given to a replaced GPT2LMHeadModel: its loss without logits, and logits once read."""

import copy
import dataclasses
import pickle

import pytest
import torch

import cgpt_kernels as ck
from cgpt_kernels import ops

pytest.importorskip("transformers", reason="transformers is not installed")
from small_gpt2 import close, make, tokens

NO_DROPOUT = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}


@pytest.fixture
def pair():
    eager = make(**NO_DROPOUT).train()
    ours = copy.deepcopy(eager)
    ck.replace(ours)
    return eager, ours


@pytest.fixture
def calls(monkeypatch):
    """The calls of ops.linear_cross_entropy."""
    seen, plain = [], ops.linear_cross_entropy
    monkeypatch.setattr(
        ops, "linear_cross_entropy", lambda *a, **k: seen.append(a) or plain(*a, **k)
    )
    return seen


def gradients_agree(ours, eager, tol=1e-4):
    for (name, p), q in zip(ours.named_parameters(), eager.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert p.grad.layout is torch.strided
            close(p.grad, q.grad, tol)


def ignored():
    labels = tokens(2, 12)
    labels[0, :5] = -100
    return labels


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_items_in_batch": torch.tensor(7)},
        {"num_items_in_batch": 7},
        {"ignore_index": 5, "labels": tokens(2, 12)},
        {"shift_labels": ignored()},
        {"attention_mask": torch.ones(2, 12, dtype=torch.long).tril(8)},
        {"token_type_ids": torch.ones(2, 12, dtype=torch.long)},
        {"output_hidden_states": True},
        {"use_cache": False},
    ],
    ids=lambda options: next(iter(options), "labels"),
)
def test_loss_and_gradients_are_eagers(options, pair, calls):
    eager, ours = pair
    options = {"labels": ignored()} | options
    losses = [model(tokens(2, 12), **options) for model in (eager, ours)]
    assert len(calls) == 1
    close(losses[1].loss, losses[0].loss)
    for out in losses:
        out.loss.backward()
    gradients_agree(ours, eager)
    assert list(losses[1].keys()) == list(losses[0].keys())
    close(losses[1].logits, losses[0].logits)


READERS = {
    "attribute": lambda out: out.logits,
    "key": lambda out: out["logits"],
    "number": lambda out: out[1],
    "slice": lambda out: out[:2][1],
    "get": lambda out: out.get("logits"),
    "tuple": lambda out: out.to_tuple()[1],
    "items": lambda out: dict(out.items())["logits"],
    "values": lambda out: list(out.values())[1],
    "dict": lambda out: dict(out)["logits"],
    "splat": lambda out: {**out}["logits"],
    "copy": lambda out: copy.copy(out).logits,
    "tree": lambda out: torch.utils._pytree.tree_flatten(out)[0][1],
    "replace": lambda out: dataclasses.replace(out, loss=None).logits,
}


@pytest.mark.parametrize("reader", READERS)
def test_logits_are_there_however_they_are_read(reader, pair):
    eager, ours = pair
    given = {"input_ids": tokens(), "labels": tokens(), "use_cache": False}
    out = ours(**given)
    assert "logits" in out and len(out) == 2
    close(READERS[reader](out), eager(**given).logits)
    assert out.logits is out["logits"], "made twice"


def test_a_pickled_output_holds_its_logits(pair):
    pair[1].requires_grad_(False)
    pair[1].lm_head.weight.requires_grad_(True)
    out = pair[1](tokens(), labels=tokens(), use_cache=False)
    out["loss"] = out.loss.detach()
    with torch.no_grad():
        again = pickle.loads(pickle.dumps(out))
    close(again.logits, pair[0](tokens()).logits.detach())


def test_the_head_is_called_only_when_logits_are_read(pair, monkeypatch):
    made, kind = [], type(pair[1].lm_head)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda head, x: made.append(1) or forward(head, x))
    out = pair[1](tokens(), labels=tokens())
    assert out.loss is out["loss"] is out[0] and not made
    out.logits, out.logits  # noqa: B018
    assert made == [1]


def test_a_second_term_of_the_loss_may_use_the_logits(pair):
    eager, ours = pair
    for model in pair:
        out = model(tokens(), labels=tokens())
        (out.loss + out.logits.logsumexp(-1).square().mean()).backward()
    gradients_agree(ours, eager)


def test_logits_read_after_the_weights_have_changed_are_refused(pair):
    ours = pair[1]
    for change in (lambda w: w.mul_(2), lambda w: w.data.mul_(2)):
        out = ours(tokens(), labels=tokens())
        with torch.no_grad():
            change(ours.lm_head.weight)
        with pytest.raises(RuntimeError, match=r"read outputs\.logits before"):
            out.logits  # noqa: B018
        assert out["loss"] is out.loss


def test_logits_read_outside_of_autocast_are_those_made_inside(pair):
    with torch.autocast("cpu", torch.bfloat16):
        out = pair[1](tokens(), labels=tokens())
        logits = pair[1](tokens()).logits
    assert out.logits.dtype == torch.bfloat16
    close(out.logits, logits, 2e-2)


@pytest.mark.parametrize(
    "why",
    ["no_grad", "hook on model", "hook on head", "return_dict", "custom loss", "kept"],
)
def test_the_original_forward_runs_where_it_would_be_missed(why, pair, calls):
    eager, ours = pair
    options, heard = {"labels": tokens()}, []
    if why == "hook on model":
        ours.register_forward_hook(lambda *_: None)
    if why == "hook on head":
        ours.lm_head.register_forward_hook(lambda *_: heard.append(1))
    if why == "return_dict":
        options["return_dict"] = False
    if why == "kept":
        options = {"logits_to_keep": 2, "labels": tokens()[:, -2:]}
    if why == "custom loss":
        for model in pair:
            model.loss_function = lambda logits, labels, **_: logits.sum() + labels.sum()
    with torch.set_grad_enabled(why != "no_grad"):
        found, expected = (model(tokens(), **options) for model in (ours, eager))
    assert type(found) is type(expected) and not calls
    assert bool(heard) == (why == "hook on head")
    close(found[0], expected[0], 1e-4)
    close(found[1], expected[1])


@pytest.mark.parametrize("why", ["tied", "untied", "head frozen", "embedding frozen", "all frozen"])
def test_tied_and_untied_weights_have_the_gradients_of_eager(why, pair):
    for model in pair:
        if why != "tied":
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        if why == "head frozen":
            model.lm_head.weight.requires_grad_(False)
        if why in ("embedding frozen", "all frozen"):
            model.transformer.wte.weight.requires_grad_(False)
        if why == "all frozen":
            model.lm_head.weight.requires_grad_(False)
        model(tokens(), labels=tokens()).loss.backward()
    gradients_agree(pair[1], pair[0])


def test_a_token_that_comes_often_loses_nothing_to_rounding(pair):
    """Its rows are added up in fp32 and rounded once."""
    eager, ours = pair
    ids = torch.full((2, 40), 3)
    model = copy.deepcopy(eager)
    model(ids, labels=ids).loss.backward()
    truth = model.transformer.wte.weight.grad
    for m in pair:
        m.to(torch.bfloat16)(ids, labels=ids).loss.backward()
    off, eagers = ((m.transformer.wte.weight.grad.float() - truth).norm() for m in (ours, eager))
    assert off <= 1.5 * eagers


def test_the_gradient_of_a_tied_weight_is_no_copy(pair):
    """Both parts lie in the loss's own matrix: as nodes of their own they took two more."""
    model = pair[1]
    made = []
    loss = model(tokens(), labels=tokens()).loss
    model.lm_head.weight.register_hook(lambda g: made.append(g.data_ptr()))
    loss.backward()
    assert model.lm_head.weight.grad.data_ptr() == made[0]


def test_a_saved_configuration_names_the_original_class(pair, tmp_path):
    pair[1].save_pretrained(tmp_path)
    assert '"GPT2LMHeadModel"' in (tmp_path / "config.json").read_text()


def test_one_token_has_nothing_to_predict(pair):
    for model in pair:
        assert model(tokens(1, 1), labels=tokens(1, 1)).loss.isnan()
