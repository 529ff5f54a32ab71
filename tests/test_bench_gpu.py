"""The targets of a GPU: each is measured, printed, and met or short; on times that are made up."""

import importlib.util
import json

import pytest
import torch

from cgpt_kernels import bench, bench_gpu
from cgpt_kernels.gpt import GPTConfig
from cgpt_kernels.ops import registry


def rows(ours, others):
    """A measure() in which ours takes so many microseconds, with gradients three times as many."""

    def measure(case, dtype, gradients=False):
        times = 1 + 2 * gradients
        peers = {"attention": ("flash", "cudnn"), "layer_norm": ("liger",)}.get(case.op, ())
        return bench.Row(
            op=case.op, case=case.name, shape=case.shape, dtype="bfloat16", threads=1,
            backend="triton", us=ours * times, us_median=ours * times,
            eager_us=others * times, eager_us_median=others * times,
            compile_us=others * times, compile_us_median=others * times,
            bound_us=1.0, limit="compute", red=None, gradients=gradients,
            peers_us_median=dict.fromkeys(peers, others * times),
            peak_bytes={"ours": 1, "eager": 10},
        )  # fmt: skip

    return measure


def train(us):
    times = {"ours": 100.0, "eager": us, "compile": us}
    return lambda: bench_gpu.Target("training step", 1.3, ("compile",), times)


@pytest.mark.parametrize("others, met", [(160.0, True), (80.0, False)])
def test_every_target_is_printed_as_met_or_short(others, met, tmp_path):
    lines, out = [], tmp_path / "targets.json"
    options = {"measure": rows(100.0, others), "train": train(others), "out": out}
    made = bench_gpu.run(show=lines.append, **options)
    assert all(one.met == met for one in made)
    for part in (
        "attention forward 1024", "attention backward 4096", "layer_norm forward 768",
        "layer_norm forward + backward 5120", "add_layer_norm", "gemm + bias + gelu",
        "linear_cross_entropy", "peak memory 0.100 of eager's, asked 0.125", "training step",
    ):  # fmt: skip
        assert any(part in line for line in lines), part
    assert f"{len(made) if met else 0} of {len(made)} targets met" in lines
    assert len(json.loads(out.read_text())["rows"]) == len(made)
    for name in bench.missing_peers():
        assert any(line.startswith(f"without {name}: pip install") for line in lines)


def test_what_breaks_the_rule_or_has_no_other_is_not_met():
    times = {"ours": 1.0, "flash": 9.0}
    assert bench_gpu.Target("a", 1.0, ("flash",), times).met
    assert not bench_gpu.Target("a", 1.0, ("flash",), times, red="wrong").met
    alone = bench_gpu.Target("a", 1.0, ("flash_attn",), times)
    assert not alone.met and "none of them is here" in bench_gpu.line(alone)


def test_other_libraries_are_asked_for_nothing_that_they_do_not_do(monkeypatch):
    found = {}
    for case in registry.cases("test"):
        inputs = case.inputs(torch.float32)
        found[case.op, case.name] = set(bench._libraries(case, inputs))
    assert found["attention", "causal"] == {"flash_attn"}
    assert found["attention", "alibi"] == found["attention", "bias_qk"] == set()
    assert found["attention", "dropout_all"] == set()
    assert found["layer_norm", "odd_tail"] == found["linear_cross_entropy", "bias"] == {"liger"}
    assert found["layer_norm", "no_bias"] == found["gemm", "odd"] == set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert bench.missing_peers() == {
        "liger": "pip install liger-kernel",
        "flash_attn": "pip install flash-attn",
    }


def test_a_training_step_is_timed_beside_torch_compile(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    config = GPTConfig(n_layer=1, n_head=2, n_embd=32, n_positions=16, vocab_size=97)
    made = bench_gpu.step(config, batch=2, tokens=8, device="cpu", seconds=0.01, rounds=1)
    assert made.red is None
    assert set(made.us) == {"ours", "eager", "compile"} and made.ratio > 0
