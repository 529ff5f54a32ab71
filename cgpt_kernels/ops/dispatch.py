"""The three ways into a kernel, shared by all ops.

lean      plain tensors in plain eager, nothing needs a gradient: allocate, call, return.
function  the same with gradients: a torch.autograd.Function around the same forward.
library   anything else (torch.compile, export, modes, subclasses, autocast): `torch.ops.cgpt.<op>`.

torch.compile keeps an op as one node of its graph, but for backend "triton": there the op is
replaced by what its implementation does, so that the graph holds the kernels themselves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, autograd
from torch._functorch import config as functorch_config
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

from .. import backends

PLAIN = frozenset({Tensor, Parameter})
PLAIN_OR_NONE = PLAIN | {type(None)}

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_any_autocast = torch._C._is_any_autocast_enabled
_functorch_level = torch._C._functorch.peek_interpreter_stack
_jit_trace = torch._C._get_tracing_state
_is_grad_enabled = torch.is_grad_enabled


def undisturbed() -> bool:
    """True when nothing stands between a call and the kernel: no compiler, mode or transform.

    Seven questions of about 60 ns; a dispatcher round trip, which answers them too, is 3 us.
    """
    return not (
        is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _any_autocast()
        or _functorch_level() is not None
        or _jit_trace() is not None
        or forward_ad._current_level >= 0
    )


def once_differentiable(backward: Callable) -> Callable:
    """torch's, whose no_grad costs 1.7 us, only where a graph is made of the backward."""
    checked = autograd.function.once_differentiable(backward)

    def run(ctx, *grads):
        return (checked if _is_grad_enabled() else backward)(ctx, *grads)

    return run


# What kernels, views and the binding raise for arguments that they do not take.
REFUSALS = (ValueError, TypeError, RuntimeError, IndexError)


def _beyond_kernels(tensors: tuple) -> str | None:
    """What of torch only plain operations understand, if it is at work here."""
    if is_compiling():
        return None
    if _functorch_level() is not None:
        return "torch.func transforms its inputs"
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        return "an input carries a forward-mode derivative"
    return None


def choose(op: str, requested: str, tensors: tuple) -> str:
    """backends.resolve, and eager where nothing but plain torch operations works."""
    reason = _beyond_kernels(tensors)
    if reason is None:
        chosen = backends.resolve(op, requested, tensors)
        return backends.traced(chosen) if is_compiling() else chosen
    if requested not in ("auto", "eager"):
        raise ValueError(
            f"{op}: backend {requested!r} cannot run: {reason}. Available here: eager."
        )
    return "eager"


# ---- shapes -------------------------------------------------------------------------------------


def as_rows(x: Tensor) -> Tensor:
    """x [..., C] as [rows, C] with the last stride 1; copies only where strides cannot say it."""
    if x.ndim != 2:
        x = x.flatten(0, -2) if x.ndim > 2 else x.unsqueeze(0)
    return x if x.stride(1) == 1 else dense_last(x)


def dense_last(x: Tensor) -> Tensor:
    """x with its last stride 1: itself where it is so, else a contiguous copy."""
    if x.stride(-1) == 1:
        return x
    # contiguous() keeps odd strides of dimensions of size 1
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)


# ---- autocast -----------------------------------------------------------------------------------


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype autocast runs matrix products in, None when it is off for this device."""
    if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """fp32, bf16 and fp16 tensors in dtype; fp64, integers, bool and None as they are."""
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(t.to(dtype) if t is not None and t.dtype in narrow else t for t in tensors)


# ---- NumPy --------------------------------------------------------------------------------------


def _from_numpy(op: str, array: np.ndarray) -> Tensor:
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if any(s < 0 or s % max(array.itemsize, 1) for s in array.strides):
        array = np.ascontiguousarray(array)  # torch counts strides in elements, none negative
    with warnings.catch_warnings():
        # A read-only array is fine: kernels write to fresh tensors only.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        try:
            return torch.from_numpy(array)
        except TypeError:
            raise TypeError(
                f"{op}: a NumPy array must have a dtype that torch knows, got {array.dtype}; "
                "for bfloat16 pass torch tensors"
            ) from None


def any_numpy(*tensors) -> bool:
    """Whether one of a call's tensors is NumPy's."""
    return any(type(t).__module__ == "numpy" for t in tensors)


def with_numpy(function: Callable, *args, **options):
    """function with NumPy arrays among args and options read in place, results as NumPy arrays."""

    def convert(value):
        if isinstance(value, tuple):
            return tuple(map(convert, value))
        return _from_numpy(function.__name__, value) if isinstance(value, np.ndarray) else value

    with torch.no_grad():
        out = function(*map(convert, args), **{k: convert(v) for k, v in options.items()})
    return tuple(o.numpy() for o in out) if isinstance(out, tuple) else out.numpy()


# ---- torch.library ------------------------------------------------------------------------------

_library = torch.library.Library("cgpt", "DEF")
_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
# What ops take beside tensors.
_VALUES = frozenset({type(None), float, int, bool, str, tuple, list})


def define(
    schema: str,
    run: Callable,
    fake: Callable,
    *,
    backward: Callable | None = None,
    save: Callable | None = None,
    autocast: Callable | None = None,
) -> Callable:
    """Register `cgpt::<schema>`.

    Args:
        run: the implementation on CPU and CUDA tensors.
        fake: shapes, dtypes and strides of the outputs only.
        backward, save: gradient and what it needs, as torch.library.register_autograd takes them.
            Without them the op refuses to be differentiated.
        autocast: maps the op's arguments to those cast for the active autocast dtype:
            (device_type, *args) -> args.
    Returns:
        The op to call, with its arguments in their order: torch.ops.cgpt.<name>, past torch's
        dispatcher where nothing would listen to it.
    """
    name = schema.split("(")[0]

    def fresh(*args):
        # Outputs given their shape by view() are fresh memory, and no views to autograd, which
        # would refuse to write into them.
        with torch._C._ExcludeDispatchKeyGuard(_VIEWS):
            return run(*args)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, fresh, key)
    torch.library.register_fake(f"cgpt::{name}", fake, lib=_library)

    def refuse(ctx, *grads):
        raise NotImplementedError(
            f"{name}: a gradient of a gradient is not offered; use backend='eager' for it"
        )

    torch.library.register_autograd(
        f"cgpt::{name}", backward or refuse, setup_context=save, lib=_library
    )

    def in_graph(mode, op, types, args, kwargs):
        if not backends.is_traced(args[-1]) or not functorch_config.decompose_custom_triton_ops:
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return run(*args)

    torch.library.register_torch_dispatch(
        f"cgpt::{name}", FunctionalTensorMode, in_graph, lib=_library
    )
    library = getattr(torch.ops.cgpt, name)
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        if autocast is None:
            break

        def cast_and_call(*args, device_type=device_type):
            args = autocast(device_type, *args)
            with torch.autocast(device_type, enabled=False):
                return library(*args)

        _library.impl(name, cast_and_call, key)

    def forward(ctx, *args):
        # not a setup_context: torch asks for this function's signature at each call then, 30 us
        outputs = fresh(*args)
        if save is not None:
            save(ctx, args, outputs)
        return outputs

    body = {"forward": staticmethod(forward), "backward": staticmethod(backward or refuse)}
    function = type(name, (torch.autograd.Function,), body)

    def call(*args):
        if not undisturbed():
            return library(*args)
        needed = False
        for arg in args:
            kind = type(arg)
            if kind in PLAIN:
                needed |= arg.requires_grad
            elif kind not in _VALUES:
                return library(*args)
        if needed and torch.is_grad_enabled():
            return function.apply(*args)
        return fresh(*args)

    return call
