"""A training run that is killed, or meets a full disk, ends with the weights of one left alone."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cgpt_kernels.train import Settings
from cgpt_kernels.train.data import make_tokenizer

HERE = Path(__file__).parent
TEXT = "".join(f"{i} plus {i % 7} is {i + i % 7}, and so on.\n" for i in range(600))


@pytest.fixture(scope="module")
def folder():
    memory = Path("/dev/shm")  # where hundreds of flushes to the disk take no time
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        path = Path(name)
        (path / "text.txt").write_text(TEXT)
        make_tokenizer([TEXT], 280).save(str(path / "tokenizer.json"))
        yield path


def killed(folder, what, **changes):
    """What killed_training.py says of a small run."""
    given = dict(width=32, layers=1, heads=2, context=16, batch=2, warmup=2, held_out_tokens=200)
    given |= dict(steps=4, save_every=2, keep=1, log_every=1) | changes
    settings = Settings(
        data=(folder / "text.txt",),
        out=str(folder / what),
        tokenizer=str(folder / "tokenizer.json"),
        **given,
    )
    file = folder / f"{what}.json"
    file.write_text(settings.to_json())
    done = subprocess.run(
        [sys.executable, HERE / "killed_training.py", what, file],
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_killed_before_any_file_operation_or_step_it_resumes_to_the_same_bits(folder):
    found, _ = killed(folder, "moments")
    assert found["kills"] > 30
    assert found["different"] == []


def test_killed_at_random_times_it_resumes_to_the_same_bits(folder):
    found, _ = killed(
        folder,
        "times",
        steps=300,
        save_every=10,
        log_every=10,
        dtype="bf16",
        accumulate=2,
        dropout=0.1,
        replay=(str(folder / "text.txt"),),
        replay_share=0.3,
    )
    assert found["kills"] >= 3 and found["resumed_at"] >= 2, found
    assert found["same"]


def test_a_full_disk_leaves_the_last_checkpoint_whole(folder):
    found, told = killed(folder, "full")
    assert found["status"] == 3
    assert "step-00000002" in found["left"] and "step-00000004" not in found["left"]
    assert not [name for name in found["left"] if name.startswith(".unfinished")]
    assert "the checkpoint of step 4 could not be written" in told
    assert "the last whole checkpoint is" in told and "step-00000002" in told
    assert found["same"]
