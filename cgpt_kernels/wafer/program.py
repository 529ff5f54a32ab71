"""What the cores do: instructions, tasks, routes. One description for the engine and its twin.

A `Program` is a grid of cores, each with a class (its tasks), parameters, and routes per colour.
Cores of one class share code; conditions on parameters tell them apart where only a number differs.
Directions: N is the row above (py - 1), E the next column (px + 1). Lengths are 32-bit words.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .spec import WaferSpec, check_grid

NORTH, EAST, SOUTH, WEST, RAMP = range(5)
OPPOSITE = (SOUTH, WEST, NORTH, EAST, RAMP)
STEP = ((0, -1), (1, 0), (0, 1), (-1, 0), (0, 0))  # (px, py) of the neighbour by port
OPS = ("end", "halt", "calc", "vec", "macs", "wait", "activate", "block", "unblock", "loop",
       "endloop")  # fmt: skip
FUNCTIONS = ("move", "add", "mul", "max")
ADVANCE_OWN, ADVANCE_PATH = 1, 2
STATISTICS = ("finish", "compute", "fabric", "sent", "received", "hops", "macs", "deepest")
PARAMETERS = 4
POSITIONS = 4  # of a switch, as the engine stores routes
TASKS = 32  # of a core, as the engine stores which are active
NOWHERE = (-1, 0, 0, 0)


def at(base: int, stride: int = 1, step: int = 0, alt: int = 0) -> tuple[int, int, int, int]:
    """An operand in memory: word address, stride, and what each (odd) round of the loop adds."""
    return base, stride, step, alt


def always():
    return 0, 0, 1


def when(parameter: int, divisor: int = 1):
    """Only in rounds of the loop with round // divisor == the core's parameter."""
    return 1, parameter, divisor


def unless(parameter: int, divisor: int = 1):
    return 2, parameter, divisor


def before(parameter: int, divisor: int = 1):
    return 3, parameter, divisor


def after(parameter: int, divisor: int = 1):
    return 4, parameter, divisor


def _instruction(op, *, function="move", length=0, beats=0, startup=0, thread=-1, read=-1, send=-1,
                 to=NOWHERE, a=NOWHERE, b=NOWHERE, condition=(0, 0, 1), tag=0, flags=0, task=-1,
                 tile=(0, 0, 0), period=0, wrap=0, ahead=0):  # fmt: skip
    return (OPS.index(op), FUNCTIONS.index(function), length, beats, startup, thread, read, send,
            *to, *a, *b, *condition, tag, flags, task, *tile, period, wrap,
            ahead)  # fmt: skip


@dataclass
class Code:
    """Writes the instructions of one class of cores.

    Every method appends one instruction; `tag` names the phase that its time is booked on.
    """

    spec: WaferSpec
    instructions: list = field(default_factory=list)
    tasks: list = field(default_factory=list)  # (pc, colour, active, blocked)
    tag: int = 0
    condition: tuple = (0, 0, 1)

    def task(self, colour: int = -1, *, active: bool = True, blocked: bool = False) -> int:
        """The instructions that follow are a task: local, or started by a colour's wavelets."""
        self.tasks.append((len(self.instructions), colour, int(active and colour < 0), blocked))
        return len(self.tasks) - 1

    def _add(self, op, **fields):
        fields.setdefault("tag", self.tag)
        fields.setdefault("condition", self.condition)
        self.instructions.append(_instruction(op, **fields))

    def arrival(self, colour: int, software: bool = True):
        """Ends the task; what follows is a task that the colour's next wavelet starts, once.

        software: whether it is one that calls back and sends, not one that counts a packet only.
        """
        following = len(self.tasks)
        self.unblock(following)
        self.end()
        self.task(colour, blocked=True)
        self.block(following)
        self.calc(self.spec.task_relay if software else 0)

    def end(self):
        self._add("end", condition=always())

    def halt(self):
        self._add("halt")

    def calc(self, cycles: int):
        if cycles > 0:
            self._add("calc", beats=int(cycles))

    def wait(self, thread: int):
        self._add("wait", thread=thread)

    def activate(self, task: int):
        self._add("activate", task=task)

    def block(self, task: int):
        self._add("block", task=task)

    def unblock(self, task: int):
        self._add("unblock", task=task)

    def loop(self, rounds: int):
        self._add("loop", length=rounds)

    def endloop(self):
        self._add("endloop")

    def vector(self, function, length, *, to=NOWHERE, a=NOWHERE, b=NOWHERE, read=-1, send=-1,
               thread=-1, flags=0, task=-1, beats=None, builtin=None, period=0, wrap=0,
               ahead=0):  # fmt: skip
        """One vector instruction. a: first operand in memory, or `read`, a colour of the fabric.

        to, send: where results go; both may be given. With fabric operands one word moves per
        cycle; otherwise the spec's rate of `builtin` counts, or `beats` where given. period: memory
        operands start over after so many words, as a 4-d descriptor with an outer stride of 0 does.
        wrap, ahead: an operand's step counts (round + ahead) % wrap, as in a circular buffer; flags
        go with the last of these only.
        """
        spec = self.spec
        fabric = read >= 0 or send >= 0
        if not fabric and beats is None:
            strides = tuple(o[1] for o in (to, a, b) if o[0] >= 0)
            cycles = spec.vector_cycles(builtin or _FP32[function], length, strides=strides)
            beats = cycles - spec.memory_start
        startup = spec.vector_start if fabric else spec.memory_start
        self._add("vec", function=function, length=length, beats=0 if fabric else beats,
                  startup=startup if thread < 0 else spec.async_start, thread=thread,
                  read=read, send=send, to=to, a=a, b=b, flags=flags, task=task,
                  period=period, wrap=wrap, ahead=ahead)  # fmt: skip

    def macs(self, tile, beats: int, *, to, a, b, wrap=0):
        """A local tile product C[m, n] += A[m, k] B[k, n] that takes `beats` cycles in all."""
        self._add("macs", tile=tuple(map(int, tile)), beats=int(beats), to=to, a=a, b=b, wrap=wrap)

    def key(self):
        return tuple(self.instructions), tuple(self.tasks)


_FP32 = {"move": "fmovs", "add": "fadds", "mul": "fmuls", "max": "fmaxs"}


def _beyond(py, px, need, limit, what: str) -> ValueError:
    return ValueError(
        f"wafer: core (px {px}, py {py}) needs {need} {what}, the limit is {limit}"
        + (" B" if what.startswith("B ") else "")
    )


class Program:
    """A grid of cores with their code, routes and budgets.

    Args:
        rows, columns: cores.
        phases: names that the tags of instructions mean.
        words: 32-bit words of data per core; values are computed where `memory` is given.
    """

    def __init__(self, spec: WaferSpec, rows: int, columns: int, phases=("all",), words: int = 0):
        check_grid("wafer", spec, (rows, columns))
        self.spec, self.rows, self.columns = spec, rows, columns
        self.phases, self.words = tuple(phases), words
        self.classes: dict = {}
        self.core_class = np.full((rows, columns), -1, np.int32)
        self.parameters = np.zeros((rows, columns, PARAMETERS), np.int32)
        self.routes = np.zeros((rows, columns, spec.colours, POSITIONS), np.int32)
        self.memory: np.ndarray | None = None
        self.next_colour = 0  # colours below are in use

    def place(self, code: Code, rows=slice(None), columns=slice(None)) -> None:
        """Give these cores this code."""
        index = self.classes.setdefault(code.key(), len(self.classes))
        self.core_class[rows, columns] = index

    def route(self, colour: int, receive, send, rows=slice(None), columns=slice(None), position=0):
        """Set what the routers of these cores do with a colour: ports in, ports out."""
        for need, limit, what in (
            (colour + 1, self.spec.colours, "colours"),
            (position + 1, self.spec.switch_positions, f"switch positions of colour {colour}"),
        ):
            if not 0 < need <= limit:
                cores = np.arange(self.rows * self.columns).reshape(self.rows, self.columns)
                first = int(np.ravel(cores[rows, columns])[0])
                raise _beyond(first // self.columns, first % self.columns, need, limit, what)
        mask = sum(1 << p for p in receive) | sum(1 << p for p in send) << 8
        self.routes[rows, columns, colour, position] = mask

    def check(self) -> None:
        """ValueError naming the core, the need and the limit where a budget is exceeded."""
        spec = self.spec
        need = 4 * self.words + spec.code_bytes + spec.stack_bytes
        limit = spec.sram_bytes - spec.sram_reserved
        if need > limit:
            parts = f"{4 * self.words} B data, {spec.code_bytes} B code, {spec.stack_bytes} B stack"
            raise _beyond(0, 0, need, limit, f"B of SRAM ({parts})")
        into_core = ((self.routes >> (8 + RAMP)) & 1).any(axis=3).sum(axis=2)
        self._refuse(into_core, spec.input_queues, "input queues")
        threads, tasks = np.zeros((2, len(self.classes) + 1), np.int64)  # cores without: the last
        for (instructions, own), index in self.classes.items():
            threads[index] = len({i[5] for i in instructions if i[5] >= 0})
            tasks[index] = len(own)
        self._refuse(threads[self.core_class], spec.microthreads, "microthreads")
        self._refuse(tasks[self.core_class], TASKS, "tasks")

    def _refuse(self, needs, limit, what):
        if needs.max(initial=0) > limit:
            raise _beyond(*np.unravel_index(needs.argmax(), needs.shape), needs.max(), limit, what)

    def lowered(self) -> dict[str, np.ndarray]:
        """The arrays that the engine and the twin read."""
        code, tasks, first = [], [], [0]
        for instructions, own in self.classes:
            base = len(code)
            code += instructions
            tasks += [(pc + base, colour, active, blocked) for pc, colour, active, blocked in own]
            first.append(len(tasks))
        used = int(self.routes.any(axis=(0, 1, 3)).nonzero()[0].max(initial=0)) + 1
        cores = self.rows * self.columns
        return {
            "code": np.array(code, np.int32).reshape(-1, 32),
            "tasks": np.array(tasks, np.int32).reshape(-1, 4),
            "first_task": np.array(first, np.int32),
            "core_class": np.ascontiguousarray(self.core_class).reshape(cores),
            "parameters": np.ascontiguousarray(self.parameters).reshape(cores, PARAMETERS),
            "routes": np.ascontiguousarray(self.routes[:, :, :used]).reshape(cores, used, -1),
        }

    def constants(self, max_cycles: int) -> np.ndarray:
        """The struct Constants of csrc/wafer/program.h."""
        s = self.spec
        colours = int(self.routes.any(axis=(0, 1, 3)).nonzero()[0].max(initial=0)) + 1
        return np.array(
            [self.columns, self.rows, colours, s.hop, s.ramp, s.stop, s.rates["fmovs"],
             s.router_queue, s.core_queue, s.task_start, self.words, PARAMETERS,
             len(self.phases), max_cycles], np.int64
        )  # fmt: skip
