"""The cycle engine's speed on programs of several kinds, and the time of whole-model estimates.

`tile_cycles_per_second` in the report: cores times cycles simulated, over the best time.
"""

import pytest

import cgpt_kernels as ck
from cgpt_kernels.wafer import WSE2, collectives, engine, model, phases, strips, tiles
from cgpt_kernels.wafer.tiles import Tiles

PROGRAMS = {
    "mesh_64x64_tiles_14": lambda: tiles.build(WSE2, 64, 64, "mesh", Tiles(14, 14, 14), steps=8),
    "mesh_64x64_tiles_3": lambda: tiles.build(WSE2, 64, 64, "mesh", Tiles(3, 3, 3, 2), steps=16),
    "summa_64x64_scalar_loops": lambda: tiles.build(
        WSE2, 64, 64, "summa", Tiles(14, 14, 14), steps=4, loop="scalar"
    ),
    "reduce_chain_1x512": lambda: collectives.build("reduce", "chain", (1, 512), 256, WSE2),
    "allreduce_ktree_64x64": lambda: collectives.build("allreduce", "ktree", (64, 64), 64, WSE2),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_cycle_engine(benchmark, name):
    program = PROGRAMS[name]()
    done = benchmark.pedantic(engine.run, (program,), rounds=3)
    tile_cycles = done.cycles * program.rows * program.columns
    benchmark.extra_info.update(
        cycles=done.cycles, tile_cycles_per_second=tile_cycles / benchmark.stats["min"]
    )


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_estimate_of_13b(benchmark, mode):
    config = ck.GPTConfig.from_name("cerebras-gpt-13b")

    def estimate():
        phases.cycles.cache_clear()
        strips.product.cache_clear()
        return model.estimate(config, grid=(660, 660), mode=mode)

    assert benchmark.pedantic(estimate, rounds=3).cycles > 0
