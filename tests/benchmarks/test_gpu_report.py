"""The tables of the GPU benchmark."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.goals import Goal, goals_table
from benchmarks.gpu import report
from tests.support.bench import parse_table

SHAPE = {"size": "124M", "dtype": "bfloat16", "quantize": "", "batch": 1, "prompt": 16, "new": 5}


def make_record(engine: str, step: float, job: str = "a", **facts: Any) -> dict[str, Any]:
    times = {"first": [0.002, 0.001, 0.003], "first_device": 0.001, "step_p50": step,
             "step_p99": 2 * step, "step_device": step / 2, "rate": [1 / step], "memory": 3e8,
             "whole_rate": [0.9 / step], "compile_time": 20.0, "kernels": None,
             "weights_read": 2 * 10**8, "cache_read": 10**8, "prompt_flops": 10**11}  # fmt: skip
    return {"section": "times", "job": job, "engine": engine, **SHAPE, **times, **facts}


def parse_times(text: str) -> list[dict[str, str]]:
    """Parse the rows of the table of times."""
    return parse_table(next(part for part in text.split("\n\n") if part.startswith("| model")))


RATES = [
    {"section": "rates", "job": "device", "name": "read", "value": 4e12},
    {"section": "rates", "job": "device", "name": "matmul", "value": 500e12},
]


def test_rows_are_compared_with_the_floor_and_with_the_fastest_peer_of_their_job() -> None:
    records = [
        *RATES,
        make_record("gptx", 150e-6),
        make_record("torch graph", 300e-6),
        make_record("transformers", 3e-3),
        make_record("gptx", 200e-6, "b"),  # the machine was slower
        make_record("torch compile", 350e-6, "b"),
        make_record("torch graph", 100e-6, batch=8),
        {"section": "kernels", "job": "k", "size": "124M", "engine": "gptx", "kernels": 63.0},
    ]
    results = report.Results(records)
    first = results.times[0]
    assert first["of_floor"] == pytest.approx(0.5)
    assert first["of_matmul"] == pytest.approx(0.1)
    assert first["kernels"] == 63
    assert first["speedup"] == pytest.approx(1.75)
    assert results.times[1]["speedup"] is None
    rows = parse_times(report.render_tables(records))
    assert [row["engine"] for row in rows] == [r["engine"] for r in results.times]
    assert rows[0] == {
        "model": "124M",
        "precision": "bfloat16",
        "batch": "1",
        "tokens": "16 + 5",
        "engine": "gptx",
        "first token": "2.00 ms",
        "of matmul": "0.10",
        "a token p50 / p99": "150 µs / 300 µs",
        "tokens/s (quartiles)": "6,667 (6,667–6,667)",
        "of the floor": "0.50",
        "events: first / token": "1.00 ms / 75 µs",
        "kernels": "63",
        "memory": "300 MB",
        "compile": "20.00 s",
        "× PyTorch": "1.75",
    }


def test_goals_of_an_h200() -> None:
    records = [
        *RATES,
        make_record("gptx", 1 / 5000),
        make_record("gptx", 1 / 4500, prompt=1000),
        make_record("gptx", 1e-3, batch=128, prompt=128, whole_rate=[130_000.0]),
        make_record("gptx", 1e-4, size="1558M"),
        make_record("gptx", 1.0, prompt=1024, new=1),
    ]
    goals = report.list_goals(report.Results(records))
    values = list(dict.fromkeys(goal.value for goal in goals))
    assert values == [5000, pytest.approx(0.75), pytest.approx(0.9), 130_000, 2.0, None]
    assert len(goals) == 11


def test_wrong_results_and_failures_are_listed() -> None:
    check = {"section": "checks", "job": "checks", "group": "ops", "limit": 1e-5}
    text = report.render_tables(
        [
            check | {"check": "linear", "error": 2e-6, "ok": True},
            check | {"check": "gelu", "error": float("nan"), "ok": False},
            {"section": "times", "job": "a", **SHAPE, "engine": "torch graph", "error": "E: full"},
            {"section": "note", "job": "b", "text": "killed: it took too long"},
        ]
    )
    [row] = parse_table(text)
    assert list(row.values()) == ["ops", "2", "0.20", "WRONG: gelu: nan, limit 1e-05"]
    assert "- a: torch graph 124M bfloat16 1 16: E: full" in text
    assert "- b: killed: it took too long" in text
    assert report.render_tables([]) == ""


def test_verdicts_of_goals() -> None:
    goals = [Goal("a", "≥", 4500, 5000.4), Goal("b", "≤", 0.8, 0.9), Goal("c", "≤", 1, None)]
    assert [tuple(row.values()) for row in parse_table(goals_table(goals))] == [
        ("a", "≥ 4,500", "5,000", "met"),
        ("b", "≤ 0.80", "0.90", "missed"),
        ("c", "≤ 1.00", "–", "not measured"),
    ]
