"""The sweep of the compiled pass beside the ops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import sweep
from benchmarks.sweep import measure_cases, summarize


def test_a_case_is_measured_in_both_passes(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba", reason="the compiled kernels need Numba (pip install '.[fast]')")
    monkeypatch.setattr(sweep, "PAUSE", 0.0)
    cases = [[1, 5, 0], [3, 1, 4]]
    records = list(measure_cases(str(folder("124M")), 1, 3, cases))
    assert [record["case"] for record in records] == cases
    for record in records:
        assert [len(record[name]) for name in ("compiled", "ops")] == [2, 2]
        assert min(record["compiled"] + record["ops"]) > 0


@pytest.mark.parametrize(("ops", "slower"), [(1.5, True), (1.95, False), (3.0, False)])
def test_slower_is_more_than_the_spread(ops: float, slower: bool) -> None:
    record = {"compiled": [1.9, 2.0, 2.1], "ops": [ops - 0.1, ops, ops + 0.1]}
    assert summarize(record)["slower"] == slower
