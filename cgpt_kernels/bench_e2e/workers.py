"""Systems in processes of their own, kept alive while memory lasts, run one at a time."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from .systems import PEERS, System, Work

LOAD_SECONDS = 1800  # conversions and compilations of a large model happen here, once
RUN_SECONDS = 600
SPARE_BYTES = 2 << 30  # never counted on: page cache, the other processes' growth
# OpenMP threads of the worker that ran last spin for some milliseconds before they sleep.
SETTLE_SECONDS = 0.1


class Failed(RuntimeError):
    """A system that did not load or run; the text is its error's first line."""


class Worker:
    """One system in one format; see bench/peers/worker.py for what is said."""

    def __init__(self, system: System, folder: Path, threads: int, *, timed: bool = True):
        self.system = system
        self.log = folder / "logs" / f"{system.name}-{system.format}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        setup = {
            "folder": str(folder / "checkpoint"),
            "cache": str(folder),
            "format": system.format,
            "threads": threads,
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "peers.worker", system.name, json.dumps(setup)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment(threads, timed=timed),
                text=True,
            )
        try:
            self._answer(LOAD_SECONDS)
        except Failed:
            self.close()
            raise

    def run(self, ids: list[list[int]], new_tokens: int, limit: float = RUN_SECONDS) -> dict:
        """{"seconds": per token, "tokens": [B][N]} of one repetition."""
        request = {"ids": ids, "new_tokens": new_tokens}
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Failed(self._ended()) from None
        return self._answer(limit)

    def _answer(self, limit: float) -> dict:
        with selectors.DefaultSelector() as ready:
            ready.register(self.process.stdout, selectors.EVENT_READ)
            if not ready.select(limit):
                self.process.kill()
                raise Failed(f"no answer within {limit:.0f} s, see {self.log}")
        line = self.process.stdout.readline()
        if not line:
            raise Failed(self._ended())
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def _ended(self) -> str:
        return f"ended with code {self.process.wait()}, see {self.log}"

    def memory(self) -> int:
        """Most bytes it has held so far."""
        return _status(self.process.pid, "VmHWM")

    def cpu_seconds(self) -> float:
        """Processor time of all its threads so far."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """The end of its input ends it."""
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class Pool:
    """The workers that are alive; the least recently used end when a next one needs their memory.

    warm: called with each worker that was started, before it is used.
    timed: False where nothing is measured, see `environment`.
    available: bytes of memory that new processes may take.
    """

    def __init__(
        self,
        folder: Path,
        threads: int,
        warm: Callable[[Worker], object],
        available: Callable[[], int] | None = None,
        *,
        timed: bool = True,
    ):
        self.folder, self.threads, self.warm, self.timed = folder, threads, warm, timed
        self.available = available or memory_available
        self.alive: dict[str, Worker] = {}  # in order of use
        self.idle_share = 0.0  # largest share of a core that all waiting workers used together
        self.needs_file = folder / "memory.json"

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """End all workers."""
        for worker in self.alive.values():
            worker.close()
        self.alive.clear()

    def get(self, system: System) -> Worker:
        """The system's worker, started if need be.

        Raises:
            Failed: it does not load.
        """
        worker = self.alive.pop(system.key, None)
        if worker is None:
            need = self._needs().get(system.key, self._guess(system)) + SPARE_BYTES
            while self.alive and self.available() < need:
                self.alive.pop(next(iter(self.alive))).close()
            worker = Worker(system, self.folder, self.threads, timed=self.timed)
            try:
                self.warm(worker)
            except Failed:
                worker.close()
                raise
            self._remember(system, worker.memory())
        self.alive[system.key] = worker
        return worker

    def repetition(self, system: System, work: Work, ids: list[list[int]]) -> dict:
        """One timed repetition, with all other workers asleep.

        Returns:
            Worker.run's answer and "others", the share of all cores that processes outside this
            pool used meanwhile.
        Raises:
            Failed: it does not load or run; its worker has ended then.
        """
        worker = self.get(system)
        others = [w for w in self.alive.values() if w is not worker]
        time.sleep(SETTLE_SECONDS)
        began, waiting = time.perf_counter(), sum(w.cpu_seconds() for w in others)
        machine, own = machine_seconds(), worker.cpu_seconds()
        try:
            answer = worker.run(ids, work.new_tokens)
        except Failed:
            self.alive.pop(system.key).close()
            raise
        taken = time.perf_counter() - began
        own = worker.cpu_seconds() - own
        waiting = sum(w.cpu_seconds() for w in others) - waiting
        self.idle_share = max(self.idle_share, waiting / taken)
        foreign = machine_seconds() - machine - own - waiting
        # clocks tick every 10 ms: a repetition as short as that may seem to exceed the machine
        share = foreign / taken / (os.cpu_count() or 1)
        return answer | {"others": min(1.0, max(0.0, share))}

    def _guess(self, system: System) -> int:
        """Bytes, for a first start: the checkpoint, a cast or converted copy and a packed one."""
        return 3 * (self.folder / "checkpoint" / "model.safetensors").stat().st_size

    def _needs(self) -> dict[str, int]:
        return json.loads(self.needs_file.read_text()) if self.needs_file.is_file() else {}

    def _remember(self, system: System, nbytes: int) -> None:
        self.needs_file.write_text(json.dumps({**self._needs(), system.key: nbytes}, indent=1))


def environment(threads: int, *, timed: bool) -> dict[str, str]:
    """For a process of bench/peers: this package, the thread count, nothing from a network.

    timed: OpenMP threads wait as OMP_WAIT_POLICY says, the same for every system; where it is not
        set, each library's default holds, which spins for some milliseconds. Otherwise they sleep,
        since spinning threads are many times slower beside other processes.
    """
    kept = dict(os.environ)
    if not timed:
        kept["OMP_WAIT_POLICY"] = "passive"
    package = str(PEERS.parents[1])
    path = [package, str(PEERS.parent), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def machine_seconds() -> float:
    """Processor time that all processes have used; 0 where the system does not tell."""
    for line in _lines("/proc/stat"):
        fields = [int(field) for field in line.split()[1:9]]
        return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")  # idle, iowait
    return 0.0


def memory_available() -> int:
    """Bytes that can be taken without swapping; unlimited where the system does not tell."""
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 1 << 62


def _status(pid: int, field: str) -> int:
    for line in _lines(f"/proc/{pid}/status"):
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    return 0


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
