"""Work in parts for threads: products on BLAS, rows and heads; and the memory of the results."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise, zip_longest
from typing import Any

import numpy as np

from gptx.backends.cpu.workers import WORKERS
from gptx.process import count_cores

Array = np.ndarray
Heads = tuple[slice, slice]  # some sequences, and some of their heads

MIN_PART_ELEMENTS = 2**15  # of a row function: a thread takes tens of microseconds to begin
MIN_PART_WORK = 2**20  # multiplications of a product
MIN_PART_ROWS = 256  # of a product: each part packs the whole right factor
COLUMN_MULTIPLE = 16  # of a thread's part of a product
ADDED_ROWS = 512  # of a product that is added to a matrix
PATTERN_BYTES = 2**22  # of the patterns that a thread computes at a time


class Parallel:
    """The threads and the memory of a backend.

    It keeps no state: a backend makes one whenever it needs one.

    Attributes
    ----------
    backend
        The NumPy backend.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    @property
    def n_threads(self) -> int:
        """Number of threads."""
        return self.backend.threads or count_cores()

    def allocate(self, shape: tuple[int, ...]) -> Array:
        """Return an array of the backend's dtype in recycled memory, with any contents."""
        return self.backend.recycler.allocate(shape, self.backend.float_dtype)

    def writable(self, x: Array) -> Array:
        """Return x, or a copy if it is read-only, not contiguous or of another type."""
        return np.require(x, self.backend.float_dtype, ["C", "W"])

    def multiply(
        self, a: Array, b: Array, out: Array, bias: Array | None = None, *, add: bool = False
    ) -> None:
        """Set `out` to a @ b + bias, or add it to `out`; a and b may be transposed."""
        threads = self.product_threads(out.size * a.shape[1])
        self.run_parts([self.split_product(a, b, out, threads, bias, add=add)])

    def run_parts(self, ops: list[list[Callable[[], None]]]) -> None:
        """Call all functions; the first one of each op on the same thread, and so on."""
        rounds = list(zip_longest(*ops))

        def run(i: int) -> None:
            for function in filter(None, rounds[i]):
                function()

        with self.backend.blas_threads(1):  # BLAS's own threads would spin between our parts
            self.run(run, len(rounds))

    def product_threads(self, multiplications: int) -> int:
        """Return the number of threads for a product."""
        if not self.backend.blas_libraries():  # Accelerate has its own threads
            return 1
        return max(1, min(self.n_threads, multiplications // MIN_PART_WORK))

    @staticmethod
    def split_product(
        a: Array, b: Array, out: Array, parts: int, bias: Array | None = None, *, add: bool = False
    ) -> list[Callable[[], None]]:
        """Return functions for a part each of `_multiply`."""
        by_column = out.shape[0] < parts * MIN_PART_ROWS
        ends = split_range(out.shape[1] if by_column else out.shape[0], parts)

        def multiply(own: slice) -> None:
            left, right = (a, b[:, own]) if by_column else (a[own], b)
            target = out[:, own] if by_column else out[own]
            if add:  # BLAS could add, but NumPy does not pass it on: the product is a temporary
                for first, last in split_blocks(len(left), ADDED_ROWS):
                    target[first:last] += left[first:last] @ right
            else:
                np.matmul(left, right, out=target)
            if bias is not None:
                target += bias[own] if by_column else bias

        return [partial(multiply, slice(*own)) for own in pairwise(ends)]

    def run(self, function: Callable[[int], None], parts: int) -> None:
        WORKERS.run(function, parts, self.n_threads)

    def run_rows(self, function: Callable[[int, int], None], rows: int, width: int) -> None:
        """Call function(first, last) on a share of the rows for each thread."""
        parts = max(1, min(self.n_threads, rows * width // MIN_PART_ELEMENTS))
        ends = split_range(rows, parts)
        self.run(lambda part: function(ends[part], ends[part + 1]), len(ends) - 1)

    def run_shares(self, function: Callable[[int, int], None], n: int) -> None:
        """Call function(first, last) on a share of range(n) for each thread."""
        parts = min(n, self.n_threads)
        self.run(lambda i: function(n * i // parts, n * (i + 1) // parts), parts)

    def run_heads(self, function: Callable[[Heads], None], B: int, H: int, T: int) -> None:
        """Call `function` on slices of the sequences and of the heads."""
        count = PATTERN_BYTES // (T * T * self.backend.float_dtype(0).itemsize)
        count = max(1, min(count, -(-B * H // self.n_threads)))
        b, h = max(1, count // H), min(count, H)
        parts = [(slice(i, i + b), slice(j, j + h)) for i in range(0, B, b) for j in range(0, H, h)]
        with self.backend.blas_threads(1):
            self.run(lambda part: function(parts[part]), len(parts))


def as_rows(x: Array) -> Array:
    """Return x [..., n] as rows [N, n]."""
    return x.reshape(-1, x.shape[-1])


def split_blocks(n: int, size: int) -> list[tuple[int, int]]:
    """Return the begin and end of blocks of range(n)."""
    return [(first, min(first + size, n)) for first in range(0, n, size)]


def split_range(n: int, parts: int) -> list[int]:
    """Return the begins of parts of range(n), and n; they are multiples of `COLUMN_MULTIPLE`."""
    size = math.ceil(n / parts / COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    return [*range(0, n, size), n]
