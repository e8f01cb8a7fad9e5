"""An engine in a process of its own, and what to say if that ends too early."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.compare.peers import TABLE

WORKER = [sys.executable, "-m", "benchmarks.compare.worker"]
HERE = Path(__file__).resolve().parents[2]  # the checkout


class LeftOut(Exception):
    """An engine that cannot be measured, and why."""


class Child:
    """An engine that is asked for one thing at a time.

    Parameters
    ----------
    folder
        The model.
    work
        Where the engine's own format of it lies, and is made if it does not, and logs.

    Raises
    ------
    LeftOut
        The engine is not installed, or cannot load the model.
    """

    def __init__(self, name: str, folder: Path, threads: int, work: Path) -> None:
        self.name = name
        self.threads = threads
        work = work.resolve()
        self.log = work / f"{name}.log"
        files = work / (TABLE[name].files if name in TABLE else "")
        self.arguments = [str(folder.resolve()), str(threads)]
        if not files.exists():
            half = files.with_suffix(".part")
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir()
            self._finish([*WORKER, "prepare", name, *self.arguments, str(half)])
            half.rename(files)
        self.arguments += [str(files)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*WORKER, "serve", name, *self.arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=HERE,
                env=self._environment(),
            )
        self.about = self._answer()

    def ask(self, do: str, **arguments: Any) -> Any:
        """What the worker answers to one of its commands."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # then there is no answer, and the log says why
            print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)
        return self._answer()

    def whole_process(self, ids: list[int], n_tokens: int) -> float:
        """Seconds that another process takes from its start to its end."""
        once = [*WORKER, "once", self.name, *self.arguments, json.dumps(ids), str(n_tokens)]
        command, folder = self.ask("program", ids=ids, n_tokens=n_tokens) or (once, HERE)
        start = time.perf_counter()
        self._finish(command, folder)
        return time.perf_counter() - start

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()

    def _finish(self, command: list[str], folder: Path = HERE) -> None:
        with self.log.open("w") as log:
            env = self._environment()
            code = subprocess.run(command, stdout=log, stderr=log, cwd=folder, env=env).returncode
        if code:
            raise LeftOut(self._why(code))

    def _answer(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise LeftOut(self._why(self.process.wait()))
        return json.loads(line)

    def _why(self, code: int) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        why = next((line for line in reversed(lines) if line.strip()), "its process ended")
        if code < 0:
            why = f"its process died of {signal.Signals(-code).name}"
        if why.startswith(("ModuleNotFoundError: ", "ImportError: ")) and self.name in TABLE:
            why = f"{why.partition(': ')[2]}: pip install {TABLE[self.name].needs}"
        return f"{self.name} is left out: {why}"

    def _environment(self) -> dict[str, str]:
        """As many threads for each library; those that have an argument for it get that, too.

        How long idle threads spin is left alone: it is a part of an engine's speed.
        """
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        return os.environ | dict.fromkeys(names, str(self.threads))
