"""The phase engine of matrix products: few cores for few steps stand for the whole grid and run.

Steps are alike but for the first and the last ones: a few, and some more, give the cost of one and
of the ends. What a long line costs beyond a short one (the way back of Cannon's rings, the distance
to SUMMA's senders) adds up over the two axes, since a core waits along x and along y in turns: a
strip of full width, plus one of full height, less the corner that both contain. In SUMMA the axes
also wait for each other, a few per cent more or less: by as much as on a smaller grid of the same
shape, which is run whole. MeshGEMM's edges span two hops at most, so a small grid is like all of
it. Small products run whole.
"""

from __future__ import annotations

import functools

from . import transposed
from .engine import run
from .spec import WaferSpec
from .tiles import Tiles, build, product_cycles

CORNER = 2  # rows of a wide strip, columns of a high one
# Sides of the grid that stands for MeshGEMM's, kept odd or even as the whole is, and words that it
# may send: the larger the tiles, the less what happens between steps counts.
SIDE, LOCAL = (4, 16), 100_000
# Steps of the shorter run, and how many more, at least, the longer one has. What happens in one
# step of MeshGEMM does not reach far, so its steps settle sooner.
STEPS = {"summa": (16, 32), "cannon": (16, 32), "mesh": (6, 12)}
# Up to so many words sent by all cores in all steps, the cycle engine runs the whole grid; SUMMA's
# smaller grid has as many.
WHOLE = {"summa": 1_000_000, "cannon": 200_000, "mesh": 200_000}


@functools.lru_cache(512)
def product(
    spec: WaferSpec,
    rows: int,
    columns: int,
    algorithm: str,
    tiles: Tiles,
    loop: str = "tuned",
    whole: int | None = None,
) -> tuple[float, float]:
    """Cycles of a product on a grid, and of them compute. whole: instead of WHOLE."""
    whole = WHOLE[algorithm] if whole is None else whole
    L = max(rows, columns)
    compute = float(L * product_cycles(spec, tiles.m, tiles.k, tiles.n, tiles.itemsize, loop))
    words = L * rows * columns * (tiles.a + tiles.b)
    given = (spec, algorithm, tiles, loop)
    if words <= whole:
        return float(run(build(spec, rows, columns, algorithm, tiles, loop=loop)).cycles), compute
    if algorithm == "mesh":
        side = (LOCAL / (sum(STEPS["mesh"]) * (tiles.a + tiles.b))) ** 0.5
        side = min(max(round(side / 2) * 2, SIDE[0]), SIDE[1])
        local = (min(P, side + P % 2) for P in (rows, columns))
        return _few_steps(given, (rows, columns), *local, 1), compute
    total = _strips(given, rows, columns)
    if algorithm == "summa":
        share = (whole / words) ** (1 / 3)
        smaller = max(1, round(rows * share)), max(1, round(columns * share))
        total *= run(build(spec, *smaller, algorithm, tiles, loop=loop)).cycles
        total /= _strips(given, *smaller)
    return total, compute


def _strips(given, rows: int, columns: int) -> float:
    short = min(CORNER, rows), min(CORNER, columns)
    grid = rows, columns
    wide = _few_steps(given, grid, short[0], columns, columns)
    high = _few_steps(given, grid, rows, short[1], rows)
    return wide + high - _few_steps(given, grid, *short, 1)


def _few_steps(given, grid, height: int, width: int, period: int) -> float:
    """Cycles of all steps on height x width cores, from two runs whose steps differ by a multiple
    of what repeats."""
    spec, algorithm, tiles, loop = given
    L = max(grid)
    few, more = STEPS[algorithm]
    more = few + -(-more // period) * period
    if more >= L:
        few = more = L

    def cycles(steps):
        options = {"steps": steps, "last_of": grid, "loop": loop}
        return run(build(spec, height, width, algorithm, tiles, **options)).cycles

    first = cycles(few)
    return first if few == L else first + (L - few) * (cycles(more) - first) / (more - few)


RING = 4  # places that stand for a longer ring: the fewest with edges of two hops
SUMS = (6, 12)  # steps of the two runs; each is one reduce over the whole line


@functools.lru_cache(512)
def transposed_product(
    spec: WaferSpec, rows: int, columns: int, tiles: Tiles, whole: int = WHOLE["mesh"]
) -> tuple[float, float]:
    """Cycles of a product with a transposed operand, and of them compute."""
    form = transposed.Form.of(tiles, rows, columns)
    t = form.tiles
    compute = float(form.line * product_cycles(spec, t.m, t.k, t.n, t.itemsize))
    few, more = SUMS
    if form.line <= more or transposed.words_moved(rows, columns, tiles) <= whole:
        return float(run(transposed.build(spec, rows, columns, tiles)).cycles), compute
    ring = min(form.ring, RING)
    shape = (form.line, ring) if form.high else (ring, form.line)
    first, second = (run(transposed.build(spec, *shape, tiles, steps=n)).cycles for n in SUMS)
    return first + (form.line - few) * (second - first) / (more - few), compute
