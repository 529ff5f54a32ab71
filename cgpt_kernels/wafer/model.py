"""What a whole transformer costs on the grid: decode, prefill, training; several ways to spread it.

Letters: d, s, f are the widths of model, context and feed-forward per core (divided by P, rounded
up). All arithmetic is fp16 with one word for two values. A decoder block in decode is vectors times
matrices: local products, then an all-reduce along one axis (the phase engine runs them); in prefill
it is MeshGEMMs and softmax rows.

parallel "tensor": one block at a time on the whole grid. "pipeline": each block on its own
rectangle. "sequence": core groups hold parts of the context, keys and values go round a ring.
"streaming": weights come from outside, columns broadcast them; time follows the nonzeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from .. import checks
from .phases import allreduce, cycles, local, per_core
from .report import Report
from .spec import WSE2, WaferSpec
from .strips import product
from .tiles import Tiles, product_cycles

MODES = ("prefill", "decode", "train")
PARALLEL = ("tensor", "pipeline", "sequence", "streaming")


@dataclass(frozen=True)
class Block:
    """The shape of a decoder and its blocks; a GPTConfig is taken as it is.

    n_kv: width of keys (and of values) in heads that share them, default n_embd. gated: two
    projections up, one multiplied with the activation of the other (SwiGLU). rms: RMSNorm, without
    mean. vocab_size 0: no output head.
    """

    n_embd: int
    n_inner: int
    n_layer: int = 1
    n_kv: int | None = None
    gated: bool = False
    rms: bool = False
    vocab_size: int = 0

    @property
    def kv(self) -> int:
        return self.n_kv or self.n_embd

    @property
    def matrix_elements(self) -> int:
        """Weights of one block."""
        up = 2 if self.gated else 1
        return self.n_embd * (2 * self.n_embd + 2 * self.kv + (up + 1) * self.n_inner)


# As WaferLLM ran them: keys and values of full width. The models themselves have n_kv=1024.
LLAMA3_8B = Block(4096, 14336, 32, gated=True, rms=True, vocab_size=128256)
QWEN2_72B = Block(8192, 29568, 80, gated=True, rms=True, vocab_size=152064)


def block_of(config) -> Block:
    """Block of a GPTConfig or anything with its fields; a Block as it is."""
    if isinstance(config, Block):
        return config
    missing = [n for n in ("n_embd", "n_inner", "n_layer", "vocab_size") if not hasattr(config, n)]
    if missing:
        raise TypeError(
            f"estimate: config must be a GPTConfig or a wafer Block, got "
            f"{type(config).__name__} without {', '.join(missing)}"
        )
    return Block(config.n_embd, config.n_inner, config.n_layer, vocab_size=config.vocab_size)


def _share(n: int, P: int) -> int:
    return -(-n // P)


def _halves(n: int) -> int:
    """Words of n fp16 values."""
    return -(-n // 2)


def _vector(spec: WaferSpec, builtin: str, n: int) -> int:
    return spec.vector_cycles(builtin, n)


def decode_phases(
    spec: WaferSpec, b: Block, rows: int, columns: int, context: int, batch: int
) -> tuple:
    """One token through one block on rows x columns cores; collectives as in WaferLLM's decode.

    Vectors lie along y before the first product of a pair and along x after it, so that no
    transposition is needed; `batch` requests share what weights are read, not the cycles.
    """
    d, dx = _share(b.n_embd, rows), _share(b.n_embd, columns)
    kv, s, f = _share(b.kv, columns), _share(context, columns), _share(b.n_inner, columns)
    up = 2 if b.gated else 1

    def product(k, n):
        return batch * product_cycles(spec, 1, k, n, 2)

    def step(*ops):
        return batch * sum(_vector(spec, name, n) for name, n in ops)

    def reduce(name, axis, n):
        # each call of a collective library costs its software besides what moves
        return (
            local("call of collectives", spec.collective_call),
            allreduce(f"{name}: all-reduce", axis, _halves(n) * batch),
        )

    def scalar(functions):
        return batch * functions * spec.scalar_function

    norm = (("fmulh", d), ("faddh", d), ("fmulh", d), ("fmulh", d))
    rstd = scalar(3)  # divide by the width, root, divide
    moments = 1 if b.rms else 2
    return (
        local("norms", step(*norm) + rstd),
        *reduce("norms", "y", moments),
        local("q, k, v", product(d, dx + 2 * kv)),
        *reduce("q, k, v", "y", dx + 2 * kv),
        local("rotation and cache", step(*[("fmulh", d)] * 4, *[("faddh", d)] * 2, ("fmovh", d))),
        local("scores", product(d, s)),
        *reduce("scores", "x", s),
        local("softmax", step(("fmulh", s), ("fmaxh", s))),
        *reduce("softmax", "y", 1),
        local("softmax", step(("faddh", s), ("faddh", s)) + scalar(s)),
        *reduce("softmax", "y", 1),
        local("softmax", step(("fmulh", s)) + scalar(1)),
        local("attention output", product(s, d)),
        *reduce("attention output", "y", d),
        local("projection", product(d, dx)),
        *reduce("projection", "x", dx),
        local("norms", step(("faddh", d), *norm) + rstd),
        *reduce("norms", "y", moments),
        local("feed-forward up", product(d, up * f)),
        *reduce("feed-forward up", "y", up * f),
        local("activation", step(("fmulh", f)) + scalar(2 * f)),  # x / (1 + exp(-x)), elementwise
        local("feed-forward down", product(f, d)),
        *reduce("feed-forward down", "x", d),
        local("norms", step(("faddh", d))),
    )


def prefill_products(b: Block, tokens: int, context: int):
    """(name, M, K, N, whether A has to be aligned first) of one block's matrix products.

    Products of one A share its alignment; the scores, against a transposed matrix, need none.
    """
    d, f = b.n_embd, b.n_inner
    return (
        ("q, k, v", tokens, d, d, True),
        ("q, k, v", tokens, d, b.kv, False),
        ("q, k, v", tokens, d, b.kv, False),
        ("scores", tokens, d, context, False),
        ("attention output", tokens, context, d, True),
        ("projection", tokens, d, d, True),
        ("feed-forward up", tokens, d, f, True),
        *([("feed-forward up", tokens, d, f, False)] if b.gated else []),
        ("feed-forward down", tokens, f, d, True),
    )


def gemm_cycles(spec: WaferSpec, P: int, M: int, K: int, N: int, algorithm="mesh", itemsize=2):
    """Cycles of a product on P x P cores, and of them compute.

    algorithm "turning": A B^T as it lies, partial sums in chains to the core whose turn it is.
    Where the tiles do not fit, the longer of M and N is cut into halves, one after the other.
    """
    passes, turned = 1, algorithm == "turning"
    while True:
        tiles = Tiles(_share(M, P), _share(K, P), _share(N, P), itemsize)
        need = 4 * (tiles.a + 2 * (tiles.b + tiles.c) if turned else tiles.memory(algorithm, P, P))
        if need <= spec.data_bytes:
            break
        if max(tiles.m, tiles.n) == 1:
            raise ValueError(
                f"estimate: K = {K} on {P} x {P} cores leaves {need} B of "
                f"tiles per core, {spec.name} holds {spec.data_bytes} B; use a larger grid"
            )
        M, N = (M, _share(N, 2)) if N >= M else (_share(M, 2), N)
        passes *= 2
    if turned:
        # The chains of one step follow those before like a pipeline: what counts is what a core
        # does, words in and out, and the two places from one step's root to the next one's.
        compute = P * product_cycles(spec, tiles.m, tiles.k, tiles.n, itemsize)
        places = 2 * (spec.hop + 2 * spec.ramp + spec.stop)
        total = compute + P * (tiles.b + 2 * tiles.c + places + spec.product_step)
    else:
        total, compute = product(spec, P, P, algorithm, tiles)
    return passes * total, passes * compute


def alignment_cycles(spec: WaferSpec, P: int, M: int, K: int) -> int:
    """Cycles until each row of A [M, K] lies as MeshGEMM's first step wants it: P / 2 shifts."""
    words = _halves(_share(M, P) * _share(K, P))
    flight = spec.async_start + spec.hop + 2 * spec.ramp + spec.stop
    return P // 2 * (spec.product_step + flight + words)


def _prefill_block(spec, b, P, tokens, context, density=1.0):
    phases = dict.fromkeys(("norms", "alignment"), 0.0)
    for name, M, K, N, aligns in prefill_products(b, tokens, context):
        algorithm = "turning" if name == "scores" else "mesh"
        weights = name not in ("scores", "attention output")
        found = gemm_cycles(spec, P, M, K, N, algorithm)[0] * (density if weights else 1.0)
        phases[name] = phases.get(name, 0.0) + found
        phases["alignment"] += alignment_cycles(spec, P, M, K) if aligns else 0
    rows, d, s, f = (_share(n, P) for n in (tokens, b.n_embd, context, b.n_inner))

    def calls(*ops):  # vectors over a core's rows, as the matrices lie
        return sum(count * (_vector(spec, name, rows) + spec.loop_tuned) for name, count in ops)

    norm = calls(("fmulh", 3 * d), ("faddh", d)) + 3 * rows * spec.scalar_function
    phases["rotation"] = calls(("fmulh", 4 * d), ("faddh", 2 * d))
    softmax = calls(("fmulh", 2 * s), ("fmaxh", s), ("faddh", 2 * s))
    softmax += (rows * s + rows) * spec.scalar_function
    phases["activation"] = calls(("fmulh", f)) + 2 * rows * f * spec.scalar_function
    moves = (
        allreduce("norms", "x", _halves(2 * rows)),
        allreduce("softmax", "x", _halves(rows)),
        allreduce("softmax", "x", _halves(rows)),
        allreduce("norms", "x", _halves(2 * rows)),
    )
    _, by_name = cycles(spec, 1, P, moves)
    phases["norms"] = 2 * norm + calls(("faddh", 2 * d)) + by_name["norms"]
    phases["softmax"] = softmax + by_name["softmax"]
    phases["call of collectives"] = len(moves) * spec.collective_call
    return phases


def macs_per_token(b: Block, context: int, density: float = 1.0) -> float:
    """Multiply-adds of all blocks for one token: nonzero weights, attention to `context` keys."""
    return b.n_layer * (density * b.matrix_elements + 2 * context * b.n_embd)


def _memory(spec, b, cores, context, batch, layers, cached, training=False):
    """Bytes per core: weights of `layers` blocks (with fp32 optimizer state in training), keys and
    values of `cached` blocks, working space; activations kept for a backward are not counted.
    """
    weights = layers * b.matrix_elements + b.vocab_size * b.n_embd
    per_weight = 2 + (12 if training else 0)
    cache = cached * 2 * b.kv * context * batch * 2
    working = 16 * b.n_inner * batch * 2
    return math.ceil((weights * per_weight + cache + working) / cores) + (
        spec.decoder_code_bytes + spec.stack_bytes
    )


def estimate(
    config,
    *,
    spec: WaferSpec = WSE2,
    grid: tuple[int, int],
    mode: str = "decode",
    batch: int = 1,
    context: int = 2048,
    parallel: str = "tensor",
    groups: int | None = None,
    density: float = 1.0,
    micro_batches: int = 8,
) -> Report:
    """Cycles of a whole model on a grid of cores, by phase, with what fits and what does not.

    Args:
        config: a GPTConfig, or a `Block` (gated feed-forward, RMSNorm, grouped keys).
        grid: (rows, columns) of cores.
        mode: "decode" (one token per request), "prefill" (`context` tokens per request) or "train"
            (forward and backward of batch x context tokens: three times the products).
        batch: requests or sequences; context: tokens each attends to.
        parallel: "tensor", "pipeline", "sequence" (four groups of rows) or "streaming".
        groups: of the K-tree collectives (default about sqrt(P)).
        density: share of nonzero weights; only streaming skips zeros.
        micro_batches: of the pipeline, whose bubble is part of the result.
    Returns:
        Report; `.tokens_per_second` counts produced (decode) or read (prefill, train) tokens.
    """
    op = "estimate"
    b = block_of(config)
    checks.is_choice(op, "mode", mode, MODES)
    checks.is_choice(op, "parallel", parallel, PARALLEL)
    spec.check_grid(op, *grid)
    for name, value in (("batch", batch), ("context", context), ("micro_batches", micro_batches)):
        ok = isinstance(value, int) and value > 0
        checks.in_range(op, name, value, ok, "a positive integer")
    checks.in_range(op, "density", density, 0 < density <= 1, "in (0, 1]")
    if density != 1.0 and parallel != "streaming":
        raise ValueError(f"{op}: density needs parallel='streaming', which alone skips zeros")
    rows, columns = grid
    sides, layers_here, stages = (rows, columns), b.n_layer, 1
    notes = []
    if parallel == "pipeline":
        stages = b.n_layer
        across = math.ceil(math.sqrt(stages * columns / rows)) or 1
        down = math.ceil(stages / across)
        sides = (rows // down, columns // across)
        if min(sides) < 1:
            raise ValueError(f"{op}: grid {grid} is too small for {stages} stages of a pipeline")
        layers_here = 1
        notes.append(f"{stages} stages of {sides[0]} x {sides[1]} cores")
    parts, maps, traffic = 1, {}, (0, 0)
    if parallel == "sequence":
        parts = max(1, min(rows, columns) // max(1, min(rows, columns) // 4))
        sides = (rows // parts, columns)
        notes.append(f"{parts} groups of {sides[0]} x {sides[1]} cores, keys and values in a ring")

    if mode == "decode":
        shape = _share(context, parts)
        phases = decode_phases(spec, b, *sides, shape, batch)
        one, by_name = cycles(spec, *sides, phases, groups)
        moved = per_core(spec, *sides, phases, groups)
        software = by_name["call of collectives"]
        compute = sum(p.cycles for p in phases if p.axis is None) - software
        maps = {
            "compute": np.full(sides, round(compute)),
            "communication": moved["fabric"] + round(software),
            "idle": one - round(compute) - round(software) - moved["fabric"],
            "hops": moved["hops"],
        }
        traffic = tuple(parts * b.n_layer * int(moved[name].sum()) for name in ("sent", "hops"))
        notes.append("maps of the cores: one block" + (", one group" if parts > 1 else ""))
        if parts > 1:
            # partial maxima, sums and outputs of the groups meet along a ring of P/parts hops each
            merge = parts * (sides[0] * spec.hop + 2 * _halves(_share(b.n_embd, columns)) + 16)
            by_name["merge of sequence parts"] = merge
            one += merge
        tokens, factor = batch, 1
        work = batch * macs_per_token(b, context)
    else:
        P = min(sides)
        factor = 3 if mode == "train" else 1
        by_name = _prefill_block(spec, b, P, _share(context, parts) * batch, context, density)
        if parts > 1:
            exchange = (parts - 1) * 2 * _halves(_share(context, P * parts) * _share(b.kv, P))
            by_name["ring of keys and values"] = exchange + parts * sides[0] * spec.hop
        one = sum(by_name.values())
        if P != max(sides):
            notes.append(f"products use a square of {P} x {P} cores")
        tokens = batch * context
        work = tokens * macs_per_token(b, context) * factor

    phases = {name: factor * b.n_layer * value for name, value in by_name.items()}
    total = factor * b.n_layer * one
    if b.vocab_size:
        if mode == "decode":
            head = product_cycles(
                spec, 1, _share(b.n_embd, sides[0]), _share(b.vocab_size, sides[1]), 2
            )
            head_words = _halves(_share(b.vocab_size, sides[1]))
            reduced, _ = cycles(spec, *sides, (allreduce("head", "y", head_words),), groups)
            phases["output head"] = head * batch + reduced
        else:
            phases["output head"] = (
                factor * gemm_cycles(spec, min(sides), batch, b.n_embd, b.vocab_size)[0]
            )
        total += phases["output head"]
        work += batch * b.vocab_size * b.n_embd * (1 if mode == "decode" else factor)
    if parallel == "pipeline":
        # A stage's time, once per micro-batch and stage in flight. A token cannot be cut: in decode
        # the micro-batches are requests.
        micro_batches = min(micro_batches, batch) if mode == "decode" else micro_batches
        slot = total / stages / micro_batches
        bubble = (stages - 1) * slot
        phases = {name: value / stages for name, value in phases.items()}
        phases["bubble"] = bubble
        total = micro_batches * slot + bubble
    if parallel == "streaming":
        weights = density * (b.n_layer * b.matrix_elements + b.vocab_size * b.n_embd)
        bits = 32 if density < 1 else 16  # a nonzero travels with its index
        stream = factor * weights * bits / spec.io_bits * spec.clock_hz
        notes.append(f"weights arrive in {stream:,.0f} cycles at {spec.io_bits / 1e12:g} Tb/s")
        if stream > total:
            phases["waiting for weights"] = stream - total
            total = stream
        layers_here = 0

    cores = sides[0] * sides[1]
    resident = replace(b, vocab_size=0) if parallel in ("pipeline", "streaming") else b
    cached = 1 if parallel == "pipeline" else b.n_layer
    held = _share(context, parts)  # keys and values of a group's own part
    need = _memory(spec, resident, cores, held, batch, layers_here, cached, mode == "train")
    report = Report(
        f"{mode}, {parallel}, {b.n_layer} blocks of {b.n_embd}",
        spec,
        rows,
        columns,
        total,
        phases,
        macs=round(work),
        words=traffic[0],
        hops=traffic[1],
        peak_sram_bytes=need,
        tokens=tokens,
        peak_macs_per_cycle=spec.rates["fmach"],
        maps=maps | {"SRAM": np.full(sides, need)} if maps else {},
        notes=notes,
    )
    limit = spec.sram_bytes - spec.sram_reserved
    if not report.fits:
        report.notes.append(
            f"does not fit: a core needs {need:,} B, has {limit:,} B; "
            f"{math.ceil(need / limit)} times the cores would hold it, or parallel='streaming'"
        )
    return report


def longest_decode(config, *, spec: WaferSpec = WSE2, grid: tuple[int, int]) -> dict[str, int]:
    """Tokens until memory is full: caches balanced by shifts, against caches that stay in a row.

    "concatenate": new keys and values go to the last row of cores, which fills first. "shift": each
    full row passes its oldest block one row up, so all rows fill together.
    """
    b = block_of(config)
    spec.check_grid("longest_decode", *grid)
    rows, columns = grid
    fixed = _memory(spec, b, rows * columns, 0, 1, b.n_layer, b.n_layer)
    free = spec.sram_bytes - spec.sram_reserved - fixed
    scores = 2  # of one block at a time, before and after the exponential
    per_token = 2 * (b.n_layer * 2 * _share(b.kv, columns) + scores)
    row = max(0, int(free // per_token))
    return {"shift": row * rows, "concatenate": row}
