"""Training killed with SIGKILL, again and again. A process of its own that forks the victims:

    python killed_training.py moments SETTINGS.json    at every file operation and step, in turn
    python killed_training.py times SETTINGS.json      after random times, until one run is through
    python killed_training.py full SETTINGS.json       a disk that takes no file as large as needed

Prints JSON for test_train_kill.py. It runs nothing itself, so that forking is safe.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from cgpt_kernels.train import Settings, loop


def victim(settings, meet=lambda: None):
    """The id of a child that runs `settings` and calls `meet` before each step and file operation.

    Its exit status is 0, or 3 for an OSError.
    """
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        operations = [(os, "fsync"), (os, "rename"), (os, "replace"), (loop._Run, "_one_step")]
        for where, name in operations:
            setattr(where, name, meeting(meet, getattr(where, name)))
        loop.run(settings, resume=True)
        status = 0
    except OSError as error:
        print(error, file=sys.stderr)
        status = 3
    finally:
        os._exit(status)


def meeting(meet, call):
    def wrapped(*args, **more):
        meet()
        return call(*args, **more)

    return wrapped


def through(settings, **more):
    """Whether a child got through; False: it was killed."""
    status = os.waitstatus_to_exitcode(os.waitpid(victim(settings, **more), 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status == 0


def weights(out):
    return {
        n: (out / "last" / n).read_bytes() for n in ("model.safetensors", "moments.safetensors")
    }


def moments(settings, out):
    """Kill before the n-th operation of a new run, for every n; each is then resumed."""
    assert through(settings)
    alone, n, different = weights(out), 0, []
    while True:
        n += 1
        shutil.rmtree(out)
        left = [n]

        def meet(left=left):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        if through(settings, meet=meet):
            break
        assert through(settings)
        if weights(out) != alone or list(out.glob(".unfinished*")):
            different.append(n)
    return {"kills": n - 1, "different": different}


def times(settings, out):
    """Kill after random times; each child goes on where the last one's checkpoints end."""
    began = time.monotonic()
    assert through(settings)
    whole, alone, kills, resumed_at = time.monotonic() - began, weights(out), 0, set()
    shutil.rmtree(out)
    draw = random.Random(1)
    while True:
        child = victim(settings)
        end = time.monotonic() + draw.uniform(0.05, 0.4) * whole
        while time.monotonic() < end:
            if os.waitpid(child, os.WNOHANG)[0]:
                return {
                    "kills": kills,
                    "resumed_at": len(resumed_at),
                    "same": weights(out) == alone,
                }
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        resumed_at.add((out / "last").readlink().name if (out / "last").exists() else None)


def full(settings, out):
    """The first checkpoint fits on the disk, the second one does not, then there is room again."""
    assert through(settings)
    alone = weights(out)
    shutil.rmtree(out)

    def meet():
        if (out / "last").exists():
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    status = os.waitpid(victim(settings, meet), 0)[1]
    return {
        "status": os.waitstatus_to_exitcode(status),
        "left": sorted(p.name for p in out.iterdir()),
        "same": through(settings) and weights(out) == alone,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, file = sys.argv[1:]
    settings = Settings.from_json(Path(file).read_text())
    print(json.dumps(globals()[what](settings, Path(settings.out))))
