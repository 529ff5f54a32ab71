"""The command line: `cgpt-kernels doctor | demo | generate | train | quantize | prune | bench`.

Results go to stdout; progress, rates and errors to stderr. An error is one line and exit code 2; a
check that fails (outputs that disagree) is exit code 1.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from .prune.cli import app as prune_app
from .train.cli import app as train_app
from .wafer.cli import app as wafer_app

# torch, rich and the rest of the package are imported by the command that needs them.
_USER_ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError)


class _OneLineErrors(TyperGroup):
    """An error is one line and exit code 2; CGPT_TRACEBACK=1 shows where it came from."""

    def main(self, *args, standalone_mode: bool = True, **kwargs):
        usage_error = typer.BadParameter.__mro__[2]  # ClickException; newer typers vendor click
        try:
            code = super().main(*args, standalone_mode=False, **kwargs)
        except (typer.Abort, KeyboardInterrupt):
            code = 130
        except usage_error as error:
            message, code = error.format_message(), 2
            if type(error).__name__ != "NoArgsIsHelpError":  # whose message is the help itself
                message = _one_line(f"{message} (--help shows the options)")
            typer.echo(message, err=True)
        except _USER_ERRORS as error:
            if os.environ.get("CGPT_TRACEBACK") == "1":
                raise
            typer.echo(_one_line(str(error) or type(error).__name__), err=True)
            code = 2
        sys.exit(code if isinstance(code, int) else 0)


def _one_line(message: str) -> str:
    return "cgpt-kernels: " + " ".join(message.split())


class Quantize(str, Enum):
    int8, int4 = "int8", "int4"


class KVCache(str, Enum):
    int8 = "int8"


class Dtype(str, Enum):
    fp32, bf16, fp16 = "fp32", "bf16", "fp16"


app = typer.Typer(
    cls=_OneLineErrors,
    add_completion=False,
    rich_markup_mode=None,  # plain help keeps the examples' lines as they are
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
_Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads; default torch's own number.")
]


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Fused kernels for GPT-2-class models: what they do here, how fast, on which model.

    \b
    cgpt-kernels doctor                    what this machine runs, and why
    cgpt-kernels demo                      eager against replaced, in a few minutes
    cgpt-kernels generate --prompt 'def '  text from the shipped model
    cgpt-kernels bench gemm --dtype bf16   each case against eager, torch.compile and the bound
    cgpt-kernels quantize --out tiny-int8  a smaller checkpoint, and what it costs in loss
    cgpt-kernels prune --out tiny-small    fewer MLP neurons, and what that costs in loss
    cgpt-kernels train texts/ --out run    a model from text, killed and resumed at will
    """
    if version:
        from importlib.metadata import PackageNotFoundError
        from importlib.metadata import version as version_of

        try:
            typer.echo(version_of("cgpt-kernels"))
        except PackageNotFoundError:
            typer.echo("unknown: run from its source, not installed")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("doctor", short_help="What this machine runs, and why.")
def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="JSON, e.g. for a bug report.")] = False,
) -> None:
    """Processor, tier, threads, GPU, versions, and which backend each op would use and why.

    \b
    cgpt-kernels doctor
    cgpt-kernels doctor --json > report.json
    CGPT_CPU_ISA=avx2 cgpt-kernels doctor      with another instruction-set tier
    """
    from .doctor import doctor

    report = doctor()
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1))
    else:
        _console().print(report)


@app.command("generate", short_help="Continue a prompt.")
def generate_command(
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from stdin.")],
    model: Annotated[
        str, typer.Option(help="Folder in Hugging Face format, or tiny, the shipped model.")
    ] = "tiny",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from the k likeliest (temperature > 0).")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the fewest that hold probability p.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws: the same text again.")] = None,
    backend: Annotated[
        str, typer.Option(help="auto, or cpu, cuda, triton; eager leaves the model as it is.")
    ] = "auto",
    dtype: Annotated[
        Dtype | None, typer.Option(help="Default: fp32 on a CPU, on a GPU as stored.")
    ] = None,
    quantize: Annotated[
        Quantize | None, typer.Option(help="Weights in 8 or 4 bits; bf16 or fp16 on a GPU.")
    ] = None,
    kv_cache: Annotated[KVCache | None, typer.Option(help="Keys and values in 8 bits.")] = None,
    threads: _Threads = None,
) -> None:
    """Continue a prompt; the text streams to stdout, tokens/s go to stderr.

    \b
    cgpt-kernels generate --prompt 'def read_lines(path):'
    cgpt-kernels generate --prompt 'import ' --temperature 0.8 --top-k 40 --seed 1
    cgpt-kernels generate --model ./Cerebras-GPT-111M --prompt 'The sun' --dtype bf16
    cgpt-kernels generate --prompt 'import ' --quantize int4
    echo 'class Stack:' | cgpt-kernels generate --prompt - --backend eager
    """
    import torch

    from . import checks, timing
    from .backends import BACKENDS
    from .generate import generate
    from .quantize import is_quantized
    from .quantize import load as load_quantized
    from .replace import replace
    from .train.data import read_tokenizer

    checks.is_choice("generate", "--backend", backend, ("auto", *BACKENDS))
    try:
        if prompt == "-":
            prompt = sys.stdin.read().rstrip("\n")
        prompt.encode()
    except UnicodeError:
        raise ValueError("generate: --prompt must be UTF-8 text") from None
    device = "cuda" if torch.cuda.is_available() and backend != "cpu" else "cpu"
    wanted = dtype and timing.dtype_named(dtype.value)
    if wanted is None and device == "cpu":
        wanted = torch.float32
    folder = _model_folder("generate", model)
    tokenizer = read_tokenizer(folder, "generate")
    ids = torch.tensor([tokenizer.encode(prompt).ids], dtype=torch.long, device=device)
    if ids.shape[1] == 0:
        raise ValueError("generate: --prompt must hold at least one token, got an empty text")
    if is_quantized(folder):
        if quantize is not None or backend not in ("auto", "cpu"):
            raise ValueError(
                f"generate: {folder} is quantized already: leave out --quantize and --backend"
            )
        device, loaded = "cpu", load_quantized(folder, dtype=wanted)
        ids = ids.cpu()
    else:
        loaded = _load(folder, wanted, device)
        if backend != "eager" or quantize is not None:
            replace(loaded, backend=backend, quantize=quantize and quantize.value)

    stamps, written = [], _TextStream(tokenizer)

    def stream(tokens):
        sys.stdout.write(prompt if not stamps else "")  # not before an error can be told
        stamps.append(time.perf_counter())
        sys.stdout.write(written.add(int(tokens[0])))
        sys.stdout.flush()

    with timing.threads(threads) as count:
        began = time.perf_counter()
        generate(
            loaded,
            ids,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            eos_token_id=loaded.config.eos_token_id,
            kv_cache=kv_cache and kv_cache.value,
            stream=stream,
        )
    sys.stdout.write(written.rest() + "\n")
    sys.stdout.flush()
    prefill, decode = stamps[0] - began, stamps[-1] - stamps[0]
    rate = f", then {(len(stamps) - 1) / decode:.1f} tokens/s" if len(stamps) > 1 else ""
    kept = checks.name_of(next(loaded.parameters()).dtype)
    typer.echo(
        f"{ids.shape[1]} prompt tokens in {prefill * 1e3:.1f} ms{rate}; {len(stamps)} new tokens, "
        f"backend {backend}, {kept}, {device}, {count} threads",
        err=True,
    )


@app.command("quantize", short_help="Write a checkpoint in 8 or 4 bits; what it costs in loss.")
def quantize_command(
    out: Annotated[Path, typer.Option(help="Folder to write; generate --model reads it.")],
    model: Annotated[
        str, typer.Option(help="Folder in Hugging Face format, or tiny, the shipped model.")
    ] = "tiny",
    format: Annotated[
        Quantize, typer.Option(help="int8: a scale per output channel; int4: per 64 inputs.")
    ] = Quantize.int8,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of embeddings, norms and activations; default as stored.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text files to measure the loss on; default what tiny never saw."),
    ] = None,
) -> None:
    """Quantize the projections of a GPT-2 checkpoint; loss and perplexity before and after.

    \b
    cgpt-kernels quantize --out tiny-int8
    cgpt-kernels quantize --model ./Cerebras-GPT-111M --format int4 --dtype bf16 --out 111m-int4
    cgpt-kernels generate --model tiny-int8 --prompt 'import '
    """
    from . import checkpoint, quantize, timing
    from .gpt import GPT
    from .train.data import read_tokenizer

    folder = _model_folder("quantize", model)
    checkpoint.check_folder("quantize", out, folder)
    checkpoint.check_not_quantized("quantize", folder)
    tokenizer = read_tokenizer(folder, "quantize")
    texts = [quantize.read_text(file) for file in text or ()]
    console = _console()
    with console.status("reading the model"):
        kept = dtype and timing.dtype_named(dtype.value)
        loaded = GPT.from_pretrained(folder, dtype=kept)
    with console.status("loss before and after"):
        ids = quantize.encode(folder, tokenizer, texts or quantize.held_out_text())
        report = quantize.measure(loaded, format.value, ids)
    quantize.save(loaded, out, format.value)
    checkpoint.copy_tokenizer(folder, out)
    console.print(
        f"{format.value}: loss {report.loss:.4f} -> {report.quantized_loss:.4f} nats/token over "
        f"{report.tokens} tokens, perplexity {report.perplexity_change:+.2%}; projections and head "
        f"{report.bytes / 1e6:.1f} -> {report.quantized_bytes / 1e6:.1f} MB"
    )
    console.print(f"written to {out}", markup=False, highlight=False)


@app.command("demo", short_help="Eager against replaced, whole models, one table.")
def demo_command(
    model: Annotated[str, typer.Option(help="Published shape of the second part.")] = (
        "cerebras-gpt-111m"
    ),
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of its prefill.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that it writes.")] = 64,
    seconds: Annotated[
        float, typer.Option(min=0.0, help="Measuring time per model and dtype; 3 rounds at least.")
    ] = 30.0,
    threads: _Threads = None,
    out: Annotated[Path | None, typer.Option(help="Write the rows as JSON too.")] = None,
) -> None:
    """This machine; the shipped model and the 111M shape, eager against replaced, in one table.

    \b
    cgpt-kernels demo
    cgpt-kernels demo --seconds 5 --out demo.json
    cgpt-kernels demo --model gpt2 --threads 1
    """
    from . import demo, timing

    with timing.threads(threads):
        agree = demo.run(
            _console(),
            model=model,
            prompt=prompt_tokens,
            new_tokens=new_tokens,
            seconds=seconds,
            out=out,
        )
    if not agree:
        raise typer.Exit(1)


@app.command("bench", short_help="Each op against eager, torch.compile and the bound.")
def bench_command(
    what: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OP]... | e2e | train", help="Default: every op."),
    ] = None,
    dtype: Annotated[
        list[Dtype] | None, typer.Option(help="Repeat for several; default fp32 and bf16.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="e2e and train: a published shape, default 111M.")
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Not e2e: time torch.compile as well."),
    ] = None,
    threads: _Threads = None,
    device: Annotated[str | None, typer.Option(help="Ops only: cpu (default) or cuda.")] = None,
    backend: Annotated[str | None, typer.Option(help="Ops only: default auto.")] = None,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Ops only: forward and backward.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="JSON file; ops and peers default to bench/results/<machine>/."),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(help="e2e only: other systems too, e.g. all, all:bf16, openvino:int8."),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="train, or e2e with --peers: turns of each system; default 5."),
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="train only; repeat for several; default 512.")
    ] = None,
    row: Annotated[
        list[str] | None, typer.Option(help="train only: rows by name, e.g. bf16; default all.")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=3, help="With --peers: tokens written; default 32.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--everything", help="With --peers: every work in every format.")
    ] = False,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="With --peers: convert and compile only.")
    ] = False,
    work: Annotated[
        list[str] | None,
        typer.Option(help="With --peers: 512, 2048 or batch; repeat for several; default all."),
    ] = None,
) -> None:
    """Ops against eager, torch.compile and the bound; e2e: whole models against eager or peers;
    train: training steps and their ops against this project's targets.

    \b
    cgpt-kernels bench                                   every op, fp32 and bf16
    cgpt-kernels bench gemm attention --dtype bf16 --no-compile
    cgpt-kernels bench attention --device cuda --backend triton --gradients
    cgpt-kernels bench --device cuda --backend triton    every op, then the targets of a GPU
    cgpt-kernels bench e2e --model cerebras-gpt-256m --out e2e.json
    cgpt-kernels bench e2e --peers all --prepare         converts and compiles, measures nothing
    cgpt-kernels bench e2e --model cerebras-gpt-111m --peers all
    cgpt-kernels bench e2e --peers openvino:int8,llama_cpp:int8 --rounds 3
    cgpt-kernels bench train --tokens 512 --tokens 1024
    cgpt-kernels bench train --model cerebras-gpt-256m --row bf16 --row fp32 --no-compile
    """
    what = what or []
    if "train" in what:
        if what != ["train"]:
            raise ValueError(f"bench: train runs alone, got {' '.join(what)}")
        taken = dtype, device, backend, gradients, peers, new_tokens, everything, prepare, work
        if any(taken):
            raise ValueError(
                "bench: train takes --model, --tokens, --row, --compile, --threads, --rounds, --out"
            )
        from . import bench_train

        made = bench_train.run(
            model=model or "cerebras-gpt-111m",
            tokens=tokens or (512,),
            only=row,
            threads=threads,
            compile=compile is not False,
            rounds=rounds or 5,
            out=out,
        )
        if any(one.red for one in made):
            raise typer.Exit(1)
        return
    if tokens or row:
        raise ValueError("bench: --tokens and --row are for train")
    if peers is None and (rounds or new_tokens or everything or prepare or work):
        raise ValueError(
            "bench: --rounds, --new-tokens, --everything, --prepare, --work need --peers"
        )
    dtypes = [d.value for d in dtype or (Dtype.fp32, Dtype.bf16)]
    if "e2e" in what:
        if what != ["e2e"]:
            raise ValueError(f"bench: e2e runs alone, got {' '.join(what)}")
        if compile is not None:
            raise ValueError("bench: e2e compares with eager only, it takes no --compile")
        if device or backend or gradients:
            raise ValueError("bench: --device, --backend and --gradients are for ops, not for e2e")
        if peers is not None:
            if dtype:
                raise ValueError("bench: with --peers a format is named as in --peers all:bf16")
            from . import bench_e2e

            red = not bench_e2e.run(
                _console(),
                model=model or "cerebras-gpt-111m",
                peers=peers,
                rounds=rounds or 5,
                new_tokens=new_tokens or 32,
                threads=threads,
                out=out,
                everything=everything,
                prepare=prepare,
                only=work,
            )
        else:
            red = _bench_end_to_end(model or "cerebras-gpt-111m", dtypes, threads, out)
    else:
        if model is not None:
            raise ValueError("bench: --model is for e2e, ops have their own cases")
        if peers is not None:
            raise ValueError("bench: --peers is for e2e, ops have their own cases")
        from . import bench

        rows = bench.run(
            what or None,
            dtypes,
            threads,
            out,
            compile is not False,
            device=device or "cpu",
            backend=backend or "auto",
            gradients=gradients,
        )
        red = any(row.red for row in rows)
        if device == "cuda" and not what and not gradients:
            from . import bench_gpu

            red |= any(one.red for one in bench_gpu.run(backend=backend or "auto"))
    if red:
        raise typer.Exit(1)


@app.command("tune", short_help="Measure the launch table and what auto tries first on this GPU.")
def tune_command(
    calls: Annotated[
        str, typer.Argument(help="Start of the calls' names: gemm, 'attention D=64', 'auto gemm'.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="JSON; default: the package's own table.")
    ] = None,
) -> None:
    """Try the launch configurations of each Triton kernel and write the fastest into the table;
    then compare cuda, triton and eager, op by op, for the order in which auto tries them.

    \b
    cgpt-kernels tune                      hours: every kernel, class of shape and candidate
    cgpt-kernels tune "attention D=64"     one part of it
    cgpt-kernels tune auto                 only what auto tries first on this GPU, minutes
    """
    if importlib.util.find_spec("triton") is None:
        raise ValueError("tune: triton is not installed: pip install 'cgpt-kernels[triton]'")
    from . import tune

    tune.tune(calls, **({} if out is None else {"out": out}))


def _bench_end_to_end(model: str, dtypes: list[str], threads: int | None, out: Path | None) -> bool:
    """Prints the rows; True when outputs disagree."""
    from . import demo, timing
    from .gpt import GPTConfig

    GPTConfig.from_name(model)  # an unknown name is told first
    console = _console()
    with timing.threads(threads) as count:
        busy = timing.others_busy()
        if busy is not None and busy > timing.BUSY:
            console.print(f"other processes use {busy:.0%} of the cores: trust ratios at most")
        with demo.Steps(console, total=len(dtypes) * (2 + 9)) as steps:
            rows = demo.end_to_end(model, dtypes, step=steps.step)
        console.print(demo.table(rows, f"{timing.machine_cpu()}, {count} threads"))
        if out is not None:
            console.print(f"written to {demo.write(out, rows)}", markup=False, highlight=False)
    return any(row.red or math.isnan(row.speedups[0]) for row in rows)


app.add_typer(wafer_app, name="wafer", short_help="A modelled wafer-scale engine.")
app.registered_commands += train_app.registered_commands + prune_app.registered_commands


# ---- what the commands share --------------------------------------------------------------------


def _console():
    """Rich on a terminal; plain text of a fixed width into files and pipes. NO_COLOR is rich's."""
    from rich.console import Console

    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 110
    return Console(width=wide, highlight=False)


def _model_folder(command: str, model: str) -> Path:
    """The folder of a model that is on this machine; nothing is ever downloaded."""
    from .assets import TINY

    folder = TINY if model == "tiny" else Path(model)
    if (folder / "config.json").is_file():
        return folder
    if model == "tiny":
        raise ValueError(
            f"{command}: the shipped model is not in this build ({TINY}); pass --model with a "
            "folder in Hugging Face format"
        )
    raise ValueError(
        f"{command}: --model must be 'tiny' or a folder with a config.json, got {model!r} "
        "(nothing is downloaded: `hf download REPO --local-dir DIR` fetches a model)"
    )


def _load(folder: Path, dtype, device: str):
    """GPT-2 and muP folders as the reference GPT, anything else through transformers."""
    from .checkpoint import read_config
    from .gpt import GPT

    kind = read_config(folder)[0].get("model_type")
    if kind in ("gpt2", "btlm"):
        return GPT.from_pretrained(folder, dtype=dtype, device=device)
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(
            f"generate: {folder} holds a {kind!r} model, which needs transformers: "
            "pip install 'cgpt-kernels[hf]'"
        )
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
    )
    if found["missing_keys"]:  # transformers draws them at random and only warns
        raise ValueError(
            f"generate: {folder} lacks {min(found['missing_keys'])} and perhaps more of a {kind!r} "
            "model: its config.json and its weights belong to different models"
        )
    return model.eval().to(device)


class _TextStream:
    """Tokens in, text out as soon as it is whole: a character may span several tokens."""

    def __init__(self, tokenizer):
        self.decode = tokenizer.decode
        # Tokens [context, shown) are on the screen and decoded again with what follows: some
        # tokenizers write a space only between tokens.
        self.ids: list[int] = []
        self.context = self.shown = 0

    def add(self, token: int) -> str:
        self.ids.append(token)
        text = self.rest()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self.context, self.shown = self.shown, len(self.ids)
        return text

    def rest(self) -> str:
        """What the tokens not shown yet add to the text."""
        before = self.decode(self.ids[self.context : self.shown])
        return self.decode(self.ids[self.context :])[len(before) :]
