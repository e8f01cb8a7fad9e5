"""Floats cut into bfloat16, and what Intel's matrix unit makes of them: products and attention."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba", reason="the compiled kernels need Numba (pip install 'gptx[fast]')")

from numba import njit

from gptx.backends.cpu.kernels.amx import attention as amx_attend
from gptx.backends.cpu.kernels.amx import bf16x3 as amx_floats
from gptx.backends.cpu.kernels.amx import tile_unit as amx
from gptx.backends.cpu.kernels.amx.tile_unit import ROWS
from gptx.backends.cpu.kernels.gemm import TILE

unit = pytest.mark.skipif(
    not amx.allowed(), reason="this processor has no AMX, or the system does not lend it"
)


def parts(words: np.ndarray) -> np.ndarray:
    """The inputs that words [..., 16] hold, float64 [..., 32]: lower halves, then upper ones."""
    halves = words[..., None] << np.uint32(16), words[..., None] & np.uint32(0xFFFF0000)
    low, high = (half[..., 0].view(np.float32) for half in halves)
    return np.concatenate([low, high], axis=-1).astype(np.float64)


def cut(rows: np.ndarray) -> np.ndarray:
    """What `cut_row` makes of rows [R, I]; what was there before does not matter."""
    count, n_in = rows.shape
    words = np.full(-(-count // ROWS) * amx_floats.ROWS_SIZE * n_in, 0x7FC00000, np.uint32)
    for n, row in enumerate(rows):
        amx_floats.cut_row(row, n_in, words, n)
    return words


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e35])
def test_the_parts_of_a_row_add_up_to_it(size: float, random: np.random.Generator) -> None:
    rows = (random.standard_normal((21, 96)) * size).astype(np.float32)
    tiles = cut(rows).reshape(2, 3, amx_floats.PARTS, ROWS, 16)
    found = parts(tiles).sum(axis=2)  # [2, 3, 16, 32]
    found = found.swapaxes(1, 2).reshape(32, 96)[:21]
    np.testing.assert_array_equal(found.astype(np.float32), rows)


def test_the_parts_of_a_panel_add_up_to_it(random: np.random.Generator) -> None:
    w = random.standard_normal((64, 100)).astype(np.float32)
    words = np.zeros(64 * amx_floats.PANEL_SIZE, np.uint32)
    amx_floats.cut_panel(w.reshape(-1), 7, 100, 64, words, 0)
    tiles = words.reshape(2, amx_floats.PARTS, 4, 16, 16).transpose(0, 1, 2, 4, 3)
    found = parts(tiles).sum(axis=1)  # [2, 4, 16 columns, 32]
    found = found.transpose(0, 3, 1, 2).reshape(64, 64)
    np.testing.assert_array_equal(found.astype(np.float32), w[:, 7 : 7 + TILE])


@njit
def product(x: np.ndarray, w: np.ndarray, depth: int, y: np.ndarray, fresh: bool) -> None:
    room = np.zeros(16, np.float32)
    amx.set_up(room)
    amx_floats.multiply(x, 0, w, 0, depth, y, 8, 80, fresh)
    amx.release()


def multiply(rows: np.ndarray, w: np.ndarray, y: np.ndarray, fresh: bool) -> None:
    depth = len(w)
    words = np.zeros(depth * amx_floats.PANEL_SIZE, np.uint32)
    amx_floats.cut_panel(w.reshape(-1), 0, TILE, depth, words, 0)
    product(cut(rows), words, depth, y.reshape(-1), fresh)


@unit
@pytest.mark.parametrize("depth", [32, 96, 1600])
def test_products(depth: int, random: np.random.Generator) -> None:
    """As exact as those of float32 in any order; written, or added to what is there."""
    rows = random.standard_normal((ROWS, depth)).astype(np.float32)
    w = random.standard_normal((depth, TILE)).astype(np.float32)
    wanted = rows.astype(np.float64) @ w.astype(np.float64)
    size = np.abs(rows).astype(np.float64) @ np.abs(w).astype(np.float64)
    y = np.full((ROWS, 80), 7, np.float32)
    multiply(rows, w, y, True)
    assert np.max(np.abs(y[:, 8:72] - wanted) / size) < 5e-7
    assert (np.delete(y, np.arange(8, 72), axis=1) == 7).all()
    multiply(rows, w, y, False)
    assert np.max(np.abs(y[:, 8:72] - 2 * wanted) / size) < 1e-6


@unit
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_shows_in_its_row_or_column(bad: float) -> None:
    rows, w = np.ones((ROWS, 32), np.float32), np.ones((32, TILE), np.float32)
    rows[3, 7] = w[9, 5] = bad
    y = np.zeros((ROWS, 80), np.float32)
    multiply(rows, w, y, True)
    found = ~np.isfinite(y[:, 8:72])
    wanted = np.zeros((ROWS, TILE), bool)
    wanted[3], wanted[:, 5] = True, True
    np.testing.assert_array_equal(found, wanted)


@njit
def transposed(x: np.ndarray) -> None:
    amx_attend.transpose_square(x)


def test_a_square_is_transposed(random: np.random.Generator) -> None:
    x = random.standard_normal((TILE, TILE)).astype(np.float32)
    found = x.copy()
    transposed(found.reshape(-1))
    np.testing.assert_array_equal(found, x.T)


@njit
def attend(
    x: np.ndarray, count: int, D: int, index: np.ndarray, keys: np.ndarray, values: np.ndarray,
    scale: float, y: np.ndarray, work: np.ndarray,
) -> None:  # fmt: skip
    """Heads of two, of which the second is asked for."""
    length = amx_attend.cut_head(keys, values, 0, D, index.max() + 1, work)
    for first in range(0, count, ROWS):
        n = min(ROWS, count - first)
        amx_attend.attend_16(x, 6 * D, first, n, 1, D, index, length, scale, y, 2 * D, work)


@unit
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(("count", "before"), [(1, 0), (16, 0), (37, 0), (20, 100), (130, 1)])
def test_attention(
    count: int, before: int, D: int, half: bool, random: np.random.Generator
) -> None:
    """What lies behind the last key does not matter, nor what is in the room; other heads stay."""
    seen, scale = before + count, np.float32(D**-0.5)
    x = random.standard_normal((count, 6 * D)).astype(np.float32)
    index = np.arange(before, seen)
    keys, values = (
        np.full((seen + 9, D), np.nan, np.float16 if half else np.float32) for _ in range(2)
    )
    keys[:seen], values[:seen] = random.standard_normal((2, seen, D))
    y = np.full((count, 2 * D), 7, np.float32)
    work = np.full(amx_attend.room_for(D, seen + 9), np.nan, np.float32)
    flat = [part.reshape(-1) for part in (keys, values)]
    if half:
        flat = [part.view(np.uint16) for part in flat]
    attend(x.reshape(-1), count, D, index, *flat, scale, y.reshape(-1), work)
    k, v = keys[:seen].astype(np.float64), values[:seen].astype(np.float64)
    scores = x[:, D : 2 * D].astype(np.float64) @ k.T * scale
    scores[np.arange(seen) > index[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    wanted = weights @ v / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(y[:, D:], wanted, rtol=0, atol=3e-6)
    assert (y[:, :D] == 7).all()
