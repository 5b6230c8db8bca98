"""python killing.py FOLDER TEACHER: one run left alone and one killed twice, each in a process of its own.

Processes are forked after the imports, before torch has computed anything. Prints how each of them ended.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import torch

import jdm.evaluation.evaluate
import tiny
from jdm.recipes import all_recipes
from jdm.training import checkpoint
from jdm.training.loop import train

STEPS, WRITING = 8, 7


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillAtSomeMoment:
    """Progress that kills the process at a random moment of a random step."""

    def __init__(self):
        self.step, self.before = random.randint(2, 4), time.monotonic()

    def __call__(self, done: int, _: dict) -> None:
        took, self.before = time.monotonic() - self.before, time.monotonic()
        if done == self.step:
            threading.Timer(took * random.random(), die).start()


def kill_in_the_middle_of_a_write() -> None:
    """The checkpoint of step WRITING is cut off halfway."""
    original = checkpoint.save_file

    def half(tensors, path):
        original(tensors, path)
        if f"{WRITING:07d}" in str(path):
            os.truncate(path, path.stat().st_size // 2)
            die()

    checkpoint.save_file = half


def ended(out: Path, teacher: Path, death: str) -> int:
    """The exit code of a forked run; negative where a signal ended it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        progress = KillAtSomeMoment() if death == "at some moment" else None
        if death == "in a write":
            kill_in_the_middle_of_a_write()
        train(tiny.run(all_recipes()["nano-canny"](), out, teacher, STEPS), progress)
        os._exit(0)
    except BaseException as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    jdm.evaluation.evaluate.judge = tiny.judge
    here, model = Path(sys.argv[1]), Path(sys.argv[2])
    plan = [("alone", "never"), ("killed", "at some moment"), ("killed", "in a write"), ("killed", "never")]
    print(json.dumps([ended(here / out, model, death) for out, death in plan]))
