"""Small programs that were measured on the machines, written again for the modelled grid."""

from __future__ import annotations

from .collectives import collective
from .engine import run
from .program import RAMP, STEP, Code, Program, at
from .spec import WSE2, WSE3, WaferSpec
from .tiles import Tiles, build
from .wires import Wires


def asynchronous_send(words: int) -> float:
    """Cycles until a core on WSE-2 has given `words` to its neighbour from a microthread."""
    program = Program(WSE2, 1, 2)
    colour = Wires(program, "x").connect([(0, 1)])[0, 1]
    source, sink = Code(WSE2), Code(WSE2)
    for code in (source, sink):
        code.task()
    source.vector("move", words, send=colour, thread=0)
    source.wait(0)
    source.halt()
    sink.vector("move", words, read=colour)
    sink.halt()
    program.place(source, 0, 0)
    program.place(sink, 0, 1)
    return float(run(program)["finish"][0, 0])


def _neighbours(x: int, y: int, side: int):
    """(port, i, j) of the up to four cores around (x, y)."""
    near = [(port, x + dx, y + dy) for port, (dx, dy) in enumerate(STEP[:4])]
    return [(port, i, j) for port, i, j in near if 0 <= i < side and 0 <= j < side]


def _per_iteration(write, spec: WaferSpec, side: int, words: int = 0, warm: int = 10) -> float:
    """Cycles of one round after `warm` rounds; `write(program, code, x, y)` fills the loop."""

    def run_for(iterations: int) -> int:
        program = Program(spec, side, side, words=words)
        for y in range(side):
            for x in range(side):
                code = Code(spec)
                code.task()
                code.loop(iterations)
                write(program, code, x, y)
                code.endloop()
                code.halt()
                program.place(code, y, x)
        return run(program).cycles

    return (run_for(2 * warm) - run_for(warm)) / warm


def cell_stencil(spec: WaferSpec, side: int) -> float:
    """5-point stencil, one cell per core: a word to all neighbours, and one added from each.

    Every core sends on one of five colours, so that no two neighbours of a core share one.
    """

    def write(program, code, x, y):
        near, own = _neighbours(x, y, side), (x + 2 * y) % 5
        program.route(own, (RAMP,), [port for port, _, _ in near], y, x)
        code.vector("move", 1, send=own)
        for port, i, j in near:
            program.route((i + 2 * j) % 5, (port,), (RAMP,), y, x)
            code.vector("add", 1, read=(i + 2 * j) % 5)

    return _per_iteration(write, spec, side, warm=80)  # waves of the start cross the grid


def tile_stencil(spec: WaferSpec, tile: int, side: int = 5) -> float:
    """5-point stencil, a tile x tile share per core: edges by microthreads, then the tile.

    When all eight transfers are over a task starts the computation: one multiply and four
    multiply-adds over the tile.
    """
    cells = tile * tile
    here, halo, result = at(0), 2 * cells, at(cells)

    def write(program, code, x, y):
        near, parity = _neighbours(x, y, side), (x + y) % 2
        for port, _, _ in near:  # what goes out by a port has the colour of that way and parity
            program.route(2 * port + parity, (RAMP,), (port,), y, x)
            into = 2 * ((port + 2) % 4) + 1 - parity
            program.route(into, (port,), (RAMP,), y, x)
            code.vector("move", tile, read=into, to=at(halo + port * tile), thread=port)
            code.vector("move", tile, a=here, send=2 * port + parity, thread=4 + port)
        for port, _, _ in near:
            code.wait(port)
            code.wait(4 + port)
        code.calc(spec.task_relay + 15)  # and the loop of iterations: 7 + 5 + 3 of loop_scalar
        code.vector("mul", cells, a=here, b=at(0, stride=0), to=result, builtin="fmuls")
        for _ in range(4):
            code.vector("add", cells, a=here, b=result, to=result, builtin="fmacs")

    return _per_iteration(write, spec, side, 2 * cells + 4 * tile)


def task_relay_reduce(algorithm: str, P: int) -> float:
    """A timed program on WSE-3: packets of three words, added by tasks on their way."""
    report = collective("reduce", algorithm, shape=(1, P), words=3, spec=WSE3, relay="task")
    return report.cycles + WSE3.launch


def multicast_and_acknowledge(side: int, words: int) -> float:
    """A timed program on WSE-3: a flood from one core, and a tree of single words back."""
    down = collective("broadcast", shape=(side, side), words=words, spec=WSE3, relay="task")
    up = collective("reduce", "preorder", shape=(side, side), words=1, spec=WSE3, relay="task")
    return down.cycles + up.cycles + WSE3.launch


def summa_by_plain_loops() -> float:
    """SUMMA in fp32 on 4 x 4 cores of WSE-2, tiles of 14 x 14."""
    return float(run(build(WSE2, 4, 4, "summa", Tiles(14, 14, 14), loop="scalar")).cycles)
