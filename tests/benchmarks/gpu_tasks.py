"""Tasks that fail, for the tests of the GPU benchmark's run."""

import time
from collections.abc import Iterator
from typing import Any

RATE = {"section": "rates", "name": "read", "value": 1.0}


def fail(until: float) -> Iterator[dict[str, Any]]:
    yield RATE
    raise ValueError("a bug")


def hang(until: float) -> Iterator[dict[str, Any]]:
    yield RATE
    time.sleep(1000)


def yield_wrong_check(until: float) -> Iterator[dict[str, Any]]:
    yield {"section": "checks", "group": "g", "check": "c", "error": 1.0, "limit": 0.1, "ok": False}
