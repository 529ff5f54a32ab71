"""Broadcast, reduce and all-reduce over lines and rectangles of cores, wavelet by wavelet.

P cores in a line, B words (32 bit) each, fp32 sums. Reduces end in position 0 (`ktree`: in the
middle); an all-reduce is a reduce and a flood from where it ended, or a ring. On a rectangle rows
come first, then column 0.

A stop relays by instruction (one vector add from the fabric to the fabric) or by task (a callback
that adds and sends). Sources of the algorithms: arXiv 2404.15888; `ktree`: arXiv 2502.04563.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from .. import checks
from .engine import Run, report_of, run
from .program import ADVANCE_OWN, EAST, NORTH, NOWHERE, RAMP, SOUTH, WEST, Code, Program, at
from .report import Report
from .spec import WSE2, WaferSpec, check_grid
from .wires import Wires

KINDS = ("broadcast", "reduce", "allreduce")
REDUCES = ("star", "chain", "tree", "preorder", "two_phase", "ktree")
RELAYS = ("instruction", "task")


@functools.lru_cache(1024)
def group_count(P: int) -> int:
    """Groups, about sqrt(P), whose two phases of chains have the fewest stops and the least way."""

    def way(g):  # stops in a group, stops between heads, and the hops to the last head
        heads = math.ceil(P / g) - 1
        return 6 * (g - 1) + 5 * heads + heads * g

    near = max(1, round(math.sqrt(P)))
    return math.ceil(P / min(range(max(1, near // 2), 2 * near + 1), key=way))


class Reduce:
    """A reduce along every line of an axis: `stops[p]` says what position p does, in order.

    A stop is ("from", q): add what q sends; ("to", q): send the sum so far. Neighbouring entries
    from, to become one relaying instruction.
    """

    def __init__(self, wires: Wires, algorithm: str, groups: int | None = None):
        self.P, self.algorithm, self.wires = wires.P, algorithm, wires
        self.root, self.star = 0, None
        edges: list[tuple[int, int]] = []
        P = self.P
        if algorithm == "star":
            self.star = wires.star() if P > 1 else None
        elif algorithm == "chain":
            edges = [(p, p - 1) for p in range(P - 1, 0, -1)]
        elif algorithm == "tree":
            reach = 1
            while reach < P:
                edges += [(p, p - reach) for p in range(reach, P, 2 * reach)]
                reach *= 2
        elif algorithm == "preorder":
            edges = _preorder(0, P)
        elif algorithm == "two_phase":
            g = math.ceil(P / (groups or group_count(P)))
            edges = [(p, p - 1) for p in range(P - 1, 0, -1) if p % g]
            edges += [(h, h - g) for h in range((P - 1) // g * g, 0, -g)]
        else:
            g = math.ceil(P / (groups or group_count(P)))
            spans = [range(lo, min(lo + g, P)) for lo in range(0, P, g)]
            for span in spans:
                edges += _both_ends(list(span))
            roots = [span[len(span) // 2] for span in spans]
            edges += _both_ends(roots)
            self.root = roots[len(roots) // 2]
        self.colours = wires.connect(edges)
        self.stops: list[list[tuple[str, int]]] = [[] for _ in range(P)]
        for s, d in edges:
            self.stops[d].append(("from", s))
            self.stops[s].append(("to", d))

    def write(self, code: Code, p: int, words: int, address: int, relay: str) -> None:
        """Position p's part; its vector lies at `address` and holds the sum at the root.

        By task each packet starts one; the last before a send, or at the root, pays the stop's
        software.
        """
        here = at(address)
        if self.algorithm == "star":
            if p == 0 and self.P > 1:
                total = words * (self.P - 1)
                code.vector("add", total, read=self.star, b=here, to=here, period=words)
            elif p:
                code.vector("move", words, a=here, send=self.star, flags=ADVANCE_OWN)
            return
        stops = self.stops[p]
        n = 0
        while n < len(stops):
            way, other = stops[n]
            if way == "to":
                code.vector("move", words, a=here, send=self.colours[p, other])
            else:
                colour = self.colours[other, p]
                if relay == "task":
                    more = n + 1 < len(stops) and stops[n + 1][0] == "from"
                    code.arrival(colour, software=not more)
                last = n + 1 < len(stops) and stops[n + 1][0] == "to"
                if last and relay == "instruction":
                    out = self.colours[p, stops[n + 1][1]]
                    code.vector("add", words, read=colour, b=here, send=out)
                    n += 1
                else:
                    code.vector("add", words, read=colour, b=here, to=here)
            n += 1


def _preorder(root: int, size: int) -> list[tuple[int, int]]:
    """A binary tree whose nodes are numbered parent, left subtree, right subtree."""
    edges, left = [], size // 2
    for child, count in ((root + 1, left), (root + 1 + left, size - 1 - left)):
        if count > 0:
            edges += [*_preorder(child, count), (child, root)]
    return edges


def _both_ends(line: list[int]) -> list[tuple[int, int]]:
    """Two chains from the ends of a list of positions to the one in its middle."""
    middle = len(line) // 2
    left = [(line[n], line[n + 1]) for n in range(middle)]
    return left + [(line[n], line[n - 1]) for n in range(len(line) - 1, middle, -1)]


class Flood:
    """A broadcast from one position of every line to all others."""

    def __init__(self, wires: Wires, root: int):
        self.P, self.root = wires.P, root
        self.colour = wires.flood(root) if wires.P > 1 else None

    def write(self, code: Code, p: int, words: int, address: int, relay: str) -> None:
        if self.P == 1:
            return
        if p == self.root:
            code.vector("move", words, a=at(address), send=self.colour)
        else:
            if relay == "task":
                code.arrival(self.colour)
            code.vector("move", words, read=self.colour, to=at(address))


class Ring:
    """All-reduce in a ring: P - 1 steps of sums, P - 1 steps of copies, B / P words each."""

    def __init__(self, wires: Wires):
        self.P = wires.P
        edges = [(p, p + 1) for p in range(self.P - 1)] + [(self.P - 1, 0)]
        # two sets that take turns: the receive of the next step waits while this one's still runs
        self.colours = [wires.connect(edges), wires.connect(edges)] if self.P > 1 else []

    def write(self, code: Code, p: int, words: int, address: int, relay: str) -> None:
        P = self.P
        if P == 1:
            return
        chunk = words // P
        into = [colours[(p - 1) % P, p] for colours in self.colours]
        out = [colours[p, (p + 1) % P] for colours in self.colours]

        def part(n):
            return at(address + n % P * chunk)

        # Receives run on microthreads while the main thread sends: were both one instruction, all
        # cores would wait for room at once.
        def receive(step):
            into_part, summing = part(p - step - 1), step < P - 1
            code.vector("add" if summing else "move", chunk, read=into[step & 1], to=into_part,
                        b=into_part if summing else NOWHERE, thread=1 + (step & 1))  # fmt: skip

        steps = 2 * P - 2
        if relay == "instruction":
            receive(0)
        for step in range(steps):
            send = {"a": part(p - step), "send": out[step & 1]}
            if relay == "task":
                code.vector("move", chunk, **send, thread=0)
                code.arrival(into[step & 1])
                receive(step)
                code.wait(0)
            else:
                code.vector("move", chunk, **send)
                if step + 1 < steps:
                    receive(step + 1)
            code.wait(1 + (step & 1))


# ---- formulas -----------------------------------------------------------------------------------


def formula(kind: str, algorithm: str, P: int, B: int, spec: WaferSpec = WSE2) -> float:
    """Cycles of a line by the closed forms of arXiv 2404.15888 (ktree: the same reasoning).

    For hop = 1; `collective` simulates instead.
    """
    T, log = spec.ramp, math.ceil(math.log2(P)) if P > 1 else 0
    if P == 1:
        return 0.0
    if kind == "broadcast":
        return B + P + 2 * T
    if kind == "allreduce":
        if algorithm == "ring":
            return 2 * (P - 1) * B / P + 4 * P - 6 + 2 * (P - 1) * (2 * T + 1)
        reach = P // 2 + 1 if algorithm == "ktree" else P
        return formula("reduce", algorithm, P, B, spec) + B + reach + 2 * T
    s = math.sqrt(P)
    return {
        "star": B * (P - 1) + 2 * T + 1,
        "chain": B + (2 * T + 2) * (P - 1),
        "tree": max(B * log, B * P / (2 * (P - 1)) * log + P - 1) + (2 * T + 1) * log,
        "preorder": 2 * B * log + P + 2 * (2 * T + 1) * log,
        "two_phase": max(2 * B, 2 * B * (P - s) / (P - 1) + P - 1) + (2 * T + 1) * (2 * s - 2),
        "ktree": 4 * B + P / 2 + (2 * T + 1) * s,
    }[algorithm]


def cheapest(kind: str, P: int, B: int, spec: WaferSpec = WSE2) -> str:
    """The algorithm with the fewest cycles by the formulas."""
    levels = math.ceil(math.log2(P)) if P > 1 else 0
    names = [n for n in REDUCES if n != "tree" or levels <= spec.input_queues]
    names += ["ring"] if kind == "allreduce" and B % P == 0 else []
    return min(names, key=lambda name: formula(kind, name, P, B, spec))


# ---- programs -----------------------------------------------------------------------------------


def build(kind, algorithm, shape, words, spec, relay="instruction", groups=None) -> Program:
    """The program of a collective on a (rows, columns) grid."""
    rows, columns = shape
    phases = ("along x", "along y", "broadcast")
    program = Program(spec, rows, columns, phases, words)
    parts = []  # (phase, axis, writer, only in column 0)
    end = (0, 0)
    if kind == "broadcast":
        parts.append((2, "xy", _Flood2D(program, (0, 0)), False))
    elif algorithm == "ring":
        parts.append((0, "x", Ring(Wires(program, "x")), False))
        parts.append((1, "y", Ring(Wires(program, "y")), False))
    else:
        along_x = Reduce(Wires(program, "x"), algorithm, groups)
        lines = slice(along_x.root, along_x.root + 1)
        along_y = Reduce(Wires(program, "y", lines), algorithm, groups)
        end = (along_y.root, along_x.root)
        parts += [(0, "x", along_x, False), (1, "y", along_y, True)]
        if kind == "allreduce":
            parts.append((2, "xy", _Flood2D(program, end), False))

    roles: dict = {}
    for py in range(rows):
        for px in range(columns):
            # cores whose parts are alike share a class; their code is written once
            key = tuple(_role(part, axis, px, py, end, only) for _, axis, part, only in parts)
            if key not in roles:
                code = Code(spec)
                code.task()
                for phase, axis, part, only in parts:
                    code.tag = phase
                    p = px if axis == "x" else py if axis == "y" else (py, px)
                    if not only or px == end[1]:
                        part.write(code, p, words, 0, relay)
                code.halt()
                roles[key] = code
            program.place(roles[key], py, px)
    return program


def _role(part, axis, px, py, end, only):
    if only and px != end[1]:
        return None
    p = px if axis == "x" else py
    if isinstance(part, Ring):
        return p
    if isinstance(part, _Flood2D):
        return (py, px) == part.root
    if part.star is not None or part.algorithm == "star":
        return p == 0
    return tuple((way, part.colours[(q, p) if way == "from" else (p, q)])
                 for way, q in part.stops[p])  # fmt: skip


class _Flood2D(Flood):
    """From one core along its row, and from there up and down every column, on one colour."""

    def __init__(self, program: Program, root: tuple[int, int]):
        rows, columns = program.rows, program.columns
        self.P, self.root, self.colour = rows * columns, root, program.next_colour
        program.next_colour += 1
        ry, rx = root
        for px in range(columns):
            for py in range(rows):
                ways = (NORTH, py <= ry and py > 0), (SOUTH, py >= ry and py + 1 < rows)
                out = [port for port, open_ in ways if open_]
                if py == ry:
                    out += [EAST] if px >= rx and px + 1 < columns else []
                    out += [WEST] if px <= rx and px > 0 else []
                if (py, px) == root:
                    receive = RAMP
                else:
                    out.append(RAMP)
                    along, across = WEST if px > rx else EAST, NORTH if py > ry else SOUTH
                    receive = along if py == ry else across
                if out:
                    program.route(self.colour, (receive,), out, py, px)


def collective(
    kind: str,
    algorithm: str = "auto",
    *,
    shape: tuple[int, int],
    words: int,
    spec: WaferSpec = WSE2,
    relay: str = "instruction",
    groups: int | None = None,
    values: np.ndarray | None = None,
) -> Report:
    """Simulate one collective, wavelet by wavelet, with real fp32 values.

    Args:
        kind: "broadcast" (algorithm "flood"), "reduce" (star, chain, tree, two_phase, ktree) or
            "allreduce" (ring, or one of these and a flood back).
        algorithm: a name, or "auto", the cheapest by the formulas for the longer side and `words`.
        shape: (rows, columns); a line is (1, P) or (P, 1).
        words: 32-bit words per core; a ring needs a multiple of each side longer than 1.
        relay: what a stop is, "instruction" or "task".
        groups: of two_phase and ktree; default about sqrt(P).
        values: [rows, columns, words] fp32 to sum or spread; default small integers by position.
    Returns:
        Report; `.result` holds the values left in every core.
    """
    return simulate(kind, algorithm, shape, words, spec, relay, groups, values)[0]


def simulate(kind, algorithm, shape, words, spec, relay="instruction", groups=None, values=None,
             log=0) -> tuple[Report, Run]:  # fmt: skip
    """`collective` with the run it comes from."""
    op = "collective"
    checks.is_choice(op, "kind", kind, KINDS)
    known = {"broadcast": ("flood",), "reduce": REDUCES, "allreduce": ("ring", *REDUCES)}[kind]
    checks.is_choice(op, "algorithm", algorithm, ("auto", *known))
    checks.is_choice(op, "relay", relay, RELAYS)
    check_grid(op, spec, shape, "shape")
    rows, columns = shape
    checks.in_range(op, "words", words, type(words) is int and words > 0, "a positive integer")
    P = max(rows, columns)
    if algorithm == "auto":
        algorithm = "flood" if kind == "broadcast" else cheapest(kind, P, words, spec)
    if algorithm == "ring" and any(words % side for side in shape):
        raise ValueError(f"{op}: a ring needs words a multiple of {shape}, got {words}")
    if groups is not None:
        ok = type(groups) is int and 1 <= groups <= P
        checks.in_range(op, "groups", groups, ok, f"a whole number in 1..{P}")
    program = build(kind, algorithm, shape, words, spec, relay, groups)
    program.check()  # before there are values to hold
    if values is None:
        values = np.arange(rows * columns * words, dtype=np.float32).reshape(rows, columns, words)
        values %= 7  # small integers: sums are exact in any order
    values = np.asarray(values).astype(np.float32)
    if values.shape != (rows, columns, words):
        raise ValueError(
            f"{op}: values must have shape {(rows, columns, words)}, got {values.shape}"
        )
    program.memory = values
    done = run(program, log=log)
    name = f"{kind} {algorithm}, {words} words" + (" by task" if relay == "task" else "")
    return report_of(name, done), done
