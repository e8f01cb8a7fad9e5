"""Damaged files, with seeds, for the tests of every reader.

A reader gets many copies of a small valid file, each damaged in some way. It may read a copy, since
many bits have no effect, or raise a `GptxError` with exit code 65 and a message of one line. Any
other exception, a hang, or memory beyond a bound from the file's size is a failure.

The default run tries `SMOKE_COPIES` copies a test; `pytest -m fuzz` tries `ALL_COPIES`. The
environment variable GPTX_FUZZ sets that number.
"""

from __future__ import annotations

import os
import random
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from gptx.errors import GptxError

SMOKE_COPIES = 20
ALL_COPIES = int(os.environ.get("GPTX_FUZZ", "200"))
EVERY_PREFIX_COPIES = 5000  # with so many copies, the steps between prefixes are 1
MAX_SECONDS = 10  # for one copy: a longer time is a hang
SLACK_BYTES = 4 * 2**20  # of memory that a reader may use for a file of any size

# Runs a test with few copies by default, and with all under the marker `fuzz`.
damaged_copies = pytest.mark.parametrize(
    "copies", [SMOKE_COPIES, pytest.param(ALL_COPIES, marks=pytest.mark.fuzz)]
)

Mutation = Callable[[bytes, random.Random], bytes]

EXTREMES = [0, 1, 2, 3, 7, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]
EXTREMES += [2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 4, 32])):
        out[_position(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(out)


def set_bytes(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    first = _position(data, rng)
    for i in range(first, min(len(out), first + rng.choice([1, 2, 4, 8, 64]))):
        out[i] = rng.choice([0, 255, rng.randrange(256)])
    return bytes(out)


def set_integer(data: bytes, rng: random.Random) -> bytes:
    """Write an extreme number at an aligned position: a length, a count or an offset."""
    size = rng.choice([1, 2, 4, 8])
    first = _position(data, rng) // size * size
    number = rng.choice(EXTREMES) % 2 ** (8 * size)
    order = rng.choice(["little", "little", "big"])
    return data[:first] + number.to_bytes(size, order) + data[first + size :]


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: _position(data, rng)]


def remove(data: bytes, rng: random.Random) -> bytes:
    first = _position(data, rng)
    return data[:first] + data[first + rng.choice([1, 2, 4, 8, 100]) :]


def insert(data: bytes, rng: random.Random) -> bytes:
    first = _position(data, rng)
    return data[:first] + rng.randbytes(rng.choice([1, 2, 4, 8, 100])) + data[first:]


def repeat(data: bytes, rng: random.Random) -> bytes:
    first = _position(data, rng)
    part = data[first : first + rng.choice([1, 4, 16, 256])]
    return data[:first] + part * rng.choice([2, 2, 3, 50]) + data[first + len(part) :]


MUTATIONS: list[Mutation] = [flip_bits, set_bytes, set_integer, truncate, remove, insert, repeat]


def _position(data: bytes, rng: random.Random) -> int:
    """Draw a position, half of the time near an end, where headers and indexes are."""
    size = max(1, len(data))
    near = min(size, 512)
    kind = rng.randrange(4)
    if kind == 0:
        return rng.randrange(near)
    return size - 1 - rng.randrange(near) if kind == 1 else rng.randrange(size)


def fuzz(
    file: Path,
    use: Callable[[], object],
    *,
    copies: int,
    seed: int = 0,
    mutations: list[Mutation] | None = None,
) -> int:
    """Damage `file` in place many times and call `use` each time; restore the file at the end.

    Parameters
    ----------
    use
        Function that opens the model of the file and reads all of it.
    mutations
        Mutations for this format, in addition to `MUTATIONS`.

    Returns
    -------
    int
        Number of copies that `use` refused. A test asserts a minimum, so that it cannot pass
        without any effect of the damage.
    """
    data = file.read_bytes()
    rng = random.Random(seed)
    kinds = MUTATIONS + 2 * (mutations or [])
    refused = 0
    use()  # imports and caches are not part of a copy's memory
    tracemalloc.start()
    try:
        for copy in range(copies):
            damaged = rng.choice(kinds)(data, rng)
            file.write_bytes(damaged)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            refused += not accepted(use, f"copy {copy} of seed {seed}")
            used = tracemalloc.get_traced_memory()[1] - before
            assert used <= 4 * len(damaged) + SLACK_BYTES, f"copy {copy} used {used} bytes"
    finally:
        tracemalloc.stop()
        file.write_bytes(data)
    return refused


def refuse_every_prefix(
    file: Path, use: Callable[[], object], *, copies: int = ALL_COPIES, step: int = 1
) -> None:
    """Truncate `file` at many lengths; assert that `use` refuses each.

    Parameters
    ----------
    copies
        `SMOKE_COPIES`: so many prefixes, evenly spaced, and the first and last ones. More: all.
    step
        Distance between two lengths; 1 if `copies` is at least `EVERY_PREFIX_COPIES`.
    """
    data = file.read_bytes()
    step = 1 if copies >= EVERY_PREFIX_COPIES else step
    if copies <= SMOKE_COPIES:
        step = max(step, len(data) // copies)
    lengths = {*range(0, len(data), step), 1, 8, len(data) - 1}
    try:
        for length in sorted(lengths & set(range(len(data)))):
            file.write_bytes(data[:length])
            assert not accepted(use, f"the first {length} of {len(data)} bytes"), (
                f"a prefix of {length} of {len(data)} bytes was read without an error"
            )
    finally:
        file.write_bytes(data)


def accepted(use: Callable[[], object], label: str) -> bool:
    """Return True if `use` reads a damaged file, False if it refuses the file correctly."""
    try:
        with _time_limit(label):
            use()
            return True
    except GptxError as error:
        code, message = error.exit_code, str(error)
    except BaseException as error:
        raise AssertionError(f"{label}: raised {type(error).__name__}: {error}") from error
    assert code == 65, f"{label}: exit code {code} ({message})"
    assert message, f"{label}: the error has no message"
    assert "\n" not in message, f"{label}: {message}"
    assert len(message) < 2000, f"{label}: {message[:2000]}"
    return False


@contextmanager
def _time_limit(label: str) -> Iterator[None]:
    def on_alarm(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"{label} took more than {MAX_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
