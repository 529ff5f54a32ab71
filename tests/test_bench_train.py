"""`cgpt-kernels bench train`: its rows, ratios and errors, on a model that takes milliseconds."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from cgpt_kernels import backends, bench_train, timing
from cgpt_kernels.cli import app
from cgpt_kernels.gpt import GPTConfig

if backends._C is None:
    pytest.skip("cgpt_kernels._C is not built", allow_module_level=True)

TINY = GPTConfig(vocab_size=97, n_positions=32, n_embd=48, n_head=3, n_layer=1)


@pytest.fixture
def tiny(monkeypatch):
    """Every published name is a tiny model, and the machine's peaks are numbers."""
    monkeypatch.setattr(GPTConfig, "from_name", staticmethod(lambda name: TINY))
    monkeypatch.setattr(timing, "peak_flops", lambda dtype, threads: 1e11)
    monkeypatch.setattr(timing, "bandwidth", lambda nbytes, threads: 1e10)


def row(**given):
    plain = {
        "name": "work",
        "shape": "",
        "dtype": "float32",
        "threads": 1,
        "target": 2.0,
        "ms": {"ours": 4.0, "eager": 9.0, "compile": 8.0},
        "ms_median": {"ours": 5.0, "eager": 12.0, "compile": 10.0},
        "bound_ms": 2.0,
        "limit": "compute",
    }
    return bench_train.Row(**plain | given)


def test_the_better_of_eager_and_compile_counts():
    found = row()
    assert found.ratio == 2.0 and found.met and found.share == 0.5
    assert not row(target=2.1).met


def test_a_red_row_has_no_ratio_and_meets_nothing():
    found = row(red="loss 1, eager's 2")
    assert math.isnan(found.ratio) and not found.met
    assert " red " in bench_train.line(found)


def test_memory_decides_where_it_is_asked():
    memory = {"peak_mb": {"ours": 10.0, "eager": 100.0}}
    assert row(**memory, memory_target=1 / 8).met
    assert not row(**memory, memory_target=1 / 16).met
    assert row(memory_target=1 / 8).memory is None  # /proc did not tell


def test_every_row_is_printed_and_written(tiny, tmp_path):
    shown, out = [], tmp_path / "train.json"
    rows = bench_train.run(
        tokens=[16],
        only=["bf16", "fp32", "adamw", "layer_norm", "linear_cross_entropy"],
        compile=False,
        seconds=0.01,
        rounds=1,
        out=out,
        show=shown.append,
    )
    assert [r.red for r in rows] == [None] * len(rows)
    text = "\n".join(shown)
    for one in rows:
        assert one.name in text and one.ms["ours"] > 0 and "compile" not in one.ms
    written = json.loads(out.read_text())["rows"]
    assert [w["target"] for w in written] == [r.target for r in rows]
    assert {"ratio", "share", "met", "memory"} <= written[0].keys()


def test_compile_is_timed_and_named_where_its_compiler_is_missing(tiny, monkeypatch):
    shown = []
    options = {"seconds": 0.01, "rounds": 1, "show": shown.append}
    monkeypatch.setattr(bench_train, "no_compiler", lambda: "no C++ compiler: install g++")
    found = bench_train.model_row("step", 1.0, TINY, 8, torch.float32, **options)
    assert found.missing == {"compile": "no C++ compiler: install g++"}
    monkeypatch.setattr(bench_train, "no_compiler", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)
    found = bench_train.model_row("step", 1.0, TINY, 8, torch.float32, **options)
    assert "compile" in found.ms and "torch.compile builds" in shown[0]


def test_a_model_that_computes_something_else_is_red(tiny, monkeypatch):
    def broken(model):
        with torch.no_grad():
            model.transformer.ln_f.weight *= 3

    monkeypatch.setattr(bench_train, "replace", broken)
    options = {"compile": False, "seconds": 0.01, "rounds": 1}
    found = bench_train.model_row("step", 1.0, TINY, 8, torch.float32, **options)
    assert found.red.startswith("loss ")


def test_flops_are_those_of_three_products_for_each_of_the_forward():
    C, V, T = 48, 97, 16
    weights = 12 * C * C + C * V
    pairs = T * (T + 1) // 2
    assert bench_train._model_flops(TINY, T) == 3 * 2 * (T * weights + 2 * C * pairs)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["gemm", "train"], "train runs alone"),
        (["train", "--dtype", "bf16"], "train takes --model, --tokens"),
        (["train", "--row", "nothing"], "row must be"),
        (["train", "--tokens", "9999"], "tokens must be in [1, 2048]"),
        (["gemm", "--tokens", "16"], "--tokens and --row are for train"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2 and message in result.stderr.replace("\n", " ")
