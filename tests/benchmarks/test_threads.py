"""Numbers of threads beside each other, and beside a busy process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import sweep, threads


def test_each_number_of_threads_is_measured_quiet_and_busy(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba", reason="the compiled kernels need Numba (pip install '.[fast]')")
    monkeypatch.setattr(sweep, "PAUSE", 0.0)
    monkeypatch.setattr(threads, "REPEATS", 1)
    monkeypatch.setattr(threads, "CASES", [(1, 1, 4), (1, 5, 0)])
    records = list(threads.measure_threads(str(folder("124M")), None, [1, 2], 2))
    assert [(r["case"], r["busy"], r["threads"]) for r in records] == [
        (case, busy, n) for case in threads.CASES for busy in (False, True) for n in (1, 2)
    ]
    assert all(len(r["seconds"]) == 2 and min(r["seconds"]) > 0 for r in records)


def test_ratios_are_to_the_fewest_threads_in_the_same_company() -> None:
    records = [
        {"case": [1, 1, 20], "busy": busy, "threads": n, "seconds": [s]}
        for busy, n, s in [(False, 2, 0.5), (False, 1, 1.0), (True, 2, 3.0), (True, 1, 2.0)]
    ]
    threads.add_ratios(records)
    assert [r["ratio"] for r in records] == [0.5, 1.0, 1.5, 1.0]
