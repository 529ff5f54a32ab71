"""The shipped checkpoint: it loads everywhere, is as good as it says, and its training resumes."""

import dataclasses
import hashlib
import json
import math
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import cgpt_kernels as ck
from cgpt_kernels.assets import TINY, train_tiny

FACTS = json.loads((TINY / "training.json").read_text())


@pytest.fixture(scope="module")
def model():
    return ck.GPT.from_pretrained(TINY, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


def test_assets_stay_below_8_mb():
    assert sum(f.stat().st_size for f in TINY.parent.rglob("*") if f.is_file()) <= 8e6


def test_vocabulary_is_odd_and_the_tokenizer_s():
    config = ck.GPT.from_pretrained(TINY).config
    assert config == train_tiny.CONFIG
    assert config.vocab_size % 2 == 1
    assert Tokenizer.from_file(str(TINY / "tokenizer.json")).get_vocab_size() == config.vocab_size


def test_transformers_loads_model_and_tokenizer(model, tokenizer):
    transformers = pytest.importorskip("transformers")
    hf = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    text = "def naïve(x):\n    return x + 1  # → 2\n"
    ids = tokenizer.encode(text).ids
    assert hf_tokenizer(text).input_ids == ids
    assert hf_tokenizer.decode(ids) == tokenizer.decode(ids) == text
    assert hf_tokenizer.eos_token_id == 0 == tokenizer.token_to_id(train_tiny.END_OF_TEXT)
    ids = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(hf(ids).logits, model(ids), rtol=0, atol=1e-4)
    theirs = hf.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(ck.generate(model, ids, 20, eos_token_id=0), theirs)


def test_held_out_loss_is_as_stated(model, tokenizer):
    compared = 0
    for sample in FACTS["held_out_sample"]:
        file = Path(sysconfig.get_path("stdlib")) / sample["file"]
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if hashlib.sha256(text.encode()).hexdigest() != sample["sha256"]:
            continue  # another Python version's file
        loss = train_tiny.loss_of(model, train_tiny.encode(tokenizer, [text]))
        assert loss == pytest.approx(sample["loss"], abs=2e-3)
        compared += 1
    if not compared:
        pytest.skip(f"needs the library of Python {FACTS['python']}, whose files were measured")


def test_loss_on_unseen_code_is_far_below_chance(model, tokenizer):
    text = '''
class Stack:
    """A list that gives back what was put in last."""

    def __init__(self, items=None):
        self.items = list(items) if items is not None else []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()
'''
    stream = train_tiny.encode(tokenizer, [text])
    assert train_tiny.loss_of(model, stream) < FACTS["held_out_loss"] + 0.5
    assert FACTS["held_out_loss"] + 0.5 < math.log(train_tiny.CONFIG.vocab_size) - 2


@pytest.mark.parametrize(
    "prompt, begins",
    [
        ("for i in range", "("),
        ("class Stack:\n    def __init__(self", ","),
        ("import os\nimport", " "),
        ("        self.assertEqual", "("),
    ],
)
def test_greedy_text_is_python_like(model, tokenizer, prompt, begins):
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    text = tokenizer.decode(ck.generate(model, ids, 8)[0].tolist())
    assert text.startswith(prompt + begins)


def test_readme_states_the_measured_numbers():
    assert (TINY / "README.md").read_text(encoding="utf-8") == train_tiny.readme(FACTS)


DOCUMENTS = [(f"{i}.py", f"def f{i}(x):\n    return x + {i}\n" * 20) for i in range(24)]


def small_training(folder, monkeypatch, interrupt_at=None, steps=4):
    """A few steps on 24 small documents; interrupt_at: the step that meets a Ctrl-C."""
    config = dataclasses.replace(train_tiny.CONFIG, vocab_size=301, n_embd=32, n_layer=1, n_head=1)
    batch = train_tiny.batch

    def interrupted(stream, step, length):
        if step == interrupt_at:
            raise KeyboardInterrupt
        return batch(stream, step, length)

    monkeypatch.setattr(train_tiny, "CONFIG", config)
    monkeypatch.setattr(train_tiny, "documents", lambda: (DOCUMENTS[:20], DOCUMENTS[20:]))
    monkeypatch.setattr(train_tiny, "batch", interrupted)
    arguments = [
        "--steps",
        str(steps),
        "--out",
        str(folder / "out"),
        "--work",
        str(folder / "work"),
    ]
    try:
        train_tiny.main(arguments)
    finally:
        monkeypatch.undo()
    return ck.GPT.from_pretrained(folder / "out").state_dict()


def test_interrupted_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    whole = small_training(tmp_path / "a", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        small_training(tmp_path / "b", monkeypatch, interrupt_at=2)
    assert json.loads((tmp_path / "b" / "out" / "training.json").read_text())["steps"] == 2
    resumed = small_training(tmp_path / "b", monkeypatch)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_changed_number_of_steps_is_stated_in_the_model_card(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        small_training(tmp_path, monkeypatch, interrupt_at=2)
    small_training(tmp_path, monkeypatch, steps=3)
    facts = json.loads((tmp_path / "out" / "training.json").read_text())
    assert facts["steps"] == 3 and facts["plans"] == [[0, 4], [2, 3]]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "--steps 4    # from step 0" in card and "--steps 3    # from step 2" in card


def test_windows_are_visited_once_per_epoch():
    stream = np.arange(train_tiny.CONTEXT * 9 + 5, dtype=np.uint16)
    rows = []
    for step in range(2):
        x, y = train_tiny.batch(stream, step, train_tiny.CONTEXT)
        assert torch.equal(y, x + 1)
        rows += x[:, 0].tolist()
    assert len(set(rows)) == 8 == 2 * train_tiny.WINDOWS_PER_STEP
    short, _ = train_tiny.batch(stream, 0, train_tiny.CONTEXT // 2)
    whole, _ = train_tiny.batch(stream, 0, train_tiny.CONTEXT)
    assert torch.equal(short.reshape(whole.shape), whole)


def test_learning_rate_rises_holds_and_falls_to_zero():
    rates = [train_tiny.learning_rate(step, 1000) for step in range(1001)]
    assert rates[0] < rates[29] == rates[500] == train_tiny.PEAK_LR
    assert rates[500] > rates[850] > rates[999] > rates[1000] == 0
