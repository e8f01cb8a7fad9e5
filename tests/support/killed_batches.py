"""Batches that end by SIGKILL; `tests/cluster/test_killed_batches.py` starts it.

Arguments: a folder, a seed, and the number of batches. Each batch is ended twice, at seeded points:
before a request is answered, or before, within or after the write of its result. Then it runs to
its end. Standard output is a JSON list with the exit codes of the three runs of each batch;
`NAME.1` and `NAME.2` are its output after the two kills. A run is a forked child of this process,
which has no threads.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from gptx.backends import get_backend
from gptx.cluster.in_process import Response, Server
from gptx.cluster.results import ResultFile
from gptx.cluster.runner import Batch
from tests.support.conversions import in_a_child
from tests.support.models import make_model
from tests.support.random_models import CASES

N_LINES, IN_FLIGHT, KILLS = 24, 4, 2
CASE = CASES["tiny"]


def write_source(path: Path) -> None:
    """Write an input of requests of different lengths; every eighth line is invalid."""
    draws = random.Random(0)
    with path.open("w") as file:
        for line in range(N_LINES):
            prompt = [draws.randrange(CASE.vocab_size) for _ in range(1 + line % 5)]
            body = {"prompt": prompt, "max_tokens": 1 + line % 4, "return_token_ids": True}
            file.write("nonsense\n" if line % 8 == 7 else f"{json.dumps(body)}\n")


class Points:
    """A counter that ends the process at the n-th point."""

    def __init__(self, at: int) -> None:
        self.count, self.at = 0, at

    def add(self) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


class KilledFile(ResultFile):
    """An output whose writes have three points."""

    points: Points

    def _write(self, data: bytes) -> None:
        self.points.add()
        half = len(data) // 2
        os.write(self._file, data[:half])
        self.points.add()
        os.write(self._file, data[half:])
        self.points.add()


def run(folder: Path, name: str, at: int) -> None:
    """Run a batch, or continue it, until the n-th point; at 0, to its end."""
    points = Points(at)
    model = make_model(CASE, get_backend("numpy", generic=True))

    async def main() -> None:
        async with Server(model, IN_FLIGHT) as server:

            async def answer(path: str, body: Any) -> Response:
                points.add()
                return await server.post(path, body)

            await batch.run(answer, batch.begin(), lambda item, error: None, IN_FLIGHT)

    with KilledFile(folder / f"{name}.jsonl") as results:
        results.points = points
        batch = Batch(folder / "in.jsonl", results)
        asyncio.run(main())
    if at == 0:
        (folder / f"{name}.points").write_text(str(points.count))


def main(folder: Path, seed: int, n_batches: int) -> list[list[int]]:
    """Run a batch to its end, as `whole`, and others that are killed; return the exit codes."""
    write_source(folder / "in.jsonl")
    assert in_a_child(partial(run, folder, "whole", 0)) == 0
    n_points = int((folder / "whole.points").read_text())
    found = []
    for number in range(n_batches):
        draws = random.Random(f"{seed} {number}")
        codes = []
        for kill in range(1, KILLS + 1):  # a later run has fewer points
            at = draws.randrange(n_points // 2) + 1
            codes.append(in_a_child(partial(run, folder, str(number), at)))
            output = folder / f"{number}.jsonl"
            output.with_suffix(f".{kill}").write_bytes(output.read_bytes())
        codes.append(in_a_child(partial(run, folder, str(number), 0)))
        found.append(codes)
    return found


if __name__ == "__main__":
    os.fsync = lambda file: None  # slow, and of no use without a power failure
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
