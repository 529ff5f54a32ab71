"""Hugging Face GPT-2 checkpoint folders: config.json and safetensors, read and written; older
folders' pytorch_model.bin is read too.

GPT-2 stores its projections as Conv1D, [in, out]; the tensors given and taken here are nn.Linear's,
[out, in], under the names of `GPT.state_dict()`.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_config(path: str | os.PathLike) -> tuple[dict, str]:
    """The contents of the folder's config.json, and that file's name for messages."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(
            f"GPT.from_pretrained: {path} is not a folder with a config.json (nothing is "
            "downloaded: `hf download REPO --local-dir DIR` fetches a model)"
        )
    return _read_json(file), str(file)


def read_weights(
    path: str | os.PathLike,
    expected: dict[str, tuple[int, ...]],
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> dict[str, Tensor]:
    """All tensors of `expected` (name: shape) but the tied "lm_head.weight", checked.

    dtype: None keeps what is stored. A product takes one dtype, so where several are stored, all
    get the one that config.json names, or the narrowest that holds them all.
    Raises ValueError naming the file and what is missing, unexpected or of another shape.
    """
    if dtype is not None and not getattr(dtype, "is_floating_point", False):
        raise ValueError(f"from_pretrained: dtype must be None or a floating one, got {dtype!r}")
    weights: dict[str, Tensor] = {}
    for file in _weight_files(Path(path)):
        for key, t in _tensors(file, device):
            name = _name(key)
            if name is None:
                continue
            if name not in expected:
                raise ValueError(f"{file}: config.json has no place for tensor {key!r}")
            shape = expected[name][::-1] if _is_conv1d(name) else expected[name]
            if tuple(t.shape) != shape:
                raise ValueError(f"{file}: {key} must have shape {shape}, got {tuple(t.shape)}")
            if t.dtype not in _DTYPES and not name.endswith(".packed"):
                raise ValueError(
                    f"{file}: {key} must be in fp32, bf16, fp16 or fp64, got {t.dtype}; quantized "
                    "weights are dequantized by what made them"
                )
            kept = dtype if dtype and t.is_floating_point() else t.dtype
            weights[name] = (t.t() if _is_conv1d(name) else t).to(kept).contiguous()
    stored = {t.dtype for t in weights.values() if t.is_floating_point()}
    if len(stored) > 1:
        config, _ = read_config(path)
        named = str(config.get("dtype", config.get("torch_dtype")))
        kept = {str(d).removeprefix("torch."): d for d in _DTYPES}.get(named)
        kept = kept or functools.reduce(torch.promote_types, stored)
        for name, t in weights.items():
            if t.is_floating_point():
                weights[name] = t.to(kept)
    head = weights.pop("lm_head.weight", None)
    missing = [n for n in expected if n not in weights and n != "lm_head.weight"]
    if missing:
        raise ValueError(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}")
    if head is not None and not torch.equal(head, weights["transformer.wte.weight"]):
        raise ValueError(f"{path}: lm_head.weight differs from wte.weight; only tied heads load")
    return weights


def _tensors(file: Path, device: str | torch.device) -> Iterator[tuple[str, Tensor]]:
    """(name as stored, tensor) of each tensor in a safetensors file or one of torch.save."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                for key in tensors.keys():
                    yield key, tensors.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{file}: not a readable safetensors file: {error}") from None
        return
    try:
        stored = torch.load(file, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first = (str(error).splitlines() or ["cut short"])[0]
        raise ValueError(f"{file}: not a readable file of weights: {first}") from None
    if not isinstance(stored, dict) or not all(isinstance(t, Tensor) for t in stored.values()):
        raise ValueError(f"{file}: must hold a state_dict, got {type(stored).__name__}")
    yield from stored.items()


def check_folder(command: str, path: str | os.PathLike, model: str | os.PathLike) -> None:
    """ValueError where a command's --out cannot become a folder, or is the model's own: before its
    work, not after."""
    folder = Path(path).absolute()
    if folder.resolve() == Path(model).resolve():
        raise ValueError(f"{command}: --out must not be the model's own folder, got {path}")
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not there.is_dir():
        raise ValueError(f"{command}: --out must be a folder, {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{command}: --out must be writable, {there} is not")


def check_not_quantized(command: str, model: str | os.PathLike) -> None:
    """ValueError where the weights of a command's --model are quantized."""
    if "quantization_config" in read_config(model)[0]:
        raise ValueError(
            f"{command}: {model} is quantized already: --model must be the folder it was made from"
        )


def copy_tokenizer(source: str | os.PathLike, path: str | os.PathLike) -> None:
    """Copy whatever tokenizer files one folder has into another."""
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(path) / name)


def write(path: str | os.PathLike, config: dict, weights: dict[str, Tensor]) -> None:
    """Write config.json and model.safetensors into the folder, each renamed into place whole."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {n: (t.t() if _is_conv1d(n) else t).contiguous() for n, t in weights.items()}
    text = json.dumps(config, indent=2) + "\n"
    _replace(
        folder / "model.safetensors",
        lambda file: save_file(stored, file, metadata={"format": "pt"}),
    )
    _replace(folder / "config.json", lambda file: file.write_text(text, encoding="utf-8"))


def _name(key: str) -> str | None:
    """The state_dict name of a stored tensor; None for the causal mask that old files carry."""
    if key.endswith((".attn.bias", ".attn.masked_bias")):
        return None
    # GPT2Model, without the LM head, saves its tensors without the prefix.
    return key if key.startswith(("transformer.", "lm_head.")) else f"transformer.{key}"


def _is_conv1d(name: str) -> bool:
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def _replace(file: Path, write_to: Callable[[Path], object]) -> None:
    """write_to a temporary file, then rename: readers see the whole old file or the new one."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        write_to(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _read_json(file: Path) -> dict:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(data).__name__}")
    return data


def _weight_files(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        single, index = folder / name, folder / f"{name}.index.json"
        if single.is_file():
            return [single]
        if index.is_file():
            break
    else:
        raise ValueError(
            f"GPT.from_pretrained: {folder} holds no model.safetensors or pytorch_model.bin (nor "
            "an index of them); other formats are converted by transformers' "
            "from_pretrained(...).save_pretrained(...)"
        )
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(n, str) for n in places.values()):
        raise ValueError(f"{index}: weight_map must map names of tensors to names of files")
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index}: names {name}, which lies outside its folder")
        if not (folder / name).is_file():
            raise ValueError(f"{index}: names {name}, which is missing")
    return [folder / name for name in names]
