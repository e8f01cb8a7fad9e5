"""Damaged files, seeded: what every reader of files is tried with.

A reader gets thousands of copies of a small valid file, each damaged in some way. It may read one
(many bits mean nothing), or raise a `GptxError` with exit code 65 and a message of one line. It may
do nothing else: no other exception, no hang, no memory beyond what the file's own size explains.
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

from gptx.errors import GptxError

# How many copies of each file; all of them take minutes.
ALL = 5000
COPIES = int(os.environ.get("GPTX_FUZZ", "200"))
SECONDS = 10  # for one copy: a hang
SLACK = 4 * 2**20  # bytes that a reader may take whatever the size of the file

Mutation = Callable[[bytes, random.Random], bytes]

EXTREMES = [0, 1, 2, 3, 7, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]
EXTREMES += [2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 4, 32])):
        out[_place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(out)


def set_bytes(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    first = _place(data, rng)
    for i in range(first, min(len(out), first + rng.choice([1, 2, 4, 8, 64]))):
        out[i] = rng.choice([0, 255, rng.randrange(256)])
    return bytes(out)


def set_integer(data: bytes, rng: random.Random) -> bytes:
    """An extreme number where one may be read: a length, a count, an offset."""
    size = rng.choice([1, 2, 4, 8])
    first = _place(data, rng) // size * size
    number = rng.choice(EXTREMES) % 2 ** (8 * size)
    order = rng.choice(["little", "little", "big"])
    return data[:first] + number.to_bytes(size, order) + data[first + size :]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: _place(data, rng)]


def take_out(data: bytes, rng: random.Random) -> bytes:
    first = _place(data, rng)
    return data[:first] + data[first + rng.choice([1, 2, 4, 8, 100]) :]


def put_in(data: bytes, rng: random.Random) -> bytes:
    first = _place(data, rng)
    return data[:first] + rng.randbytes(rng.choice([1, 2, 4, 8, 100])) + data[first:]


def repeat(data: bytes, rng: random.Random) -> bytes:
    first = _place(data, rng)
    piece = data[first : first + rng.choice([1, 4, 16, 256])]
    return data[:first] + piece * rng.choice([2, 2, 3, 50]) + data[first + len(piece) :]


MUTATIONS: list[Mutation] = [flip_bits, set_bytes, set_integer, cut, take_out, put_in, repeat]


def _place(data: bytes, rng: random.Random) -> int:
    """Anywhere, but half of the time near an end, where headers and indexes are."""
    last = max(1, len(data))
    near = min(last, 512)
    kind = rng.randrange(4)
    if kind == 0:
        return rng.randrange(near)
    return last - 1 - rng.randrange(near) if kind == 1 else rng.randrange(last)


def fuzz(
    file: Path,
    use: Callable[[], object],
    *,
    seed: int = 0,
    mutations: list[Mutation] | None = None,
    copies: int = COPIES,
) -> int:
    """Damage `file` in place again and again, calling `use` each time; it is whole at the end.

    Parameters
    ----------
    use
        Opens the model that the file is part of and reads all that is in it.
    mutations
        Those that know the format, beside `MUTATIONS`.

    Returns
    -------
    int
        How many copies were refused. A test that wants to be sure that it tries something asserts
        that they were not few.
    """
    data = file.read_bytes()
    rng = random.Random(seed)
    kinds = MUTATIONS + 2 * (mutations or [])
    refused = 0
    use()  # once whole: imports and caches count for no copy
    tracemalloc.start()
    try:
        for copy in range(copies):
            damaged = rng.choice(kinds)(data, rng)
            file.write_bytes(damaged)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            refused += not accepted(use, f"copy {copy} of seed {seed}")
            taken = tracemalloc.get_traced_memory()[1] - before
            assert taken <= 4 * len(damaged) + SLACK, f"copy {copy} took {taken} bytes"
    finally:
        tracemalloc.stop()
        file.write_bytes(data)
    return refused


def refuse_every_prefix(file: Path, use: Callable[[], object], *, step: int = 1) -> None:
    """Cut `file` at each length (each `step`-th, or at all if all copies of `fuzz` are tried): none
    may be read, each is refused in one line."""
    data = file.read_bytes()
    step = 1 if COPIES >= ALL else step
    try:
        for length in range(0, len(data), step):
            file.write_bytes(data[:length])
            assert not accepted(use, f"the first {length} of {len(data)} bytes"), (
                f"{length} of {len(data)} bytes were read as if they were all"
            )
    finally:
        file.write_bytes(data)


def accepted(use: Callable[[], object], what: str) -> bool:
    """Whether a damaged file was read; False if it was refused as it should be."""
    try:
        with _alarm(what):
            use()
            return True
    except GptxError as error:
        code, message = error.exit_code, str(error)
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__} came out: {error}") from error
    assert code == 65, f"{what}: exit code {code} ({message})"
    assert message, f"{what}: refused without a word"
    assert "\n" not in message, f"{what}: {message}"
    assert len(message) < 2000, f"{what}: {message[:2000]}"
    return False


@contextmanager
def _alarm(what: str) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"{what} took more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
