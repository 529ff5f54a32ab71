"""The twin of the engine: the same programs, interpreted cycle by cycle, part by part, no calendar.

Slow and obvious on purpose. Every cycle visits every core and every router; all of them see the
queues as they were when the cycle began. `csrc/wafer` must give the same cycles, statistics,
values and log, event by event.
"""

from __future__ import annotations

import operator
from collections import deque
from types import SimpleNamespace

from .program import ADVANCE_OWN, ADVANCE_PATH, OPPOSITE, OPS, RAMP, STATISTICS, STEP

MAIN = 8  # the main thread comes after the microthreads
CORE = 5  # of a colour's queues by port, behind those of the router's five: the core's own
_CONSTANTS = (
    "width height colours hop ramp stop slots router_queue core_queue task_start words parameters "
    "tags max_cycles"
).split()
_FIELDS = (
    "op function len beats startup thread read send to0 to1 to2 to3 a0 a1 a2 a3 b0 b1 b2 b3 "
    "when parameter divisor tag flags task m k n period wrap ahead"
).split()
_APPLY = (lambda x, y: x, operator.add, operator.mul, lambda x, y: x if x > y else y)
_CONDITIONS = (operator.eq, operator.ne, operator.lt, operator.gt)


class Fifo:
    """Wavelets (value, flags, from when) in order; departures make room in the next cycle only."""

    def __init__(self, room):
        self.room, self.items, self.popped = room, deque(), -1

    def ready(self, now):
        return bool(self.items) and self.items[0][2] <= now

    def depth(self, now):
        return len(self.items) + (self.popped == now)

    def has_room(self, now):
        return self.depth(now) < self.room

    def pop(self, now):
        self.popped = now
        return self.items.popleft()


class Twin:
    """One run; the arguments are those of `_C.wafer_run`."""

    def __init__(self, constants, code, tasks, first_task, core_class, parameters, routes, memory,
                 statistics, phases, log):  # fmt: skip
        self.k = SimpleNamespace(**dict(zip(_CONSTANTS, map(int, constants), strict=True)))
        self.code = [
            SimpleNamespace(index=n, **dict(zip(_FIELDS, map(int, row), strict=True)))
            for n, row in enumerate(code)
        ]
        self.statistics, self.phases, self.log = statistics, phases, log
        self.now = self.moved = self.cycles = self.logged = 0
        self.cores = [
            self.core(n, tasks, first_task, int(core_class[n]), parameters, routes[n], memory)
            for n in range(self.k.width * self.k.height)
        ]

    def core(self, n, tasks, first_task, own, parameters, routes, memory):
        """A core and its router: queues by colour and port, threads, tasks, place in the code."""
        c = SimpleNamespace(
            number=n, name=f"core (px {n % self.k.width}, py {n // self.k.width})",
            memory=None if memory is None else memory[n], parameters=parameters[n],
            routes={}, queues={}, threads=[None] * (MAIN + 1), turn=0, tasks=[],
            in_task=False, halted=own < 0, pc=0, next=0, mark=0, start=-1, rounds=0, round=0,
        )  # fmt: skip
        if own >= 0:
            c.tasks = tasks[first_task[own] : first_task[own + 1]].tolist()
        c.active = {t for t, task in enumerate(c.tasks) if task[2]}
        c.blocked = {t for t, task in enumerate(c.tasks) if task[3]}
        for colour in range(self.k.colours):
            masks = [int(m) for m in routes[colour] if m]
            c.routes[colour] = SimpleNamespace(masks=masks, position=0, moved=-1)
            for port in range(5):
                if any(m >> port & 1 for m in masks):
                    flying = (self.k.stop + self.k.ramp if port == RAMP else self.k.hop) - 1
                    c.queues[colour, port] = Fifo(self.k.router_queue + flying)
            if any(m >> (8 + RAMP) & 1 for m in masks):
                c.queues[colour, CORE] = Fifo(self.k.core_queue + self.k.ramp - 1)
        return c

    def run(self):
        # nothing takes longer than this to follow from what moved last
        longest = max((code.startup for code in self.code), default=0)
        longest += self.k.hop + self.k.ramp + self.k.stop + self.k.task_start
        while self.now <= min(self.moved + longest, self.k.max_cycles):
            for c in self.cores:
                self.step_core(c)
            for c in self.cores:
                self.step_router(c)
            self.now += 1
        for c in self.cores:
            if not c.halted:
                raise RuntimeError(f"wafer: deadlock: {c.name}")
        left = [(k[0], c.name) for c in self.cores for k, q in c.queues.items() if q.items]
        for colour, name in left:
            raise RuntimeError(f"wafer: nobody receives a wavelet of colour {colour} in {name}")
        return self.cycles, self.now, self.logged

    def count(self, c, name, by=1):
        self.statistics[c.number, STATISTICS.index(name)] += by

    def event(self, cycle, c, thread, code, what):
        if self.log is not None and self.logged < len(self.log):
            self.log[self.logged] = cycle, c.number, thread, code.index, what
        self.logged += self.log is not None

    def push(self, c, queue, value, flags, at):
        queue.items.append((value, flags, at))
        row, deepest = self.statistics[c.number], STATISTICS.index("deepest")
        row[deepest] = max(row[deepest], queue.depth(self.now))

    def step_router(self, c):
        now, used = self.now, 0
        for (colour, port), queue in c.queues.items():
            route = c.routes[colour]
            mask = route.masks[route.position]
            if port == CORE or not queue.ready(now) or not mask >> port & 1:
                continue
            sources = [o for o in range(5) if mask >> o & 1 and c.queues[colour, o].ready(now)]
            if len(sources) > 1:
                what = f"colour {colour} at {c.name} in cycle {now}"
                raise RuntimeError(f"wafer: two sources deliver on one colour: {what}")
            send = mask >> 8
            if route.moved == now or used & send:
                self.moved = now  # it goes on in the next cycle
                continue
            targets = [(o, *self.target(c, colour, o)) for o in range(5) if send >> o & 1]
            if not all(q.has_room(now) for _, _, q in targets):
                continue
            value, flags, _ = queue.pop(now)
            if flags & (ADVANCE_OWN | ADVANCE_PATH):
                route.position = min(route.position + 1, len(route.masks) - 1)
                flags &= ~ADVANCE_OWN
            for o, there, q in targets:
                late = self.k.ramp if o == RAMP else self.k.hop
                self.push(there, q, value, 0 if o == RAMP else flags, now + late)
                self.count(c, "hops", o != RAMP)
            self.moved, route.moved, used = now, now, used | send

    def target(self, c, colour, port):
        """The core at the other end of a port, and its queue there."""
        there = self.cores[c.number + STEP[port][0] + STEP[port][1] * self.k.width]
        return there, there.queues[colour, CORE if port == RAMP else OPPOSITE[port]]

    def step_core(self, c):
        for n, t in enumerate(c.threads):
            if t and t.done and t.done <= self.now:
                if t.code.task >= 0:
                    c.active.add(t.code.task)
                c.threads[n] = None
        self.fetch(c)
        slots, sent = self.k.slots, False
        for n in (*range(c.turn, MAIN + 1), *range(c.turn)):
            t = c.threads[n]
            if not t or slots == 0 or not self.ready(c, t):
                continue
            sends, local = t.code.send >= 0, t.code.send < 0 and t.code.read < 0
            if (sends and sent) or (local and slots < self.k.slots):
                continue
            slots, sent = 0 if local else slots - 1, sent or sends
            self.beat(c, n)

    def pick(self, c):
        """Starts the first task that may run."""
        for n, (pc, colour, _, _) in enumerate(c.tasks):
            queue = c.queues.get((colour, CORE))
            due = n in c.active if colour < 0 else queue and queue.ready(self.now)
            if due and n not in c.blocked:
                c.active.discard(n)
                self.moved, c.in_task, c.pc = self.now, True, pc
                c.next = self.now + self.k.task_start
                return True
        return False

    def fetch(self, c):
        """Takes instructions for the main thread until one occupies it."""
        while not c.threads[MAIN] and c.next <= self.now and not c.halted:
            if not c.in_task:
                if not self.pick(c):
                    return
                continue
            code = self.code[c.pc]
            op, c.pc = OPS[code.op], c.pc + 1
            value = c.parameters[code.parameter]
            if code.when and not _CONDITIONS[code.when - 1](c.round // code.divisor, value):
                continue
            if op == "end":
                c.in_task = False
            elif op == "halt":
                c.halted, c.in_task = True, False
                self.count(c, "finish", self.now)
                self.cycles = max(self.cycles, self.now)
            elif op in ("activate", "block", "unblock"):
                tasks = c.active if op == "activate" else c.blocked
                (tasks.discard if op == "unblock" else tasks.add)(code.task)
            elif op == "loop":
                c.start, c.rounds, c.round = c.pc, code.len, 0
            elif op == "endloop":
                c.round = (c.round + 1) % c.rounds
                c.pc = c.start if c.round else c.pc
            elif code.thread >= 0 and c.threads[code.thread]:
                c.pc -= 1  # waits for its microthread, or for the one it names
                return
            elif op == "wait":
                self.book(c, code, self.now)
            else:
                self.launch(c, code)

    def launch(self, c, code):
        n = MAIN if code.thread < 0 else code.thread
        steps = (c.round + code.ahead) % code.wrap if code.wrap else c.round

        def operand(name):
            base, stride, step, alt = (getattr(code, f"{name}{i}") for i in range(4))
            return (base + step * steps + c.round % 2 * alt if base >= 0 else -1, stride)

        c.threads[n] = SimpleNamespace(
            code=code, position=0, ready=self.now + code.startup, done=None,
            flags=0 if code.wrap and steps + 1 < code.wrap else code.flags,
            to=operand("to"), a=operand("a"), b=operand("b"))  # fmt: skip
        self.event(self.now, c, n, code, 0)
        if n != MAIN:
            c.next = self.now + 1
            self.book(c, code, c.next)

    def book(self, c, code, until):
        self.phases[c.number, code.tag] += until - c.mark
        c.mark = until

    def ready(self, c, t):
        if t.done or t.ready > self.now:
            return False
        if t.code.read >= 0 and not c.queues[t.code.read, CORE].ready(self.now):
            return False
        return t.code.send < 0 or c.queues[t.code.send, RAMP].has_room(self.now)

    def beat(self, c, n):
        """One cycle of a thread: one word of the fabric, or a cycle of work in memory."""
        t, code, x = c.threads[n], c.threads[n].code, None
        local = code.read < 0 and code.send < 0
        self.moved, c.turn = self.now, (n + 1) % (MAIN + 1)
        last = t.position + 1 == (code.beats if local else code.len)
        self.count(c, "compute" if local else "fabric")
        if local and last:
            self.compute(t, c.memory)
            self.count(c, "macs", code.m * code.k * code.n)
        if code.read >= 0:
            x = c.queues[code.read, CORE].pop(self.now)[0]
            self.count(c, "received")
        if not local:
            x = self.word(t, c.memory, t.position, x)
        if code.send >= 0:
            at = self.now + self.k.stop + self.k.ramp
            self.push(c, c.queues[code.send, RAMP], x, t.flags if last else 0, at)
            self.count(c, "sent")
        t.position += 1
        if last:
            t.done = self.now + 1
            self.event(t.done, c, n, code, 1)
            if n == MAIN:
                self.book(c, code, t.done)

    def word(self, t, m, n, x):
        """Word n of a vector instruction, from the fabric (x) or memory, to memory and returned."""
        if m is None:
            return 0.0
        n = n % t.code.period if t.code.period else n
        first, second = (m[o[0] + n * o[1]] if o[0] >= 0 else None for o in (t.a, t.b))
        x = first if x is None else x
        x = x if second is None else _APPLY[t.code.function](x, second)
        if t.to[0] >= 0:
            m[t.to[0] + n * t.to[1]] = x
        return x

    def compute(self, t, m):
        code = t.code
        if OPS[code.op] == "vec":
            for n in range(code.len):
                self.word(t, m, n, None)
        elif OPS[code.op] == "macs" and m is not None:
            shapes = ((t.to, code.m, code.n), (t.a, code.m, code.k), (t.b, code.k, code.n))
            out, a, b = (m[o[0] : o[0] + r * c].reshape(r, c) for o, r, c in shapes)
            for k in range(code.k):
                out += a[:, k : k + 1] * b[k]


def run(*arguments):
    """The signature and result of `_C.wafer_run`."""
    return Twin(*arguments).run()
