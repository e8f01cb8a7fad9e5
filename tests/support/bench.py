"""Running benchmarks without processes of their own, and without waiting for large buffers."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest

from gptx.bench import bandwidth, child, grid
from gptx.bench.process import Event, Events

QUICK = ("-r", "1", "-t", "1", "--generic")
BOTH = ("-p", "3", "-n", "2", *QUICK)
READ = ("-p", "3", "-n", "0", *QUICK)


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Have tasks run here, their arguments and events as JSON all the same; those that ran."""
    ran: list[tuple[str, dict[str, Any]]] = []

    def fresh(task: str, **arguments: Any) -> Events:
        ran.append((task, arguments))
        for event in child.TASKS[task](**json.loads(json.dumps(arguments))):
            yield json.loads(json.dumps(event))

    monkeypatch.setattr(grid, "fresh", fresh)
    monkeypatch.setattr(bandwidth, "SMALLEST", 4_000_000)
    monkeypatch.setattr(bandwidth, "LARGEST", 4_000_000)
    monkeypatch.setattr(bandwidth, "largest_cache", lambda: 0)
    return ran


def records(events: Events) -> list[Event]:
    """What is left without the progress."""
    return [event for event in events if "progress" not in event]


def parsed(text: str, output_format: str) -> list[dict[str, Any]]:
    """The records that were printed as csv, json or jsonl."""
    if output_format == "json":
        return json.loads(text)
    if output_format == "jsonl":
        return [json.loads(line) for line in text.splitlines()]
    rows = csv.DictReader(io.StringIO(text))
    return [{name: _value(field) for name, field in row.items()} for row in rows]


def _value(field: str) -> Any:
    if not field:
        return None
    try:
        return json.loads(field)
    except ValueError:
        return field


def table(text: str) -> list[dict[str, str]]:
    """The rows of the one markdown table in a text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    header, rule, *rows = cells
    assert {len(row) for row in cells} == {len(header)}
    assert all(set(cell) <= {"-", ":"} and len(cell) >= 3 for cell in rule)
    return [dict(zip(header, row, strict=True)) for row in rows]
