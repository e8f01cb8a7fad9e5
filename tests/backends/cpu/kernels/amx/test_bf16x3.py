"""bf16x3 on AMX: packing, products and attention."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba", reason="the compiled kernels need Numba (pip install '.[fast]')")

from gptx.backends.cpu.interface.cpu_features import amx_is_allowed
from gptx.backends.cpu.interface.sizes import PANEL_OUTPUTS, TILE_ROWS, amx_workspace_size
from gptx.backends.cpu.kernels.amx import attention, bf16x3
from gptx.backends.cpu.kernels.amx.tile_unit import configure_tiles, release_tiles
from gptx.backends.cpu.kernels.arguments import AttentionTask, Matrix
from tests.support.kernels import cached

pack_row, pack_panel = cached(bf16x3.pack_row), cached(bf16x3.pack_panel)
transpose_square = cached(attention.transpose_square)

needs_amx = pytest.mark.skipif(
    not amx_is_allowed(), reason="this processor has no AMX, or the system does not permit it"
)


def unpack(words: np.ndarray) -> np.ndarray:
    """Return the inputs of words [..., 16], float64 [..., 32]: lower halves, then upper ones."""
    halves = words[..., None] << np.uint32(16), words[..., None] & np.uint32(0xFFFF0000)
    low, high = (half[..., 0].view(np.float32) for half in halves)
    return np.concatenate([low, high], axis=-1).astype(np.float64)


def pack_rows(rows: np.ndarray) -> np.ndarray:
    """Return the words of `pack_row` for rows [R, I], in an array that was NaN before."""
    count, n_in = rows.shape
    words = np.full(-(-count // TILE_ROWS) * bf16x3.ROWS_WORDS * n_in, 0x7FC00000, np.uint32)
    for n, row in enumerate(rows):
        pack_row(row, n_in, words, n)
    return words


@pytest.mark.parametrize("magnitude", [1e-25, 1.0, 1e35])
def test_the_parts_of_a_row_add_up_to_it(magnitude: float, random: np.random.Generator) -> None:
    rows = (random.standard_normal((21, 96)) * magnitude).astype(np.float32)
    tiles = pack_rows(rows).reshape(2, 3, bf16x3.N_PARTS, TILE_ROWS, 16)
    found = unpack(tiles).sum(axis=2)  # [2, 3, 16, 32]
    found = found.swapaxes(1, 2).reshape(32, 96)[:21]
    np.testing.assert_array_equal(found.astype(np.float32), rows)


def test_the_parts_of_a_panel_add_up_to_it(random: np.random.Generator) -> None:
    w = random.standard_normal((64, 100)).astype(np.float32)
    words = np.zeros(64 * bf16x3.PANEL_WORDS, np.uint32)
    pack_panel(w.reshape(-1), 7, 100, 64, words, 0)
    tiles = words.reshape(2, bf16x3.N_PARTS, 4, 16, 16).transpose(0, 1, 2, 4, 3)
    found = unpack(tiles).sum(axis=1)  # [2, 4, 16 columns, 32]
    found = found.transpose(0, 3, 1, 2).reshape(64, 64)
    np.testing.assert_array_equal(found.astype(np.float32), w[:, 7 : 7 + PANEL_OUTPUTS])


@cached
def product(x: np.ndarray, w: np.ndarray, depth: int, y: np.ndarray, overwrite: bool) -> None:
    workspace = np.zeros(16, np.float32)
    configure_tiles(workspace)
    bf16x3.multiply(x, 0, w, 0, depth, Matrix(y, 8, 80, 1), overwrite)
    release_tiles()


def multiply(rows: np.ndarray, w: np.ndarray, y: np.ndarray, overwrite: bool) -> None:
    depth = len(w)
    words = np.zeros(depth * bf16x3.PANEL_WORDS, np.uint32)
    pack_panel(w.reshape(-1), 0, PANEL_OUTPUTS, depth, words, 0)
    product(pack_rows(rows), words, depth, y.reshape(-1), overwrite)


@needs_amx
@pytest.mark.parametrize("depth", [32, 96, 1600])
def test_products(depth: int, random: np.random.Generator) -> None:
    """Products are as exact as in float32 in any order; written to y, or added to y."""
    rows = random.standard_normal((TILE_ROWS, depth)).astype(np.float32)
    w = random.standard_normal((depth, PANEL_OUTPUTS)).astype(np.float32)
    expected = rows.astype(np.float64) @ w.astype(np.float64)
    magnitude = np.abs(rows).astype(np.float64) @ np.abs(w).astype(np.float64)
    y = np.full((TILE_ROWS, 80), 7, np.float32)
    multiply(rows, w, y, True)
    assert np.max(np.abs(y[:, 8:72] - expected) / magnitude) < 5e-7
    assert (np.delete(y, np.arange(8, 72), axis=1) == 7).all()
    multiply(rows, w, y, False)
    assert np.max(np.abs(y[:, 8:72] - 2 * expected) / magnitude) < 1e-6


@needs_amx
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_number_affects_its_row_or_column(bad: float) -> None:
    rows, w = np.ones((TILE_ROWS, 32), np.float32), np.ones((32, PANEL_OUTPUTS), np.float32)
    rows[3, 7] = w[9, 5] = bad
    y = np.zeros((TILE_ROWS, 80), np.float32)
    multiply(rows, w, y, True)
    found = ~np.isfinite(y[:, 8:72])
    expected = np.zeros((TILE_ROWS, PANEL_OUTPUTS), bool)
    expected[3], expected[:, 5] = True, True
    np.testing.assert_array_equal(found, expected)


def test_transpose_square(random: np.random.Generator) -> None:
    x = random.standard_normal((PANEL_OUTPUTS, PANEL_OUTPUTS)).astype(np.float32)
    found = x.copy()
    transpose_square(found.reshape(-1))
    np.testing.assert_array_equal(found, x.T)


@cached
def attend(task: AttentionTask) -> None:
    """Compute the second of two heads; the cache has only its keys and values."""
    count = len(task.positions)
    length = attention.pack_head(task, 0, task.positions.max() + 1)
    for first in range(0, count, TILE_ROWS):
        attention.prompt_attention(task, 1, length, first, min(TILE_ROWS, count - first))


@needs_amx
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(("count", "before"), [(1, 0), (16, 0), (37, 0), (20, 100), (130, 1)])
def test_attention(
    count: int, before: int, D: int, half: bool, random: np.random.Generator
) -> None:
    """NaN behind the last key and in the workspace have no effect; the other head stays."""
    n_keys, scale = before + count, np.float32(D**-0.5)
    x = random.standard_normal((count, 6 * D)).astype(np.float32)
    positions = np.arange(before, n_keys)
    keys, values = (
        np.full((n_keys + 9, D), np.nan, np.float16 if half else np.float32) for _ in range(2)
    )
    keys[:n_keys], values[:n_keys] = random.standard_normal((2, n_keys, D))
    y = np.full((count, 2 * D), 7, np.float32)
    workspace = np.full(amx_workspace_size(D, n_keys + 9), np.nan, np.float32)
    flat = [part.reshape(-1) for part in (keys, values)]
    if half:
        flat = [part.view(np.uint16) for part in flat]
    attend(
        AttentionTask(
            x=x.reshape(-1), x_width=6 * D, y=y.reshape(-1), y_width=2 * D, positions=positions,
            first_rows=np.array([0, count]), slots=np.zeros(1, np.int64), keys=flat[0],
            values=flat[1], rows=count, B=1, H=2, D=D, capacity=n_keys + 9, scale=scale,
            workspace=workspace,
        )
    )  # fmt: skip
    k, v = keys[:n_keys].astype(np.float64), values[:n_keys].astype(np.float64)
    scores = x[:, D : 2 * D].astype(np.float64) @ k.T * scale
    scores[np.arange(n_keys) > positions[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    expected = weights @ v / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(y[:, D:], expected, rtol=0, atol=3e-6)
    assert (y[:, :D] == 7).all()
