"""The command line as a user meets it: text, exit codes, one-line errors. Models are tiny."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

import cgpt_kernels as ck
from cgpt_kernels import backends, bench, cli, demo

SMALL = ck.GPTConfig(vocab_size=256, n_positions=256, n_embd=32, n_layer=2, n_head=2)


def run(*args, stdin=None, **env):
    # a runner of tests may set a narrow COLUMNS, at which tables wrap
    env.setdefault("COLUMNS", "110")
    return CliRunner().invoke(cli.app, list(map(str, args)), input=stdin, env=env)


def fails(*args, **more):
    """The error of a command that must fail as every command does."""
    result = run(*args, **more)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("cgpt-kernels: ") and result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    return result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with random weights whose tokens are the 256 bytes."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    ck.GPT(SMALL).save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
def small_shape(monkeypatch):
    """Every published name is a small shape, and nothing is shipped, so that the demo is quick."""
    monkeypatch.setattr(ck.GPTConfig, "from_name", classmethod(lambda cls, name: SMALL))
    monkeypatch.setattr(demo, "TINY_SHAPE", SMALL)
    monkeypatch.setattr(demo, "TINY", demo.TINY / "absent")


# ---- help ---------------------------------------------------------------------------------------


def test_a_group_without_a_command_prints_its_help():
    result = run("wafer")
    assert result.exit_code == 2 and "\n  cgpt-kernels wafer estimate --model" in result.output


def test_no_command_prints_the_help():
    result = run()
    assert result.exit_code == 0
    for command in ("doctor", "demo", "generate", "quantize", "bench"):
        assert f"cgpt-kernels {command}" in result.stdout


@pytest.mark.parametrize("command", ["doctor", "demo", "generate", "bench"])
def test_help_teaches_with_examples(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert result.stdout.count(f"cgpt-kernels {command}") >= 3  # the usage line and two examples


# ---- doctor -------------------------------------------------------------------------------------


def test_doctor_names_tier_threads_and_versions():
    text = run("doctor").stdout
    assert backends._C.cpu_isa() in text
    assert torch.__version__ in text
    assert "OpenMP" in text and "GPU" in text


def test_doctor_says_which_backend_each_op_uses_and_why_not_the_others():
    report = ck.doctor()
    states = {(v.backend, v.state) for v in report.verdicts}
    assert ("cpu", "chosen") in states and ("eager", "can") in states
    assert {v.backend for v in report.verdicts} == set(backends.BACKENDS)
    assert all(v.why for v in report.verdicts)
    assert all(v.why in str(report) for v in report.verdicts)


def test_doctor_tells_a_missing_build(monkeypatch):
    monkeypatch.setattr(backends, "_C", None)
    monkeypatch.setattr(backends, "_C_REASON", "cgpt_kernels._C is not built")
    backends.implementation.cache_clear()
    try:
        report = ck.doctor()
    finally:
        backends.implementation.cache_clear()
    assert "not built" in dict(report.facts)["kernels"]
    assert any("every op runs eager" in text for text in report.warnings)
    assert ("eager", "chosen") in {(v.backend, v.state) for v in report.verdicts}


def test_doctor_json_is_json():
    found = json.loads(run("doctor", "--json").stdout)
    assert found["facts"]["torch"] == torch.__version__
    assert found["verdicts"][0].keys() == {"backend", "state", "ops", "why"}


def test_output_into_a_pipe_has_no_colours():
    assert "\x1b" not in run("doctor").stdout
    assert "\x1b" not in run("doctor", NO_COLOR="1", FORCE_COLOR="").stdout


# ---- generate -----------------------------------------------------------------------------------


def test_generate_writes_prompt_and_text_and_rates(folder):
    result = run("generate", "--model", folder, "--prompt", "def f", "--max-new-tokens", 8)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("def f") and len(result.stdout) > len("def f\n")
    assert "5 prompt tokens" in result.stderr and "tokens/s" in result.stderr


def test_generate_writes_the_same_on_every_backend(folder):
    call = ("generate", "--model", folder, "--prompt", "abc", "--max-new-tokens", 12)
    texts = [run(*call, "--backend", b).stdout for b in ("eager", "auto", "cpu")]
    assert texts[0] == texts[1] == texts[2]


def test_generate_repeats_itself_with_a_seed(folder):
    call = ("generate", "--model", folder, "--prompt", "a", "--max-new-tokens", 16)
    call += ("--temperature", 1.0, "--top-k", 50, "--top-p", 0.9, "--dtype", "bf16")
    first, again, other = (run(*call, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again != other


def test_generate_reads_the_prompt_from_stdin(folder):
    call = ("generate", "--model", folder, "--max-new-tokens", 4, "--prompt")
    assert run(*call, "-", stdin="xyz\n").stdout == run(*call, "xyz").stdout


def test_generate_uses_the_threads_asked_for_and_gives_them_back(folder):
    before = torch.get_num_threads()
    result = run(
        *("generate", "--model", folder, "--prompt", "a", "--max-new-tokens", 2, "--threads", 1)
    )
    assert "1 threads" in result.stderr
    assert torch.get_num_threads() == before


def test_a_character_of_several_tokens_is_shown_when_whole(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "aé→😀z"
    stream = cli._TextStream(tokenizer)
    shown = [stream.add(token) for token in tokenizer.encode(text).ids]
    assert "".join(shown) + stream.rest() == text
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in shown)
    assert len(stream.ids) == len(text.encode()) == 11


# ---- errors -------------------------------------------------------------------------------------


def test_errors_are_one_line_with_the_way_out(folder, tmp_path):
    generate = ("generate", "--prompt", "a", "--model")
    assert "--backend must be 'auto', 'cpu'" in fails(*generate, folder, "--backend", "cpuu")
    assert "folder with a config.json, got 'gpt2'" in fails(*generate, "gpt2")
    assert "256 positions" in fails(*generate, folder, "--max-new-tokens", 256)
    assert "top_k and top_p need temperature" in fails(*generate, folder, "--top-k", 3)
    assert "at least one token" in fails("generate", "--model", folder, "--prompt", "")
    assert "--dtype" in fails(*generate, folder, "--dtype", "fp8")
    assert "Missing option '--prompt'" in fails("generate")
    assert "frobnicate" in fails("frobnicate")
    assert "--wrong" in fails("doctor", "--wrong")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert "tokenizer.json" in fails(*generate, tmp_path)


def test_files_that_are_not_what_they_should_be_are_named(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "tokenizer.json").write_text("{}")
    text, bytes_, out = (tmp_path / n for n in ("empty.txt", "bytes.txt", "out"))
    text.write_text(" \n"), bytes_.write_bytes(b"\xff\xfe")
    generate = ("generate", "--prompt", "a", "--model")
    assert "tokenizer.json is not a readable tokenizer" in fails(*generate, broken)
    assert "UTF-8 text" in fails("generate", "--model", folder, "--prompt", "\udcff")
    assert "UTF-8 text" in fails("generate", "--model", folder, "--prompt", "-", stdin=b"\xff")
    quantize = ("quantize", "--model", folder, "--out")
    assert "empty.txt must hold text" in fails(*quantize, out, "--text", text)
    assert "bytes.txt must be UTF-8" in fails(*quantize, out, "--text", bytes_)
    for command in ("quantize", "prune"):
        message = fails(command, "--model", folder, "--out", text / "deep")
        assert f"{command}: --out must be a folder" in message and "empty.txt is a file" in message
    assert not out.exists()
    assert "holds no run" in fails("train", "--out", out, "--resume")


def test_weights_of_another_model_are_refused(folder, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "gpt_neox", "vocab_size": 256, "intermediate_size": 64, **small}
    (other / "config.json").write_text(json.dumps(config))
    result = run("generate", "--prompt", "a", "--model", other)
    assert result.exit_code == 2 and result.stdout == ""
    message = result.stderr.splitlines()[-1]  # transformers' progress stands before it
    assert message.startswith("cgpt-kernels: ") and "lacks gpt_neox.embed_in.weight" in message


def test_a_named_backend_that_cannot_run_says_why(folder):
    message = fails("generate", "--prompt", "a", "--model", folder, "--backend", "cuda")
    assert "backend 'cuda' cannot run" in message and "Available here: cpu" in message


def test_nothing_is_written_before_an_error(folder):
    result = run("generate", "--prompt", "a", "--model", folder, "--temperature", -1)
    assert result.exit_code == 2 and result.stdout == ""


def test_a_traceback_is_shown_on_request(folder):
    result = run("generate", "--prompt", "", "--model", folder, CGPT_TRACEBACK="1")
    assert isinstance(result.exception, ValueError)


# ---- demo ---------------------------------------------------------------------------------------


def test_demo_shows_machine_text_and_one_table(small_shape, tmp_path):
    out = tmp_path / "demo.json"
    result = run(*("demo", "--prompt-tokens", 16, "--new-tokens", 8, "--seconds", 0, "--out", out))
    assert result.exit_code == 0, result.output
    assert backends._C.cpu_isa() in result.stdout
    assert "the same text" in result.stdout
    assert "all of 8 tokens equal" in " ".join(result.stdout.split())  # lines are wrapped
    found = json.loads(out.read_text())
    assert [row["dtype"] for row in found["rows"]] == ["fp32", "fp32", "bf16"]
    assert all(row["rounds"] == 3 and row["red"] is None for row in found["rows"])
    assert "cpu" in found["machine"]


def test_demo_without_transformers_uses_the_reference_and_says_so(small_shape, monkeypatch):
    monkeypatch.setattr(demo, "transformers_missing", lambda: "transformers is not installed: GPT")
    model = demo.random_model(SMALL, torch.float32)
    assert isinstance(model, ck.GPT)
    result = run("demo", "--prompt-tokens", 8, "--new-tokens", 4, "--seconds", 0)
    assert result.exit_code == 0, result.output
    assert "transformers is not installed" in result.stdout
    assert "the reference GPT" in result.stdout


def test_demo_fails_where_outputs_differ(small_shape, monkeypatch):
    def spoil(model):
        with torch.no_grad():
            model.transformer.ln_f = torch.nn.Identity()

    monkeypatch.setattr(demo, "replace", spoil)
    result = run("demo", "--prompt-tokens", 8, "--new-tokens", 8, "--seconds", 0)
    assert result.exit_code == 1
    assert "differs from eager's" in result.stdout or "logits error" in result.stdout


def test_twins_share_their_parameters():
    model = demo.random_model(SMALL, torch.float32)
    other = demo.twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    ck.replace(other)
    with pytest.raises(ValueError, match="nothing in this"):
        ck.restore(model)


def rates(prefill, token):
    return demo.Rates(prefill, prefill, token, token)


def row(**changes):
    given = dict(model="m", dtype="fp32", prompt=8, tokens=4, rounds=3, same=4)
    given |= dict(eager=rates(2.0, 0.3), replaced=rates(1.0, 0.1))
    return demo.Row(**{**given, **changes})


def test_a_red_row_claims_no_speedup():
    assert row().speedups == pytest.approx((2.0, 3.0))
    assert row(same=3).red == "token 4 of 4 differs from eager's"
    assert all(s != s for s in row(same=3).speedups)
    assert row(dtype="bf16", same=3).red is None  # near-ties fall either way in 16 bits
    assert row(eager_error=1e-3, error=1.9e-3, scale=1.0).red is None
    assert "logits error" in row(eager_error=1e-3, error=3e-3, scale=1.0).red
    assert "logits error" in row(eager_error=1e-3, error=float("nan"), scale=1.0).red


# ---- bench --------------------------------------------------------------------------------------


def test_bench_passes_ops_dtypes_threads_and_file_on(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(bench, "run", lambda *args, **more: calls.append((args, more)) or [])
    out = tmp_path / "x.json"
    call = ("bench", "gemm", "attention", "--dtype", "bf16", "--no-compile", "--threads", 1)
    on_gpu = ("--device", "cuda", "--backend", "triton", "--gradients")
    assert run(*call, "--out", out, *on_gpu).exit_code == 0
    assert run("bench").exit_code == 0
    assert calls == [
        (
            (["gemm", "attention"], ["bf16"], 1, out, False),
            {"device": "cuda", "backend": "triton", "gradients": True},
        ),
        (
            (None, ["fp32", "bf16"], None, None, True),
            {"device": "cpu", "backend": "auto", "gradients": False},
        ),
    ]


def test_bench_end_to_end_prints_a_table_and_writes_json(small_shape, monkeypatch, tmp_path):
    monkeypatch.setattr(
        *(demo.end_to_end, "__kwdefaults__"),
        {**demo.end_to_end.__kwdefaults__, "prompt": 8, "new_tokens": 4, "seconds": 0.0},
    )
    out = tmp_path / "e2e.json"
    result = run("bench", "e2e", "--dtype", "fp32", "--out", out)
    assert result.exit_code == 0, result.output
    assert "all of 4 tokens equal" in result.stdout
    assert len(json.loads(out.read_text())["rows"]) == 1


def test_bench_refuses_what_does_not_fit_together():
    assert "op must be" in fails("bench", "softmax", "--no-compile")
    assert "for ops, not for e2e" in fails("bench", "e2e", "--device", "cuda")
    assert "e2e runs alone" in fails("bench", "e2e", "gemm")
    assert "--model is for e2e" in fails("bench", "gemm", "--model", "gpt2")
    assert "unknown name 'gpt5'" in fails("bench", "e2e", "--model", "gpt5")
    assert "no --compile" in fails("bench", "e2e", "--compile")


# ---- quantize -----------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_quantize_writes_a_checkpoint_that_generate_reads(folder, tmp_path, format):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 5, encoding="utf-8")
    out = tmp_path / "small"
    options = ("--model", folder, "--out", out, "--format", format, "--text", text)
    result = run("quantize", *options)
    assert result.exit_code == 0, result.output
    assert f"{format}: loss " in result.stdout and "perplexity" in result.stdout
    prompt = ("--prompt", "The quick", "--max-new-tokens", "8")
    found = run("generate", "--model", out, *prompt)
    assert found.exit_code == 0, found.output
    wanted = run("generate", "--model", folder, "--quantize", format, *prompt)
    assert found.stdout == wanted.stdout


def test_quantize_tells_what_is_wrong(folder, tmp_path):
    assert "must not be the model's own folder" in fails(
        "quantize", "--model", folder, "--out", folder
    )
    nowhere = fails("quantize", "--model", tmp_path / "no", "--out", tmp_path / "x")
    assert "quantize: --model must be 'tiny' or a folder" in nowhere
    assert "--format" in fails("quantize", "--out", tmp_path / "x", "--format", "int2")
    ck.quantize.save(ck.GPT.from_pretrained(folder), tmp_path / "q", "int8")
    (tmp_path / "q" / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    assert "is quantized already" in fails(
        "generate", "--model", tmp_path / "q", "--prompt", "x", "--quantize", "int8"
    )
    for name in ("quantize", "prune"):
        told = fails(name, "--model", tmp_path / "q", "--out", tmp_path / "x")
        assert f"{name}: {tmp_path / 'q'} is quantized already: --model must be" in told
    with pytest.raises(ValueError, match="quantization_config"):
        ck.GPT.from_pretrained(tmp_path / "q")
