"""Runs that end by SIGKILL before a file operation; `tests/training/test_killed_runs.py` starts it.

Arguments: a folder, a seed, and the number of runs. Standard output is a JSON list with the exit
code of each run, and of the run that continues it in the same folder. A run is a forked child of
this process, which has no threads.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gptx.backends import get_backend
from gptx.training.callbacks import Callback, StepRecord
from gptx.training.reports.log_file import LogFile
from gptx.training.trainer import Trainer
from tests.support.conversions import in_a_child
from tests.support.training import CONFIG, TinyData, tiny_settings

STEPS, EVAL_EVERY = 40, 8
OPERATIONS = {
    "open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.listdir",
    "os.scandir", "ctypes.dlsym",  # before two folders are exchanged
}  # fmt: skip


class Points(Callback):
    """A counter of file operations and steps that calls a function at the n-th."""

    def __init__(self, at: int, call: Callable[[], None]) -> None:
        self.count, self.at, self.call = 0, at, call
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Count an event of Python's audit hooks if it is a file operation."""
        if event in OPERATIONS:
            self.add()

    def on_step(self, record: StepRecord) -> None:
        self.add()

    def add(self) -> None:
        """Count one operation."""
        self.count += 1
        if self.count == self.at:
            self.call()


def train(folder: Path, *, resume: bool, points: Points | None = None) -> None:
    """Run, or continue, 40 steps with a checkpoint every eight."""
    trainer = Trainer(
        CONFIG,
        TinyData(),
        tiny_settings(steps=STEPS, eval_every=EVAL_EVERY),
        output=folder,
        backend=get_backend("numpy", generic=True),
        callbacks=[LogFile(), *([points] if points else [])],
        resume=resume,
    )
    trainer.run()


def train_until(folder: Path, at: int) -> None:
    """Run until the n-th point."""
    train(folder, resume=False, points=Points(at, kill))


def kill() -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def count_points(folder: Path) -> int:
    """Count the points of a whole run, which stays as `whole`."""

    def run() -> None:
        points = Points(0, kill)
        train(folder / "whole", resume=False, points=points)
        (folder / "points").write_text(str(points.count))

    assert in_a_child(run) == 0
    return int((folder / "points").read_text())


def main(folder: Path, seed: int, runs: int) -> list[list[int]]:
    """End runs at seeded points, and continue each; return the exit codes."""
    n_points = count_points(folder)
    codes = []
    for number in range(runs):
        at = random.Random(f"{seed} {number}").randrange(n_points) + 1
        output = folder / str(number)
        killed = in_a_child(partial(train_until, output, at))
        resume = (output / "last" / "training.json").is_file()
        codes.append([killed, in_a_child(partial(train, output, resume=resume))])
    return codes


if __name__ == "__main__":
    os.fsync = lambda file: None  # slow, and of no use without a power failure
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
