"""Aligned arrays, and pools of them."""

from __future__ import annotations

import gc
import threading
import weakref
from itertools import pairwise

import numpy as np
import pytest

from gptx.backends.cpu.memory import (
    CACHE_LINE_BYTES,
    KEPT_PASSES,
    MIN_RECYCLED_BYTES,
    POOL_CHUNK_BYTES,
    Pool,
    Recycler,
    allocate_aligned,
)

SHAPES = [(3,), (5, 7), (1,), (1000, 33), (2, 3, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint32])
def test_arrays_begin_at_a_cache_line(shape: tuple[int, ...], dtype: type) -> None:
    pool = Pool()
    arrays = allocate_aligned(shape, dtype), pool.allocate((1,), dtype), pool.allocate(shape, dtype)
    for array in arrays:
        assert array.ctypes.data % CACHE_LINE_BYTES == 0
        assert array.dtype == dtype
    assert pool.allocate(shape, dtype).shape == shape
    assert not allocate_aligned(shape, dtype, np.zeros).any()


def test_arrays_that_several_threads_allocate_do_not_overlap() -> None:
    pool = Pool()
    arrays: list[np.ndarray] = []

    def allocate() -> None:
        for n in range(1, 200):
            arrays.append(pool.allocate((n,), np.uint8))

    threads = [threading.Thread(target=allocate) for _ in range(4)]
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


def test_small_arrays_share_a_chunk_and_large_ones_have_separate_chunks() -> None:
    pool = Pool()
    a, b = pool.allocate((10,), np.float32), pool.allocate((10,), np.float32)
    assert base_of(a) is base_of(b)
    assert base_of(a).nbytes >= POOL_CHUNK_BYTES
    large = pool.allocate((POOL_CHUNK_BYTES,), np.uint8)
    assert base_of(large) is not base_of(a)
    assert base_of(pool.allocate((10,), np.float32)) is base_of(a), (
        "a chunk is filled before the next"
    )


def test_a_large_array_is_freed() -> None:
    pool = Pool()
    large = pool.allocate((POOL_CHUNK_BYTES,), np.uint8)
    freed = weakref.ref(base_of(large))
    del large
    gc.collect()
    assert freed() is None


def test_a_full_chunk_is_freed_with_the_last_of_its_arrays() -> None:
    pool = Pool()
    first = pool.allocate((POOL_CHUNK_BYTES // 2,), np.uint8)
    freed = weakref.ref(base_of(first))
    second = pool.allocate((POOL_CHUNK_BYTES - 1024,), np.uint8)  # does not fit: a new chunk
    assert base_of(second) is not base_of(first)
    del first
    gc.collect()
    assert freed() is None


LARGE = (MIN_RECYCLED_BYTES // 16, 4)  # float32


def test_memory_is_used_again_when_the_last_view_is_gone() -> None:
    recycler = Recycler()
    array = recycler.allocate(LARGE, np.float32)
    assert (array.shape, array.dtype, array.flags.writeable) == (LARGE, np.float32, True)
    address = array.ctypes.data
    assert address % CACHE_LINE_BYTES == 0
    view = array.reshape(-1)[5:].view(np.int32)
    del array
    other = recycler.allocate(LARGE, np.float32)
    assert other.ctypes.data != address
    del view
    again = recycler.allocate((MIN_RECYCLED_BYTES // 8,), np.float64)  # as many bytes
    assert again.ctypes.data == address
    assert not np.shares_memory(again, other)


def test_small_arrays_are_not_recycled() -> None:
    array = Recycler().allocate((3, 2), np.float32)
    assert (array.shape, array.dtype, array.base) == ((3, 2), np.float32, None)


def test_memory_that_the_latest_passes_have_not_used_is_freed() -> None:
    recycler = Recycler()
    recycler.allocate(LARGE, np.float32)
    (memory,) = (weakref.ref(kept.array) for free in recycler._free.values() for kept in free)
    for _ in range(KEPT_PASSES):
        recycler.next_pass()
        assert memory() is not None
    array = recycler.allocate((2, *LARGE), np.float32)
    recycler.next_pass()
    assert memory() is None
    assert not recycler._free  # no empty rows of sizes that do not come again
    address = array.ctypes.data
    del array
    assert recycler.allocate((2, *LARGE), np.float32).ctypes.data == address


def test_arrays_outlive_their_recycler() -> None:
    array = Recycler().allocate(LARGE, np.float32)
    array[...] = 7
    gc.collect()
    assert (array == 7).all()
