"""Matrix products on a grid of cores: who holds which tile, what each core does per step.

C [M, N] = A [M, K] B [K, N] on R x C cores. K is cut into L = max(R, C) panels; core (py, px) owns
tile C(py, px), Mt x Nt, and meets the pairs A(py, k), B(k, px) one step after the other, L steps.
The transfer for the next step runs on microthreads beside the product of this one.

summa   step k: the column that owns panel k sends its A tiles along the rows, the row that owns it
        its B tiles along the columns.
cannon  tiles move one place in a ring: left (up) by one hop, and from the edge all the way back.
mesh    the same ring, laid out so that no edge is longer than two hops: even places first, odd
        ones on the way back (MeshGEMM, arXiv 2502.04563).

A ring has L slots. On a line of L cores each holds one; on a shorter line of P, place q holds slots
q L // P to (q + 1) L // P, multiplies what lies in the last of them and passes that on. So the
algorithms run on any grid: on a square one they are the published ones. They start aligned: the
host scatters A and B so that the pairs of every core and step match.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from .engine import Run
from .program import ADVANCE_OWN, NOWHERE, Code, Program, after, always, at, before, unless, when
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


def last_slots(algorithm: str, P: int, L: int) -> np.ndarray:
    """The slot of a ring of L whose tile each of the P positions of a line multiplies, [P]."""
    return (np.array(ring_places(ring(algorithm, P))) + 1) * L // P - 1


def slots_held(algorithm: str, P: int, L: int) -> list[int]:
    """How many slots of a ring of L each of the P positions of a line holds."""
    return [(q + 1) * L // P - q * L // P for q in ring_places(ring(algorithm, P))]


def held(algorithm: str, rows: int, columns: int, step: int) -> np.ndarray:
    """Index k of the pair of tiles that each core multiplies in a step, [rows, columns]."""
    L = max(rows, columns)
    if algorithm == "summa":
        return np.full((rows, columns), step)
    x, y = (last_slots(algorithm, P, L) for P in (columns, rows))
    return (y[:, None] + x[None, :] - step) % L


def check_schedule(algorithm: str, rows: int, columns: int) -> None:
    """Moves tile numbers step by step and raises unless every core meets every k once, in pairs."""
    L = max(rows, columns)
    if algorithm == "summa":
        return  # every step is one k, the same for all
    x, y = (last_slots(algorithm, P, L) for P in (columns, rows))
    for P, last in ((columns, x), (rows, y)):
        for p, to in enumerate(ring(algorithm, P)):  # what leaves a place enters the next one
            after = slots_held(algorithm, P, L)[to]
            if (last[p] + after - last[to]) % L:
                raise AssertionError(f"{algorithm}: position {p} of {P} sends to the wrong place")
    a = (np.arange(L)[None, :] + y[:, None]) % L  # [rows, slots]
    b = (np.arange(L)[None, :] + x[:, None]) % L  # [columns, slots]
    met = np.zeros((rows, columns, L), bool)
    i, j = np.indices((rows, columns))
    for step in range(L):
        k = a[:, x]
        if not np.array_equal(k, b[:, y].T) or not np.array_equal(
            k, held(algorithm, rows, columns, step)
        ):
            raise AssertionError(f"{algorithm}: unmatched tiles meet in step {step}")
        met[i, j, k] = True
        a, b = np.roll(a, 1, 1), np.roll(b, 1, 1)
    if not met.all():
        raise AssertionError(f"{algorithm}: some core missed a tile on {rows} x {columns}")


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

    def owned(self, rows: int, columns: int) -> tuple[int, int]:
        """The most tiles of A, and of B, that one core of a grid owns."""
        L = max(rows, columns)
        return -(-L // columns), -(-L // rows)

    def memory(self, algorithm: str, rows: int, columns: int) -> int:
        """Words of data per core: the tiles it owns, two buffers of each operand (of a ring's, the
        tiles are one), and C."""
        own_a, own_b = self.owned(rows, columns)
        buffers = 2 if algorithm == "summa" else 1
        return (own_a + buffers) * self.a + (own_b + buffers) * self.b + self.c

    def offset(self, algorithm: str, rows: int, columns: int) -> tuple[int, int, int, int]:
        """Where the first A and B buffer, C, and summa's own tiles lie."""
        own_a, own_b = self.owned(rows, columns)
        if algorithm == "summa":
            c = 2 * (self.a + self.b)
            return 0, 2 * self.a, c, c + self.c
        b = (own_a + 1) * self.a
        return 0, b, b + (own_b + 1) * self.b, -1


def build(
    spec: WaferSpec,
    rows: int,
    columns: int,
    algorithm: str,
    tiles: Tiles,
    *,
    steps: int | None = None,
    last_of: tuple[int, int] | None = None,
    loop: str = "tuned",
) -> Program:
    """The program of one product.

    steps: for timing representative cores only: so many steps, the last ones of a grid with
    `last_of` (rows, columns), default this one's; a core then holds one tile of a ring.
    """
    L = steps or max(rows, columns)
    shape = (L, L) if steps else (rows, columns)
    program = Program(spec, rows, columns, PHASES, tiles.memory(algorithm, *shape))
    if algorithm == "summa":
        _summa(program, tiles, L, shape, last_of or (rows, columns), loop)
    else:
        _ring(program, algorithm, tiles, L, shape, loop)
    return program


def _macs(code: Code, t: Tiles, loop: str, a, b, c, wrap: int = 0):
    code.tag = 0
    cycles = product_cycles(code.spec, t.m, t.k, t.n, t.itemsize, loop)
    code.macs((t.m, t.k, t.n), cycles, to=c, a=a, b=b, wrap=wrap)
    code.tag = 1


def buffers(base: int, words: int, held: int):
    """Operands of a ring's tile in use and of the incoming one, and where steps start over.

    A place of `held` slots has held + 1 buffers: in step s the last slot's tile is in buffer
    s % (held + 1), and what comes in goes to the buffer before it.
    """
    if held == 1:
        return at(base, alt=words), at(base + words, alt=-words), 0
    return at(base, step=words), at(base, step=words), held + 1


def _ring(program, algorithm, t, steps, shape, loop):
    """Memory: A tiles and a free buffer, B tiles and a free buffer, C."""
    program.parameters[:, :, 0] = steps - 1
    bases, axes = t.offset(algorithm, *shape), []
    for axis, P, size in (("x", program.columns, shape[1]), ("y", program.rows, shape[0])):
        to = ring(algorithm, P)
        colours = Wires(program, axis).connect((p, d) for p, d in enumerate(to) if p != d)
        source = {d: p for p, d in enumerate(to)}
        slots = slots_held(algorithm, P, steps) if size == P else [1] * P
        axes.append([
            (colours.get((p, to[p])), colours.get((source[p], p)), slots[p]) for p in range(P)
        ])  # fmt: skip
    made = {}
    for py in range(program.rows):
        for px in range(program.columns):
            key = (axes[0][px], axes[1][py])
            if key not in made:
                code = Code(program.spec)
                code.task()
                code.loop(steps)
                code.tag, code.condition = 1, unless(0)
                threads, operands, wraps = [], [], 0
                for (send, read, slots), base, words in zip(key, bases, (t.a, t.b), strict=False):
                    now, coming, wrap = buffers(base, words, slots)
                    operands.append(now)
                    wraps = max(wraps, wrap)
                    if send is None:
                        continue
                    code.vector("move", words, read=read, to=coming, thread=len(threads),
                                wrap=wrap, ahead=slots if wrap else 0)  # fmt: skip
                    threads.append(len(threads))
                    code.vector("move", words, a=now, send=send, thread=len(threads), wrap=wrap)
                    threads.append(len(threads))
                code.condition = always()
                _macs(code, t, loop, *operands, at(bases[2]), wraps)
                for thread in threads:
                    code.wait(thread)
                code.calc(program.spec.product_step)
                code.endloop()
                code.halt()
                made[key] = code
            program.place(made[key], py, px)


def _summa(program, t, steps, shape, last_of, loop):
    """Memory: A0 A1 B0 B1 C, own A, own B. Round r receives pair r and multiplies pair r - 1."""
    first_a, first_b, c0, own_a = t.offset("summa", *shape)
    own_b = own_a + t.owned(*shape)[0] * t.a
    sides = []
    for axis, P, whole, parameter, words, base, own in (
        ("x", program.columns, last_of[1], 0, t.a, first_a, own_a),
        ("y", program.rows, last_of[0], 1, t.b, first_b, own_b),
    ):
        wires = Wires(program, axis)
        # A position owns `share` panels, one after the other; a strip that stands for a longer run
        # has the positions that come last.
        L = max(steps, *last_of)
        share = -(-L // P) if P == whole else max(1, -(-steps // P))
        skipped = (L - steps) // share if P == whole else 0
        pair = None
        if P > 1:
            pair = wires.shared("forward"), wires.shared("backward", skipped)
        index = np.arange(P) - skipped
        program.parameters[:, :, parameter] = index[None, :] if axis == "x" else index[:, None]
        sides.append((parameter, words, base, own, pair, share))
    made = {}
    ends = [[(p > 0, p + 1 < P) for p in range(P)] for P in (program.columns, program.rows)]
    for py in range(program.rows):
        for px in range(program.columns):
            key = (ends[0][px], ends[1][py])
            if key not in made:
                code = Code(program.spec)
                code.task()
                code.loop(steps)
                code.tag = 1
                threads = []
                for n, (side, (lower, higher)) in enumerate(zip(sides, key, strict=True)):
                    parameter, words, base, own, pair, share = side
                    now = at(base, alt=words)
                    mine = {
                        "a": at(own, step=words if sum(t.owned(*shape)) > 2 else 0),
                        "wrap": share,
                    }
                    first = 4 * n  # four microthreads per axis: two reads, two sends
                    code.condition = after(parameter, share)
                    if higher:
                        code.vector("move", words, read=pair[1], to=now, thread=first + 1)
                    code.condition = before(parameter, share)
                    if lower:
                        code.vector("move", words, read=pair[0], to=now, thread=first)
                    # The sender's own words come back by its ramp: once into the buffer, and once
                    # more, where it sends both ways, to be dropped.
                    code.condition = when(parameter, share)
                    if higher:
                        code.vector("move", words, read=pair[0], to=now, thread=first)
                        code.vector("move", words, **mine, send=pair[0], thread=first + 2)
                    if lower:
                        to = NOWHERE if higher else now
                        code.vector("move", words, read=pair[1], to=to, thread=first + 1)
                        code.vector("move", words, **mine, send=pair[1], thread=first + 3,
                                    flags=ADVANCE_OWN)  # fmt: skip
                    if not pair:
                        code.vector("move", words, **mine, to=now, thread=first)
                    threads += range(first, first + 4)
                code.condition = unless(3)  # parameter 3 is 0: every round but the first
                previous = (at(t.a, alt=-t.a), at(first_b + t.b, alt=-t.b))
                _macs(code, t, loop, *previous, at(c0))
                code.condition = always()
                for thread in threads:
                    code.wait(thread)
                code.calc(program.spec.product_step)
                code.endloop()
                last = (steps - 1) & 1
                final = (at(last * t.a), at(first_b + last * t.b))
                _macs(code, t, loop, *final, at(c0))
                code.halt()
                made[key] = code
            program.place(made[key], py, px)


def words_moved(algorithm: str, rows: int, columns: int, t: Tiles) -> int:
    """Words that all cores send: a ring passes on one tile per core, axis and step but the last;
    summa's owner of a panel sends it both ways, where there is somebody."""
    L = max(rows, columns)
    if algorithm != "summa":
        return rows * columns * (L - 1) * ((columns > 1) * t.a + (rows > 1) * t.b)

    def ways(P):
        owners = np.arange(L) // -(-L // P)
        return int((owners > 0).sum() + (owners < P - 1).sum())

    return rows * ways(columns) * t.a + columns * ways(rows) * t.b


def scatter(program: Program, algorithm: str, t: Tiles, a: np.ndarray, b: np.ndarray) -> None:
    """Put fp32 matrices into the cores' memory: a [R*m, L*k], b [L*k, C*n]."""
    R, C = program.rows, program.columns
    L = max(R, C)
    program.memory = np.zeros((R, C, program.words), np.float32)
    tiles_a = a.reshape(R, t.m, L, t.k).transpose(0, 2, 1, 3).reshape(R, L, -1)  # [i, k]
    tiles_b = b.reshape(L, t.k, C, t.n).transpose(0, 2, 1, 3).reshape(L, C, -1)  # [k, j]
    base_a, base_b, _, own = t.offset(algorithm, R, C)
    i, j = np.indices((R, C))
    if algorithm == "summa":
        own_a, own_b = t.owned(R, C)
        for n in range(own_a):
            k = np.minimum(j * own_a + n, L - 1)
            program.memory[:, :, own + n * t.a : own + (n + 1) * t.a] = tiles_a[i, k]
        own += own_a * t.a
        for n in range(own_b):
            k = np.minimum(i * own_b + n, L - 1)
            program.memory[:, :, own + n * t.b : own + (n + 1) * t.b] = tiles_b[k, j]
        return
    x, y = (last_slots(algorithm, P, L) for P in (C, R))
    slots_x, slots_y = (np.array(slots_held(algorithm, P, L)) for P in (C, R))
    k = y[:, None] + x[None, :]
    for n in range(slots_x.max()):  # buffer n holds the n-th slot before the last
        start = base_a + n * t.a
        chosen = n < slots_x
        program.memory[:, chosen, start : start + t.a] = tiles_a[i, (k - n) % L][:, chosen]
    for n in range(slots_y.max()):
        start = base_b + n * t.b
        chosen = n < slots_y
        program.memory[chosen, :, start : start + t.b] = tiles_b[(k - n) % L, j][chosen]


def gather(done: Run, algorithm: str, t: Tiles) -> np.ndarray:
    """C [R*m, C*n] out of the cores' memory."""
    R, C = done.program.rows, done.program.columns
    c0 = t.offset(algorithm, R, C)[2]
    c = done.memory[:, :, c0 : c0 + t.c].reshape(R, C, t.m, t.n)
    return c.transpose(0, 2, 1, 3).reshape(R * t.m, C * t.n)
