"""Random bits by Philox, in the array API: those of NumPy's generator."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from gptx.backends import Backend
from gptx.backends.philox import random_bits
from tests.support.models import EXACT


@pytest.mark.parametrize(
    ("key", "counter", "first_row", "n"),
    [
        ((5, 0), (3, 7), 11, 21),
        ((2**64 - 1, 9), (2**63, 1), 0, 4),
        ((0, 2**63), (0, 2**64 - 1), 2**64 - 3, 16),
        ((1, 2), (3, 4), 5, 1),
    ],
    ids=["two blocks", "large key", "largest numbers", "one element"],
)
def test_bits_are_those_of_numpys_philox(
    key: tuple[int, int], counter: tuple[int, int], first_row: int, n: int, library: Backend
) -> None:
    with library.scope():
        found = library.to_numpy(random_bits(library, key, counter, first_row, 3, n))
    assert found.shape == (3, n)
    for row in range(3):
        full = np.array([0, *counter, first_row + row], np.uint64)
        words = np.random.Philox(key=np.array(key, np.uint64), counter=full).random_raw(8)
        np.testing.assert_array_equal(found[row], words.view("<u2")[:n])


def test_no_more_blocks_than_needed() -> None:
    tracemalloc.start()
    bits = random_bits(EXACT, (1, 0), (0, 0), 0, 64, 256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * bits.nbytes
