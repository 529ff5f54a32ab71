"""The examples at small size: what they say they show, they show."""

import importlib
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(p.stem for p in EXAMPLES.glob("*.py") if p.stem != "shared")


@pytest.fixture
def example(monkeypatch):
    """Imports an example by name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield lambda name: importlib.import_module(name)
    for name in (*SCRIPTS, "shared"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_option(example, script):
    app = typer.Typer()
    app.command()(example(script).main)
    found = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"})
    assert found.exit_code == 0, found.output
    assert "Usage" in found.output and "--steps" in found.output


def test_the_readme_names_every_script():
    text = (EXAMPLES / "README.md").read_text()
    assert all(f"{script}.py" in text for script in SCRIPTS)


def test_held_out_modules_are_not_trained_on(example):
    shared = example("shared")
    names = [name for name, _ in shared.sources(60)]
    kept = [name for name in names if shared.held_out(name)]
    assert len(set(names)) == len(names) and 5 <= len(kept) <= 20


def test_lora_learns_and_switches_off(example):
    found = example("lora").main(steps=12, batch=2, length=96, modules=10)
    assert found["after"] < found["before"] - 0.5
    assert found["without"] == found["before"]


@pytest.mark.parametrize(("method", "lr"), [("prefix", 3e-2), ("prompt", 0.1)])
def test_virtual_tokens_learn(example, method, lr):
    found = example("prompt_tuning").main(
        method=method, steps=20, batch=2, length=96, lr=lr, modules=10
    )
    assert found["after"] < found["before"] - 0.1


def test_an_unknown_method_is_named(example):
    with pytest.raises(typer.BadParameter, match="must be one of prefix, prompt, got 'suffix'"):
        example("prompt_tuning").main(method="suffix")


def test_the_gpt2_classifier_beats_the_majority(example):
    found = example("classify_gpt2").main(steps=25, batch=16, length=24, modules=24)
    assert found["after"] > found["majority"] + 0.2
    assert abs(found["before"] - found["majority"]) < 0.25


def test_the_bert_classifier_beats_the_majority(example):
    found = example("classify_bert").main(
        steps=60, batch=16, length=24, modules=24, width=64, layers=1
    )
    assert found["after"] > found["majority"] + 0.1


def test_adapters_forget_nothing_and_full_fine_tuning_does(example):
    found = example("continual").main(steps=12, batch=2, length=96, modules=10)
    assert found["adapters, after second"] == found["adapters, after first"]
    assert found["adapters, after first"] < found["untrained"] - 0.3
    assert found["full, after second"] > found["full, after first"] + 0.05


def test_replaced_and_eager_learn_the_same(example):
    options = {"steps": 5, "batch": 2, "length": 64, "modules": 10}
    lora = example("lora")
    ours, eager = lora.main(**options), lora.main(**options, eager=True)
    assert abs(ours["after"] - eager["after"]) < 1e-3
