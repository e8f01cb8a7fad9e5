"""Records as a table for people (md), or for machines (csv, json, jsonl) with all that is known."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gptx.bench.process import Event

NOTHING = "–"


@dataclass(frozen=True)
class Column:
    """A column of a markdown table: its header, and a record's text in it."""

    header: str
    text: Callable[[Event], str]
    right: bool = True


def render(records: Sequence[Event], columns: Sequence[Column], format: str) -> str:
    """The records as "md", "csv", "json" or "jsonl", without the last line end."""
    if format == "json":
        return json.dumps(list(records), indent=2, ensure_ascii=False)
    if format == "jsonl":
        return "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    if format == "csv":
        return _csv(records)
    return "\n".join([*markdown(records, columns), *_footer(records)])


def _csv(records: Sequence[Event]) -> str:
    """A header and a line a record; what is a list or an object is JSON in its field."""
    out = io.StringIO()
    names = list(dict.fromkeys(name for record in records for name in record))
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for record in records:
        values = [record.get(name) for name in names]
        writer.writerow(json.dumps(v) if isinstance(v, list | dict | bool) else v for v in values)
    return out.getvalue().removesuffix("\n")


def markdown(records: Sequence[Event], columns: Sequence[Column]) -> list[str]:
    """The lines of a table."""
    texts = [[column.text(record).replace("|", "\\|") for column in columns] for record in records]
    widths = [
        max(3, len(column.header), *(len(row[i]) for row in texts))
        for i, column in enumerate(columns)
    ]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(cells, widths, columns, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = [
        f"{'-' * (width - 1)}:" if column.right else "-" * width
        for width, column in zip(widths, columns, strict=True)
    ]
    return [line([column.header for column in columns]), line(rule), *map(line, texts)]


def _footer(records: Sequence[Event]) -> list[str]:
    """What it was measured with, and how fast the memory was."""
    if not records:
        return []
    facts = records[0]
    libraries = dict.fromkeys([*(record["library"] for record in records), facts["blas"]])
    made = [f"gptx {facts['gptx']}", f"Python {facts['python']}", *filter(None, libraries)]
    devices = filter(None, dict.fromkeys(record.get("device") for record in records))
    where = [*devices, facts["cpu"], f"{facts['cores']} cores"]
    lines = ["", f"{', '.join(made)}; {', '.join(where)}; {facts['date'][:10]}"]
    speeds = {
        (record["backend"], record["threads"]): record["bandwidth"]
        for record in records
        if record.get("bandwidth")
    }
    for (backend, threads), speed in speeds.items():
        who = f"{backend}, {count(threads, 'thread')}" if threads else backend
        lines.append(f"memory read at {speed / 1e9:.1f} GB/s ({who})")
    return lines


def count(n: int, noun: str) -> str:
    """ "1 thread", "2 threads"."""
    return f"{n} {noun}{'s' * (n != 1)}"


def rate(record: Event) -> str:
    """Tokens per second: mean ± standard deviation."""
    mean, sd = record["tokens_per_second"], record["tokens_per_second_sd"]
    return f"{mean:.2f}" if sd is None else f"{mean:.2f} ± {sd:.2f}"


def duration(seconds: float | None) -> str:
    """Seconds for people: 158 µs, 412 ms, 1.26 s."""
    if seconds is None:
        return NOTHING
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.{2 * (seconds < 0.1)}f} ms"


def _spread(p50: float | None, p99: float | None) -> str:
    return NOTHING if p50 is None else f"{duration(p50)} ({duration(p99)})"


def _megabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:,.0f} MB"


def _backend(record: Event) -> str:
    return record["backend"] + (", generic" if record["generic"] else "")


MODEL = Column("model", lambda r: r["model"], right=False)
BACKEND = Column("backend", _backend, right=False)
DTYPE = Column("dtype", lambda r: r["dtype"], right=False)
THREADS = Column("threads", lambda r: str(r["threads"] or NOTHING))
RATE = Column("t/s", rate)
LOAD = Column("load", lambda r: duration(r["load_time"]))
MEMORY = Column("peak memory", lambda r: _megabytes(r["peak_memory"]))
KERNELS = Column("kernels a token", lambda r: str(r["kernels"] or NOTHING))

GRID = (
    MODEL,
    Column("size", lambda r: _megabytes(r["size"])),
    Column("params", lambda r: f"{r['parameters'] / 1e6:,.2f} M"),
    BACKEND,
    DTYPE,
    THREADS,
    Column("batch", lambda r: str(r["batch"])),
    Column("test", lambda r: r["test"]),
    RATE,
    Column("first token", lambda r: duration(r["time_to_first_token"])),
    Column("a step (p99)", lambda r: _spread(r["step_p50"], r["step_p99"])),
    Column("first run", lambda r: duration(r["first_run"])),
    LOAD,
    MEMORY,
    Column(
        "of bandwidth",
        lambda r: NOTHING if r["of_bandwidth"] is None else f"{r['of_bandwidth']:.2f}",
    ),
)

ABLATION = (
    MODEL,
    THREADS,
    Column("reused", lambda r: r["rung"], right=False),
    RATE,
    Column("a token", lambda r: duration(r["seconds_per_token"])),
    Column("times faster", lambda r: f"{r['speedup']:.2f}"),
    Column("tokens", lambda r: "the same" if r["same_tokens"] else "others", right=False),
)

TOTAL = (
    MODEL,
    BACKEND,
    DTYPE,
    THREADS,
    Column("test", lambda r: f"{r['prompt']} + {r['output']}"),
    Column("whole process", lambda r: duration(r["median"])),
    Column("fastest–slowest", lambda r: f"{r['fastest']:.2f}–{r['slowest']:.2f} s"),
    Column("first run", lambda r: duration(r["first"])),
    Column("import", lambda r: duration(r["import_time"])),
    LOAD,
    Column("first token", lambda r: duration(r["time_to_first_token"])),
    Column("the others", lambda r: duration(r["other_tokens"])),
    MEMORY,
)


def grid_columns(records: Sequence[Event]) -> tuple[Column, ...]:
    """Those of the grid, and the kernels of a decode step where a backend counts them."""
    return (*GRID, KERNELS) if any(record["kernels"] for record in records) else GRID


def budget_columns(records: Sequence[Event]) -> tuple[Column, ...]:
    """Those of the budget: one for each length of the input."""

    def outputs(prompt: str) -> Column:
        def text(record: Event) -> str:
            return full(record["outputs"][prompt], record["context"] - int(prompt) + 1)

        return Column(f"outputs for {count(int(prompt), 'input')}", text)

    def full(n: int, limit: int) -> str:
        return f"{n} (all)" if n == limit else str(n)

    return (
        MODEL,
        BACKEND,
        DTYPE,
        THREADS,
        Column("budget", lambda r: f"{r['budget']:g} s"),
        Column("cache", lambda r: "yes" if r["cache"] else "no", right=False),
        Column("inputs for 1 output", lambda r: full(r["inputs"], r["context"])),
        *(outputs(prompt) for prompt in (records[0]["outputs"] if records else ())),
    )
