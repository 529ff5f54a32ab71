"""Training: the recipe, the order of the data, token streams, checkpoints, errors, replay."""

import json
import math
import os
import re
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import cgpt_kernels as ck
from cgpt_kernels import cli
from cgpt_kernels.train import Settings, data, loop, loss_of, run, state
from cgpt_kernels.train.order import Mixture, Windows
from cgpt_kernels.train.progress import flops_per_token
from cgpt_kernels.train.settings import mup_fields, plan

SUMS = "".join(f"{i} plus {i % 7} is {i + i % 7}, and so on.\n" for i in range(900))
NAMES = "".join(
    f"Then {'ABCDEFGH'[i % 8]}nna told {'xyz'[i % 3]}orro to wait.\n" for i in range(900)
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two kinds of text, and one tokenizer of both."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "sums.txt").write_text(SUMS)
    (folder / "names.txt").write_text(NAMES)
    data.make_tokenizer([SUMS, NAMES], 300).save(str(folder / "tokenizer.json"))
    return folder


def settings(texts, out, **changes):
    given = dict(width=32, layers=1, heads=2, context=32, batch=4, lr=3e-3, held_out_tokens=500)
    given |= dict(steps=6, save_every=2, log_every=1, tokenizer=str(texts / "tokenizer.json"))
    if "model" in changes:
        given = {n: v for n, v in given.items() if n not in ("width", "layers", "heads")}
    return Settings(data=(texts / "sums.txt",), out=str(out), **given | changes)


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- a run --------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_a_checkpoint_that_generates(texts, tmp_path):
    result = run(settings(texts, tmp_path / "run", steps=60, save_every=30))
    assert result.finished and result.step == 60
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 60 and losses[0] > math.log(300) - 0.3
    assert losses[-1] < losses[0] - 1 and result.held_out_loss < losses[0] - 1
    model = ck.GPT.from_pretrained(tmp_path / "run" / "best")
    assert model.transformer.wte.weight.dtype == torch.float32
    held_out = np.fromfile(tmp_path / "run" / "tokens" / "held_out.bin", dtype=np.uint16)
    measured = loss_of(model, held_out, length=32, limit=500)
    assert measured == pytest.approx(result.held_out_loss, rel=1e-5)
    of_model = ["--model", str(tmp_path / "run" / "last"), "--max-new-tokens", "8"]
    done = CliRunner().invoke(cli.app, ["generate", "--prompt", "1 plus", *of_model])
    assert done.exit_code == 0 and done.stdout.startswith("1 plus")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_replaced_and_eager_modules_train_alike(texts, tmp_path, dtype):
    losses = {}
    for backend in ("eager", "auto"):
        run(settings(texts, tmp_path / backend, steps=20, dtype=dtype, backend=backend))
        log = (tmp_path / backend / "log.jsonl").read_text().splitlines()
        losses[backend] = [json.loads(line).get("loss") for line in log if '"loss"' in line]
    assert losses["auto"] == pytest.approx(losses["eager"], abs=1e-4 if dtype == "fp32" else 3e-2)


def test_bf16_keeps_weights_and_moments_in_fp32(texts, tmp_path):
    # updates below half a bf16 step of a weight are lost unless somebody keeps them
    run(settings(texts, tmp_path / "run", dtype="bf16", lr=1e-5, warmup=1))
    stored = weights(tmp_path / "run" / "last")
    moments = load_file(tmp_path / "run" / "last" / "moments.safetensors")
    assert {t.dtype for t in (*stored.values(), *moments.values())} == {torch.float32}
    wte = stored["transformer.wte.weight"]
    assert not torch.equal(wte, wte.to(torch.bfloat16).float())
    torch.manual_seed(0)
    begun = ck.GPT(ck.GPT.from_pretrained(tmp_path / "run" / "last").config)
    moved = (wte - begun.transformer.wte.weight).abs()
    assert 0 < moved.max() < 1e-4


def test_dropout_is_on_while_training_and_off_while_measuring(texts, tmp_path):
    run(settings(texts, tmp_path / "a", dropout=0.5))
    run(settings(texts, tmp_path / "b", dropout=0.5))
    run(settings(texts, tmp_path / "c"))
    a, b, c = (weights(tmp_path / name / "last") for name in "abc")
    assert same(a, b) and not same(a, c)
    model = ck.GPT.from_pretrained(tmp_path / "a" / "last")
    held_out = np.fromfile(tmp_path / "a" / "tokens" / "held_out.bin", dtype=np.uint16)
    measured = state.facts(tmp_path / "a" / "last")["held_out_loss"]
    assert loss_of(model.train(), held_out, length=32, limit=500) == pytest.approx(measured, 1e-5)
    assert model.training
    more = dict(model=str(tmp_path / "a" / "last"), steps=2, dropout=0.2)
    tuned = run(settings(texts, tmp_path / "d", **more))
    assert ck.GPT.from_pretrained(tuned.folder).config.resid_pdrop == 0.2


def test_accumulated_passes_are_one_larger_batch(texts, tmp_path):
    run(settings(texts, tmp_path / "a", batch=4))
    run(settings(texts, tmp_path / "b", batch=2, accumulate=2))
    a, b = weights(tmp_path / "a" / "last"), weights(tmp_path / "b" / "last")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=2e-5, msg=name)


def test_an_interrupt_saves_and_the_resumed_run_has_the_same_weights(texts, tmp_path, monkeypatch):
    run(settings(texts, tmp_path / "a", save_every=4))
    one_step = loop._Run._one_step

    def interrupted(self):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return one_step(self)

    monkeypatch.setattr(loop._Run, "_one_step", interrupted)
    result = run(settings(texts, tmp_path / "b", save_every=4))
    assert not result.finished and result.step == 3  # the step is finished first
    assert result.folder.name == "step-00000003"
    monkeypatch.undo()
    result = run(settings(texts, tmp_path / "b", save_every=4), resume=True)
    assert result.finished and same(
        weights(tmp_path / "a" / "last"), weights(tmp_path / "b" / "last")
    )
    steps = [json.loads(s)["step"] for s in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and {*steps} == {1, 2, 3, 4, 5, 6}


def test_a_resumed_run_needs_neither_its_text_nor_its_first_place(texts, tmp_path, monkeypatch):
    (tmp_path / "text").write_text(SUMS)
    of_text = dict(data=(str(tmp_path / "text"),))
    one = settings(texts, tmp_path / "a")
    given = {**vars(one), **of_text}
    monkeypatch.setattr(loop._Run, "_one_step", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(Settings(**given))
    monkeypatch.undo()
    (tmp_path / "text").unlink()
    (tmp_path / "a").rename(tmp_path / "b")
    run(Settings(**given | {"out": str(tmp_path / "b")}), resume=True)
    run(settings(texts, tmp_path / "c"))
    assert same(weights(tmp_path / "b" / "last"), weights(tmp_path / "c" / "last"))


def test_resumed_fine_tuning_does_not_need_the_weights_it_began_with(texts, tmp_path):
    run(settings(texts, tmp_path / "a"))
    shutil.copytree(tmp_path / "a" / "last", tmp_path / "begun")
    of_model = dict(model=str(tmp_path / "begun"), lr=None)
    run(settings(texts, tmp_path / "b", **of_model))
    alone = weights(tmp_path / "b" / "last")
    shutil.rmtree(tmp_path / "begun")
    shutil.rmtree(tmp_path / "b" / "step-00000006")  # as if it had been killed before
    run(settings(texts, tmp_path / "b", **of_model), resume=True)
    assert same(weights(tmp_path / "b" / "last"), alone)
    log = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert max(line.get("learning_rate", 0) for line in log) < 3e-4  # a tenth of the usual


def test_a_run_can_be_made_longer(texts, tmp_path):
    run(settings(texts, tmp_path / "run", steps=4))
    result = run(settings(texts, tmp_path / "run", steps=8), resume=True)
    assert result.finished and result.step == 8
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["learning_rate"] for line in log if "loss" in line}
    assert list(rates) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert rates[4] < rates[5] > rates[8] == pytest.approx(0.1 * 3e-3)


def test_the_last_and_the_best_checkpoints_are_kept(texts, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5, 4.0, 1.5])
    monkeypatch.setattr(loop._Run, "_measure", lambda self: {"held_out_loss": next(losses)})
    run(settings(texts, tmp_path / "run", save_every=1, keep=2))
    kept = [f.name for f in state.folders(tmp_path / "run")]
    assert kept == ["step-00000002", "step-00000005", "step-00000006"]
    assert (tmp_path / "run" / "best").readlink().name == "step-00000002"
    assert (tmp_path / "run" / "last").readlink().name == "step-00000006"


def test_a_loss_that_is_no_number_stops_the_run(texts, tmp_path):
    with pytest.raises(RuntimeError, match=r"loss of step \d+ is (nan|inf).*lower lr"):
        run(settings(texts, tmp_path / "run", lr=1e18, warmup=0, clip=1e6, steps=30))


def test_two_processes_do_not_train_in_one_folder(texts, tmp_path):
    (tmp_path / "run").mkdir()
    with loop._alone(tmp_path / "run"), pytest.raises(ValueError, match="another process"):
        run(settings(texts, tmp_path / "run"))


# ---- the recipe ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, parameters, batch, steps, warmup, lr",
    [  # the published configurations
        ("cerebras-gpt-111m", 111_050_496, 120, 9037, 1525, 6e-4),
        ("cerebras-gpt-256m", 255_983_872, 264, 9468, 693, 6e-4),
        ("cerebras-gpt-111m-mup", 111_050_496, 120, 9037, 1525, 6e-3),
    ],
)
def test_the_defaults_are_the_published_runs(name, parameters, batch, steps, warmup, lr):
    told = Settings(data=("x",), out="run", model=name, batch=batch)
    of = plan(told, ck.GPTConfig.from_name(name), parameters)
    assert of.steps == pytest.approx(steps, rel=2e-3) and of.warmup == warmup and of.lr == lr
    rates = [of.factor(step, told) for step in range(of.steps)]
    assert rates[0] == 1 / warmup and max(rates) == rates[warmup] == 1
    assert rates[-1] == pytest.approx(0.1)
    falls = np.diff(rates[warmup:])
    assert falls == pytest.approx(falls.mean(), abs=1e-9)  # a line


def test_the_cosine_falls_slowly_first_and_last():
    told = Settings(data=("x",), out="run", steps=101, warmup=1, schedule="cosine", final_lr=0.0)
    of = plan(told, ck.GPTConfig(n_positions=64), 1_000_000)
    rates = np.array([of.factor(step, told) for step in range(101)])
    assert rates[-1] == pytest.approx(0) and rates[51] == pytest.approx(0.5, abs=0.02)
    assert rates[10] > 0.97 and rates[90] < 0.03


def test_flops_count_every_product_of_a_training_step():
    config = ck.GPTConfig(vocab_size=50257, n_positions=2048)
    weights = 10 * 12 * 768**2 + 50257 * 768
    assert flops_per_token(config, 2048) == 6 * weights + 6 * 10 * 768 * 2048


# ---- text ---------------------------------------------------------------------------------------


def test_text_read_in_pieces_is_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 50)
    text = "a line\r\n" * 9 + "x" * 230 + "\nnaïve → \n\n" + "the end"
    (tmp_path / "t").write_bytes(text.encode())
    pieces = list(data.pieces(tmp_path / "t"))
    assert "".join(pieces) == text and max(map(len, pieces)) <= 50
    assert pieces[0].endswith("\n")


def test_tokens_are_the_documents_each_ended(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 500)
    folder = tmp_path / "docs"
    (folder / "inner").mkdir(parents=True)
    (folder / "b.txt").write_text(SUMS[:2000])
    (folder / "inner" / "a.txt").write_text("so it is")
    (folder / ".hidden").write_text("no")
    (folder / "picture.png").write_bytes(b"\x89PNG\0\xff")
    tokenizer = data.read_tokenizer(texts)
    given = dict(tokenizer=str(texts), out=str(tmp_path / "run"), held_out_share=0.0)
    tokens = data.prepare(Settings(data=(str(folder),), **given), None)
    ids = tokens.stream("train")
    assert isinstance(ids, np.memmap) and ids.dtype == np.uint16
    end = tokenizer.token_to_id(data.END_OF_TEXT)
    assert tokens.about["skipped"] == ["picture.png"]
    assert np.count_nonzero(ids == end) == 2 and ids[-1] == end
    first = np.flatnonzero(ids == end)[0]
    assert tokenizer.decode(ids[:first]) == SUMS[:2000]
    assert tokenizer.decode(ids[first + 1 : -1]) == "so it is"
    assert tokens.stream("held_out") is None


def test_held_out_documents_are_chosen_by_name_and_never_trained_on(tmp_path):
    documents = [data.Document(f"{i}.txt", tmp_path / f"{i}.txt") for i in range(2000)]
    train, held_out = data.split(documents, 0.1)
    assert 150 < len(held_out) < 250 and not {*train} & {*held_out}
    fewer = data.split(documents[:1000], 0.1)[1]
    assert fewer == [d for d in held_out if d in documents[:1000]]


def test_of_one_document_the_end_is_held_out(texts, tmp_path):
    given = dict(tokenizer=str(texts), out=str(tmp_path / "run"), held_out_share=0.1)
    tokens = data.prepare(Settings(data=(str(texts / "sums.txt"),), **given), None)
    both = np.concatenate([tokens.stream("train"), tokens.stream("held_out")])
    assert data.read_tokenizer(texts).decode(both[:-1]) == SUMS
    assert len(tokens.stream("held_out")) == int(0.1 * len(both))


# ---- order --------------------------------------------------------------------------------------


def test_an_epoch_visits_every_window_once_and_the_next_one_others():
    windows = Windows(np.arange(1000), 10, seed=3, name="text")
    epochs = [[windows[e * windows.count + i] for i in range(windows.count)] for e in range(2)]
    for epoch in epochs:
        assert all(len(w) == 11 and np.array_equal(w, np.arange(w[0], w[0] + 11)) for w in epoch)
        starts = sorted(w[0] for w in epoch)
        assert np.array_equal(np.diff(starts), np.full(windows.count - 1, 10))
    assert [w[0] for w in epochs[0]] != [w[0] for w in epochs[1]]
    again = Windows(np.arange(1000), 10, seed=3, name="text")
    assert np.array_equal(again[windows.count + 5], epochs[1][5])  # whatever came before


@pytest.mark.parametrize("length", [1, 7, 10, 19])
def test_windows_of_a_short_stream_stay_within_it(length):
    for size in range(length + 1, 4 * length):
        windows = Windows(np.arange(size), length, seed=0, name="text")
        assert all(len(windows[i]) == length + 1 for i in range(5 * windows.count))


def test_replay_takes_its_share_evenly_and_leaves_no_window_out():
    main, replay = np.arange(0, 500), np.arange(1000, 1500)
    mixture = Mixture(Windows(main, 4, 0, "main"), Windows(replay, 4, 0, "replay"), 0.25)
    inputs, targets = mixture.batch(8, 16)
    assert torch.equal(targets[:, :-1], inputs[:, 1:])
    from_replay = (inputs[:, 0] >= 1000).tolist()
    assert from_replay == [False, False, False, True] * 4
    alone = [mixture.main[i][0] for i in range(6, 18)]
    assert inputs[~torch.tensor(from_replay), 0].tolist() == alone


# ---- continual fine-tuning ----------------------------------------------------------------------


def test_replay_keeps_what_fine_tuning_alone_forgets(texts, tmp_path):
    run(settings(texts, tmp_path / "a", steps=80, save_every=80))
    sums = tmp_path / "a" / "tokens"
    kept = np.fromfile(sums / "held_out.bin", dtype=np.uint16)
    losses, new = {}, {}
    for share in (None, 0.3):
        more = {} if share is None else dict(replay=(texts / "sums.txt",), replay_share=share)
        tuned = Settings(
            data=(texts / "names.txt",),
            out=str(tmp_path / f"b{share}"),
            model=str(tmp_path / "a" / "last"),
            steps=80,
            lr=3e-3,
            batch=4,
            **more,
        )
        result = run(tuned)
        losses[share] = loss_of(ck.GPT.from_pretrained(result.folder), kept)
        new[share] = result.held_out_loss
    before = loss_of(ck.GPT.from_pretrained(tmp_path / "a" / "last"), kept)
    assert losses[None] > before + 1  # it forgot
    assert losses[0.3] < before + 0.3 * (losses[None] - before)
    assert new[0.3] < new[None] + 0.3  # and learnt the new text all the same


# ---- errors -------------------------------------------------------------------------------------


def command(*arguments):
    return CliRunner().invoke(cli.app, ["train", *map(str, arguments)], env={"COLUMNS": "110"})


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["{tmp}/empty", "--out", "{tmp}/run"], "holds no files"),
        (["{tmp}/binary", "--out", "{tmp}/run"], "no text in"),
        (["{tmp}/missing.txt", "--out", "{tmp}/run"], "no file, no folder and no pattern"),
        (["{texts}/sums.txt", "--out", "{tmp}/other"], "new or empty folder"),
        (["{tmp}/short.txt", "--out", "{tmp}/run"], "context + 1 = 257"),
        (["{texts}/sums.txt", "--out", "{tmp}/run", "--model", "gpt9"], "got 'gpt9'"),
        (["{texts}/sums.txt", "--out", "{tmp}/run", "--vocab-size", "99"], "must be above 256"),
        (["{texts}/sums.txt", "--out", "{tmp}/run", "--replay-share", "0.2"], "go together"),
        (["{texts}/sums.txt", "--out", "{tmp}/run", "--steps", "5", "--tokens", "9"], "not both"),
        (["{texts}/sums.txt", "--out", "{tmp}/run", "--backend", "no"], "backend must be"),
        (["--out", "{tmp}/run"], "name text to train on"),
        (["--out", "{tmp}/run", "--resume"], "name text to train on"),
    ],
)
def test_an_error_is_one_line_and_leaves_the_folder_free(texts, tmp_path, arguments, told):
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "x").write_bytes(b"\xff\xfe\0")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    (tmp_path / "short.txt").write_text("too short")
    done = command(*(a.format(tmp=tmp_path, texts=texts) for a in arguments))
    assert done.exit_code == 2, done.output
    last = done.stderr.splitlines()[-1]
    assert last.startswith("cgpt-kernels: ") and told in last
    assert "Traceback" not in done.output
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "other" / "thesis.tex").exists()


def test_a_model_that_cannot_be_trained_is_told_before_the_text_is_read(
    texts, tmp_path, monkeypatch
):
    shape = ck.GPTConfig(vocab_size=300, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    for name in ("whole", "cut"):
        ck.GPT(shape).save_pretrained(tmp_path / name)
    ck.quantize.save(ck.GPT(shape), tmp_path / "int8", "int8")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"cut short")
    (tmp_path / "empty").mkdir()

    def refuse(*given):
        raise AssertionError("the text was read")

    monkeypatch.setattr(data, "prepare", refuse)
    out = tmp_path / "a" / "b"
    for told, options in (
        ("not a folder with a config.json", ("--model", tmp_path / "empty")),
        ("not a readable safetensors file", ("--model", tmp_path / "cut")),
        ("train: .* is quantized already", ("--model", tmp_path / "int8")),
        ("at most the model's n_positions = 32, got 33", ("--model", tmp_path / "whole")),
        ("n_embd must be a multiple of n_head", ("--width", 32, "--heads", 5)),
    ):
        done = command(texts / "sums.txt", "--out", out, "--context", 33, *options)
        assert done.exit_code == 2, done.output
        assert re.search(told, done.stderr.splitlines()[-1]), done.stderr
        assert not out.parent.exists()


def test_a_tokenizer_beyond_the_models_vocabulary_is_refused(texts, tmp_path):
    shape = ck.GPTConfig(vocab_size=299, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    ck.GPT(shape).save_pretrained(tmp_path / "model")
    given = ("--model", tmp_path / "model", "--tokenizer", texts, "--out", tmp_path / "run")
    done = command(texts / "sums.txt", *given)
    assert done.exit_code == 2 and "the tokenizer has 300 tokens" in done.stderr, done.output
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_begin_leaves_an_empty_folder_empty(texts, tmp_path, monkeypatch):
    def fail(*given):
        raise OSError("the disk is full")

    monkeypatch.setattr(loop, "_order", fail)  # when the tokens are there
    (tmp_path / "mine").mkdir()
    for out in (tmp_path / "mine", tmp_path / "a" / "b"):
        with pytest.raises(OSError, match="disk is full"):
            run(settings(texts, out))
    assert not [*(tmp_path / "mine").iterdir()] and not (tmp_path / "a").exists()


def test_the_command_trains_resumes_and_refuses_other_settings(texts, tmp_path):
    out = tmp_path / "run"
    small = ["--width", 32, "--layers", 1, "--context", 32, "--batch", 2, "--threads", 1]
    small += ["--tokenizer", texts, "--steps", 4, "--save-every", 2]
    done = command(texts / "sums.txt", "--out", out, *small)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(str(out / "step-00000004")) and "held-out loss" in done.stdout
    assert "tokens per parameter" in done.stderr and "of the bound" in done.stderr
    done = command(texts / "sums.txt", "--out", out, *small)
    assert done.exit_code == 2 and "--resume" in done.stderr
    done = command("--out", out, "--resume")
    assert done.exit_code == 0 and "going on after step 4" in done.stderr
    done = command("--out", out, "--resume", "--lr", 1)
    assert done.exit_code == 2 and "begun with other settings: lr None" in done.stderr


def test_tensorboard_scalars_are_the_log(texts, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(settings(texts, tmp_path / "run", tensorboard=True))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for name in ("loss", "held_out_loss", "learning_rate", "gradient_norm", "tokens_per_second"):
        told = {line["step"]: line[name] for line in log if name in line}
        assert {e.step: e.value for e in events.Scalars(name)} == pytest.approx(told, rel=1e-6)


def test_tensorboard_is_named_where_it_is_missing(texts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'cgpt-kernels\[train\]'"):
        run(settings(texts, tmp_path / "run", tensorboard=True))
    assert not (tmp_path / "run").exists()


def test_mup_fields_are_the_published_presets():
    published = ck.GPTConfig.from_name("cerebras-gpt-590m-mup")
    assert {n: getattr(published, n) for n in mup_fields(1536)} == mup_fields(1536)
