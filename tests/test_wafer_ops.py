"""Ops on the modelled grid: the same numbers as elsewhere, on every grid; the tiny model's text."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cgpt_kernels as ck
from cgpt_kernels import backends
from cgpt_kernels.ops import registry
from cgpt_kernels.testing import hold_to_rule
from cgpt_kernels.wafer import WSE2, WSE3, engine, tiles, transposed, twin
from cgpt_kernels.wafer.ops import merged_attention
from cgpt_kernels.wafer.tiles import ALGORITHMS, Tiles

OPS = ("gemm", "layer_norm", "add_layer_norm", "attention")
CASES = [c for op in OPS for c in registry.cases("test", op) if "vocabulary" not in c.name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}-{c.name}")
def test_backend_wafer_is_as_exact_as_the_others(case, dtype):
    hold_to_rule(registry.FUNCTIONS[case.op], case.inputs(dtype), backend="wafer")


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name in ("all_kn", "odd_tail", "packed", "no_rows")],
    ids=lambda c: f"{c.op}-{c.name}",
)
def test_gradients_pass_through_backend_wafer(case):
    function = registry.FUNCTIONS[case.op]
    hold_to_rule(function, case.inputs(torch.float32), gradients=True, backend="wafer")


def test_auto_never_picks_the_wafer():
    x = torch.randn(4, 8)
    assert backends.resolve("gemm", "auto", (x, x)) == "cpu"
    assert "wafer" in str(ck.explain("gemm", x, x))


# ---- products -----------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("P", [1, 2, 3, 4, 5, 8])
def test_the_cycle_engine_multiplies_real_matrices(algorithm, P):
    t = Tiles(2, 3, 4)
    random = np.random.default_rng(P)
    a = random.integers(-4, 5, (2 * P, 3 * P)).astype(np.float32)
    b = random.integers(-4, 5, (3 * P, 4 * P)).astype(np.float32)
    program = tiles.build(WSE2, P, P, algorithm, t)
    tiles.scatter(program, algorithm, t, a, b)
    done = engine.run(program)
    np.testing.assert_array_equal(tiles.gather(done, t), a @ b)
    assert done["macs"].sum() == a.shape[0] * a.shape[1] * b.shape[1]
    assert done["sent"].sum() == done["received"].sum() or algorithm == "summa"
    if algorithm != "summa" and P > 1:
        assert done["sent"].sum() == P * P * (P - 1) * (t.a + t.b)
    assert done.cycles >= P * tiles.product_cycles(WSE2, 2, 3, 4, 4)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_engine_and_twin_agree_on_products(algorithm):
    t = Tiles(2, 2, 2)
    program = tiles.build(WSE3, 3, 3, algorithm, t)
    tiles.scatter(program, algorithm, t, *np.ones((2, 6, 6), np.float32))
    fast = engine.run(program, log=20_000)
    slow = engine.run(program, log=20_000, engine=twin.run)
    for what in ("log", "statistics", "phases", "memory"):
        np.testing.assert_array_equal(getattr(fast, what), getattr(slow, what), what)


@pytest.mark.parametrize("spec", [WSE2, WSE3], ids=lambda s: s.name)
@pytest.mark.parametrize("P", [1, 2, 3, 4, 5, 8, 11])
def test_the_cycle_engine_multiplies_by_a_transposed_matrix_as_it_lies(P, spec):
    t = Tiles(2, 3, 4)
    random = np.random.default_rng(P)
    a = random.integers(-4, 5, (2 * P, 3 * P)).astype(np.float32)
    b = random.integers(-4, 5, (4 * P, 3 * P)).astype(np.float32)
    program = transposed.build(spec, P, P, t)
    transposed.scatter(program, t, a, b)
    done = engine.run(program)
    np.testing.assert_array_equal(transposed.gather(done, t), a @ b.T)
    assert done["macs"].sum() == a.shape[0] * a.shape[1] * b.shape[0]
    assert (np.sort(transposed.held(P), axis=1) == np.arange(P)).all()


def test_engine_and_twin_agree_on_transposed_products():
    t = Tiles(2, 2, 2)
    program = transposed.build(WSE3, 3, 3, t)
    transposed.scatter(program, t, *np.ones((2, 6, 6), np.float32))
    fast = engine.run(program, log=20_000)
    slow = engine.run(program, log=20_000, engine=twin.run)
    for what in ("log", "statistics", "phases", "memory"):
        np.testing.assert_array_equal(getattr(fast, what), getattr(slow, what), what)


@pytest.mark.parametrize("P, side", [(16, 4), (20, 4), (24, 6), (32, 2), (40, 1)])
def test_the_strip_of_a_transposed_product_is_the_grid(P, side):
    t = Tiles(side, side, side, 2)
    whole = engine.run(transposed.build(WSE2, P, P, t)).cycles
    assert transposed.strip_cycles(WSE2, P, t)[0] == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("P", [2, 7, 16, 40])
def test_transposed_products_are_as_exact_as_the_others(P):
    a, b = torch.randn(50, 40), torch.randn(60, 40)
    truth = a.double() @ b.double().t()
    eager = (a @ b.t()).double().sub(truth).abs().max()
    y, report = ck.wafer.gemm(a, b, grid=(P, P), transposed_b=True)
    assert (y.double() - truth).abs().max() <= 2 * eager + 1e-6 * truth.abs().max()
    assert report.macs == 50 * 40 * 60 and report.fits and 0 < report.utilization < 1


@given(P=st.integers(1, 40), algorithm=st.sampled_from(ALGORITHMS))
def test_every_core_meets_every_pair_of_tiles_once(P, algorithm):
    tiles.check_schedule(algorithm, P)
    if algorithm == "mesh":
        assert max(abs(p - d) for p, d in enumerate(tiles.ring("mesh", P))) <= 2


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("P, side", [(16, 4), (20, 4), (24, 6), (32, 4)])
def test_the_strip_of_the_phase_engine_is_the_grid(algorithm, P, side):
    t = Tiles(side, side, side, 2)
    whole = engine.run(tiles.build(WSE2, P, P, algorithm, t)).cycles
    share = 0.02 if algorithm == "summa" else 0.01  # its broadcasts wait for both axes
    assert tiles.strip_cycles(WSE2, P, algorithm, t)[0] == pytest.approx(whole, rel=share)


@pytest.mark.parametrize("algorithm, share", [("summa", 0.08), ("cannon", 0.08), ("mesh", 0.01)])
def test_the_strip_where_only_latency_counts(algorithm, share):
    # one multiply-add per step: the strip misses what the other axis adds to the long ways
    whole = engine.run(tiles.build(WSE2, 40, 40, algorithm, Tiles(1, 1, 1))).cycles
    assert tiles.strip_cycles(WSE2, 40, algorithm, Tiles(1, 1, 1))[0] == pytest.approx(
        whole, rel=share
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_products_do_not_depend_on_the_grid(algorithm):
    a, b = torch.randn(50, 40), torch.randn(40, 60)
    truth = a.double() @ b.double()
    eager = (a @ b).double().sub(truth).abs().max()
    for P in (2, 7, 16, 40):
        y, report = ck.wafer.gemm(a, b, grid=(P, P), algorithm=algorithm)
        assert (y.double() - truth).abs().max() <= 2 * eager + 1e-6 * truth.abs().max()
        assert report.macs == 50 * 40 * 60 and report.fits
        assert report.cycles > 0 and 0 < report.utilization < 1


@pytest.mark.parametrize("grid", [(2, 5), (6, 3), (1, 7), (4, 40)], ids=str)
def test_summa_takes_grids_that_are_not_square(grid):
    a, b = torch.randn(30, 40), torch.randn(40, 50)
    y, report = ck.wafer.gemm(a, b, grid=grid, algorithm="summa")
    torch.testing.assert_close(y, a @ b)
    m, k, n = -(-30 // grid[0]), -(-40 // max(grid)), -(-50 // grid[1])
    assert report.cycles >= max(grid) * tiles.product_cycles(WSE2, m, k, n, 4)
    assert (report.rows, report.columns) == grid


def test_gemv_reduces_what_gemm_shifts():
    x, w = torch.randn(64), torch.randn(64, 48)
    for algorithm in ("chain", "ktree"):
        y, report = ck.wafer.gemv(x, w, grid=(8, 6), algorithm=algorithm)
        torch.testing.assert_close(y, x @ w)
        assert report.macs == 64 * 48
    long = [
        ck.wafer.gemv(torch.randn(2048), torch.randn(2048, 64), grid=(500, 8), algorithm=a)[1]
        for a in ("chain", "ktree")
    ]
    assert long[1].cycles < long[0].cycles


def test_a_wider_machine_computes_faster():
    a, b = torch.randn(512, 512).half(), torch.randn(512, 512).half()
    reports = [ck.wafer.gemm(a, b, grid=(16, 16), spec=s)[1] for s in (
        WSE2, dataclasses.replace(WSE2, rates=WSE3.rates))]  # fmt: skip
    assert reports[1].cycles < reports[0].cycles


# ---- layer norm and attention -------------------------------------------------------------------


def test_layer_norm_on_any_grid():
    x, w, b = torch.randn(13, 40), torch.randn(40), torch.randn(40)
    for grid in ((1, 1), (4, 5), (20, 50)):
        y, report = ck.wafer.layer_norm(x, w, b, grid=grid)
        torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (40,), w, b))
        assert report.cycles > 0


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("S, keys", [(9, 9), (1, 17), (5, 12)])
def test_attention_in_pieces_is_attention(causal, S, keys):
    q, k, v = torch.randn(2, 3, S, 8), torch.randn(2, 3, keys, 8), torch.randn(2, 3, keys, 8)
    wanted = ck.ops.attention(q, k, v, causal=causal, backend="eager")
    for grid in ((1, 1), (3, 4), (8, 30)):
        out, report = ck.wafer.attention(q, k, v, grid=grid, causal=causal)
        torch.testing.assert_close(out, wanted)
        assert report.macs == 2 * 6 * S * keys * 8


def test_queries_that_see_nothing_give_zero():
    q, k = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 3, 8)
    out = merged_attention(q, k, k, True, 1.0, 2)
    assert (out[0, 0, :2] == 0).all() and torch.isfinite(out).all()


# ---- whole models -------------------------------------------------------------------------------


def test_the_tiny_model_writes_the_same_text_with_a_report():
    from cgpt_kernels.assets import TINY

    model = ck.GPT.from_pretrained(TINY)
    prompt = torch.arange(20, 60)[None]
    wanted = ck.generate(model, prompt, 6)
    with ck.replace(model, backend="wafer"), ck.wafer.record(grid=(16, 16)) as recording:
        found = ck.generate(model, prompt, 6)
    assert torch.equal(found, wanted)
    report = recording.report()
    assert set(report.phases) >= {"gemm", "gemv", "layer_norm", "attention"}
    assert report.cycles == pytest.approx(sum(report.phases.values()))
    assert report.macs > 0 and report.fits


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"grid": (4, 5)}, r"mesh needs a square grid \(P, P\), got \(4, 5\)"),
        ({"grid": (800, 800)}, r"within WSE-2's usable \(994, 750\) cores"),
        (
            {"algorithm": "summa", "transposed_b": True, "b": torch.zeros(20, 40)},
            "algorithm must be 'mesh'",
        ),
        ({"transposed_b": True}, r"b must have shape \(40, 40\) = \(N, K\), got \(40, 20\)"),
        ({"algorithm": "strassen"}, "algorithm must be 'summa', 'cannon' or 'mesh'"),
        ({"b": torch.zeros(3, 4)}, r"b must have shape \(40, 4\) = \(K, N\), got \(3, 4\)"),
        ({"a": torch.zeros(4000, 40)}, r"core \(px 0, py 0\) needs \d+ B for its tiles"),
    ],
    ids=str,
)
def test_bad_products_are_named(options, message):
    options = {"a": torch.zeros(30, 40), "b": torch.zeros(40, 20), "grid": (4, 4), **options}
    if options["a"].shape[0] == 4000:
        options["b"] = torch.zeros(40, 400)
    with pytest.raises(ValueError, match=message):
        ck.wafer.gemm(options.pop("a"), options.pop("b"), **options)
