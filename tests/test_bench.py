"""Timing and benchmarks: what they record, and that a wrong kernel gets no speed-up."""

import dataclasses
import json
import math

import pytest
import torch

from cgpt_kernels import bench, timing
from cgpt_kernels.ops import registry


def test_interleaved_candidates_get_samples_each_and_in_turns():
    order = []
    taken = timing.interleave(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0.01, rounds=4
    )
    assert taken["a"].samples == taken["b"].samples >= 4
    assert 0 < taken["a"].minimum <= taken["a"].median
    assert "".join(order[4:]).strip("a").startswith("b")


def test_the_bound_is_the_larger_of_compute_and_bandwidth(monkeypatch):
    monkeypatch.setattr(timing, "peak_flops", lambda *_: 1e9)
    monkeypatch.setattr(timing, "bandwidth", lambda *_: 1e8)
    assert timing.bound(10**9, 1, torch.float32, 1) == timing.Bound(1.0, "compute")
    assert timing.bound(1, 10**9, torch.float32, 1) == timing.Bound(10.0, "bandwidth")


def test_peaks_are_measured(monkeypatch):
    monkeypatch.setattr(timing, "PEAK_SECONDS", 0.05)
    threads = torch.get_num_threads()
    assert 1e8 < timing.peak_flops(torch.float32, threads) < 1e15
    assert 1e8 < timing.bandwidth(1 << 20, threads) < 1e13


def test_thread_count_is_set_and_restored():
    before = torch.get_num_threads()
    with timing.threads(1) as count:
        assert count == torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_a_run_prints_lines_and_writes_json(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "peak_flops", lambda *_: 1e11)
    monkeypatch.setattr(timing, "bandwidth", lambda *_: 1e10)
    lines = []
    rows = bench.run(
        ops=["gemm"],
        dtypes=["bf16"],
        out=tmp_path / "ops.json",
        compile=False,
        cases=["tiny"],
        seconds=0.01,
        show=lines.append,
    )
    assert [(row.op, row.case, row.dtype) for row in rows] == [("gemm", "tiny", "bfloat16")]
    assert rows[0].speedup > 0 and rows[0].share > 0
    assert any(line.startswith("gemm") for line in lines)
    written = json.loads((tmp_path / "ops.json").read_text())
    assert {"cpu", "torch", "commit", "load", "threads", "date"} <= written["machine"].keys()
    assert written["rows"][0]["case"] == "tiny"


def test_a_red_case_gets_no_speed_up(monkeypatch):
    monkeypatch.setattr(timing, "bound", lambda *_: timing.Bound(1e-6, "compute"))
    monkeypatch.setitem(registry.FUNCTIONS, "gemm", wrong_gemm)
    case = next(c for c in registry.cases("bench", "gemm") if c.name == "tiny")
    row = bench.measure(case, torch.float32, compile=False, seconds=0.01)
    assert "out: error" in row.red
    assert math.isnan(row.speedup)
    assert "red" in bench.line(row)


def wrong_gemm(backend="auto", **inputs):
    out = torch.nn.functional.linear(inputs["x"], inputs["weight"], inputs["bias"])
    return out if backend == "eager" else out + 0.1


@pytest.mark.parametrize(
    "wrong", [dict(ops=["conv"]), dict(dtypes=["int3"]), dict(cases=["no_such_case"])]
)
def test_unknown_names_are_errors_that_list_the_known(wrong):
    with pytest.raises(ValueError, match="bench: "):
        bench.run(**wrong, show=lambda _: None)


@pytest.mark.parametrize("case", registry.cases("bench"), ids=lambda c: f"{c.op}-{c.name}")
def test_every_benchmark_case_states_its_work(case):
    assert case.why and case.shape
    assert case.flops > 0
    assert case.bytes(torch.float32) > case.bytes(torch.bfloat16) > 0


@pytest.mark.parametrize("op", registry.FUNCTIONS)
def test_torchs_own_call_computes_the_same(op):
    for case in registry.cases("bench", op):
        if "test" in case.use:
            inputs = case.inputs(torch.float32)
            wanted = registry.FUNCTIONS[op](**inputs, backend="eager")
            torch.testing.assert_close(case.torch_call(inputs)(), wanted)


def test_case_names_are_unique_within_an_op():
    names = [(case.op, case.name) for case in registry.CASES]
    assert len(set(names)) == len(names)


def test_gradients_are_timed_and_held_to_the_rule(monkeypatch):
    monkeypatch.setattr(timing, "peak_flops", lambda *_: 1e11)
    monkeypatch.setattr(timing, "bandwidth", lambda *_: 1e10)
    for case in (c for c in registry.cases("bench") if c.name in ("tiny", "one_row_768")):
        row = bench.measure(case, torch.float32, compile=False, seconds=0.01, gradients=True)
        assert row.gradients and row.speedup > 0 and row.red is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="--device cuda needs a GPU"):
        bench.run(ops=["gemm"], device="cuda", out="")


def test_a_peer_counts_in_the_speed_up():
    case = next(c for c in registry.cases("bench") if c.name == "tiny")
    row = bench.measure(case, torch.float32, compile=False, check=False, seconds=0.01)
    faster = dataclasses.replace(row, peers_us={"other": row.us / 4})
    assert faster.speedup == pytest.approx(min(row.eager_us / row.us, 0.25))
