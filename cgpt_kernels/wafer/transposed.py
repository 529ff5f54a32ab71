"""C [M, N] = A [M, K] B [N, K]^T on a square grid, both operands as they lie: nothing is aligned.

MeshGEMM's form for a transposed operand (arXiv 2502.04563), P steps. Core (py, px) keeps tile
A(py, px), Mt x Kt. The tiles of B, Nt x Kt, go round the interleaved ring along y; a core
multiplies the one it holds, block n of B's rows, by its A; the partial products of a row are summed
along x by a K-tree and flooded back, and the core whose px is n keeps the sum: C(py, n). The tile
for the next step travels on microthreads beside the product of this one.
"""

from __future__ import annotations

import functools

import numpy as np

from .collectives import Flood, Reduce
from .engine import Run, run
from .program import NOWHERE, Code, Program, always, at, unless, when
from .spec import WaferSpec
from .tiles import PHASES, WHOLE, Tiles, product_cycles, ring, ring_places
from .wires import Wires

STRIP = 4  # rows that stand for the grid: the fewest on which the ring has edges of two hops
STEPS = (6, 12)  # of the two runs whose difference is the cost of a step


def held(P: int) -> np.ndarray:
    """Block of B's rows that row py of cores multiplies in a step: [P rows, P steps]."""
    places = np.array(ring_places(ring("mesh", P)))
    return np.argsort(places)[(places[:, None] - np.arange(P)[None, :]) % P]


def memory(t: Tiles) -> int:
    """Words of data per core: A, two buffers of B, the partial product, C, and a zero."""
    return t.a + 2 * t.b + 2 * t.c + 1


def build(
    spec: WaferSpec, rows: int, columns: int, t: Tiles, *, steps: int | None = None
) -> Program:
    """The program of one product. Memory: A B0 B1 partial C 0; B's tiles lie as [Kt, Nt].

    `steps` other than P, on a strip: for timing representative rows only.
    """
    steps = steps or rows
    program = Program(spec, rows, columns, PHASES, memory(t))
    turn = np.full((rows, columns), -1)
    if steps == rows == columns:
        turn = np.argsort(held(rows), axis=1)  # the step in which (py, px) keeps the sum
    program.parameters[:, :, 0] = turn
    program.parameters[:, :, 1] = steps - 1

    to = ring("mesh", rows)
    moves = Wires(program, "y").connect((p, d) for p, d in enumerate(to) if p != d)
    source = {d: p for p, d in enumerate(to)}
    along_x = Wires(program, "x")
    reduce = Reduce(along_x, "ktree")
    flood = Flood(along_x, reduce.root)

    b0 = t.a
    partial, c0 = at(b0 + 2 * t.b), at(b0 + 2 * t.b + t.c)
    zero = at(b0 + 2 * t.b + 2 * t.c, stride=0)
    now, following = at(b0, alt=t.b), at(b0 + t.b, alt=-t.b)
    cycles = product_cycles(spec, t.m, t.k, t.n, t.itemsize)
    made = {}
    for py in range(rows):
        ways = (moves.get((py, to[py])), moves.get((source[py], py)))
        for px in range(columns):
            key = (ways, px)
            if key not in made:
                code = Code(spec)
                code.task()
                code.loop(steps)
                code.tag, code.condition = 1, unless(1)
                if ways[0] is not None:
                    code.vector("move", t.b, read=ways[1], to=following, thread=0)
                    code.vector("move", t.b, a=now, send=ways[0], thread=1)
                code.tag, code.condition = 0, always()
                code.vector("mul", t.c, a=partial, b=zero, to=partial)
                code.macs((t.m, t.k, t.n), cycles, to=partial, a=at(0), b=now)
                code.tag = 1
                reduce.write(code, px, t.c, partial[0], "instruction")
                if px == reduce.root:
                    if columns > 1:
                        code.vector("move", t.c, a=partial, send=flood.colour)
                    code.condition = when(0)
                    code.vector("move", t.c, a=partial, to=c0)
                else:
                    code.condition = when(0)
                    code.vector("move", t.c, read=flood.colour, to=c0)
                    code.condition = unless(0)
                    code.vector("move", t.c, read=flood.colour, to=NOWHERE)
                code.condition = always()
                if ways[0] is not None:
                    code.wait(0)
                    code.wait(1)
                code.calc(spec.product_step)
                code.endloop()
                code.halt()
                made[key] = code
            program.place(made[key], py, px)
    return program


def scatter(program: Program, t: Tiles, a: np.ndarray, b: np.ndarray) -> None:
    """Put fp32 matrices into the cores' memory: a [P*m, P*k], b [P*n, P*k]."""
    P = program.rows
    program.memory = np.zeros((P, P, program.words), np.float32)
    program.memory[:, :, : t.a] = a.reshape(P, t.m, P, t.k).transpose(0, 2, 1, 3).reshape(P, P, -1)
    program.memory[:, :, t.a : t.a + t.b] = (
        b.reshape(P, t.n, P, t.k).transpose(0, 2, 3, 1).reshape(P, P, -1)
    )


def gather(done: Run, t: Tiles) -> np.ndarray:
    """C [P*m, P*n] out of the cores' memory."""
    P, c0 = done.program.rows, t.a + 2 * t.b + t.c
    c = done.memory[:, :, c0 : c0 + t.c].reshape(P, P, t.m, t.n)
    return c.transpose(0, 2, 1, 3).reshape(P * t.m, P * t.n)


@functools.lru_cache(512)
def strip_cycles(spec: WaferSpec, P: int, t: Tiles) -> tuple[float, float]:
    """Cycles of a P x P product, and of them compute, from a few whole rows: all rows do alike."""
    compute = float(P * product_cycles(spec, t.m, t.k, t.n, t.itemsize))
    if P <= WHOLE:
        return float(run(build(spec, P, P, t)).cycles), compute
    few, more = (run(build(spec, STRIP, P, t, steps=n)).cycles for n in STEPS)
    step = (more - few) / (STEPS[1] - STEPS[0])
    return few + (P - STEPS[0]) * step, compute
