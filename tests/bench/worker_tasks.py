"""Tasks for the tests of workers; they import nothing that takes time."""

import os
import time
from collections.abc import Iterator
from typing import Any

from gptx.errors import WeightsError


def echo(n: int, **arguments: Any) -> Iterator[dict[str, Any]]:
    print("the output of a library")
    for i in range(n):
        yield {"i": i, **arguments}


def process_id() -> Iterator[dict[str, Any]]:
    yield {"pid": os.getpid()}


def fail(kind: str) -> Iterator[dict[str, Any]]:
    yield {"progress": "started"}
    if kind == "exit":
        os._exit(3)
    raise {"memory": MemoryError("4 GB"), "gptx": WeightsError("h.0 is damaged\u2026")}.get(
        kind, ZeroDivisionError("a bug")
    )


def run_forever() -> Iterator[dict[str, Any]]:
    yield {"pid": os.getpid()}
    time.sleep(1000)


def parameters(setup: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Load the model of a setup."""
    from gptx.bench.setups import Setup

    model = Setup(**setup).load()
    yield {"model": setup["model"], "parameters": model.config.n_parameters}
