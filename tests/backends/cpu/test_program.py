"""Products with float matrices, as programs of one instruction, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from gptx.backends.fusion import FusedOp

pytest.importorskip("numba", reason="the compiled kernels need Numba (pip install '.[fast]')")

from gptx.backends.cpu.program import Program, Shape


@pytest.mark.parametrize("is_head", [False, True])
@pytest.mark.parametrize(
    ("n_in", "n_out"),
    [
        (768, 450),
        (1600, 136),
        (3072, 72),
        (768, 65),
        (520, 130),
        (40, 63),
        (70, 64),
        (50, 16),
        (768, 8300),
        (7, 1),
    ],
    ids=lambda n: str(n),
)
def test_products_with_floats(
    n_in: int, n_out: int, is_head: bool, unit: str, random: np.random.Generator
) -> None:
    """One row in the memory of many, blocks of both heights, chunks; unaligned weights."""
    shape = (n_out, n_in) if is_head else (n_in, n_out)
    weight = np.empty(n_in * n_out * 4 + 8, np.uint8)[8:].view(np.float32).reshape(shape)
    weight[:] = random.standard_normal(shape)
    bias = None if is_head else random.standard_normal(n_out).astype(np.float32)
    exact = (weight.T if is_head else weight).astype(np.float64)
    x = random.standard_normal((270, n_in)).astype(np.float32)
    expected, magnitude = x @ exact, np.abs(x) @ np.abs(exact)
    if bias is not None:
        expected, magnitude = expected + bias, magnitude + np.abs(bias)
    op = FusedOp("linear", 0, 1, weight=weight, bias=bias, is_head=is_head)
    program = Program([op], inputs=[n_in])
    for threads in (1, 3):
        for rows in (270, 1, 2, 5, 8, 12, 19, 32, 33, 48, 64, 130):
            source, y = (np.full((272, width), np.nan, np.float32) for width in program.widths)
            source[:rows, :n_in] = x[:rows]
            program.run({0: source, 1: y}, Shape(rows), threads)
            error = np.abs(y[:rows, :n_out] - expected[:rows]) / magnitude[:rows]
            assert np.max(error) < 3e-6, (rows, threads)
