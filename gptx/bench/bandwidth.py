"""How fast memory can be read: the limit of a decode step, which uses each weight once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from gptx.backends import Backend, get_backend
from gptx.bench.machine import largest_cache
from gptx.bench.process import Events

WIDTH = 1024
ROUNDS = 7
SMALLEST = 256_000_000  # bytes; more than the caches of an ordinary processor
LARGEST = 2_000_000_000  # and what a GPU takes half a millisecond for


def measure(backend: str, threads: int | None) -> Events:
    """Yield `bandwidth` in bytes per second: the median of several readings."""
    made = get_backend(backend, threads=threads)
    n_bytes = min(max(SMALLEST, 2 * largest_cache()), LARGEST)
    yield {"bandwidth": read(made, LARGEST if made.device_name() else n_bytes)}


def read(backend: Backend, n_bytes: int) -> float:
    """Read so many bytes with the library's own ops; bytes per second.

    A matrix times a vector and the sums of a matrix are hardly any arithmetic; the one that the
    library does fastest counts. With BLAS that is the product, on as many threads as the backend
    has. The matrix is much larger than the caches: a model that is not may be read faster. What it
    takes to start a computation on a device and to get a number back does not count.
    """
    xp = backend.xp
    with backend.scope():
        vector = xp.ones((WIDTH,), dtype=xp.float32)
        matrix = xp.ones((n_bytes // (4 * WIDTH), WIDTH), dtype=xp.float32)
        ways = (
            partial(xp.matmul, matrix, vector),
            partial(xp.sum, matrix, axis=-1),
            lambda: xp.reshape(xp.sum(matrix), (1,)),
        )
        seconds = min(_seconds(backend, way) for way in ways)
        start = _seconds(backend, partial(xp.matmul, matrix[:1, :], vector))
    return 4 * WIDTH * matrix.shape[0] / max(seconds - start, seconds / 2)


def _seconds(backend: Backend, way: Callable[[], Any]) -> float:
    times = []
    for _ in range(ROUNDS + 1):
        backend.synchronize()
        start = time.perf_counter()
        backend.to_numpy(way()[:1])  # a lazy library computes when it is asked for a number
        backend.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
