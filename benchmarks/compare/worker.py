"""One engine in a process of its own: commands come in as lines of JSON, answers go out so.

Started by `Child` as `python -m benchmarks.compare.worker` in the folder above. Whatever a library prints goes
to standard error: the pipe is the answers' alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.compare.peers import TABLE, engine_class


class Worker:
    """What the commands do."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def about(self) -> dict[str, Any]:
        """Say what the engine is."""
        return {"version": self.engine.version, "n_bytes": self.engine.n_bytes}

    def time(self, times: int, **workload: Any) -> dict[str, list[float]]:
        """Seconds until the first tokens, and seconds a step from there on; each `times` times."""
        measured = [self._once(**workload) for _ in range(times)]
        return {"first": [first for first, _ in measured], "step": [step for _, step in measured]}

    def _once(self, prompts: list[list[int]], n_tokens: int, known: bool) -> tuple[float, float]:
        ticks: list[float] = []
        start = time.perf_counter()
        self.engine.generate(prompts, n_tokens, lambda _: ticks.append(time.perf_counter()), known)
        if len(ticks) != n_tokens:
            raise RuntimeError(f"{len(ticks)} steps were taken, not {n_tokens}")
        return ticks[0] - start, (ticks[-1] - ticks[0]) / max(1, n_tokens - 1)

    def sample(self, ids: list[int], n_tokens: int) -> dict[str, Any]:
        """What the engine computes: the logits after a prompt, and its greedy continuation."""
        tokens: list[int] = []
        self.engine.generate([ids], n_tokens, tokens.extend)
        return {"logits": self.engine.logits(ids), "tokens": tokens}

    def program(self, ids: list[int], n_tokens: int) -> Any:
        """See `Engine`."""
        program = self.engine.program(ids, n_tokens)
        return program and [program[0], str(program[1])]

    def read(self) -> Any:
        """See `Reading`."""
        return self.engine.read()


def main() -> None:
    task, name, folder, threads, work, *rest = sys.argv[1:]
    options = TABLE[name].options if name in TABLE else {}
    if task == "prepare":
        engine_class(name).prepare(Path(folder), Path(work), **options)
        return
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    place = Path(folder), int(threads), Path(work)
    if task == "once":  # a whole process, timed from outside
        ids, n_tokens = json.loads(rest[0]), int(rest[1])
        engine = engine_class(name).for_one_call(n_tokens, *place, **options)
        engine.generate([ids], n_tokens, lambda tokens: None)
        return
    engine = engine_class(name)(*place, **options)
    worker = Worker(engine)
    print(json.dumps(worker.about()), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(worker, command.pop("do"))(**command)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
