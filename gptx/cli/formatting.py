"""Output of more than one command: JSON, sizes in bytes, a bar."""

from __future__ import annotations

import codecs
import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click


def format_size(n_bytes: float) -> str:
    """Return a number of bytes with its unit: "497.8 MB"."""
    if n_bytes < 1000:
        return f"{n_bytes:.0f} bytes"
    for unit in ("kB", "MB"):
        n_bytes /= 1000
        if n_bytes < 1000:
            return f"{n_bytes:.1f} {unit}"
    return f"{n_bytes / 1000:.1f} GB"


def print_json(value: Any) -> None:
    """Print a value as one line of JSON.

    If the encoding of standard output is not UTF-8, other characters than ASCII are escaped. NaN
    and infinities, which JSON does not have, are null.
    """
    escape = not is_utf8(sys.stdout)
    click.echo(json.dumps(_finite(value), ensure_ascii=escape, allow_nan=False))


def is_utf8(stream: Any) -> bool:
    """Return True for a text stream that encodes its text in UTF-8."""
    try:
        return codecs.lookup(stream.encoding).name == "utf-8"
    except (AttributeError, TypeError, LookupError):  # no file, or an unknown encoding
        return False


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """Yield a function that updates a bar on standard error; None if that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    with click.progressbar(length=1, file=sys.stderr, item_show_func=lambda name: name) as bar:

        def show(name: str, done: int, total: int) -> None:
            bar.length = max(total, 1)
            bar.update(done - bar.pos, name)

        yield show
        bar.update((bar.length or 0) - bar.pos)
