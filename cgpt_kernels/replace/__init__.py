"""Swap a model's modules for fused ones, in place, and back.

`replace` changes the class of each module that has a fused counterpart (see swap.py for why that
keeps everything else as it was). The counterparts live in one adapter file per model family,
imported only when a model holds one of its modules: transformers stays optional.

An adapter is a file with `CLASSES`, {class: fused class}, where a fused class is a module-level
`class FusedX(X, Replaced)` that adds no parameters and no __init__; `_ADAPTERS` names it.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable

import torch
from torch import nn

from cgpt_kernels import backends, checks, decoder
from cgpt_kernels.replace import packing, torch_nn
from cgpt_kernels.replace.swap import Replaced, lora_factors
from cgpt_kernels.replace.table import Row, Table

__all__ = ["Replacement", "replace", "restore"]

# Where a module's class is defined -> the adapter that knows it.
_ADAPTERS = {
    "cgpt_kernels.gpt": "reference_gpt",
    "transformers.pytorch_utils": "hf_gpt2",  # Conv1D
    "transformers.models.gpt2.modeling_gpt2": "hf_gpt2",
    "transformers.models.bert.modeling_bert": "hf_bert",
    "peft.tuners.lora.layer": "peft_lora",
}
# Where a causal language model's class is defined -> the adapter whose `decoder_parts` knows it.
_DECODERS = {
    "cgpt_kernels.gpt": "reference_gpt",
    "transformers.models.gpt2.modeling_gpt2": "hf_gpt2",
}
_SUPPORTED = f"cgpt_kernels.GPT, Hugging Face GPT-2 and BERT, and {torch_nn.SUPPORTED}"
QUANTIZED = ("int8", "int4")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Replacement:
    """What `replace` did; `restore()` undoes it, as does leaving it as a context manager."""

    def __init__(self, model: nn.Module, rows: list, before: list):
        self.model = model
        self._rows = rows  # (row, module)
        self._before = before  # (module, what _set takes) of each module that was changed

    @property
    def table(self) -> Table:
        """One row per module of the model: replaced by what, or left alone and why, and the memory
        that packed copies of its weights take now."""
        return Table(
            dataclasses.replace(row, packed=packing.copied_bytes(module))
            for row, module in self._rows
        )

    def restore(self) -> None:
        """Set every module back to what it was before this call; a second time does nothing."""
        # What `ck.restore` or a second copy of this call has put back needs nothing more.
        before = [entry for entry in self._before if isinstance(entry[0], Replaced)]
        _check_ours(module for module, _ in before)
        self._before = []
        for module, state in before:
            _set(module, *state)

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, *exception) -> None:
        self.restore()

    def __repr__(self) -> str:
        replaced = len(self.table.replaced)
        kind = type(self.model).__name__
        return f"Replacement({kind}: {replaced} of {len(self.table)} modules replaced)"

    def __str__(self) -> str:
        return str(self.table)

    def __rich__(self):
        return self.table.__rich__()


def replace(
    model: nn.Module,
    backend: str = "auto",
    *,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    keep_original: bool = True,
) -> Replacement:
    """Run `model` on this project's ops: swap its modules for fused ones, in place.

    model: Hugging Face GPT-2 or BERT, `cgpt_kernels.GPT`, or any module tree that holds
        nn.LayerNorm, nn.Linear, nn.MultiheadAttention or nn.TransformerEncoderLayer. Subclasses of
        these are left alone, since their behaviour is their own.
    backend: "auto" lets each op choose for its tensors and fall back where it must; a named one
        runs or raises.
    dtype: casts the model, as model.to(dtype) does; `restore` does not cast back.
    quantize: None; "int8", a scale per output channel; "int4", a scale per 64 values along the
        input. Weights of nn.Linear and Conv1D only, for inference on the CPU or, in bf16 and fp16,
        by the CUDA kernels; under "int4" a head tied to an embedding is int8, and LoRA's factors
        stay as they are. `restore` goes back to the weights as they were.
    keep_original: False frees the memory of every weight that has a packed copy and is not tied to
        another module: for inference only. The state_dict then unpacks, exactly where weights are
        not quantized, and so does `restore`.

    Parameters, buffers, hooks, tying and the state_dict stay as they are, so training, saving,
    LoRA, `generate` and torch.compile go on as before. Calling it again picks up modules added
    since and changes the backend. Outputs differ from eager's by rounding; dropout in training
    draws other masks from the same generator.

    Raises ValueError or TypeError before anything is changed: nothing to replace, an unknown
    backend, or a named backend that cannot run on the model's device and dtype.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace: model must be a torch.nn.Module, got {type(model).__name__}")
    checks.is_choice("replace", "quantize", quantize, (None, *QUANTIZED))
    checks.is_choice("replace", "keep_original", keep_original, (True, False))
    if dtype is not None and dtype not in _DTYPES:
        names = ", ".join(map(str, _DTYPES))
        raise ValueError(f"replace: dtype must be None or one of {names}, got {dtype!r}")

    rows, changes = [], []
    for name, module in model.named_modules():
        if type(module) in (nn.ModuleList, nn.ModuleDict):  # nothing is computed there
            continue
        fused, reason = _plan(module)
        cls = fused.original() if fused else type(module)
        rows.append((Row(name, cls.__name__, fused and fused.__name__, reason), module))
        if fused is not None:
            changes.append((module, fused))
    if not changes:
        held = sorted({row.cls for row, _ in rows if row.name} or {type(model).__name__})
        raise ValueError(
            f"replace: nothing in {type(model).__name__} can be replaced, it holds "
            f"{', '.join(held[:8])}. Supported: {_SUPPORTED}. "
            "CONTRIBUTING.md, 'Add a model family', says how to write an adapter"
        )
    _check_backend(backend, changes, dtype)
    packs = quantize is not None or not keep_original
    factors = lora_factors(model)
    packable = {
        module: None
        for module, fused in changes
        if issubclass(fused, packing.Packable) and module not in factors
    }
    if packs:
        _check_packing(model, backend, quantize, packable, dtype)

    if dtype is not None:
        model.to(dtype)
    before, tied = [], packing.tied(model)
    for module, fused in changes:
        now = _state(module)
        state = fused, backend, None
        if quantize and module in packable:
            head = quantize == "int4" and tied.get(id(module.weight)) is nn.Embedding
            state = fused, backend, "int8" if head else quantize
        if now != state:
            before.append((module, now))
            _set(module, *state)
        if packs and module in packable and not packing.given_up(module):
            if keep_original or id(module.weight) in tied:
                packing.current(module, module.weight)
            else:
                packing.give_up(module)
    return Replacement(model, rows, before)


def decoder_parts(model: nn.Module) -> decoder.Parts | None:
    """What a decoder of a replaced model is made of; None where its modules must run.

    They must where the model is not wholly replaced, where hooks, dropout or adapters other than
    plain LoRA's are at work, or where a backend other than "auto" and those of the model's device
    that have a decoder, "cpu" and "cuda", was asked for.
    """
    if type(model).__module__ == "peft.peft_model":
        model = importlib.import_module(f"{__name__}.peft_lora").base_model(model)
    kind = type(model).original() if isinstance(model, Replaced) else type(model)
    adapter = _DECODERS.get(kind.__module__)
    if adapter is None:
        return None
    return importlib.import_module(f"{__name__}.{adapter}").decoder_parts(model)


def restore(model: nn.Module) -> None:
    """Give every replaced module of `model` its own class again; outputs are eager's, bit for bit.

    Raises ValueError where nothing is replaced.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model must be a torch.nn.Module, got {type(model).__name__}")
    replaced = [module for module in model.modules() if isinstance(module, Replaced)]
    if not replaced:
        raise ValueError(
            f"restore: nothing in this {type(model).__name__} is replaced; call replace first"
        )
    _check_ours(replaced)
    for module in replaced:
        _set(module, type(module).original(), None, None)


def _check_backend(backend: str, changes: list, dtype: torch.dtype | None) -> None:
    """ValueError where `backend` is unknown, or named and unable to run what `changes` need."""
    checks.is_choice("replace", "backend", backend, ("auto", *backends.BACKENDS))
    if backend == "auto":
        return
    needs = set()
    for module, fused in changes:
        for p in module.parameters():
            if not p.is_meta:  # these tensors come later, and with them their device
                kept = dtype is None or not p.is_floating_point()
                needs.update((op, p.device, p.dtype if kept else dtype) for op in fused.uses)
    for op, device, p_dtype in sorted(needs, key=str):
        vector = torch.zeros(16, dtype=p_dtype, device=device)
        matrix, heads = vector.expand(16, 16), vector.expand(1, 1, 16, 16)
        tensors = {"layer_norm": (matrix, vector, vector), "gemm": (matrix, matrix, vector)}
        try:
            backends.resolve(op, backend, tensors.get(op, (heads, heads, heads)))
        except ValueError as error:
            raise ValueError(f"replace: {error}") from None


def _check_ours(modules: Iterable[nn.Module]) -> None:
    """ValueError where another library has put a class of its own on top of a fused one."""
    for module in modules:
        if type(module) is not _fused_class(type(module).original()):
            raise ValueError(
                f"restore: a module's class is {type(module).__name__}, built by another library "
                f"on {type(module).__mro__[1].__name__}; undo that (a parametrization, FSDP) first"
            )


def _check_packing(model, backend, quantize, packable, dtype) -> None:
    """ValueError where weights cannot be packed as asked."""
    asked = f"quantize={quantize!r}" if quantize else "keep_original=False"
    able = ("auto", "cpu", "cuda") if quantize else ("auto", "cpu")  # float copies are the CPU's
    if backend not in able:
        raise ValueError(
            f"replace: {asked} needs backend {checks.one_of(map(repr, able))}, got {backend!r}"
        )
    if backends._C is None:
        raise ValueError(f"replace: {asked} cannot run: {backends._C_REASON}")
    if not packable:
        raise ValueError(
            f"replace: {asked} takes nn.Linear or Conv1D weights, {type(model).__name__} has none"
        )
    for module in packable:
        if packing.given_up(module):
            if module.quantize != quantize:
                raise ValueError(
                    f"replace: {asked} needs the original weights, which keep_original=False gave "
                    "up; restore the model first"
                )
            continue
        weight, kept = module.weight, dtype or module.weight.dtype
        built = quantize and backends.implementation("gemm", "cuda")[0]
        if backend == "cuda" or (built and weight.is_cuda):
            if kept not in checks.LOW_PRECISION:
                raise ValueError(
                    f"replace: {asked} needs weights in bf16 or fp16 on cuda, got "
                    f"{checks.name_of(kept)}; pass dtype=torch.bfloat16 or torch.float16"
                )
        elif not weight.is_cpu or kept not in backends.KERNEL_DTYPES:
            raise ValueError(
                f"replace: {asked} needs weights in fp32, bf16 or fp16 on cpu, got "
                f"{checks.name_of(weight.dtype)} on {weight.device.type}"
            )


def _state(module: nn.Module) -> tuple:
    """What `_set` takes to bring the module back to what it is now."""
    attributes = module.__dict__.get
    return type(module), attributes("kernel_backend", "auto"), attributes("quantize")


def _set(module: nn.Module, cls: type, backend: str | None, quantize: str | None) -> None:
    if not issubclass(cls, Replaced):
        if packing.given_up(module):
            packing.bring_back(module)
        module.__dict__.pop("packed_copy", None)
    module.__class__ = cls
    for name, value, usual in (("kernel_backend", backend, "auto"), ("quantize", quantize, None)):
        module.__dict__.pop(name, None)
        if issubclass(cls, Replaced) and value != usual:
            setattr(module, name, value)


def _fused_class(cls: type) -> type[Replaced] | None:
    """The fused counterpart of a module class, importing the adapter that knows it."""
    adapter = _ADAPTERS.get(cls.__module__)
    if adapter is None:
        return torch_nn.CLASSES.get(cls)
    return importlib.import_module(f"{__name__}.{adapter}").CLASSES.get(cls)


def _plan(module: nn.Module) -> tuple[type[Replaced] | None, str]:
    """(fused class or None, reason or note) for one module."""
    cls = type(module)
    if isinstance(module, Replaced):
        if cls is _fused_class(cls.original()):
            return cls, cls.note(module)
        return None, f"its class was built by another library on {cls.__mro__[1].__name__}"
    fused = _fused_class(cls)
    if fused is None:
        return None, _why_not(module)
    if "forward" in module.__dict__:
        return None, "its forward was patched on the object (accelerate does that)"
    reason = fused.unsuitable(module)
    return (None, reason) if reason else (fused, fused.note(module))


def _why_not(module: nn.Module) -> str:
    cls = type(module)
    if cls in torch_nn.LEFT_ALONE:
        return torch_nn.LEFT_ALONE[cls]
    for base in cls.__mro__[1:]:
        if base is not nn.Module and issubclass(base, nn.Module) and _fused_class(base):
            return f"a subclass of {base.__name__}, which may behave in its own way"
    if next(module.children(), None) is not None:
        return "its own forward runs, on the parts below"
    return "no kernel for this class"
