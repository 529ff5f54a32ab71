"""Matrix products on a square grid of cores: who holds which tile, what each core does per step.

C [M, N] = A [M, K] B [K, N] on P x P cores; core (py, px) owns tile C(py, px), Mt x Nt, and meets
the pairs A(py, k), B(k, px) one step after the other, P steps. Operands are double buffered: the
transfer for the next step runs on microthreads beside the product of this one.

summa   step k: column k sends its A tiles along the rows, row k its B tiles along the columns.
cannon  tiles move one place in a ring: left (up) by one hop, and from the edge all the way back.
mesh    the same ring, laid out so that no edge is longer than two hops: even places first, odd
        ones on the way back (MeshGEMM, arXiv 2502.04563).

Ring algorithms start aligned: the host scatters A and B so that every core's first pair matches.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from .engine import Run, run
from .program import NOWHERE, Code, Program, after, always, at, before, unless, when
from .spec import WaferSpec
from .wires import Wires

ALGORITHMS = ("summa", "cannon", "mesh")
PHASES = ("compute", "communication")
LOOPS = ("tuned", "scalar")


def ring(algorithm: str, P: int) -> list[int]:
    """Where each position sends its tile; following it visits all P positions."""
    if algorithm == "cannon":
        return [(p - 1) % P for p in range(P)]
    if P < 3:
        return [(p + 1) % P for p in range(P)]
    to = [min(p + 2, P - 1) if p % 2 == 0 else max(p - 2, 0) for p in range(P)]
    if P % 2:
        to[P - 1] = P - 2
    return to


def ring_places(to: list[int]) -> list[int]:
    """Place of each position along the ring."""
    places, p = [0] * len(to), 0
    for n in range(len(to)):
        places[p] = n
        p = to[p]
    return places


def held(algorithm: str, P: int, step: int) -> np.ndarray:
    """Index k of the pair of tiles that each core multiplies in a step, [P, P]."""
    if algorithm == "summa":
        return np.full((P, P), step)
    q = np.array(ring_places(ring(algorithm, P)))
    return (q[:, None] + q[None, :] - step) % P


def check_schedule(algorithm: str, P: int) -> None:
    """Moves tile numbers step by step and raises unless every core meets every k once, in pairs."""
    seen = np.zeros((P, P), np.int64)
    if algorithm != "summa":
        to = np.array(ring(algorithm, P))
        a = held(algorithm, P, 0)
        b = a.copy()
    for step in range(P):
        if algorithm == "summa":
            a = b = np.full((P, P), step)
        if not np.array_equal(a, b):
            raise AssertionError(f"{algorithm}: unmatched tiles meet in step {step} on P = {P}")
        seen += a
        if step and (a == held(algorithm, P, 0)).any() and P > 1:
            raise AssertionError(f"{algorithm}: a tile comes twice within {P} steps")
        if algorithm != "summa":
            moved_a, moved_b = np.empty_like(a), np.empty_like(b)
            moved_a[:, to], moved_b[to, :] = a, b
            a, b = moved_a, moved_b
    if (seen != P * (P - 1) // 2).any():
        raise AssertionError(f"{algorithm}: some core missed a tile on P = {P}")


@functools.lru_cache(4096)
def product_cycles(
    spec: WaferSpec, m: int, k: int, n: int, itemsize: int, loop: str = "tuned"
) -> int:
    """Cycles of a local product: one vector multiply-add per element of B (m = 1: of x).

    loop "tuned": for each k one @map over a row of B adds column k of A, m elements, to C's
    columns; with m = 1 one @map over x adds rows of B. "scalar": plain nested loops around the same
    vectors.
    """
    rate = spec.rates["fmacs" if itemsize == 4 else "fmach"]
    vector, calls, maps = (m, k * n, k) if loop == "scalar" or m > 1 else (n, k, 1)
    around, outer = (spec.loop_tuned, maps * spec.loop_outer)
    if loop == "scalar":
        around, outer = spec.loop_scalar, 0
    return outer + calls * (around + spec.memory_start + -(-vector // rate))


@dataclass(frozen=True)
class Tiles:
    """Tile sizes and words: element counts of one core's share, padded."""

    m: int
    k: int
    n: int
    itemsize: int = 4

    def words(self, elements: int) -> int:
        return -(-elements * self.itemsize // 4)

    @property
    def a(self) -> int:
        return self.words(self.m * self.k)

    @property
    def b(self) -> int:
        return self.words(self.k * self.n)

    @property
    def c(self) -> int:
        return self.words(self.m * self.n)

    def memory(self, algorithm: str) -> int:
        """Words of data per core: two buffers of each operand, and summa's own tiles besides."""
        buffers = 3 if algorithm == "summa" else 2
        return buffers * (self.a + self.b) + self.c


def build(
    spec: WaferSpec,
    rows: int,
    columns: int,
    algorithm: str,
    tiles: Tiles,
    *,
    steps: int | None = None,
    loop: str = "tuned",
) -> Program:
    """The program of one product. `steps` other than P: for timing representative rows only."""
    steps = steps or max(rows, columns)
    program = Program(spec, rows, columns, PHASES, tiles.memory(algorithm))
    program.parameters[:, :, 0] = np.arange(columns)[None, :]
    program.parameters[:, :, 1] = np.arange(rows)[:, None]
    program.parameters[:, :, 2] = steps - 1
    write = _summa if algorithm == "summa" else _ring
    write(program, algorithm, tiles, steps, loop)
    return program


def _macs(code: Code, t: Tiles, loop: str, a, b, c):
    code.tag = 0
    cycles = product_cycles(code.spec, t.m, t.k, t.n, t.itemsize, loop)
    code.macs((t.m, t.k, t.n), cycles, to=c, a=a, b=b)
    code.tag = 1


def _ring(program, algorithm, t, steps, loop):
    """Memory: A0 A1 B0 B1 C."""
    axes = []
    for axis, P in (("x", program.columns), ("y", program.rows)):
        to = ring(algorithm, P)
        colours = Wires(program, axis).connect((p, d) for p, d in enumerate(to) if p != d)
        source = {d: p for p, d in enumerate(to)}
        axes.append([(colours.get((p, to[p])), colours.get((source[p], p))) for p in range(P)])
    b0, c0 = 2 * t.a, 2 * (t.a + t.b)
    operands = (
        (t.a, at(0, alt=t.a), at(t.a, alt=-t.a)),
        (t.b, at(b0, alt=t.b), at(b0 + t.b, alt=-t.b)),
    )
    made = {}
    for py in range(program.rows):
        for px in range(program.columns):
            key = (axes[0][px], axes[1][py])
            if key not in made:
                code = Code(program.spec)
                code.task()
                code.loop(steps)
                code.tag, code.condition = 1, unless(2)
                threads = []
                for (send, read), (words, now, following) in zip(key, operands, strict=True):
                    if send is None:
                        continue
                    code.vector("move", words, read=read, to=following, thread=len(threads))
                    threads.append(len(threads))
                    code.vector("move", words, a=now, send=send, thread=len(threads))
                    threads.append(len(threads))
                code.condition = always()
                _macs(code, t, loop, operands[0][1], operands[1][1], at(c0))
                for thread in threads:
                    code.wait(thread)
                code.calc(program.spec.product_step)
                code.endloop()
                code.halt()
                made[key] = code
            program.place(made[key], py, px)


def _summa(program, algorithm, t, steps, loop):
    """Memory: A0 A1 B0 B1 C, own A, own B. Round r receives pair r and multiplies pair r - 1."""
    own_a = 2 * (t.a + t.b) + t.c
    sides = []
    for axis, P, parameter, words, base, own in (
        ("x", program.columns, 0, t.a, 0, own_a),
        ("y", program.rows, 1, t.b, 2 * t.a, own_a + t.a),
    ):
        wires = Wires(program, axis)
        pair = (wires.shared("forward"), wires.shared("backward")) if P > 1 else None
        divisor = max(1, -(-steps // P))  # a representative strip has more steps than positions
        sides.append((P, parameter, words, base, own, pair, divisor))
    c0 = 2 * (t.a + t.b)
    made = {}
    for py in range(program.rows):
        for px in range(program.columns):
            key = tuple((p > 0, p + 1 < side[0]) for p, side in zip((px, py), sides, strict=True))
            if key not in made:
                code = Code(program.spec)
                code.task()
                code.loop(steps)
                code.tag = 1
                threads = []
                for n, (side, ends) in enumerate(zip(sides, key, strict=True)):
                    _, parameter, words, base, own, pair, divisor = side
                    now = at(base, alt=words)
                    lower, higher = ends
                    first = 4 * n  # four microthreads per axis: two reads, two sends
                    code.condition = after(parameter, divisor)
                    if higher:
                        code.vector("move", words, read=pair[1], to=now, thread=first + 1)
                    code.condition = before(parameter, divisor)
                    if lower:
                        code.vector("move", words, read=pair[0], to=now, thread=first)
                    # The sender's own words come back by its ramp: once into the buffer, and once
                    # more, where it sends both ways, to be dropped.
                    code.condition = when(parameter, divisor)
                    if higher:
                        code.vector("move", words, read=pair[0], to=now, thread=first)
                        code.vector("move", words, a=at(own), send=pair[0], thread=first + 2)
                    if lower:
                        to = NOWHERE if higher else now
                        code.vector("move", words, read=pair[1], to=to, thread=first + 1)
                        code.vector("move", words, a=at(own), send=pair[1], thread=first + 3)
                    if not pair:
                        code.vector("move", words, a=at(own), to=now, thread=first)
                    threads += range(first, first + 4)
                code.condition = unless(3)  # parameter 3 is 0: every round but the first
                previous = (at(t.a, alt=-t.a), at(2 * t.a + t.b, alt=-t.b))
                _macs(code, t, loop, *previous, at(c0))
                code.condition = always()
                for thread in threads:
                    code.wait(thread)
                code.calc(program.spec.product_step)
                code.endloop()
                last = (steps - 1) & 1
                final = (at(last * t.a), at(2 * t.a + last * t.b))
                _macs(code, t, loop, *final, at(c0))
                code.halt()
                made[key] = code
            program.place(made[key], py, px)


def scatter(program: Program, algorithm: str, t: Tiles, a: np.ndarray, b: np.ndarray) -> None:
    """Put fp32 matrices into the cores' memory: a [P*m, P*k], b [P*k, P*n]."""
    P = program.rows
    program.memory = np.zeros((P, P, program.words), np.float32)
    tiles_a = a.reshape(P, t.m, P, t.k).transpose(0, 2, 1, 3).reshape(P, P, -1)  # [i, k]
    tiles_b = b.reshape(P, t.k, P, t.n).transpose(0, 2, 1, 3).reshape(P, P, -1)  # [k, j]
    i, j = np.indices((P, P))
    if algorithm == "summa":
        own = 2 * (t.a + t.b) + t.c
        program.memory[:, :, own : own + t.a] = tiles_a
        program.memory[:, :, own + t.a : own + t.a + t.b] = tiles_b
    else:
        k = held(algorithm, P, 0)
        program.memory[:, :, : t.a] = tiles_a[i, k]
        program.memory[:, :, 2 * t.a : 2 * t.a + t.b] = tiles_b[k, j]


def gather(done: Run, t: Tiles) -> np.ndarray:
    """C [P*m, P*n] out of the cores' memory."""
    P, c0 = done.program.rows, 2 * (t.a + t.b)
    c = done.memory[:, :, c0 : c0 + t.c].reshape(P, P, t.m, t.n)
    return c.transpose(0, 2, 1, 3).reshape(P * t.m, P * t.n)


# ---- phase engine -------------------------------------------------------------------------------

STRIP = 2  # rows of the strip that stands for the grid
# Steps of the two runs whose difference is the cost of a step. Summa and Cannon reach across the
# whole line, and their pipelines fill over many steps; the interleaved ring's steps are local.
STEPS = {"summa": (16, 48), "cannon": (16, 48), "mesh": (6, 12)}
WHOLE = 12  # grids up to this side are simulated whole
LOCAL = 16  # columns of a strip of the interleaved ring, whose edges span two hops at most


@functools.lru_cache(512)
def strip_cycles(
    spec: WaferSpec, P: int, algorithm: str, tiles: Tiles, loop: str = "tuned"
) -> tuple[float, float, float]:
    """Cycles of a P x P product from a 2 x P strip: (cycles, of them compute, cycles per step).

    A step is the same for all rows, so a strip shows it; steps are alike, so two short runs give
    the cost of one and of the ends.
    """
    compute = float(P * product_cycles(spec, tiles.m, tiles.k, tiles.n, tiles.itemsize, loop))
    few, more = STEPS[algorithm]
    if P <= more:
        rows = P if P <= WHOLE else STRIP
        done = run(build(spec, rows, P, algorithm, tiles, steps=P, loop=loop))
        return float(done.cycles), compute, done.cycles / P
    columns = min(P, LOCAL + P % 2) if algorithm == "mesh" else P
    first = run(build(spec, STRIP, columns, algorithm, tiles, steps=few, loop=loop)).cycles
    second = run(build(spec, STRIP, columns, algorithm, tiles, steps=more, loop=loop)).cycles
    step = (second - first) / (more - few)
    return first + (P - few) * step, compute, step
