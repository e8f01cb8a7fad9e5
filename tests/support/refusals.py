"""Expecting a refusal: its class or its exit code, and one line that says why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gptx.errors import GptxError
from tests.support.cli import run


def short(value: object) -> str:
    """The id of a test."""
    return repr(value)[:40].replace("\n", "")


@contextmanager
def refused(kind: type[GptxError], *parts: str) -> Iterator[None]:
    """Expect exactly this class, in one line that has each of `parts`."""
    with pytest.raises(GptxError) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in message
    for part in parts:
        assert part in message


def command(*args: str, code: int, says: str, stdin: bytes = b"") -> None:
    """Expect `gptx generate` to end with `code`, its last line to say why, and no output."""
    done = run("generate", "-m", "shakespeare", *args, stdin=stdin)
    assert (done.code, done.out) == (code, "")
    last = done.err.splitlines()[-1]
    assert last.startswith("Error: ")
    assert says in last
    if not done.err.startswith("Usage: "):
        assert done.err.count("\n") == 1
