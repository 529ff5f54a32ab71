"""The ops on the modelled grid: real numbers by the CPU substrate, cycles by the model.

Each function splits its work over the cores as its algorithm does, gives every column of cores'
share to the CPU kernel, and puts the pieces together. Sums over K run in ascending order in fp32
whatever the algorithm, so that results do not depend on the grid; the order in which a core meets
its tiles is checked on tile numbers (`tiles.check_schedule`), and with real values in the cycle
engine, where the tests run every algorithm on small grids.

Letters: P cores per side, M K N of a product, S queries, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import checks
from ..backends import _C, _C_REASON, KERNEL_DTYPES
from . import phases as phase_engine
from . import strips, transposed
from .blocks import softmax_cycles, turned_cycles
from .engine import report_of, run
from .phases import allreduce, local, shift
from .report import Report
from .spec import WSE2, WaferSpec, check_grid
from .tiled_attention import tiled_attention
from .tiles import (
    ALGORITHMS,
    PHASES,
    Tiles,
    build,
    check_schedule,
    product_cycles,
    words_moved,
)

SIMULATED = 16  # grids up to this side run in the cycle engine, core by core
REDUCTIONS = ("chain", "ktree")


def _kernel(name: str):
    if _C is None:
        raise ImportError(_C_REASON)
    return getattr(_C, name)


def _share(n: int, P: int) -> int:
    return -(-n // P)


def _panels(n: int, P: int) -> Iterator[slice]:
    """The shares of n that P columns of cores hold; the last ones may be short or empty."""
    share = _share(n, P)
    for start in range(0, n, share):
        yield slice(start, min(start + share, n))


def _check_matrix(op, name, t, letters):
    checks.is_tensor(op, name, t, numpy=False)
    checks.has_dtype(op, name, t, *KERNEL_DTYPES)
    checks.has_rank(op, name, t, 2, letters)


def _fits(op: str, spec: WaferSpec, words: int) -> None:
    if 4 * words > spec.data_bytes:
        raise ValueError(
            f"{op}: core (px 0, py 0) needs {4 * words} B for its tiles, {spec.name} leaves "
            f"{spec.data_bytes} B of {spec.sram_bytes} B; use a larger grid"
        )


def _nothing(what: str, *sizes: int, spec: WaferSpec, grid: tuple[int, int]) -> Report:
    """The report of an op that has no numbers to work on: no cycles."""
    return Report(f"{what} {' x '.join(map(str, sizes))}, empty", spec, *grid, 0.0)


# ---- products -----------------------------------------------------------------------------------


def gemm(
    a: Tensor,
    b: Tensor,
    *,
    grid: tuple[int, int],
    algorithm: str = "mesh",
    transposed_b: bool = False,
    spec: WaferSpec = WSE2,
) -> tuple[Tensor, Report]:
    """a b on a grid of cores, padded where it does not divide.

    Args:
        a: [M, K], b: [K, N], both fp32, bf16 or fp16.
        grid: (rows, columns) of cores; on those that are not square, see tiles.py.
        algorithm: "summa", "cannon" or "mesh".
        transposed_b: a b^T with b: [N, K] as it lies, a program of its own (transposed.py) in the
            manner of "mesh".
    Returns:
        [M, N] in the dtype of a, and the report.
    """
    op = "wafer.gemm"
    letters = "(N, K)" if transposed_b else "(K, N)"
    _check_matrix(op, "a", a, "(M, K)")
    _check_matrix(op, "b", b, letters)
    checks.has_dtype(op, "b", b, a.dtype, why=" as a")
    K, N = a.shape[1], b.shape[0 if transposed_b else 1]
    checks.has_shape(op, "b", b, (N, K) if transposed_b else (K, N), letters)
    checks.is_choice(op, "algorithm", algorithm, ("mesh",) if transposed_b else ALGORITHMS)
    check_grid(op, spec, grid)
    sizes = (a.shape[0], K, N, a.element_size())
    y = a.new_zeros(a.shape[0], N)
    if not y.numel() or not K:
        return y, _nothing("gemm", *sizes[:3], spec=spec, grid=grid)
    if transposed_b:
        report = transposed_report(*sizes, tuple(grid), spec)
    else:
        report = gemm_report(*sizes, tuple(grid), algorithm, spec)
        check_schedule(algorithm, *grid)
    _product(a, b, None, None, y, "none", not transposed_b, grid[1])
    return y, report


def _product(x, weight, bias, residual, y, activation, kn, P):
    """y = activation(x W + bias) + residual, one column of cores after the other."""
    run_kernel = _kernel("gemm_fwd")
    for part in _panels(y.shape[1], P):
        run_kernel(
            x,
            weight[:, part] if kn else weight[part],
            None if bias is None else bias[part],
            None if residual is None else residual[:, part],
            y[:, part],
            activation,
            kn,
        )


def gemm_report(M, K, N, itemsize, grid, algorithm, spec, log: int = 0) -> Report:
    """Cycles of a product; simulated core by core where the grid is small: `log` events then.

    K is cut into as many panels as the longer side has cores; cores of the shorter side own several
    panels.
    """
    rows, columns = grid
    P = max(grid)
    tiles = Tiles(_share(M, rows), _share(K, P), _share(N, columns), itemsize)
    words = tiles.memory(algorithm, rows, columns)
    _fits("wafer.gemm", spec, words)
    name = f"gemm {M} x {K} x {N}, {algorithm}"
    if P <= SIMULATED and P**3 * (tiles.a + tiles.b) < 300_000:
        report = report_of(name, run(build(spec, rows, columns, algorithm, tiles), log=log))
        report.macs = M * K * N  # padding is not counted
    else:
        total, compute = strips.product(spec, rows, columns, algorithm, tiles)
        by_name = dict(zip(PHASES, (compute, total - compute), strict=True))
        report = Report(name, spec, rows, columns, total, by_name)
        report.macs = M * K * N
        report.words = words_moved(algorithm, rows, columns, tiles)
        report.notes.append("cycles from representative cores, for some of the steps")
    report.peak_macs_per_cycle = spec.rates["fmach" if itemsize == 2 else "fmacs"]
    report.peak_sram_bytes = 4 * words + spec.code_bytes + spec.stack_bytes
    return report


def transposed_report(M, K, N, itemsize, grid, spec) -> Report:
    """Cycles of a b^T on a grid; simulated core by core where it is small."""
    tiles = transposed.shares(M, K, N, *grid, itemsize)
    words = transposed.Form.of(tiles, *grid).words
    _fits("wafer.gemm", spec, words)
    name = f"gemm {M} x {K} x {N}, transposed b"
    if max(grid) <= SIMULATED:
        report = report_of(name, run(transposed.build(spec, *grid, tiles)))
    else:
        total, compute = strips.transposed_product(spec, *grid, tiles)
        by_name = dict(zip(PHASES, (compute, total - compute), strict=True))
        report = Report(name, spec, *grid, total, by_name)
        report.words = transposed.words_moved(*grid, tiles)
        report.notes.append("cycles from representative cores, for some of the steps")
    report.macs = M * K * N
    report.peak_macs_per_cycle = spec.rates["fmach" if itemsize == 2 else "fmacs"]
    report.peak_sram_bytes = 4 * words + spec.code_bytes + spec.stack_bytes
    return report


def gemv(
    x: Tensor,
    w: Tensor,
    *,
    grid: tuple[int, int],
    algorithm: str = "ktree",
    spec: WaferSpec = WSE2,
) -> tuple[Tensor, Report]:
    """x w: x [K] along the columns of cores, w [K, N] in tiles, sums reduced along y.

    algorithm: how partial sums meet and come back: "chain", from both ends to the middle, or
    "ktree", the same in about sqrt(P) groups and then between these. Returns [N] and the report.
    """
    op = "wafer.gemv"
    checks.is_tensor(op, "x", x, numpy=False)
    checks.has_rank(op, "x", x, 1, "(K,)")
    _check_matrix(op, "w", w, "(K, N)")
    checks.has_dtype(op, "x", x, w.dtype, why=" as w")
    checks.has_shape(op, "w", w, (x.shape[0], w.shape[1]), "(K, N)")
    checks.is_choice(op, "algorithm", algorithm, REDUCTIONS)
    check_grid(op, spec, grid)
    y = x.new_zeros(1, w.shape[1])
    if not w.numel():
        return y[0], _nothing("gemv", 1, *w.shape, spec=spec, grid=grid)
    report = gemv_report(1, *w.shape, x.element_size(), grid, algorithm, spec)
    _product(x[None], w, None, None, y, "none", True, grid[1])
    return y[0], report


def gemv_report(M, K, N, itemsize, grid, algorithm, spec) -> Report:
    """M vectors times a matrix that lies in tiles: local products, then a reduce along y."""
    rows, columns = grid
    k, n = _share(K, rows), _share(N, columns)
    words = _share(n * itemsize, 4) * M
    held = _share(k * n * itemsize, 4) + _share(k * M * itemsize, 4) + words
    _fits("wafer.gemv", spec, held)
    groups = 1 if algorithm == "chain" else None
    steps = (
        local("compute", M * product_cycles(spec, 1, k, n, itemsize)),
        allreduce("communication", "y", words),
    )
    total, by_name = phase_engine.cycles(spec, rows, columns, steps, groups)
    return Report(
        f"gemv {M} x {K} x {N}, {algorithm}",
        spec,
        rows,
        columns,
        total,
        by_name,
        macs=M * K * N,
        words=words * rows * columns,
        peak_sram_bytes=4 * held + spec.code_bytes + spec.stack_bytes,
        peak_macs_per_cycle=spec.rates["fmach" if itemsize == 2 else "fmacs"],
    )


# ---- layer norm ---------------------------------------------------------------------------------


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    eps: float = 1e-5,
    spec: WaferSpec = WSE2,
) -> tuple[Tensor, Report]:
    """Rows of x [rows, C] over the rows of cores, C over the columns: moments reduced along x."""
    op = "wafer.layer_norm"
    _check_matrix(op, "x", x, "(rows, C)")
    for name, t in (("weight", weight), ("bias", bias)):
        checks.is_tensor(op, name, t, optional=name == "bias", numpy=False)
        if t is not None:
            checks.has_shape(op, name, t, (x.shape[1],), "(C,)")
    checks.is_number(op, "eps", eps)
    check_grid(op, spec, grid)
    y = torch.empty_like(x)
    if not x.numel():
        return y, _nothing("layer_norm", *x.shape, spec=spec, grid=grid)
    report = layer_norm_report(*x.shape, x.element_size(), grid, spec)
    _norm_rows(x, None, weight, bias, y, None, None, None, eps, grid[0])
    return y, report


def _norm_rows(x, residual, weight, bias, y, total, mean, rstd, eps, P):
    """One row of cores after the other."""
    run_kernel = _kernel("layer_norm_fwd")

    def cut(t, part):
        return None if t is None else t[part]

    for part in _panels(x.shape[0], P):
        cuts = [cut(t, part) for t in (x, residual)]
        out = [cut(t, part) for t in (y, total, mean, rstd)]
        run_kernel(*cuts, weight, bias, *out, eps)


def layer_norm_report(rows, C, itemsize, grid, spec) -> Report:
    held, c = _share(rows, grid[0]), _share(C, grid[1])
    half = itemsize == 2
    names = ("faddh", "fmulh", "faddh", "fmulh", "fmulh", "faddh") if half else (
        "fadds", "fmuls", "fadds", "fmuls", "fmuls", "fadds")  # fmt: skip
    work = held * sum(spec.vector_cycles(name, c) for name in names)
    steps = (local("compute", work), allreduce("communication", "x", 2 * held))
    words = _share(2 * held * c * itemsize, 4) + 2 * held
    _fits("wafer.layer_norm", spec, words)
    total, by_name = phase_engine.cycles(spec, *grid, steps)
    return Report(
        f"layer_norm {rows} x {C}",
        spec,
        *grid,
        total,
        by_name,
        words=2 * held * grid[0] * grid[1],
        peak_sram_bytes=4 * words + spec.code_bytes + spec.stack_bytes,
    )


# ---- attention ----------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: tuple[int, int],
    causal: bool = True,
    scale: float | None = None,
    spec: WaferSpec = WSE2,
) -> tuple[Tensor, Report]:
    """Attention of [B, H, S, D] tensors, tile by tile: queries over the rows of cores, keys and
    values over the columns, merged in fp32 (tiled_attention.py).

    One query is decode: the keys lie balanced over the columns, which cost one shift of the cache
    (every column passes its oldest key and value on) before the scores.
    """
    op = "wafer.attention"
    for name, t in (("q", q), ("k", k), ("v", v)):
        checks.is_tensor(op, name, t, numpy=False)
        checks.has_dtype(op, name, t, *KERNEL_DTYPES)
        checks.has_dtype(op, name, t, q.dtype, why=" as q")
        checks.has_rank(op, name, t, 4, "(B, H, S, D)")
    B, H, S, D = q.shape
    checks.has_shape(op, "k", k, (B, H, k.shape[2], D), "(B, H, S_k, D)")
    checks.has_shape(op, "v", v, k.shape, "the shape of k")
    checks.is_number(op, "scale", scale, optional=True)
    check_grid(op, spec, grid)
    out = torch.zeros_like(q)
    if not q.numel() or not k.numel():
        return out, _nothing("attention", B, H, S, k.shape[2], D, spec=spec, grid=grid)
    report = attention_report(q.shape, k.shape[2], q.element_size(), grid, spec)
    scale = D**-0.5 if scale is None else scale
    tiled_attention(q, k, v, None, None, None, out, None, scale, causal, grid)
    return out, report


def attention_report(shape, keys, itemsize, grid, spec) -> Report:
    """B * H products q k^T, softmax rows, products with v, one head after the other."""
    B, H, S, D = shape
    rows, columns = grid
    P = max(grid)
    name = f"attention {B} x {H} x {S} x {keys} x {D}"
    s = _share(keys, columns)
    if S == 1:
        d = _share(D, rows)
        words = _share(s * itemsize, 4)
        steps = (
            shift("cache", "x", 2 * _share(d * itemsize, 4)),
            local("scores", product_cycles(spec, 1, d, s, itemsize)),
            allreduce("scores", "y", words),
            local("softmax", softmax_cycles(spec, s, 1, 0, itemsize)),
            allreduce("softmax", "x", 1),
            allreduce("softmax", "x", 1),
            local("output", product_cycles(spec, 1, s, d, itemsize)),
            allreduce("output", "x", _share(d * itemsize, 4)),
        )
        total, by_name = phase_engine.cycles(spec, rows, columns, steps)
        held = 2 * _share(s * d * itemsize, 4) + words
    else:
        scores = transposed.shares(S, D, keys, rows, columns, itemsize)  # q k^T
        output = Tiles(_share(S, rows), _share(keys, P), _share(D, columns), itemsize)
        form = transposed.Form.of(scores, rows, columns)
        held = max(form.words, output.memory("mesh", rows, columns))
        _fits("wafer.attention", spec, held)
        lines = _share(S, rows)
        reduce = (allreduce("softmax", "x", lines), allreduce("softmax", "x", lines))
        by_name = {
            "scores": turned_cycles(spec, form)[0],
            "softmax": softmax_cycles(spec, lines, s, spec.loop_tuned, itemsize)
            + phase_engine.cycles(spec, 1, columns, reduce)[0],
            "output": strips.product(spec, rows, columns, "mesh", output)[0],
        }
        total = sum(by_name.values())
    _fits("wafer.attention", spec, held)
    heads = B * H
    return Report(
        name,
        spec,
        rows,
        columns,
        heads * total,
        {k: heads * v for k, v in by_name.items()},
        macs=2 * heads * S * keys * D,
        peak_sram_bytes=4 * held + spec.code_bytes + spec.stack_bytes,
        peak_macs_per_cycle=spec.rates["fmach" if itemsize == 2 else "fmacs"],
    )
