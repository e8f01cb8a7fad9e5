"""Where the NumPy backend's arrays lie."""

from __future__ import annotations

import gc
import threading
import weakref
from itertools import pairwise

import numpy as np
import pytest

from gptx.backends.cpu.memory import CACHE_LINE, PIECE, Pool, aligned

SHAPES = [(3,), (5, 7), (1,), (1000, 33), (2, 3, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint32])
def test_arrays_begin_where_a_cache_line_does(shape: tuple[int, ...], dtype: type) -> None:
    pool = Pool()
    for array in (aligned(shape, dtype), pool.array((1,), dtype), pool.array(shape, dtype)):
        assert array.ctypes.data % CACHE_LINE == 0
        assert array.dtype == dtype
    assert pool.array(shape, dtype).shape == shape
    assert not aligned(shape, dtype, np.zeros).any()


def test_arrays_of_a_pool_do_not_overlap_whoever_asks() -> None:
    pool = Pool()
    arrays: list[np.ndarray] = []

    def take() -> None:
        for n in range(1, 200):
            arrays.append(pool.array((n,), np.uint8))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ranges = sorted((a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays)
    assert len(ranges) == 4 * 199
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))


def base_of(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def test_small_arrays_share_a_piece_and_large_ones_have_their_own() -> None:
    pool = Pool()
    a, b = pool.array((10,), np.float32), pool.array((10,), np.float32)
    assert base_of(a) is base_of(b)
    assert base_of(a).nbytes >= PIECE
    large = pool.array((PIECE,), np.uint8)
    assert base_of(large) is not base_of(a)
    assert base_of(pool.array((10,), np.float32)) is base_of(a), "the piece is used up first"


def test_what_is_large_goes_back_with_its_array() -> None:
    pool = Pool()
    large = pool.array((PIECE,), np.uint8)
    gone = weakref.ref(base_of(large))
    del large
    gc.collect()
    assert gone() is None


def test_a_full_piece_goes_back_with_the_last_of_its_arrays() -> None:
    pool = Pool()
    first = pool.array((PIECE // 2,), np.uint8)
    gone = weakref.ref(base_of(first))
    kept = pool.array((PIECE - 1024,), np.uint8)  # does not fit: a new piece
    assert base_of(kept) is not base_of(first)
    del first
    gc.collect()
    assert gone() is None
