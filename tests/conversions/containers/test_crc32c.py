"""gptx.conversions.containers.crc32c, against known checksums and the textbook's algorithm."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptx.conversions.containers.crc32c import CHUNK, P, Q, crc32c
from gptx.safetensors_file import BFLOAT16
from tests.support.files.tensor_bundle_bytes import slow_crc32c


def test_known_checksums() -> None:
    # RFC 3720, B.4, and the check value of the CRC catalogue
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(bytes([255] * 32)) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(b"") == 0


@given(st.binary(max_size=100))
def test_any_bytes(data: bytes) -> None:
    assert crc32c(data) == slow_crc32c(data)


@pytest.mark.parametrize("around", [8, Q[0], 8 * Q[0], 8 * (Q[0] - Q[1]), 8 * CHUNK])
def test_lengths_at_which_the_steps_change(around: int, random: np.random.Generator) -> None:
    data = random.bytes(around + 4)
    for length in (around - 1, around, around + 4):
        assert crc32c(data[:length]) == slow_crc32c(data[:length])


def test_arrays() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert crc32c(array) == crc32c(array.tobytes())
    assert crc32c(array.view("<u2").astype("<u2").view(BFLOAT16)) == crc32c(array)


def test_q_is_a_multiple_of_p() -> None:
    powers, power = [], 1 << 31
    for _ in range(Q[0] + 1):
        powers.append(power)
        power = power >> 1 ^ (P if power & 1 else 0)
    assert powers[Q[0]] ^ powers[Q[1]] ^ powers[Q[2]] ^ powers[Q[3]] == 0
