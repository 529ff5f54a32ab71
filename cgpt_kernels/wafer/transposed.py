"""C [M, N] = A [M, K] B [N, K]^T on R x C cores, both operands as they lie: nothing is aligned.

MeshGEMM's form for a transposed operand (arXiv 2502.04563), here on R <= C cores, L = C steps. Core
(py, px) keeps tile A(py, px), Mt x Kt. N is cut into L blocks; the tiles of B, Nt x Kt, go round
the interleaved ring along y (tiles.py: a place of a line shorter than L holds several). A core
multiplies one of those it holds, block n of B's rows, by its A; the partial products of a row are
summed along x by a K-tree and flooded back, and the core whose px is n keeps the sum: C(py, n). The
tile for the next step travels on microthreads beside the product of this one.

A grid with R > C runs the same program with the axes and the operands changed over: C^T = B A^T.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .collectives import Flood, Reduce
from .engine import Run
from .program import NOWHERE, Code, Program, always, at, unless, when
from .spec import WaferSpec
from .tiles import PHASES, Tiles, buffers, last_slots, product_cycles, ring, slots_held
from .wires import Wires


@dataclass(frozen=True)
class Form:
    """A product as the program sees it: tiles m x k stay, n x k go round `ring` cores."""

    tiles: Tiles
    ring: int
    line: int  # cores along which partial products are summed, and steps
    high: bool  # R > C: axes and operands are changed over

    @classmethod
    def of(cls, t: Tiles, rows: int, columns: int) -> Form:
        high = rows > columns
        if high:
            t = Tiles(t.n, t.k, t.m, t.itemsize)
        return cls(t, min(rows, columns), max(rows, columns), high)

    @property
    def words(self) -> int:
        """Of data per core: what stays, the tiles that move and a free buffer, the partial
        product, C, and a zero."""
        t = self.tiles
        return t.a + (-(-self.line // self.ring) + 1) * t.b + 2 * t.c + 1


def held(ring_cores: int, line: int) -> np.ndarray:
    """Block of the moving operand that a place multiplies in a step: [places, steps]."""
    return (last_slots("mesh", ring_cores, line)[:, None] - np.arange(line)[None, :]) % line


def shares(M: int, K: int, N: int, rows: int, columns: int, itemsize: int) -> Tiles:
    """Tile sizes on a grid: C is Mt x Nt, and Kt is a share of the longer side's cores."""

    def share(n, P):
        return -(-n // P)

    return Tiles(share(M, rows), share(K, max(rows, columns)), share(N, columns), itemsize)


def build(
    spec: WaferSpec, rows: int, columns: int, t: Tiles, *, steps: int | None = None
) -> Program:
    """The program of one product. Memory: A, B's tiles and a free buffer, partial, C, 0.

    B's tiles lie as [Kt, Nt]. `steps`, for timing representative cores only: a place of the ring
    then holds one tile.
    """
    form = Form.of(t, rows, columns)
    t, P = form.tiles, form.ring
    L = steps or form.line
    if steps:
        form = Form(t, P, P, form.high)
    program = Program(spec, rows, columns, PHASES, form.words)
    program.parameters[:, :, 1] = L - 1
    turn = np.full((P, max(rows, columns)), -1)
    if not steps:
        turn = np.argsort(held(P, L), axis=1)  # the step in which a core keeps the sum
    program.parameters[:, :, 0] = turn.T if form.high else turn

    along, across = ("x", "y") if form.high else ("y", "x")
    to = ring("mesh", P)
    moves = Wires(program, along).connect((p, d) for p, d in enumerate(to) if p != d)
    source = {d: p for p, d in enumerate(to)}
    slots = [1] * P if steps else slots_held("mesh", P, L)
    lines = Wires(program, across)
    reduce = Reduce(lines, "ktree")
    flood = Flood(lines, reduce.root)

    partial0 = form.words - 2 * t.c - 1
    partial, c0 = at(partial0), at(partial0 + t.c)
    zero = at(partial0 + 2 * t.c, stride=0)
    cycles = product_cycles(spec, t.m, t.k, t.n, t.itemsize)
    made = {}
    for p in range(P):
        ways = (moves.get((p, to[p])), moves.get((source[p], p)), slots[p])
        now, coming, wrap = buffers(t.a, t.b, slots[p])
        for q in range(lines.P):
            key = (ways, q)
            if key not in made:
                code = Code(spec)
                code.task()
                code.loop(L)
                code.tag, code.condition = 1, unless(1)
                if ways[0] is not None:
                    code.vector("move", t.b, read=ways[1], to=coming, thread=0, wrap=wrap,
                                ahead=slots[p] if wrap else 0)  # fmt: skip
                    code.vector("move", t.b, a=now, send=ways[0], thread=1, wrap=wrap)
                code.tag, code.condition = 0, always()
                code.vector("mul", t.c, a=partial, b=zero, to=partial)
                code.macs((t.m, t.k, t.n), cycles, to=partial, a=at(0), b=now, wrap=wrap)
                code.tag = 1
                reduce.write(code, q, t.c, partial0, "instruction")
                if q == reduce.root:
                    if lines.P > 1:
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
            program.place(made[key], *((q, p) if form.high else (p, q)))
    return program


def words_moved(rows: int, columns: int, t: Tiles) -> int:
    """Words that all cores send: tiles round the ring, partial sums to one core and back."""
    form = Form.of(t, rows, columns)
    shifts = (form.line - 1) * (form.ring > 1) * form.tiles.b
    return rows * columns * (shifts + (form.line > 1) * form.line * form.tiles.c)


def scatter(program: Program, t: Tiles, a: np.ndarray, b: np.ndarray) -> None:
    """Put fp32 matrices into the cores' memory.

    R <= C: a [R*m, C*k], b [C*n, C*k]. R > C: a [R*m, R*k], b [C*n, R*k].
    """
    R, C = program.rows, program.columns
    form = Form.of(t, R, C)
    t, P, L = form.tiles, form.ring, form.line
    stays, moves = (b, a) if form.high else (a, b)
    memory = np.zeros((P, L, program.words), np.float32)
    memory[:, :, : t.a] = stays.reshape(P, t.m, L, t.k).transpose(0, 2, 1, 3).reshape(P, L, -1)
    blocks = moves.reshape(L, t.n, L, t.k).transpose(0, 2, 3, 1).reshape(L, L, -1)  # [n, line]
    last, slots = last_slots("mesh", P, L), np.array(slots_held("mesh", P, L))
    for n in range(slots.max()):  # buffer n holds the n-th slot before the last
        start, chosen = t.a + n * t.b, n < slots
        memory[chosen, :, start : start + t.b] = blocks[(last - n) % L][chosen]
    program.memory = memory.transpose(1, 0, 2) if form.high else memory


def gather(done: Run, t: Tiles) -> np.ndarray:
    """C [M, N], padded, out of the cores' memory."""
    form = Form.of(t, done.program.rows, done.program.columns)
    t = form.tiles
    memory = done.memory.transpose(1, 0, 2) if form.high else done.memory  # [ring, line, words]
    c0 = form.words - t.c - 1
    c = memory[:, :, c0 : c0 + t.c].reshape(form.ring, form.line, t.m, t.n)
    c = c.transpose(0, 2, 1, 3).reshape(form.ring * t.m, form.line * t.n)
    return c.T if form.high else c
