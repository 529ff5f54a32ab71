"""Ops on the modelled grid: the same numbers as elsewhere, on every grid; the tiny model's text."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cgpt_kernels as ck
from cgpt_kernels import backends
from cgpt_kernels.ops import registry
from cgpt_kernels.ops.attention.attention_wafer import attention_fwd
from cgpt_kernels.testing import hold_to_rule
from cgpt_kernels.wafer import WSE2, WSE3, engine, strips, tiles, transposed, twin
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


GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9))
# The third has no software between steps, so that every hop counts.
SPECS = st.sampled_from([WSE2, WSE3, dataclasses.replace(WSE2, name="bare", product_step=0)])


def integers(seed, *shape):
    """Small whole numbers: sums are exact in any order."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


@settings(max_examples=50)
@given(grid=GRIDS, algorithm=st.sampled_from(ALGORITHMS), spec=SPECS, seed=st.integers(0, 9))
def test_the_cycle_engine_multiplies_real_matrices_on_any_grid(grid, algorithm, spec, seed):
    (R, C), L, t = grid, max(grid), Tiles(2, 3, 4)
    a, b = integers(seed, 2 * R, 3 * L), integers(seed + 10, 3 * L, 4 * C)
    program = tiles.build(spec, R, C, algorithm, t)
    tiles.scatter(program, algorithm, t, a, b)
    done = engine.run(program)
    np.testing.assert_array_equal(tiles.gather(done, algorithm, t), a @ b)
    assert done["macs"].sum() == a.shape[0] * a.shape[1] * b.shape[1]
    assert done["sent"].sum() == tiles.words_moved(algorithm, R, C, t)
    assert done["sent"].sum() == done["received"].sum() or algorithm == "summa"
    assert done.cycles >= L * tiles.product_cycles(spec, 2, 3, 4, 4)
    if algorithm != "summa" and R == C > 1:
        assert done["sent"].sum() == R * R * (R - 1) * (t.a + t.b)


@settings(max_examples=25)
@given(grid=GRIDS, spec=SPECS, seed=st.integers(0, 9))
def test_the_cycle_engine_multiplies_by_a_transposed_matrix_as_it_lies(grid, spec, seed):
    (R, C), L, t = grid, max(grid), Tiles(2, 3, 4)
    a, b = integers(seed, 2 * R, 3 * L), integers(seed + 10, 4 * C, 3 * L)
    program = transposed.build(spec, R, C, t)
    transposed.scatter(program, t, a, b)
    done = engine.run(program)
    np.testing.assert_array_equal(transposed.gather(done, t), a @ b.T)
    assert done["macs"].sum() == a.shape[0] * a.shape[1] * b.shape[0]
    assert done["sent"].sum() == transposed.words_moved(R, C, t)


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (5, 2)], ids=str)
@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "transposed"])
def test_engine_and_twin_agree_on_products(algorithm, grid):
    (R, C), L, t = grid, max(grid), Tiles(2, 2, 2)
    if algorithm == "transposed":
        program = transposed.build(WSE3, R, C, t)
        transposed.scatter(program, t, integers(0, 2 * R, 2 * L), integers(1, 2 * C, 2 * L))
    else:
        program = tiles.build(WSE3, R, C, algorithm, t)
        tiles.scatter(program, algorithm, t, integers(0, 2 * R, 2 * L), integers(1, 2 * L, 2 * C))
    fast = engine.run(program, log=40_000)
    slow = engine.run(program, log=40_000, engine=twin.run)
    for what in ("log", "statistics", "phases", "memory"):
        np.testing.assert_array_equal(getattr(fast, what), getattr(slow, what), what)


SIDES = st.integers(1, 9)
TILES = st.builds(Tiles, SIDES, SIDES, SIDES, st.sampled_from([2, 4]))


@settings(max_examples=25)
@given(
    grid=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    t=TILES,
    algorithm=st.sampled_from(["cannon", "mesh", "transposed"]),
    spec=SPECS,
)
def test_few_cores_for_few_steps_stand_for_the_grid(grid, t, algorithm, spec):
    if algorithm == "transposed":
        t = Tiles(min(t.m, 3), t.k, min(t.n, 3), t.itemsize)  # sums travel: larger ones take long
        whole = engine.run(transposed.build(spec, *grid, t)).cycles
        found = strips.transposed_product(spec, *grid, t, whole=0)[0]
    else:
        whole = engine.run(tiles.build(spec, *grid, algorithm, t)).cycles
        found = strips.product(spec, *grid, algorithm, t, whole=0)[0]
    assert found == pytest.approx(whole, rel=0.01, abs=2)


@settings(max_examples=3)
@given(P=st.integers(60, 70), t=st.builds(Tiles, *[st.integers(1, 3)] * 3), spec=SPECS)
def test_a_smaller_grid_and_strips_stand_for_summa(P, t, spec):
    grid = P, P - 10
    whole = engine.run(tiles.build(spec, *grid, "summa", t)).cycles
    assert strips.product(spec, *grid, "summa", t)[0] == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("grid", [(2, 2), (7, 7), (16, 16), (40, 40), (3, 20), (20, 3)], ids=str)
def test_transposed_products_are_as_exact_as_the_others(grid):
    a, b = torch.randn(50, 40), torch.randn(60, 40)
    truth = a.double() @ b.double().t()
    eager = (a @ b.t()).double().sub(truth).abs().max()
    y, report = ck.wafer.gemm(a, b, grid=grid, transposed_b=True)
    assert (y.double() - truth).abs().max() <= 2 * eager + 1e-6 * truth.abs().max()
    assert report.macs == 50 * 40 * 60 and report.fits and 0 < report.utilization < 1


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), algorithm=st.sampled_from(ALGORITHMS))
def test_every_core_meets_every_pair_of_tiles_once(rows, columns, algorithm):
    tiles.check_schedule(algorithm, rows, columns)
    for P in (rows, columns):
        if algorithm == "mesh":
            assert max(abs(p - d) for p, d in enumerate(tiles.ring("mesh", P))) <= 2


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_products_do_not_depend_on_the_grid(algorithm):
    a, b = torch.randn(50, 40), torch.randn(40, 60)
    truth = a.double() @ b.double()
    eager = (a @ b).double().sub(truth).abs().max()
    for grid in ((2, 2), (7, 7), (16, 16), (40, 40), (2, 5), (6, 3), (1, 7), (4, 40), (40, 4)):
        y, report = ck.wafer.gemm(a, b, grid=grid, algorithm=algorithm)
        assert (y.double() - truth).abs().max() <= 2 * eager + 1e-6 * truth.abs().max()
        assert report.macs == 50 * 40 * 60 and report.fits
        assert report.cycles > 0 and 0 < report.utilization < 1


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


@settings(max_examples=40)
@given(
    S=st.integers(1, 12),
    keys=st.integers(1, 15),
    grid=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    causal=st.booleans(),
    padded=st.booleans(),
    biased=st.sampled_from([None, torch.bool, torch.float32]),
    sloped=st.booleans(),
    dropped=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_tiles_of_attention_are_the_kernels_whole(
    S, keys, grid, causal, padded, biased, sloped, dropped
):
    B, H, D = 2, 3, 8
    q, k, v = (torch.randn(B, H, n, D) for n in (S, keys, keys))
    padding = torch.rand(B, keys) < 0.3 if padded else None
    bias = torch.randn(B, H, S, keys) if biased else None
    bias = bias > -1 if biased == torch.bool else bias
    slopes = torch.tensor([0.5, 0.1, 0.02]) if sloped else None
    found = {}
    for name, kernel in (("whole", engine._C.attention_fwd), ("tiles", attention_fwd)):
        out, lse = torch.full_like(q, torch.nan), torch.full((B, H, S), torch.nan)
        with ck.wafer.record(grid=grid):
            kernel(q, k, v, padding, bias, slopes, out, lse, D**-0.5, causal, dropped, 2**40 + 7)
        found[name] = out, lse
    torch.testing.assert_close(found["tiles"], found["whole"])


@pytest.mark.parametrize("S, keys", [(9, 13), (1, 40)])
def test_tiles_drop_what_the_other_backends_drop(S, keys):
    """Values are one-hot, so that outputs are probabilities: what is zero is the mask."""
    q, k = torch.randn(2, 3, S, keys), torch.randn(2, 3, keys, keys)
    v = torch.eye(keys).expand(2, 3, keys, keys)
    given = {"causal": False, "dropout_p": 0.4, "seed": 11}
    kept = {
        b: ck.ops.attention(q, k, v, backend=b, **given) != 0 for b in ("eager", "cpu", "wafer")
    }
    assert torch.equal(kept["wafer"], kept["eager"]) and torch.equal(kept["wafer"], kept["cpu"])
    assert 0 < kept["wafer"].float().mean() < 1


def test_queries_that_see_nothing_give_zero():
    q, k = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 3, 8)
    out, _ = ck.wafer.attention(q, k, k, grid=(2, 2))
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


x = torch.zeros(4, 4)
CALLS = {
    "wafer.gemm": lambda **given: ck.wafer.gemm(x, x, **given),
    "wafer.gemv": lambda **given: ck.wafer.gemv(x[0], x, **given),
    "wafer.layer_norm": lambda **given: ck.wafer.layer_norm(x, x[0], **given),
    "wafer.attention": lambda **given: ck.wafer.attention(*[x[None, None]] * 3, **given),
    "estimate": lambda **given: ck.wafer.estimate(ck.wafer.Block(8, 8), **given),
    "longest_decode": lambda **given: ck.wafer.longest_decode(ck.wafer.Block(8, 8), **given),
    "record": lambda **given: ck.wafer.record(**given).__enter__(),
}


@pytest.mark.parametrize("op", CALLS)
def test_a_bad_machine_and_a_bad_grid_are_named(op):
    with pytest.raises(TypeError, match=f"^{op}: spec must be a WaferSpec .* got 'wse2'$"):
        CALLS[op](grid=(4, 4), spec="wse2")
    for grid in (5, None, "4x4", (4,)):
        named = re.escape(f"{op}: grid must be (rows, columns) of cores, got {grid!r}")
        with pytest.raises(ValueError, match=f"^{named}$"):
            CALLS[op](grid=grid)


@pytest.mark.parametrize(
    "call",
    [
        lambda: ck.wafer.layer_norm(x, None, grid=(2, 2)),
        lambda: ck.wafer.layer_norm(x, x[0], grid=(2, 2), eps="small"),
        lambda: ck.wafer.attention(*[x[None, None]] * 3, grid=(2, 2), scale="big"),
        lambda: ck.wafer.attention(*[x[None, None]] * 2, x[None, None].half(), grid=(2, 2)),
    ],
)
def test_wrong_kinds_of_arguments_are_named_in_a_line(call):
    with pytest.raises(
        TypeError, match=r"^wafer\.\w+: (weight|eps|scale|v) must be .*, got '?\w+'?$"
    ):
        call()


@pytest.mark.parametrize("M, K, N", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
def test_nothing_to_work_on_takes_no_cycles(M, K, N):
    a, b, g = torch.ones(M, K), torch.ones(K, N), {"grid": (2, 2)}
    heads = torch.ones(1, M, N, K)
    for wanted, (y, report) in (
        (a @ b, ck.wafer.gemm(a, b, **g)),
        (a @ b, ck.wafer.gemm(a, b.t(), transposed_b=True, **g)),
        (torch.zeros_like(heads), ck.wafer.attention(heads, heads, heads, **g)),
        *([] if K and N else [(torch.ones(K) @ b, ck.wafer.gemv(torch.ones(K), b, **g))]),
        *([] if M and K else [(a, ck.wafer.layer_norm(a, torch.ones(K), **g))]),
    ):
        assert torch.equal(y, wanted) and report.cycles == 0 and report.utilization == 0
        assert "empty" in str(report)
