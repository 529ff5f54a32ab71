"""docs/wafer-model.md, written from the spec and the validation table.

python -m cgpt_kernels.wafer.document docs/wafer-model.md
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from .spec import WSE2, WSE3, WaferSpec
from .validate import markdown, validate

_INTRODUCTION = """# The wafer model

What `ck.wafer` computes, from which constants, and how far it is from what was published. Written
by `python -m cgpt_kernels.wafer.document docs/wafer-model.md`; a test compares it with the code.

## What is modelled

A grid of cores. Each has a router with five ports (north, east, south, west, and the ramp to the
core), memory, one datapath, a main thread and eight microthreads. A wavelet carries 32 bits.

- **Router.** One wavelet per port and cycle; per colour a static route from ports to ports, free
  multicast, up to four switch positions that wavelets advance. Queues are finite: a full one holds
  its sender back. Where several colours want one port, the lowest goes first.
- **Core.** A vector instruction moves one word per cycle where an operand is on the fabric. In
  memory it runs at its listed rate, or slower where strides and banks leave memory less. Words of
  the fabric share the datapath: as many per cycle as it moves in memory (`fmovs`), one of them into
  the router. Threads take turns.
- **Tasks.** Local tasks are activated; data tasks start when their colour has a wavelet; both run
  to completion.
- **Budgets**: memory, colours, queues, switch positions, microthreads and tasks are checked before
  a run; the error names core, need and limit. Deadlock, two sources on one colour, and a wavelet
  that nobody receives are errors that name core and colour.

## Two engines and a twin

The **cycle engine** (`csrc/wafer`) moves every wavelet with its fp32 value. Its **twin**
(`cgpt_kernels/wafer/twin.py`) interprets the same programs cycle by cycle; tests compare cycles,
statistics, values and logs event by event. The **phase engine** runs representative parts only:

- collectives along one axis and local work (decode): one row and one column, whose times add. It is
  equal to the cycle engine in the tests' properties, within 1 % by their rule;
- matrix products: a few cores for a few steps (`cgpt_kernels/wafer/strips.py`), within 1 % on every
  grid that the tests draw. Cannon: strips along both axes, whose excess over a corner adds up.
  SUMMA: the same, times what a smaller grid of the same shape shows beyond it. MeshGEMM: a small
  grid, since its edges span two hops. With a transposed operand: a few whole lines.

Whole models in training and in the modes `pipeline`, `sequence` and `streaming` are arithmetic on
top of these: bubbles, rings and streams are computed, not simulated. So are, in prefill, the
alignment of MeshGEMM's operands and the step of products with a transposed operand, the scores'
among them: chains of partial sums end at another core in each step. (`ck.wafer.gemm` with
`transposed_b` runs a program of its own, with a K-tree in each step.)

## Whole models

`ck.wafer.estimate` lays matrices out with the model's width over the rows of cores and what comes
of it over the columns, shares rounded up; tokens of a prefill or a training lie over the rows.

- **Rectangle.** A product takes a step for each core of the longer side, so a longer rectangle can
  be slower than a square. Where all of the model fits on the square of the shorter side and is
  faster there, it runs there; the other cores idle, in the utilization too. A square is taken as
  given: that half its side would be faster is a note. A pipeline's stages have their own shapes.
- **Training.** Each product `A B` asks for `dC B^T` and `A^T dC`, whose sums over tokens run along
  the columns of cores. Probabilities are not kept: the scores are made again from q, k and the sums
  of rows. What is elementwise counts three times; the loss has a logit per token and entry of the
  vocabulary. The optimizer's memory is counted, its cycles are not.
- **Memory of a core.** Code, stack, weights (2 bytes; in training 16: fp16 weight and gradient, an
  fp32 copy and Adam's two moments), keys and values, what is widest while tokens pass through a
  block, tiles on their way; in training what the backward reads: 16 numbers of the model's width
  per token and block where the feed-forward is four times as wide, or, with `recompute`, what
  enters each block and the 16 of one. A pipeline's first stage has as many micro-batches under way
  as there are stages.
- **Pipeline.** Each block has a rectangle, embedding and head have a strip below, with as many of
  the cores as they have of the weights. A result crosses the edge of two rectangles, each link
  its share, and goes as far as a rectangle is long; that is not hidden behind the next product. The
  slowest stage sets the pace.
- **Sequence.** Four groups of rows hold all weights each. Keys and values (in training their
  gradients too) go round: every core's words cross one link per column to the same place in the
  next group. In training the groups add up their weight gradients, in a chain and back.
- **Streaming.** Weights come by the links to the outside, in training twice, and gradients leave.
  Nonzeros carry their indices, or all weights come without, whichever is shorter; what a core takes
  to find the zeros among these is not counted.

## Numbers on the grid

`ck.wafer.gemm`, `gemv`, `layer_norm`, `attention` and `backend="wafer"` give each column (or row)
of cores its share through the CPU kernels. Sums over K run in ascending order, so results do not
depend on the grid; that each core meets each pair of tiles once is checked on tile numbers, and
with values in the cycle engine on small grids. Attention runs tile by tile, queries over the rows
of cores and keys over the columns, merged by the largest logit and the sum of each tile. Dropout's
mask is the one of the other backends, bit for bit: sums run over all keys, outputs over those kept.
What is cut into pieces (`ck.wafer.split`, attention's tiles) is merged only if the pieces cover
their axis once and each is what was sealed with a hash when it was computed.

## Constants

`fitted` constants were set so that one published row comes out: one per generation. `derived` ones
were read off published numbers, which rows of the table below may be. Cycles are what is modelled;
seconds follow from the clock.
"""

_MISSES = """
`*`: a constant of the spec was taken from this row; the other rows test the model. Targets:
formulas 4 %, micro and kernel rows 10 %, end to end 15 %. What is missed, and what is known:

- *Stencils over tiles on WSE-2*: 6.1 to 6.2 cycles per cell where one multiply and four
  multiply-adds at the listed rates take 4.5. WSE-3 takes 4.1, as listed. The program's author
  counts 1 cycle for the multiply, 1 for each multiply-add along a row and 1.5 for those across
  rows, whose operands share banks. Which ones do depends on where its arrays lie. At radius 2 and
  beyond both machines take the same time, and two published rules give it on paper within 5 % for
  even tiles: operands an even number of words apart conflict, except aligned ones 2 modulo 4 apart.
  At radius 1 they explain one row of WSE-2 and neither of WSE-3, so they are not in the model.

Within their targets, but with a lean that has a cause:

- *Decode leans with the grid*: 1 to 3 % slow on 420 x 420, 3 to 4 % fast on 660 x 660. Between
  these the published programs' all-reduce grows by 350 cycles, the model's by 270.
- *Decode's scalar code.* `scalar_function` spreads over all of the feed-forward's width what the
  published program spends on as many elements as the model is wide: its SiLU loop ends there, and
  each of its divisions costs several times as much.
- *Two phases* at P = 512, B = 4096 are 3.9 % above the formula, which lets bandwidth and distance
  overlap entirely; where B is near P they are up to 11 % above it (P = 31, B = 128). The tree is
  between 9 % below it (P = 64, B = 8) and 9 % above (P = 512, B = 128).
- *The ring* pays the start of an instruction in each step, which the formula does not: 2.8 % for
  chunks of 64 words, a quarter for chunks of one.

What the rows of whole models mean: WaferLLM's programs have one head of full width for keys and
values, no output head, and sides padded to multiples of the grid; `LLAMA3_8B` and `QWEN2_72B` are
those shapes. In prefill its MeshGEMM runs its vectors down the rows of A's tile, whatever their
length, aligns A in P / 2 shifts before a product, and sums the scores in chains that end at another
core in each step; `estimate` computes this one's step rather than simulate it.

WaferLLM's text says that at 2K MeshGEMM stays flat from 360 x 360 to 720 x 720 cores while SUMMA
and Cannon get slower. Flat it is here: what a step's software costs makes up for smaller tiles.
SUMMA and Cannon are flat too, within 2 % of MeshGEMM: cores here wait only for their own transfers,
queues take up the skew, and long ways hide behind products. Of the compute limit, more than 70 %
there, MeshGEMM reaches 67 % here, with the largest tiles that fit (32K on 720 x 720).

Not compared, because what ran is not stated: WaferLLM's shares of the compute limit and MeshGEMV
at 4.6 times the vendor's GEMV (sizes), reduces at up to 3.27 times the vendor's library (which
algorithm that has), and advertised bandwidths (what is counted).
"""


def _value(value) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _constants(spec: WaferSpec) -> str:
    lines = [
        f"\n### {spec.name}\n",
        "| constant | value | unit | tag | source | what |",
        "|---|---|---|---|---|---|",
    ]
    for name, value, unit, tag, source, what in spec.constants():
        lines.append(f"| `{name}` | {_value(value)} | {unit} | {tag} | {source} | {what} |")
    return "\n".join(lines) + "\n"


def document() -> str:
    """The whole text."""
    return (
        _INTRODUCTION
        + _constants(WSE2)
        + _constants(WSE3)
        + "\n## Against what was published\n\n"
        + markdown(validate())
        + _MISSES
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(document())
