"""The cycle engine: equal to its twin event by event, budgets and routes checked, errors named."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgpt_kernels.wafer import (
    WSE2,
    WSE3,
    WaferSpec,
    collectives,
    engine,
    model,
    phases,
    tiles,
    transposed,
    twin,
)
from cgpt_kernels.wafer.program import (
    ADVANCE_PATH,
    EAST,
    NORTH,
    RAMP,
    WEST,
    Code,
    Program,
    at,
    unless,
    when,
)
from cgpt_kernels.wafer.wires import Wires


def both(program, log=50_000):
    """The run in the engine, after comparing everything with the twin's."""
    fast = engine.run(program, log=log)
    slow = engine.run(program, log=log, engine=twin.run)
    assert len(fast.log) and fast.cycles == slow.cycles
    for what in ("log", "statistics", "phases"):
        np.testing.assert_array_equal(getattr(fast, what), getattr(slow, what), what)
    if fast.memory is not None:
        np.testing.assert_array_equal(fast.memory, slow.memory)
    return fast


def line(P, spec=WSE2, words=0, phases=("all",)):
    program = Program(spec, 1, P, phases, words)
    return program, Wires(program, "x")


def code(spec=WSE2):
    made = Code(spec)
    made.task()
    return made


def halted(spec=WSE2):
    made = code(spec)
    made.halt()
    return made


COLLECTIVES = [
    ("broadcast", "flood"),
    *(("reduce", name) for name in collectives.REDUCES),
    ("allreduce", "ring"),
    ("allreduce", "ktree"),
]


@pytest.mark.parametrize("relay", collectives.RELAYS)
@pytest.mark.parametrize("kind, algorithm", COLLECTIVES)
@pytest.mark.parametrize("shape", [(1, 6), (5, 1), (3, 4)], ids=str)
def test_engine_and_twin_agree_on_collectives(kind, algorithm, relay, shape):
    words = 2 * shape[0] * shape[1]
    spec = dataclasses.replace(WSE2, hop=2, task_start=3) if relay == "task" else WSE2
    program = collectives.build(kind, algorithm, shape, words, spec, relay)
    random = np.random.default_rng(0)
    program.memory = random.standard_normal((*shape, words), np.float32)
    both(program)


@given(
    distance=st.integers(1, 9),
    words=st.integers(1, 40),
    wait=st.integers(0, 60),
    work=st.integers(0, 50),
    hop=st.integers(1, 3),
    ramp=st.integers(1, 4),
    rooms=st.tuples(st.integers(2, 4), st.integers(2, 5)),
)
def test_engine_and_twin_agree_on_senders_relays_and_late_receivers(
    distance, words, wait, work, hop, ramp, rooms
):
    spec = dataclasses.replace(WSE2, hop=hop, ramp=ramp, router_queue=rooms[0], core_queue=rooms[1])
    program, wires = line(distance + 2, spec, words=2 * words)
    far, near = distance + 1, distance
    colours = wires.connect([(far, near), (near, 0)])
    back = wires.connect([(0, far)])
    root = code(spec)
    root.calc(wait)
    root.vector("add", words, read=colours[near, 0], b=at(0), to=at(0), thread=1)
    root.calc(work)
    root.vector("move", words, a=at(words), send=back[0, far], thread=2)
    root.wait(1)
    root.wait(2)
    root.halt()
    relay = code(spec)
    relay.vector("add", words, read=colours[far, near], b=at(0), send=colours[near, 0])
    relay.halt()
    source = code(spec)
    source.vector("move", words, a=at(0), send=colours[far, near], thread=3)
    source.calc(work)
    source.vector("max", words, read=back[0, far], b=at(words), to=at(words))
    source.wait(3)
    source.halt()
    program.place(halted(spec), 0, slice(1, distance))
    program.place(root, 0, 0)
    program.place(relay, 0, near)
    program.place(source, 0, far)
    program.memory = np.arange(1 * (distance + 2) * 2 * words, dtype=np.float32).reshape(
        1, distance + 2, -1
    )
    done = both(program)
    m = program.memory[0]
    np.testing.assert_array_equal(
        done.memory[0, 0, :words], m[0, :words] + m[near, :words] + m[far, :words]
    )
    assert done["sent"].sum() == done["received"].sum() == 3 * words
    assert done["hops"].sum() == words * (1 + distance + far)
    assert done.cycles >= wait + words  # the bandwidth bound of the root


def test_loops_conditions_and_double_buffers():
    program, _ = line(2, words=16)
    made = code()
    made.loop(4)
    made.condition = when(0, 2)  # rounds 2 and 3 of the core whose parameter is 1
    made.vector("add", 2, a=at(0, 1, 2), b=at(8), to=at(8))
    made.condition = unless(0, 2)
    made.vector("move", 2, a=at(0, alt=2), to=at(12, alt=2))
    made.condition = (0, 0, 1)
    made.endloop()
    made.halt()
    program.place(made)
    program.parameters[0, 1, 0] = 1
    program.memory = np.tile(np.arange(16, dtype=np.float32), (1, 2, 1))
    done = both(program)
    zero, one = done.memory[0]
    np.testing.assert_array_equal(zero[8:10], [8 + 0 + 2, 9 + 1 + 3])
    np.testing.assert_array_equal(one[8:10], [8 + 4 + 6, 9 + 5 + 7])
    np.testing.assert_array_equal(one[12:16], [0, 1, 2, 3])


def test_a_local_tile_product():
    program, _ = line(1, words=6 + 12 + 8)
    made = code()
    made.macs((2, 3, 4), 99, to=at(18), a=at(0), b=at(6))
    made.halt()
    program.place(made)
    program.memory = np.arange(26, dtype=np.float32).reshape(1, 1, -1)
    done = both(program)
    m = program.memory[0, 0]
    wanted = m[18:].reshape(2, 4) + m[:6].reshape(2, 3) @ m[6:18].reshape(3, 4)
    np.testing.assert_array_equal(done.memory[0, 0, 18:].reshape(2, 4), wanted)
    assert done.cycles == 99 and done["macs"].sum() == 24


def test_local_tasks_and_completions_start_tasks():
    program, _ = line(1, words=8)
    made = code()
    made.vector("move", 4, a=at(0), to=at(4), thread=0, task=1)
    made.end()
    made.task(active=False)
    made.calc(10)
    made.activate(2)
    made.end()
    made.task(active=False, blocked=False)
    made.halt()
    program.place(made)
    program.memory = np.arange(8, dtype=np.float32).reshape(1, 1, -1)
    done = both(program)
    np.testing.assert_array_equal(done.memory[0, 0], [0, 1, 2, 3, 0, 1, 2, 3])
    # 5 to start, 4 words at 2 a cycle, then the task's 10 cycles
    assert done.cycles == WSE2.async_start + 2 + 10


def test_microthreads_share_the_datapath():
    def cycles(threads):
        program, _ = line(1)
        made = code()
        for thread in range(threads):
            made.vector("mul", 100, to=at(0), a=at(0), b=at(0), thread=thread)
        for thread in range(threads):
            made.wait(thread)
        made.halt()
        program.place(made)
        return both(program).cycles

    assert cycles(1) == WSE2.async_start + 50
    assert abs(cycles(3) - (WSE2.async_start + 150)) <= 3


def test_a_wavelet_takes_two_ramps_and_one_cycle_per_hop():
    for distance in (1, 7):
        program, wires = line(distance + 1)
        colour = wires.connect([(0, distance)])[0, distance]
        source, sink = code(), code()
        source.vector("move", 1, send=colour)
        source.halt()
        sink.vector("move", 1, read=colour)
        sink.halt()
        program.place(halted())
        program.place(source, 0, 0)
        program.place(sink, 0, distance)
        start, done = WSE2.vector_start + WSE2.stop, 1
        assert both(program).cycles == start + 2 * WSE2.ramp + distance * WSE2.hop + done


def test_a_slow_receiver_holds_its_sender_back():
    program, wires = line(4)
    colour = wires.connect([(0, 3)])[0, 3]
    source, sink = code(), code()
    source.vector("move", 200, send=colour)
    source.halt()
    sink.calc(5000)
    sink.vector("move", 200, read=colour)
    sink.halt()
    program.place(halted())
    program.place(source, 0, 0)
    program.place(sink, 0, 3)
    done = both(program)
    assert done["finish"][0, 0] > 5000
    room = WSE2.core_queue + WSE2.ramp - 1
    assert done["deepest"].max() <= room


def test_switches_advance_with_the_wavelet_that_says_so():
    program, _ = line(3, words=8)
    program.route(2, (RAMP,), (EAST,), 0, 0)
    program.route(2, (WEST,), (RAMP,), 0, 1)
    program.route(2, (WEST,), (EAST,), 0, 1, position=1)
    program.route(2, (WEST,), (RAMP,), 0, 2)
    source, sink = code(), code()
    source.vector("move", 4, a=at(0), send=2, flags=ADVANCE_PATH)
    source.vector("move", 4, a=at(4), send=2)
    source.halt()
    sink.vector("move", 4, read=2, to=at(0))
    sink.halt()
    program.place(source, 0, 0)
    program.place(sink, 0, slice(1, 3))
    program.memory = np.zeros((1, 3, 8), np.float32)
    program.memory[0, 0] = range(8)
    done = both(program)
    np.testing.assert_array_equal(done.memory[0, 1:, :4], [[0, 1, 2, 3], [4, 5, 6, 7]])


def test_the_same_run_twice_gives_the_same_log():
    program = collectives.build("allreduce", "two_phase", (4, 5), 9, WSE2)
    first, second = (engine.run(program, log=9999) for _ in range(2))
    np.testing.assert_array_equal(first.log, second.log)


def test_two_threads_leave_what_one_leaves():
    # 32 x 33 cores are enough for a second thread; a log is written by one
    random = np.random.default_rng(0)
    for program in (
        tiles.build(WSE2, 33, 32, "summa", tiles.Tiles(2, 2, 2)),
        collectives.build("allreduce", "two_phase", (33, 32), 8, WSE3),
    ):
        shape = (33, 32, program.words)
        program.memory = random.integers(-4, 5, shape).astype(np.float32)
        one, two = engine.run(program, log=1), engine.run(program)
        assert one.cycles == two.cycles
        for what in ("statistics", "phases", "memory"):
            np.testing.assert_array_equal(getattr(one, what), getattr(two, what), what)


# ---- errors -------------------------------------------------------------------------------------


def test_deadlock_names_core_and_colour():
    program, wires = line(3)
    colour = wires.connect([(0, 2)])[0, 2]
    sink = code()
    sink.vector("move", 4, read=colour)
    sink.halt()
    program.place(halted())
    program.place(sink, 0, 2)
    with pytest.raises(RuntimeError, match=r"deadlock: core \(px 2, py 0\) waits .* colour 0 \(wo"):
        engine.run(program)
    with pytest.raises(RuntimeError, match=r"deadlock: core \(px 2, py 0\)"):
        engine.run(program, engine=twin.run)


def test_a_full_ring_of_sends_is_a_deadlock():
    program, wires = line(2)
    colours = wires.connect([(0, 1), (1, 0)])
    for p in (0, 1):
        made = code()
        made.vector("move", 100, send=colours[p, 1 - p])
        made.vector("move", 100, read=colours[1 - p, p])
        made.halt()
        program.place(made, 0, p)
    with pytest.raises(RuntimeError, match=r"deadlock: core \(px 0, py 0\) cannot send on colour"):
        engine.run(program)


def test_a_wavelet_that_nobody_receives_is_named():
    program, wires = line(2)
    colour = wires.connect([(0, 1)])[0, 1]
    source = code()
    source.vector("move", 1, send=colour)
    source.halt()
    program.place(halted())
    program.place(source, 0, 0)
    for run in (engine._C.wafer_run, twin.run):
        with pytest.raises(RuntimeError, match=r"nobody receives a wavelet of colour 0 .*px 1"):
            engine.run(program, engine=run)


def test_two_sources_on_one_colour_are_named():
    program, _ = line(3)
    program.route(4, (RAMP,), (EAST,), 0, 0)
    program.route(4, (RAMP,), (WEST,), 0, 2)
    program.route(4, (WEST, EAST), (RAMP,), 0, 1)
    source, sink = code(), code()
    source.vector("move", 3, send=4)
    source.halt()
    sink.vector("move", 6, read=4)
    sink.halt()
    program.place(source)
    program.place(sink, 0, 1)
    for run in (engine._C.wafer_run, twin.run):
        with pytest.raises(RuntimeError, match=r"two sources .* colour 4 at core \(px 1, py 0\)"):
            engine.run(program, engine=run)


def test_impossible_routes_are_named_before_the_run():
    program, _ = line(2)
    program.place(halted())
    program.route(3, (RAMP,), (NORTH,), 0, 1)
    with pytest.raises(ValueError, match=r"colour 3 leaves core \(px 1, py 0\) by port N, the e"):
        engine.run(program)
    program, _ = line(2)
    program.place(halted())
    program.route(3, (RAMP,), (EAST,), 0, 0)
    with pytest.raises(ValueError, match=r"core \(px 1, py 0\) does not receive it"):
        engine.run(program)
    program, _ = line(2)
    made = code()
    made.vector("move", 1, read=5)
    made.halt()
    program.place(made)
    program.route(5, (RAMP,), (EAST,), 0, 0)
    program.route(5, (WEST,), (RAMP,), 0, 1)
    with pytest.raises(ValueError, match=r"core \(px 0, py 0\) reads colour 5, which has no route"):
        engine.run(program)


def test_budgets_name_core_need_and_limit():
    with pytest.raises(ValueError, match=r"core \(px 0, py 0\) needs \d+ B of SRAM .* 48128 B"):
        engine.run(line(1, words=10_000)[0])
    program, wires = line(3)
    with pytest.raises(ValueError, match=r"core \(px 0, py 0\) needs 22 colours, the limit is 21"):
        for _ in range(30):
            wires.flood(0)
    program, wires = line(2, WSE3)
    for _ in range(9):
        wires.flood(0)
    program.place(halted(WSE3))
    with pytest.raises(ValueError, match=r"core \(px 1, py 0\) needs 9 input queues.* limit is 8"):
        engine.run(program)
    wanted = r"core \(px 1, py 0\) needs 5 switch positions of colour 3, the limit is 4"
    with pytest.raises(ValueError, match=wanted):
        program.route(3, (RAMP,), (EAST,), 0, 1, position=4)
    with pytest.raises(ValueError, match=r"WSE-2's usable \(994, 750\) cores, got \(1, 751\)"):
        Program(WSE2, 1, 751)


def test_threads_and_tasks_are_budgets_too():
    program, _ = line(3, dataclasses.replace(WSE2, microthreads=2))
    made = code()
    for thread in range(3):
        made.vector("mul", 4, to=at(0), a=at(0), b=at(0), thread=thread)
    made.halt()
    program.place(halted())
    program.place(made, 0, 2)
    wanted = r"core \(px 2, py 0\) needs 3 microthreads, the limit is 2"
    with pytest.raises(ValueError, match=wanted):
        engine.run(program)
    program = collectives.build("allreduce", "ring", (1, 20), 20, WSE2, "task")
    with pytest.raises(ValueError, match=r"core \(px 0, py 0\) needs 39 tasks, the limit is 32"):
        engine.run(program)


def test_the_longest_kernel_is_within_its_share_of_code():
    """At what a whole decoder's code takes, by instruction."""
    block = model.Block(4200, 14700, gated=True, rms=True)
    decoder = phases.build(
        WSE2, 60, 60, tuple(model.decode_phases(WSE2, block, 420, 420, 4200, 1)), 8
    )
    kernels = [
        *(tiles.build(WSE2, 8, 8, name, tiles.Tiles(4, 4, 4)) for name in tiles.ALGORITHMS),
        transposed.build(WSE2, 8, 8, tiles.Tiles(4, 4, 4)),
        collectives.build("allreduce", "ktree", (16, 16), 8, WSE2),
    ]

    def longest(program):
        return max(len(instructions) for instructions, _ in program.classes)

    for spec in (WSE2, WSE3):
        each = spec.decoder_code_bytes / longest(decoder)
        assert all(each * longest(program) <= spec.code_bytes for program in kernels)


def test_the_engine_refuses_addresses_outside_memory():
    program, _ = line(1, words=8)
    made = code()
    made.loop(3)
    made.vector("move", 4, a=at(0, 1, 2), to=at(0))
    made.endloop()
    made.halt()
    program.place(made)
    program.memory = np.zeros((1, 1, 8), np.float32)
    engine.run(program)
    made.instructions[0] = (*made.instructions[0][:2], 4, *made.instructions[0][3:])
    program.classes.clear()
    program.place(made)
    with pytest.raises(ValueError, match="instruction 1 has a bad first operand"):
        engine.run(program)


# ---- spec ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [WSE2, WSE3], ids=lambda s: s.name)
def test_every_constant_has_unit_tag_and_source(spec):
    rows = list(spec.constants())
    assert {row[0] for row in rows} == {f.name for f in dataclasses.fields(spec)} - {
        "name",
        "provenance",
    }
    for name, value, _, tag, source, what in rows:
        assert what and source and tag in ("published", "derived", "assumed", "fitted"), name
        assert value is not None


def test_vector_rates_are_the_published_ones():
    # @fmuls on 5,124 elements: 2,597 aligned, about 5,130 with one bad operand, 10,254 with all
    aligned = WSE2.vector_cycles("fmuls", 5124)
    assert abs(aligned / 2597 - 1) < 0.02
    assert abs(WSE2.vector_cycles("fmuls", 5124, banks=(1, 5)) / 5130 - 1) < 0.01
    assert WSE2.vector_cycles("fmuls", 5124, strides=(8,), banks=(1, 5)) / 10254 - 1 < 0.01
    assert abs(WSE2.vector_cycles("fmacs", 14) - 15) <= 1
    # 135.3 on hardware for 254: half the listed rate, as with operands in conflicting banks
    assert abs(WSE3.vector_cycles("fmachs", 254, banks=(0, 4)) - 135.3) < 10


def test_bad_specs_are_refused():
    for field, value, wanted in (
        ("hop", 0, "hop must be a whole number, in 1..1000, got 0"),
        ("hop", 1.5, "hop must be a whole number"),
        ("hop", 10**12, "hop must be a whole number, in 1..1000"),
        ("columns", "many", "columns must be a whole number"),
        ("colours", 0, "colours must be a whole number, in 1..64, got 0"),
        ("microthreads", 9, "microthreads must be a whole number, in 0..8, got 9"),
        ("switch_positions", 5, "in 1..4, got 5"),
        ("clock_hz", float("nan"), "clock_hz must be at least 1.0, got nan"),
        ("io_bits", float("inf"), "io_bits must be at least 1.0, got inf"),
        ("rates", {**WSE2.rates, "fmacs": 0}, "rates of 'fmacs' must be a positive whole number"),
    ):
        with pytest.raises(ValueError, match=wanted):
            dataclasses.replace(WSE2, **{field: value})
    with pytest.raises(ValueError, match="rates must name"):
        dataclasses.replace(WSE2, rates={"fmach": 4})
    with pytest.raises(dataclasses.FrozenInstanceError):
        WSE2.hop = 2
    small = WaferSpec("mine", 8, 8, 1e9, 1, 2, 1, WSE2.rates)
    assert {tag for *_, tag, _, _ in small.constants()} == {"assumed"}
