"""The twin of the engine: the same programs, interpreted cycle by cycle, part by part, no calendar.

Slow and obvious on purpose. Every cycle visits every core and every router; all of them see the
queues as they were when the cycle began. `csrc/wafer` must give the same cycles, statistics,
values and log, event by event.
"""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import numpy as np

from . import program as p
from .program import FUNCTIONS, OPS, RAMP, STATISTICS

THREADS = 9  # eight microthreads and the main thread, which comes last
MAIN = 8
_FIELDS = (
    "op function len beats startup thread read send to0 to1 to2 to3 a0 a1 a2 a3 b0 b1 b2 b3 "
    "when parameter divisor tag flags task m k n period wrap ahead"
).split()
_APPLY = {
    "move": lambda x, y: x,
    "add": lambda x, y: np.float32(x + y),
    "mul": lambda x, y: np.float32(x * y),
    "max": lambda x, y: x if x > y else y,
}


class Fifo:
    """A queue whose departures make room only for the next cycle."""

    def __init__(self, room):
        self.room, self.items, self.popped = room, deque(), -1

    def ready(self, now):
        return bool(self.items) and self.items[0].at <= now

    def full(self, now):
        return len(self.items) + (self.popped == now) >= self.room

    def pop(self, now):
        self.popped = now
        return self.items.popleft()


class Twin:
    """One run; the arguments are those of `_C.wafer_run`."""

    def __init__(self, constants, code, tasks, first_task, core_class, parameters, routes, memory,
                 statistics, phases, log):  # fmt: skip
        (self.width, self.height, self.colours, self.hop, self.ramp, self.stop, self.slots,
         router_queue, core_queue, self.task_start, _, _, _,
         self.max_cycles) = map(int, constants)  # fmt: skip
        self.code = [SimpleNamespace(index=n, **dict(zip(_FIELDS, map(int, row), strict=True)))
                     for n, row in enumerate(code)]  # fmt: skip
        self.memory, self.statistics, self.phases = memory, statistics, phases
        self.log_rows, self.parameters, self.now, self.cycles = log, parameters, 0, 0
        self.logged = 0
        self.ins, self.inbox, self.routes, self.channels, self.cores = {}, {}, {}, [], []
        for core in range(self.width * self.height):
            own, mine = int(core_class[core]), []
            for colour in range(self.colours):
                masks = [int(m) for m in routes[core, colour] if m]
                if not masks:
                    continue
                route = SimpleNamespace(masks=masks, position=0, moved=-1, colour=colour)
                self.routes[core, colour] = route
                for port in range(5):
                    if any(m >> port & 1 for m in masks):
                        flying = (self.stop + self.ramp if port == RAMP else self.hop) - 1
                        self.ins[core, colour, port] = Fifo(router_queue + flying)
                        mine.append((colour, port))
                if any(m >> (8 + RAMP) & 1 for m in masks):
                    self.inbox[core, colour] = Fifo(core_queue + self.ramp - 1)
            self.channels.append(mine)
            span = range(int(first_task[own]), int(first_task[own + 1])) if own >= 0 else ()
            self.cores.append(SimpleNamespace(
                tasks=[tasks[t] for t in span],
                active={n for n, t in enumerate(span) if tasks[t][2]},
                blocked={n for n, t in enumerate(span) if tasks[t][3]}, threads=[None] * THREADS,
                pc=0, turn=0, start=-1, rounds=0, round=0, in_task=False, halted=own < 0, next=0,
                mark=0))  # fmt: skip
        assert routes.shape[2] == p.POSITIONS

    def run(self):
        while self.now <= self.max_cycles:
            before = self.moves = 0
            for core in range(len(self.cores)):
                self.step_core(core)
            for core in range(len(self.cores)):
                self.step_router(core)
            self.now += 1
            if self.moves == before and not self.pending():
                break
        stuck = [n for n, c in enumerate(self.cores) if not c.halted]
        if stuck:
            raise RuntimeError(f"wafer: deadlock: {self.at(stuck[0])}")
        left = [k for k, q in {**self.ins, **self.inbox}.items() if q.items]
        if left:
            raise RuntimeError(
                f"wafer: nobody receives a wavelet of colour {left[0][1]} in {self.at(left[0][0])}"
            )
        return self.cycles, self.now, self.logged

    def pending(self):
        """Whether time alone will change something."""
        queues = (*self.ins.values(), *self.inbox.values())
        times = [w.at for q in queues for w in q.items]
        times += [c.next for c in self.cores if not c.halted]
        times += [t.done or t.ready for c in self.cores for t in c.threads if t]
        return any(time >= self.now for time in times)

    def at(self, core):
        return f"core (px {core % self.width}, py {core // self.width})"

    def count(self, core, name, by=1):
        self.statistics[core, STATISTICS.index(name)] += by

    def event(self, cycle, core, thread, instruction, what):
        if self.log_rows is not None:
            if self.logged < len(self.log_rows):
                self.log_rows[self.logged] = cycle, core, thread, instruction.index, what
            self.logged += 1

    def push(self, core, queue, value, flags, at):
        queue.items.append(SimpleNamespace(value=value, flags=flags, at=at))
        deepest = STATISTICS.index("deepest")
        depth = len(queue.items) + (queue.popped == self.now)
        self.statistics[core, deepest] = max(self.statistics[core, deepest], depth)

    # ---- routers --------------------------------------------------------------------------------

    def step_router(self, core):
        mine, now, used = self.channels[core], self.now, 0
        for colour, port in mine:
            queue, route = self.ins[core, colour, port], self.routes[core, colour]
            mask = route.masks[route.position]
            if not queue.ready(now) or not mask >> port & 1:
                continue
            for o in set(range(5)) - {port}:
                other = self.ins.get((core, colour, o)) if mask >> o & 1 else None
                if other and other.ready(now):
                    raise RuntimeError(f"wafer: two sources deliver on one colour: colour {colour}"
                                       f" at {self.at(core)} in cycle {now}")  # fmt: skip
            send = mask >> 8
            if route.moved == now or used & send:
                self.moves += 1  # it goes on in the next cycle
                continue
            targets = [(o, *self.target(core, colour, o)) for o in range(5) if send >> o & 1]
            if any(q.full(now) for _, _, q in targets):
                continue
            wavelet = queue.pop(now)
            flags = wavelet.flags
            if flags & (p.ADVANCE_OWN | p.ADVANCE_PATH):
                route.position = min(route.position + 1, len(route.masks) - 1)
                flags &= ~p.ADVANCE_OWN
            for o, there, q in targets:
                late = self.ramp if o == RAMP else self.hop
                self.push(there, q, wavelet.value, 0 if o == RAMP else flags, now + late)
                self.count(core, "hops", o != RAMP)
            route.moved, used = now, used | send
            self.moves += 1

    def target(self, core, colour, port):
        if port == RAMP:
            return core, self.inbox[core, colour]
        there = core + p.STEP[port][0] + p.STEP[port][1] * self.width
        return there, self.ins[there, colour, p.OPPOSITE[port]]

    # ---- cores ----------------------------------------------------------------------------------

    def step_core(self, core):
        c, now = self.cores[core], self.now
        for n, t in enumerate(c.threads):
            if t and t.done and t.done <= now:
                if t.code.task >= 0:
                    c.active.add(t.code.task)
                c.threads[n] = None
        self.fetch(core, c)
        slots, sent, first = self.slots, False, c.turn
        for n in (*range(first, THREADS), *range(first)):
            t = c.threads[n]
            if not t or slots == 0 or not self.ready(core, t):
                continue
            sends, local = t.code.send >= 0, t.code.send < 0 and t.code.read < 0
            if (sends and sent) or (local and slots < self.slots):
                continue
            slots, sent = 0 if local else slots - 1, sent or sends
            self.beat(core, c, n)
            self.moves += 1

    def pick(self, core, c):
        for n, (pc, colour, _, _) in enumerate(c.tasks):
            queue = self.inbox.get((core, int(colour)))
            due = (queue and queue.ready(self.now)) if colour >= 0 else n in c.active
            if due and n not in c.blocked:
                c.active.discard(n)
                c.in_task, c.pc, c.next = True, int(pc), self.now + self.task_start
                return True
        return False

    def fetch(self, core, c):
        while not c.threads[MAIN] and c.next <= self.now and not c.halted:
            if not c.in_task:
                if not self.pick(core, c):
                    return
                continue
            code = self.code[c.pc]
            op = OPS[code.op]
            if code.when:
                turn, value = c.round // code.divisor, self.parameters[core, code.parameter]
                if not (turn == value, turn != value, turn < value, turn > value)[code.when - 1]:
                    c.pc += 1
                    continue
            if op == "end":
                c.in_task = False
            elif op == "halt":
                c.halted, c.in_task = True, False
                self.count(core, "finish", self.now)
                self.cycles = max(self.cycles, self.now)
            elif op in ("activate", "block", "unblock"):
                tasks = c.active if op == "activate" else c.blocked
                (tasks.discard if op == "unblock" else tasks.add)(code.task)
            elif op == "wait":
                if c.threads[code.thread]:
                    return
                self.book(core, c, code, self.now)
            elif op == "loop":
                c.start, c.rounds, c.round = c.pc + 1, code.len, 0
            elif op == "endloop":
                c.round += 1
                if c.round < c.rounds:
                    c.pc = c.start
                    continue
                c.round = 0
            else:
                if code.thread >= 0 and c.threads[code.thread]:
                    return
                self.launch(core, c, code)
            c.pc += 1

    def launch(self, core, c, code):
        n = MAIN if code.thread < 0 else code.thread

        steps = (c.round + code.ahead) % code.wrap if code.wrap else c.round

        def operand(name):
            base, stride, step, alt = (getattr(code, f"{name}{n}") for n in range(4))
            return (base + step * steps + (c.round & 1) * alt if base >= 0 else -1, stride)

        flags = 0 if code.wrap and steps + 1 < code.wrap else code.flags
        c.threads[n] = SimpleNamespace(
            code=code, flags=flags, position=0, remaining=code.beats,
            ready=self.now + code.startup, done=None,
            to=operand("to"), a=operand("a"), b=operand("b"))  # fmt: skip
        self.event(self.now, core, n, code, 0)
        if n != MAIN:
            c.next = self.now + 1
            self.book(core, c, code, c.next)

    def book(self, core, c, code, until):
        self.phases[core, code.tag] += until - c.mark
        c.mark = until

    def ready(self, core, t):
        if t.done or t.ready > self.now:
            return False
        if t.code.read >= 0 and not self.inbox[core, t.code.read].ready(self.now):
            return False
        return t.code.send < 0 or not self.ins[core, t.code.send, RAMP].full(self.now)

    def beat(self, core, c, n):
        t, now = c.threads[n], self.now
        code, m = t.code, None if self.memory is None else self.memory[core]
        c.turn = (n + 1) % THREADS
        if code.read < 0 and code.send < 0:
            self.count(core, "compute")
            t.remaining -= 1
            if t.remaining == 0:
                if m is not None:
                    self.compute(t, m)
                self.count(core, "macs", code.m * code.k * code.n)
                self.finish(core, c, n)
            return
        self.count(core, "fabric")
        x = None
        if code.read >= 0:
            x = self.inbox[core, code.read].pop(now).value
            self.count(core, "received")
        x = self.word(t, m, t.position, x)
        t.position += 1
        last = t.position == code.len
        if code.send >= 0:
            queue = self.ins[core, code.send, RAMP]
            self.push(core, queue, x, t.flags if last else 0, now + self.stop + self.ramp)
            self.count(core, "sent")
        if last:
            self.finish(core, c, n)

    def word(self, t, m, n, x):
        """Word n of a vector instruction, from the fabric (x) or memory, to memory and returned."""
        if m is None:
            return np.float32(0)
        n = n % t.code.period if t.code.period else n
        first, second = (m[o[0] + n * o[1]] if o[0] >= 0 else None for o in (t.a, t.b))
        x = first if x is None else x
        x = x if second is None else _APPLY[FUNCTIONS[t.code.function]](x, second)
        if t.to[0] >= 0:
            m[t.to[0] + n * t.to[1]] = x
        return x

    def compute(self, t, m):
        code = t.code
        if OPS[code.op] == "vec":
            for n in range(code.len):
                self.word(t, m, n, None)
        elif OPS[code.op] == "macs":
            shapes = ((t.to, code.m, code.n), (t.a, code.m, code.k), (t.b, code.k, code.n))
            out, a, b = (m[o[0] : o[0] + r * c].reshape(r, c) for o, r, c in shapes)
            for k in range(code.k):
                out += a[:, k : k + 1] * b[k]

    def finish(self, core, c, n):
        t = c.threads[n]
        self.event(self.now + 1, core, n, t.code, 1)
        if n == MAIN:
            self.book(core, c, t.code, self.now + 1)
            if t.code.task >= 0:
                c.active.add(t.code.task)
            c.threads[MAIN] = None
            c.next = self.now + 1
        else:
            t.done = self.now + 1


def run(*arguments):
    """The signature and result of `_C.wafer_run`."""
    return Twin(*arguments).run()
