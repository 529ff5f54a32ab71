"""Packed weights: laid out once for the kernels, floating or quantized; for inference only.

Letters: M rows, K reduced width, N output width, T the dtype of x. The layout is described in
csrc/ops/gemm/packed.h and, as plain PyTorch that reads it, in reference.unpack.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ... import backends, checks
from ..dispatch import REFUSALS, as_rows, autocast_dtype, cast, choose, define, undisturbed
from ..philox import check_dropout
from . import reference

FORMATS = ("f32", "bf16", "f16", "int8", "int4")
GROUPS = (32, 64)
_FORMAT_OF = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}

_C = backends._C


@dataclass(eq=False)
class PackedWeight:
    """A weight [N, K] in one opaque buffer that ck.ops.gemm takes in place of the tensor.

    Made by pack_weight. Copies, pickles and torch.save store the buffer as it is; every processor
    reads the same layout.

    Args:
        data: uint8, the packed bytes, scales included.
        format: "f32", "bf16", "f16", "int8" (a scale per output channel) or "int4" (a scale per
            `group` values along K of an output channel).
        N, K: output and reduced width.
        group: 32 or 64, of "int4"; None for the other formats.
    """

    data: Tensor
    format: str
    N: int
    K: int
    group: int | None

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer, padding included."""
        return self.data.numel()

    @property
    def shape(self) -> tuple[int, int]:
        return self.N, self.K

    def unpack(self, dtype: torch.dtype = torch.float32, weight_layout: str = "nk") -> Tensor:
        """The weight as a tensor: the packed values for "f32", "bf16" and "f16", bit for bit in
        their own dtype; scale times integer for "int8" and "int4".

        Args:
            dtype: fp32, bf16, fp16 or fp64.
            weight_layout: "nk" gives [N, K], "kn" [K, N].
        """
        op = "unpack_weight"
        checks.is_choice(op, "weight_layout", weight_layout, reference.LAYOUTS)
        checks.is_choice(op, "dtype", dtype, checks.FLOATING)
        kn = weight_layout == "kn"
        if _C is None or self.data.device.type != "cpu":
            weight = reference.unpack(self.data, self.format, self.N, self.K, self.group).to(dtype)
            return weight.t().contiguous() if kn else weight
        direct = torch.float32 if dtype == torch.float64 else dtype
        shape = (self.K, self.N) if kn else (self.N, self.K)
        out = torch.empty(shape, dtype=direct)
        _C.unpack_weight(self.data, out, kn, self.format, self.group or 0)
        return out.to(dtype)

    def __repr__(self) -> str:
        of = f", group {self.group}" if self.group else ""
        return f"PackedWeight({self.format}{of}, N {self.N}, K {self.K}, {self.nbytes} bytes)"


# A checkpoint may hold one: it is data, and safe to load as such.
torch.serialization.add_safe_globals([PackedWeight])


def pack_weight(
    weight: Tensor, format: str | None = None, *, weight_layout: str = "nk", group: int = 64
) -> PackedWeight:
    """Lay a weight out for the CPU kernels, quantizing it for "int8" and "int4", which the CUDA
    kernels read too.

    "int8": scale = max |w| / 127 of each output channel. "int4": of ten scales around
    max |w| / 8 of each group the one with the smallest squared error, stored in bf16.

    A product with it keeps the numerics rule against the unpacked weight in fp64. Where the tier
    multiplies integers, rounding row i of x adds to output n at most max |x_i| / 32638 * sum |w_n|
    for up to 16 rows ("int8", "int4"), and max |x_i| / 254 * sum |w_n| for more ("int8").

    Args:
        weight: [N, K] for weight_layout "nk" (nn.Linear), [K, N] for "kn" (GPT-2's Conv1D); fp32,
            bf16 or fp16. On cuda it is packed by the CPU, and the bytes go where it lies.
        format: one of FORMATS; None takes that of the weight's dtype.
        group: values along K that share a scale, 32 or 64; "int4" only.
    Raises:
        ValueError, TypeError: naming argument, expected and got.
    """
    op = "pack_weight"
    checks.is_tensor(op, "weight", weight)
    checks.strided(op, {"weight": weight})
    checks.has_dtype(op, "weight", weight, *backends.KERNEL_DTYPES)
    checks.has_rank(op, "weight", weight, 2, "(N, K) or (K, N)")
    checks.is_choice(op, "format", format, (None, *FORMATS))
    checks.is_choice(op, "weight_layout", weight_layout, reference.LAYOUTS)
    checks.is_choice(op, "group", group, GROUPS)
    format, device = format or _FORMAT_OF[weight.dtype], weight.device
    if device.type != "cpu" and not (device.type == "cuda" and format in ("int8", "int4")):
        raise ValueError(
            f"{op}: weight must be on cpu, or on cuda for 'int8' and 'int4', got {device} for "
            f"{format!r}; move it with .cpu()"
        )
    if _C is None:
        raise RuntimeError(f"{op}: {backends._C_REASON}")
    weight = as_rows(weight.detach().cpu())
    kn = weight_layout == "kn"
    N, K = weight.shape[kn], weight.shape[not kn]
    # huge pages: the stream of a decode step would lose half its speed to address translation
    data = torch.from_dlpack(_C.allocate_buffer(_C.packed_bytes(format, N, K, group)))
    _C.pack_weight(weight, data, kn, format, group)
    return PackedWeight(data.to(device), format, N, K, group if format == "int4" else None)


def gemm(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    weight_layout: str,
    dropout_p: float,
    seed: int | None,
    backend: str,
) -> Tensor:
    """ops.gemm where the weight is packed; the arguments are ops.gemm's."""
    if (
        _C is not None
        and backend in ("auto", "cpu")
        and weight_layout == "nk"
        and dropout_p == 0.0
        and seed is None
        and undisturbed()
        and not _wants_gradient(x, bias, residual)
        and (residual is None or residual.shape[:-1] == x.shape[:-1])
    ):
        try:
            return _forward(x, weight, bias, residual, activation)
        except REFUSALS:
            pass  # the general path says why, or copies strides the kernel cannot read
    if weight_layout != "nk":
        raise ValueError(
            "gemm: weight_layout belongs to pack_weight where the weight is packed; leave it out"
        )
    check_dropout("gemm", dropout_p, seed)
    if dropout_p > 0.0:
        raise ValueError(
            f"gemm: dropout_p must be 0 with a packed weight, which is for inference, "
            f"got {dropout_p}; pass the weight itself"
        )
    late_residual = None
    narrow = autocast_dtype(x.device.type) if isinstance(x, Tensor) else None
    if narrow is not None:
        x, bias = cast(narrow, x, bias)
        if isinstance(residual, Tensor) and residual.dtype != x.dtype:
            late_residual, residual = residual, None
    _check(x, weight, bias, residual, activation)
    if _wants_gradient(x, bias, residual):
        raise RuntimeError(
            "gemm: a packed weight is for inference, but a gradient is required of x, bias or "
            "residual; call it under torch.no_grad(), or pass the weight itself"
        )
    chosen = choose("gemm", backend, (x, weight.data, bias, residual))
    reason = _unsupported(chosen, x, weight)
    if reason is not None and backend != "auto":
        able = [b for b in backends.BACKENDS if _able(b, x, weight)]
        raise ValueError(
            f"gemm: backend {chosen!r} cannot run: {reason}. Available here: {', '.join(able)}."
        )
    chosen = "eager" if reason is not None else chosen
    y = torch.ops.cgpt.packed_gemm(
        x,
        weight.data,
        weight.N,
        weight.K,
        weight.format,
        weight.group or 0,
        bias,
        residual,
        activation,
        chosen,
    )
    return y if late_residual is None else y + late_residual


def _unsupported(backend: str, x: Tensor, weight: PackedWeight) -> str | None:
    """Why a backend that takes x does not take this packed weight, or None."""
    if backend in ("cpu", "eager"):
        return None
    own = backends.own("gemm", backend, "unsupported_packed")
    return own(x, weight.format) if own else "the weight is packed"


def _able(backend: str, x: Tensor, weight: PackedWeight) -> bool:
    return backends.why_not("gemm", backend, (x,)) is None and not _unsupported(backend, x, weight)


def _wants_gradient(x, bias, residual):
    return torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in (x, bias, residual)
    )


def _check(x, weight, bias, residual, activation):
    op = "gemm"
    checks.is_tensor(op, "x", x)
    checks.is_tensor(op, "bias", bias, optional=True)
    checks.is_tensor(op, "residual", residual, optional=True)
    given = {"x": x, "weight": weight.data, "bias": bias, "residual": residual}
    checks.strided(op, given)
    checks.is_choice(op, "activation", activation, (None, *reference.ACTIVATIONS))
    checks.has_dtype(op, "x", x, *checks.FLOATING)
    if x.ndim == 0 or x.shape[-1] != weight.K:
        raise ValueError(f"gemm: x must have shape (..., {weight.K}) = (..., K), got {(*x.shape,)}")
    if bias is not None:
        widest = x.dtype if x.dtype == torch.float64 else torch.float32
        checks.has_dtype(op, "bias", bias, x.dtype, widest, why=" beside this x")
        checks.has_shape(op, "bias", bias, (weight.N,), "(N,)")
    if residual is not None:
        checks.has_dtype(op, "residual", residual, x.dtype, why=" as x")
        checks.has_shape(op, "residual", residual, (*x.shape[:-1], weight.N), "(..., N)")
    checks.same_device(op, "x", given)


def _forward(x, weight, bias, residual, activation):
    """y [..., N]."""
    w = weight.data, weight.N, weight.K, weight.format, weight.group or 0
    if x.ndim > 1:  # the binding allocates y
        return _C.packed_gemm_fwd(x, *w, bias, residual, None, activation or "none")
    residual = residual if residual is None else residual.unsqueeze(0)
    return _C.packed_gemm_fwd(x.unsqueeze(0), *w, bias, residual, None, activation or "none")[0]


# ---- torch.ops.cgpt -----------------------------------------------------------------------------


def _run(x, packed, N, K, format, group, bias, residual, activation, backend):
    weight = PackedWeight(packed, format, N, K, group or None)
    if backend == "eager":
        return reference.gemm(x, weight.unpack(x.dtype), bias, residual, activation, "nk")
    bias = bias if bias is None else bias.contiguous()
    residual = residual if residual is None else as_rows(residual)
    if backend == "cuda":
        run = backends.own("gemm", backend, "packed_gemm")
        y = run(as_rows(x), packed, N, K, format, group, bias, residual, activation)
        return y.view(*x.shape[:-1], N)
    return _forward(as_rows(x), weight, bias, residual, activation).view(*x.shape[:-1], N)


def _fake(x, packed, N, K, format, group, bias, residual, activation, backend):
    return x.new_empty(*x.shape[:-1], N)


define(
    "packed_gemm(Tensor x, Tensor packed, int N, int K, str format, int group, Tensor? bias,"
    " Tensor? residual, str? activation, str backend) -> Tensor",
    _run,
    _fake,
)
