"""Benchmarks without workers and large buffers, and parsers of their output formats."""

from __future__ import annotations

import csv
import importlib
import io
import json
import re
from typing import Any

import pytest

from gptx.bench import machine, worker
from gptx.bench.worker import Event, Events

QUICK = ("-r", "1", "-t", "1", "--generic")
BOTH = ("-p", "3", "-n", "2", *QUICK)
READ = ("-p", "3", "-n", "0", *QUICK)


def run_in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run tasks in this process, through JSON as in a worker; return the list of their names."""
    names: list[str] = []

    def run_task(task: str, **arguments: Any) -> Events:
        names.append(task)
        module, _, function = task.partition(":")
        events = getattr(importlib.import_module(module), function)
        for event in events(**json.loads(json.dumps(arguments))):
            yield json.loads(json.dumps(event))

    monkeypatch.setattr(worker, "run_task", run_task)
    monkeypatch.setattr(machine, "MIN_READ_BYTES", 4_000_000)
    monkeypatch.setattr(machine, "MAX_READ_BYTES", 4_000_000)
    monkeypatch.setattr(machine, "largest_cache_bytes", lambda: 0)
    return names


class Clock:
    """A stand-in for the module `time`, set by the test."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    time = perf_counter


def records(events: Events) -> list[Event]:
    """Return the events without the progress."""
    return [event for event in events if "progress" not in event]


def parse(text: str, output_format: str) -> list[dict[str, Any]]:
    """Parse records that were printed as csv, json or jsonl."""
    if output_format == "json":
        return json.loads(text)
    if output_format == "jsonl":
        return [json.loads(line) for line in text.splitlines()]
    rows = csv.DictReader(io.StringIO(text))
    return [{name: _parse_field(field) for name, field in row.items()} for row in rows]


def _parse_field(field: str) -> Any:
    if not field:
        return None
    try:
        return json.loads(field)
    except ValueError:
        return field


def parse_table(text: str) -> list[dict[str, str]]:
    """Parse the rows of the only markdown table in a text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]
    header, rule, *rows = cells
    assert {len(row) for row in cells} == {len(header)}
    assert all(set(cell) <= {"-", ":"} and len(cell) >= 3 for cell in rule)
    return [dict(zip(header, row, strict=True)) for row in rows]
