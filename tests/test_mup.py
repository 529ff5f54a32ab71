"""muP: what a step does to every layer is the same at all widths, and so is the best rate."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from cgpt_kernels import cli
from cgpt_kernels.train import mup_check

WIDTHS = (64, 128, 256)


@pytest.fixture(scope="module", params=[2.0**-7, 2.0**-9], ids=["large_rate", "small_rate"])
def check(request):
    return mup_check.coordinate_check(WIDTHS, request.param, steps=4)


def test_sizes_after_some_steps_do_not_depend_on_the_width_under_mup(check):
    for part in ("embedding", "attention", "mlp", "residual"):
        assert abs(check["growth"]["mup"][part]) < 0.25, part
    # at the first step logits shrink as width ** -1/2, and what is learnt does not
    assert -0.6 < check["growth"]["mup"]["logits"] < 0.25


def test_sizes_grow_with_the_width_in_the_standard_parametrization(check):
    for part in ("attention", "mlp", "residual"):
        assert check["growth"]["standard"][part] > 0.6, part
    assert check["growth"]["standard"]["logits"] > 0.3


def test_at_the_base_width_muPs_rules_change_no_learning_rate():
    base = mup_check.model_of(mup_check.BASE_WIDTH, "mup")
    assert {group["lr"] for group in base.optimizer_groups(1e-3)} == {1e-3}
    wide = mup_check.model_of(4 * mup_check.BASE_WIDTH, "mup")
    rates = {
        name: group["lr"]
        for group in wide.optimizer_groups(1e-3)
        for p in group["params"]
        for name, q in wide.named_parameters()
        if q is p
    }
    assert rates["transformer.h.0.attn.c_attn.weight"] == 0.25e-3
    assert rates["transformer.h.1.mlp.c_proj.weight"] == 0.25e-3
    for name in ("transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight"):
        assert rates[name] == 1e-3
    assert rates["transformer.h.0.attn.c_attn.bias"] == 1e-3


def test_the_best_rate_lies_at_the_bottom_of_the_losses():
    rates = [2.0**-p for p in range(9, 3, -1)]
    losses = {r: (math.log2(r) + 6.3) ** 2 + 2 for r in rates}
    assert mup_check.best_rate(losses) == pytest.approx(2**-6.3)
    assert mup_check.best_rate({r: -r for r in rates}) == rates[-1]
    assert mup_check.best_rate({1: 3.0, 2: 2.0, 4: math.inf}) == 2


def test_growth_is_the_exponent():
    assert mup_check.growth((32, 64, 128), (5, 10, 20)) == pytest.approx(1)
    assert mup_check.growth((32, 64, 128), (5, 5, 5)) == pytest.approx(0)


def test_the_text_is_the_same_for_every_model_and_can_be_learnt():
    inputs, targets = mup_check.Text().batch(7)
    again, _ = mup_check.Text().batch(7)
    assert torch.equal(inputs, again) and torch.equal(inputs[:, 1:], targets[:, :-1])
    begun = math.log(mup_check.VOCABULARY)
    assert mup_check.final_loss(32, "mup", 2.0**-6, 60) < begun - 0.5


def test_the_command_writes_numbers_and_a_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(mup_check, "RATES", (2.0**-7, 2.0**-6, 2.0**-5))
    arguments = ["mup-check", "--out", str(tmp_path / "mup"), "--widths", "8,16", "--steps", "10"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "mup.json").read_text())
    assert set(found["losses"]["mup"]) == {"8", "16"} and len(found["losses"]["mup"]["8"]) == 3
    assert (tmp_path / "mup.png").read_bytes().startswith(b"\x89PNG")
    done = CliRunner().invoke(cli.app, ["mup-check", "--widths", "8"])
    assert done.exit_code == 2 and "two or more multiples of 4" in done.stderr
