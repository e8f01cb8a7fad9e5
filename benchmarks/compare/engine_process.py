"""An engine in a worker: the parent sends requests, the worker runs them on the loaded engine."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.compare.peers import TABLE, engine_class
from benchmarks.instruction_sets import ISAS
from gptx.bench.worker import Worker, time_process
from gptx.errors import GptxError

MODULE = "benchmarks.compare.engine_process"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
ONCE = f"import json, sys, {MODULE} as m; m.generate_once(**json.loads(sys.argv[1]))"


class LeftOut(Exception):
    """An engine that cannot be measured, with the reason."""


class EngineProcess:
    """A loaded engine in another process.

    The number of threads is set in the environment, and by the engine's own argument if it has one.
    The time that idle threads spin is not changed: it is a part of an engine's speed.

    Parameters
    ----------
    folder
        The model.
    work
        Folder for logs and for the model in the engine's format, which is converted if missing.
    isa
        Name of an instruction set that the engine is restricted to, see `ISAS`.

    Attributes
    ----------
    about
        Version of the engine, and bytes of its weights.

    Raises
    ------
    LeftOut
        The engine is not installed, or does not load the model.
    """

    def __init__(
        self, name: str, folder: Path, threads: int, work: Path, isa: str | None = None
    ) -> None:
        work = work.resolve()
        self.name = name
        self._env = dict.fromkeys(THREAD_VARIABLES, str(threads)) | ISAS.get(isa or "", {})
        # A checkout keeps its bytecode, as an installation does: a whole process imports it.
        self._env["PYTHONDONTWRITEBYTECODE"] = ""
        self._log = work / f"{name}.log"
        files = work / TABLE[name].files
        self._place = {"name": name, "folder": str(folder.resolve()), "threads": threads}
        if not files.exists():
            part = files.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            with self._start() as worker:
                self._answer(worker, "prepare_engine", **self._place, work=str(part))
            part.rename(files)
        self._place["work"] = str(files)
        self._worker = self._start()
        self.about = self.ask("load_engine", **self._place)

    def _start(self) -> Worker:
        with self._log.open("w") as log:
            return Worker(log=log, env=self._env)

    def ask(self, task: str, **arguments: Any) -> dict[str, Any]:
        """Run a function of this module in the worker, and return its answer."""
        return self._answer(self._worker, task, **arguments)

    def _answer(self, worker: Worker, task: str, **arguments: Any) -> dict[str, Any]:
        try:
            [answer] = worker.run(f"{MODULE}:{task}", **arguments)
        except GptxError as error:
            reason = str(error)
            if reason.startswith(("ModuleNotFoundError: ", "ImportError: ")):
                reason = f"{reason.partition(': ')[2]}: pip install {TABLE[self.name].needs}"
            raise LeftOut(f"{self.name} is left out: {reason}, see {self._log}") from None
        return answer

    def time_whole_process(self, ids: list[int], n_tokens: int) -> float:
        """Return the seconds of a fresh process that loads the model and continues a prompt."""
        arguments = {"ids": ids, "n_tokens": n_tokens}
        program = self.ask("describe_program", **arguments)
        once = [sys.executable, "-c", ONCE, json.dumps(self._place | arguments)]
        cwd = Path(program["cwd"]) if program else None
        seconds, done = time_process(program.get("command", once), cwd=cwd, env=self._env)
        if done.returncode:
            self._log.write_text(done.stderr)
            raise LeftOut(f"{self.name} is left out: a process failed, see {self._log}")
        return seconds

    def close(self) -> None:
        """End the process."""
        self._worker.close()


# In the worker

_engine: Any = None


def prepare_engine(name: str, folder: str, threads: int, work: str) -> Iterator[dict[str, Any]]:
    """Convert the model for an engine."""
    engine_class(name).prepare(Path(folder), Path(work), **TABLE[name].options)
    yield {}


def load_engine(name: str, folder: str, threads: int, work: str) -> Iterator[dict[str, Any]]:
    """Load an engine; the functions below use it."""
    global _engine
    _engine = engine_class(name)(Path(folder), threads, Path(work), **TABLE[name].options)
    yield {"version": _engine.version, "n_bytes": _engine.n_bytes}


def time_generation(
    prompts: list[list[int]], n_tokens: int, known: bool, times: int
) -> Iterator[dict[str, Any]]:
    """Yield the seconds of the first tokens and of a step after them, `times` times each."""
    measured = [_time_once(prompts, n_tokens, known) for _ in range(times)]
    yield {"first": [first for first, _ in measured], "step": [step for _, step in measured]}


def _time_once(prompts: list[list[int]], n_tokens: int, known: bool) -> tuple[float, float]:
    ticks: list[float] = []
    start = time.perf_counter()
    _engine.generate(prompts, n_tokens, lambda _: ticks.append(time.perf_counter()), known)
    if len(ticks) != n_tokens:
        raise RuntimeError(f"the engine made {len(ticks)} steps, expected {n_tokens}")
    return ticks[0] - start, (ticks[-1] - ticks[0]) / max(1, n_tokens - 1)


def sample(ids: list[int], n_tokens: int) -> Iterator[dict[str, Any]]:
    """Yield the logits after a prompt, and its greedy continuation."""
    tokens: list[int] = []
    _engine.generate([ids], n_tokens, tokens.extend)
    yield {"logits": _engine.logits(ids), "tokens": tokens}


def describe_program(ids: list[int], n_tokens: int) -> Iterator[dict[str, Any]]:
    """Yield the command of an engine that is a program; see `Engine.program`."""
    program = _engine.program(ids, n_tokens)
    yield {"command": program[0], "cwd": str(program[1])} if program else {}


# In a fresh process


def generate_once(
    name: str, folder: str, threads: int, work: str, ids: list[int], n_tokens: int
) -> None:
    """Load an engine for one call, and continue a prompt."""
    place = Path(folder), threads, Path(work)
    engine = engine_class(name).for_one_call(n_tokens, *place, **TABLE[name].options)
    engine.generate([ids], n_tokens, lambda tokens: None)
