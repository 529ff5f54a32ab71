"""`bench e2e --peers`: systems in processes of their own, the same model, honest ratios."""

import dataclasses
import json

import pytest
import torch
from rich.console import Console

import cgpt_kernels as ck
from cgpt_kernels import bench_e2e, cli, timing
from cgpt_kernels.bench_e2e import bounds, measure, report, roofline, single, systems, targets
from cgpt_kernels.bench_e2e import workers as pool

SMALL = ck.GPTConfig(vocab_size=301, n_positions=48, n_embd=32, n_layer=2, n_head=2)
PEAKS = {
    "flops": {"fp32": 1e11, "bf16": 2e11, "int8": 4e11, "int4": 4e11},
    "bandwidth": 2e10,
    "by": {},
}
WORK = systems.Work("512", 1, 512, 32)


def small_works(new_tokens):
    return systems.works(new_tokens, prompt=12, long=20, rows=2)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Every published name is a small shape, and the roofs are given."""
    monkeypatch.setattr(ck.GPTConfig, "from_name", classmethod(lambda cls, name: SMALL))
    monkeypatch.setattr(bench_e2e.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(measure, "_peaks", lambda run: PEAKS)
    monkeypatch.setattr(measure, "single_ops", lambda run: [])


@pytest.fixture
def few(small, monkeypatch):
    """Only two systems exist: each is a process to start."""
    monkeypatch.setattr(systems, "NAMES", ("ours_gpt", "torch_sdpa"))


def run_small(tmp_path, peers, **more):
    console = Console(width=220, record=True)
    given = dict(model="small", peers=peers, rounds=2, new_tokens=4, threads=1, works=small_works)
    given["out"] = tmp_path / "e2e.json"
    sound = bench_e2e.run(console, **{**given, **more})
    return sound, console.export_text()


# ---- the whole way ------------------------------------------------------------------------------


def test_a_run_shows_systems_and_targets_and_writes_json_and_a_picture(small, tmp_path):
    pytest.importorskip("matplotlib")
    sound, text = run_small(tmp_path, "torch_sdpa:bf16")
    assert sound
    for title in ("ours, reference GPT", "ours, Hugging Face model", "PyTorch + SDPA"):
        assert title in text
    assert "decode bf16" in text and "batch 8 decode bf16" in text
    assert "decode int8" in text and "not part of this run" in text
    assert (tmp_path / "e2e.png").stat().st_size > 10_000

    found = json.loads((tmp_path / "e2e.json").read_text())
    assert found["model"] == "small" and list(found["groups"]) == ["bf16"]
    group = found["groups"]["bf16"]
    assert {"cpu", "torch", "commit", "load", "date", "versions"} <= group["machine"].keys()
    assert group["peaks"] == PEAKS and group["failed"] == {}
    rows = {(row["system"], row["work"]): row for row in group["rows"]}
    works = ("512", "2048", "batch")
    expected = {(name, work) for name in ("ours_gpt", "ours_hf", "torch_sdpa") for work in works}
    assert rows.keys() == expected | {("ours_hf_generate", "512")}
    for row in group["rows"]:
        assert row["rounds"] == 2 and row["red"] is None and 0 <= row["others"] <= 1
        assert 0 < row["prefill"] <= row["prefill_median"]
        assert row["work"] == "2048" or 0 < row["token"] <= row["token_median"]
    assert rows["torch_sdpa", "batch"]["batch"] == 2
    assert {"name", "ours", "median", "peer", "reached", "asked", "verdict"} == found["targets"][
        0
    ].keys()


def test_a_run_of_one_format_keeps_the_others_of_the_file(few, tmp_path):
    for kind in ("fp32", "bf16"):
        assert run_small(tmp_path, f"torch_sdpa:{kind}", rounds=1)[0]
    groups = json.loads((tmp_path / "e2e.json").read_text())["groups"]
    assert list(groups) == ["fp32", "bf16"]
    works = {kind: {row["work"] for row in groups[kind]["rows"]} for kind in groups}
    assert works == {"fp32": {"512"}, "bf16": {"512", "2048", "batch"}}


def test_preparing_measures_nothing(few, tmp_path):
    sound, text = run_small(tmp_path, "torch_sdpa:fp32", prepare=True)
    assert sound and "making torch_sdpa:fp32 ready" in text
    assert not (tmp_path / "e2e.json").exists()
    folder = tmp_path / "cgpt-kernels-bench" / "small"
    assert (folder / "checkpoint" / "config.json").is_file()
    assert set(json.loads((folder / "memory.json").read_text())) >= {"torch_sdpa:fp32"}


def test_missing_peers_are_named_with_the_command_that_brings_them(monkeypatch):
    absent = ("openvino", "nncf", "llama_cpp", "gguf", "ctranslate2")
    there = systems._installed
    monkeypatch.setattr(systems, "_installed", lambda name: name not in absent and there(name))
    chosen = systems.select("openvino:fp32,openvino:int4,llama_cpp:fp32,ctranslate2:fp32")
    found, lacking = systems.resolve(chosen)
    assert {system.name for system in found} == set(systems.own())
    lines = report.left_out(lacking, {})
    assert (
        "OpenVINO (fp32, int4): not installed: pip install 'openvino>=2026.0' 'nncf>=3.0'" in lines
    )
    assert any("pip install 'llama-cpp-python>=0.3.36' 'gguf" in line for line in lines)
    assert "CTranslate2 (fp32): not installed: pip install 'ctranslate2>=4.8'" in lines


def small_job(tmp_path):
    config = systems.helper("weights").config_of("small")
    job = measure.Run("small", config, tmp_path, small_works(4), 1, 1, False, lambda line: None)
    measure.make_checkpoint(job)
    return job


def test_a_system_that_fails_is_listed_with_its_error_and_the_others_go_on(small, tmp_path):
    run = small_job(tmp_path)
    plain = systems.System("torch_sdpa", "fp32", "plain", False, "", None)
    group = measure.group(run, "fp32", [dataclasses.replace(plain, name="no_such"), plain])
    assert group["failed"] == {
        "no_such:fp32": "ModuleNotFoundError: No module named 'peers.no_such'"
    }
    assert [row["system"] for row in group["rows"]] == ["torch_sdpa"]
    # waiting workers sleep: their processor time is their own, whatever else the machine does
    assert group["idle_share"] < 0.5


def test_quantised_formats_run_or_say_why_not(few, tmp_path):
    _, text = run_small(tmp_path, "ours_gpt:int8", rounds=1)
    failed = json.loads((tmp_path / "e2e.json").read_text())["groups"]["int8"]["failed"]
    measured = json.loads((tmp_path / "e2e.json").read_text())["groups"]["int8"]["rows"]
    assert bool(measured) != ("ours_gpt:int8" in failed)
    for key, reason in failed.items():
        assert reason and "\n" not in reason and f"{key}: {reason}" in text


# ---- choosing -----------------------------------------------------------------------------------


def test_a_choice_brings_our_own_systems_in_its_formats():
    chosen = systems.select("llama_cpp:int4, torch_sdpa:bf16")
    own = [(name, kind) for kind in ("bf16", "int4") for name in systems.own()]
    assert set(chosen) == {("llama_cpp", "int4"), ("torch_sdpa", "bf16"), *own}
    every = systems.select("all")
    assert len(every) == len(set(every)) and {name for name, _ in every} == set(systems.NAMES)
    assert {kind for _, kind in systems.select("all:int8")} == {"int8"}


@pytest.mark.parametrize("wrong", ["vllm", "openvino:fp8", "", "ctranslate2:int4"])
def test_an_unknown_choice_is_an_error(wrong):
    with pytest.raises(ValueError, match="bench: --peers"):
        systems.select(wrong)


def test_an_unknown_work_is_an_error():
    with pytest.raises(ValueError, match="bench: --work must be 512, 2048, batch, got '4096'"):
        bench_e2e.run(Console(), only=["512", "4096"])


def test_threads_that_never_sleep_are_refused(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with pytest.raises(ValueError, match="would spin"):
        bench_e2e.run(Console())


@pytest.mark.parametrize("name", systems.NAMES)
def test_each_system_describes_itself_without_importing_its_library(name):
    module = systems.helper(name)
    assert module.TITLE and module.NOTE and callable(module.load)
    assert set(module.FORMATS) <= set(systems.FORMATS)
    assert isinstance(module.NEEDS, dict)
    assert not any(hasattr(module, needed) for needed in ("torch", *module.NEEDS))


def test_the_command_passes_its_options_on(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    calls = []
    monkeypatch.setattr(bench_e2e, "run", lambda console, **given: calls.append(given) or True)
    call = ["bench", "e2e", "--model", "cerebras-gpt-590m", "--peers", "all:int8", "--rounds", "3"]
    result = CliRunner().invoke(cli.app, [*call, "--threads", "2", "--everything"])
    assert result.exit_code == 0, result.output
    assert calls[0]["model"] == "cerebras-gpt-590m" and calls[0]["peers"] == "all:int8"
    assert (calls[0]["rounds"], calls[0]["new_tokens"], calls[0]["threads"]) == (3, 32, 2)
    assert calls[0]["everything"] and not calls[0]["prepare"] and not calls[0]["only"]
    assert CliRunner().invoke(cli.app, [*call, "--work", "512", "--work", "batch"]).exit_code == 0
    assert calls[1]["only"] == ["512", "batch"]
    for wrong in (
        ["--rounds", "3"],
        ["--prepare"],
        ["--work", "512"],
        ["--peers", "all", "--dtype", "bf16"],
    ):
        result = CliRunner().invoke(cli.app, ["bench", "e2e", *wrong])
        assert result.exit_code == 2 and "--peers" in result.stderr
    result = CliRunner().invoke(cli.app, ["bench", "gemm", "--peers", "all"])
    assert result.exit_code == 2 and "--peers is for e2e" in result.stderr


# ---- workers ------------------------------------------------------------------------------------


class FakeWorker:
    ended: list = []  # noqa: RUF012

    def __init__(self, system, folder, threads, *, timed):
        self.system = system

    def memory(self):
        return 100

    def close(self):
        FakeWorker.ended.append(self.system.name)


def test_the_least_recently_used_worker_ends_when_memory_is_short(monkeypatch, tmp_path):
    monkeypatch.setattr(pool, "Worker", FakeWorker)
    monkeypatch.setattr(pool, "SPARE_BYTES", 0)
    monkeypatch.setattr(FakeWorker, "ended", [])
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "model.safetensors").write_bytes(b"0" * 30)
    a, b, c = (systems.System(name, "fp32", name, False, "", None) for name in "abc")
    warmed = []

    def available():
        return 250 - 100 * len(workers.alive)

    workers = pool.Pool(tmp_path, 1, warmed.append, available)
    workers.get(a), workers.get(b), workers.get(a)
    assert [w.system.name for w in warmed] == ["a", "b"] and FakeWorker.ended == []
    workers.get(c)
    assert FakeWorker.ended == ["b"] and list(workers.alive) == ["a:fp32", "c:fp32"]
    workers.close()
    assert FakeWorker.ended == ["b", "a", "c"]
    assert json.loads((tmp_path / "memory.json").read_text())["c:fp32"] == 100


def test_a_process_that_dies_is_an_error_that_names_its_log(small, tmp_path):
    system = systems.System("torch_sdpa", "fp32", "plain", False, "", None)
    worker = pool.Worker(system, small_job(tmp_path).folder, 1)
    worker.process.kill()
    worker.process.wait()
    with pytest.raises(pool.Failed, match=r"code -9, see .*torch_sdpa-fp32\.log"):
        worker.run([[1, 2]], 3)
    worker.close()


# ---- the same model -----------------------------------------------------------------------------


def test_greedy_text_of_the_random_weights_does_not_settle_on_one_token():
    helper = systems.helper("weights")
    config = dataclasses.replace(SMALL, n_embd=64, n_layer=4, n_positions=64)
    model = helper.random_gpt(config)
    out = ck.generate(model, torch.tensor(helper.prompts(config, 2, 24)), 24)[:, 24:]
    assert all(len(row.unique()) > 6 for row in out)
    assert all(float(p.detach().std()) > 0.01 for p in model.parameters())


def test_agreement_counts_equal_tokens_and_weighs_where_they_part():
    agreement = systems.helper("truth").agreement
    logits = torch.tensor([[[3.0, 1.0, -1.0, -3.0]] * 3])
    truth = {"tokens": torch.zeros(1, 3, dtype=torch.long), "logits": logits}
    assert agreement(truth, [[0, 0, 0]]) == (3, 0.0)
    same, gap = agreement(truth, [[0, 2, 3]])
    assert same == 1 and gap == pytest.approx(4.0 / logits[0, 0].std().item())


def test_another_model_is_told_from_rounding():
    helper, truth = systems.helper("weights"), systems.helper("truth")
    config = dataclasses.replace(SMALL, vocab_size=2000, n_embd=64, n_layer=4)
    prompts = helper.prompts(config, 4, 20)
    given = truth.continued(helper.random_gpt(config), prompts, 8)
    tokens = ck.generate(helper.random_gpt(config).bfloat16(), torch.tensor(prompts), 8)
    assert truth.agreement(given, tokens[:, 20:].tolist())[1] < measure.GAPS["bf16"]
    other = ck.generate(helper.random_gpt(config, seed=1), torch.tensor(prompts), 8)
    assert truth.agreement(given, other[:, 20:].tolist())[1] > measure.GAPS["int4"] > 2


# ---- bounds, targets, picture -------------------------------------------------------------------


def test_bounds_of_the_published_shape():
    config = ck.GPTConfig.from_name("cerebras-gpt-111m")
    assert bounds.prefill(config, WORK, "bf16").flops == pytest.approx(76e9, rel=0.02)
    step = bounds.step(config, WORK, "bf16")
    assert step.bytes == pytest.approx(219e6 + 2 * 2 * 10 * 768 * 528, rel=0.01)
    assert step.seconds(PEAKS, "bf16") == pytest.approx(step.bytes / 2e10)
    fewer = [bounds.step(config, WORK, kind).bytes for kind in ("fp32", "bf16", "int8", "int4")]
    assert fewer == sorted(fewer, reverse=True)
    eight = bounds.step(config, dataclasses.replace(WORK, batch=8), "bf16")
    assert eight.flops > 7.9 * step.flops and eight.bytes < 1.6 * step.bytes


def row(**changes):
    given = dict(system="ours_gpt", title="ours, reference GPT", format="bf16", ours=True)
    given |= dict(work="512", batch=1, prompt=512, new_tokens=32, rounds=3)
    given |= dict(prefill=0.1, prefill_median=0.1, token=0.01, token_median=0.01)
    given |= dict(prefill_bound=0.05, token_bound=0.008, prefill_flops=8e10, prefill_bytes=2e8)
    given |= dict(token_flops=2e8, token_bytes=2.2e8, same=32, compared=32, gap=0.0, others=0.0)
    given |= dict(red=None)
    return measure.Row(**{**given, **changes})


def peer(**changes):
    return row(**{**dict(system="openvino", title="OpenVINO", ours=False), **changes})


def verdicts(*rows, reasons=()):
    return {(v.name, v.who): v for v in targets.judge(rows, dict(reasons))}


def test_a_target_is_met_against_the_fastest_peer_or_short_by_how_much():
    slow, fast = peer(token_median=0.02), peer(token_median=0.012, title="fast")
    found = verdicts(row(), slow, fast)["decode bf16", "ours, reference GPT"]
    assert found.value == pytest.approx(1.2) and not found.met
    assert found.verdict == "short by 11%" and found.peer.startswith("fast, 83.3 tok/s")
    met = verdicts(row(), slow)["decode bf16", "ours, reference GPT"]
    assert met.met and met.verdict == "met"
    share = verdicts(row(), slow)["decode bf16, of the read bandwidth", "ours, reference GPT"]
    assert share.value == pytest.approx(0.8) and share.verdict == "short by 6%"


def test_a_system_that_runs_another_model_counts_in_no_ratio():
    wrong = peer(token_median=0.001, red="token 1 is 4.20 standard deviations away")
    found = verdicts(row(), wrong, peer(token_median=0.02))
    assert found["decode bf16", "ours, reference GPT"].value == pytest.approx(2.0)
    red = verdicts(row(red="token 1"), peer())["decode bf16", "ours, reference GPT"]
    assert red.value is None and not red.met and red.verdict == "not measured: token 1"


def test_what_was_not_measured_says_why():
    found = verdicts(peer(), reasons={"ours_gpt:int8": "ValueError: quantize must be None"})
    assert "quantize must be None" in found["decode int8", "ours_gpt"].verdict
    assert "not part of this run" in found["decode bf16", "ours_hf"].verdict
    assert "no peer ran" in verdicts(row())["decode bf16", "ours, reference GPT"].verdict


def test_hugging_face_generate_is_compared_as_a_whole():
    ours = row(system="ours_hf_generate", title="ours, Hugging Face generate")
    theirs = peer(system="hf_generate", prefill_median=0.19, token_median=0.02)
    found = verdicts(ours, theirs, peer(token_median=1e-3))
    value = found["inside Hugging Face generate, bf16", "ours, Hugging Face generate"].value
    assert value == pytest.approx((0.19 + 31 * 0.02) / (0.1 + 31 * 0.01))


def test_single_ops_are_measured_and_judged(monkeypatch):
    monkeypatch.setattr(single, "SECONDS", 0.01)
    rows = [
        {"name": "attention D64", **single.attention(2, 64, tokens=32)},
        {"name": "gemm 512 x 768 x 3072", **single.linear(8, 32, 48)},
        {"name": "gemm M=1, 768 x 768", **single.linear(1, 32, 32)},
    ]
    assert all(0 < r["seconds"] <= r["seconds_median"] and r["torch"] > 0 for r in rows)
    found = targets.judge_single(rows, PEAKS)
    assert [v.is_share for v in found] == [False, True, False]
    assert found[1].value == pytest.approx(2 * 8 * 32 * 48 / rows[1]["seconds_median"] / 2e11)
    names = {*targets.SINGLE_RATIOS, *targets.SINGLE_SHARES}
    assert names == {*single.ATTENTION, *single.LINEAR}


def test_a_red_system_shows_its_reason_in_the_table():
    group = {"rows": [dataclasses.asdict(row(red="token 3 is off"))]}
    console = Console(width=200, record=True)
    console.print(report.systems_table("bf16", group))
    assert "token 3 is off" in console.export_text()


def test_the_roofline_has_a_point_per_system_and_metric():
    rows = [row(), peer(), peer(work="2048", token=None, token_median=None)]
    found = roofline.points({"rows": [dataclasses.asdict(r) for r in rows]})
    assert [(p["title"], p["metric"]) for p in found] == [
        ("ours, reference GPT", "prefill"),
        ("ours, reference GPT", "decode"),
        ("OpenVINO", "prefill"),
        ("OpenVINO", "decode"),
        ("OpenVINO", "prefill"),
    ]
    assert found[1]["rate"] == pytest.approx(2e8 / 0.01)
    assert found[1]["intensity"] == pytest.approx(2e8 / 2.2e8)


def test_a_missing_matplotlib_leaves_the_numbers(monkeypatch, tmp_path):
    def missing(path, groups):
        raise ImportError("No module named 'matplotlib'")

    monkeypatch.setattr(roofline, "draw", missing)
    assert bench_e2e._picture(tmp_path / "e2e.json", {}) == "no picture: pip install matplotlib"


def test_roofs_are_measured(monkeypatch):
    monkeypatch.setattr(timing, "PEAK_SECONDS", 0.02)
    found = systems.helper("peaks").measure(1)
    rates = [found["flops"][kind] for kind in ("fp32", "bf16", "int8", "int4")]
    assert rates == sorted(rates) and 1e9 < rates[0] < rates[-1] < 1e15
    assert 1e8 < found["bandwidth"] < 1e13


def test_a_worker_reports_an_error_in_one_line():
    worker = systems.helper("worker")
    assert worker._first_line(ValueError("one\ntwo")) == "ValueError: one"
    assert worker._first_line(RuntimeError()) == "RuntimeError"
