"""The shipped checkpoint: it loads everywhere, is as good as it says, and its training goes on."""

import dataclasses
import hashlib
import json
import math
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

import cgpt_kernels as ck
from cgpt_kernels import quantize
from cgpt_kernels.assets import TINY, train_tiny
from cgpt_kernels.train import data, loss_of

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
    assert hf_tokenizer.eos_token_id == 0 == tokenizer.token_to_id(data.END_OF_TEXT)
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
        loss = loss_of(model, quantize.encode(TINY, tokenizer, [text]))
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
    stream = quantize.encode(TINY, tokenizer, [text])
    assert loss_of(model, stream) < FACTS["held_out_loss"] + 0.5
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


def test_training_goes_on_from_the_shipped_weights_and_measures_what_it_writes(
    tmp_path, monkeypatch
):
    shipped, out = tmp_path / "shipped", tmp_path / "out"
    shutil.copytree(TINY, shipped)
    config = dataclasses.replace(train_tiny.CONFIG, n_positions=32, n_embd=32, n_layer=1, n_head=1)
    torch.manual_seed(0)
    ck.GPT(config).save_pretrained(shipped)
    texts = [(f"{i}.py", f"def f{i}(x):\n    return x + {i}\n" * 20) for i in range(24)]
    held_out = {d.name for d in data.split([data.Document(n, None) for n, _ in texts], 0.3)[1]}
    documents = [p for p in texts if p[0] not in held_out], [p for p in texts if p[0] in held_out]
    monkeypatch.setattr(train_tiny, "TINY", shipped)
    monkeypatch.setattr(train_tiny, "CONTEXT", 32)
    monkeypatch.setattr(train_tiny, "HELD_OUT", 0.3)
    monkeypatch.setattr(train_tiny, "documents", lambda: documents)
    arguments = ["--steps", "30", "--out", str(out), "--work", str(tmp_path / "work")]
    train_tiny.main(arguments)
    facts = json.loads((out / "training.json").read_text())
    assert facts["held_out_documents"] == len(held_out) > 3
    assert facts["runs"][:-1] == FACTS["runs"] and facts["runs"][-1]["steps"] == 30
    trained = ck.GPT.from_pretrained(out, dtype=torch.float32)
    assert ck.GPT.from_pretrained(out).lm_head.weight.dtype == torch.bfloat16
    ids = quantize.encode(out, data.read_tokenizer(out), [text for _, text in documents[1]])
    assert loss_of(trained, ids) == pytest.approx(facts["held_out_loss"], abs=1e-3)
    before = loss_of(ck.GPT.from_pretrained(shipped, dtype=torch.float32), ids)
    assert facts["held_out_loss"] < before - 0.1
    assert (out / "README.md").read_text(encoding="utf-8") == train_tiny.readme(facts)
    with pytest.raises(ValueError, match="--resume"):
        train_tiny.main(arguments)
    train_tiny.main([*arguments, "--resume"])  # finished: it is measured again, nothing more
    assert json.loads((out / "training.json").read_text()) == facts
