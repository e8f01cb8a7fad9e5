"""Tables: records as markdown, csv, json or jsonl, and the columns that presets share."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gptx.bench.worker import Event

NOTHING = "–"


@dataclass(frozen=True)
class Column:
    """A column of a markdown table: its header, and the text of a record in it."""

    header: str
    text: Callable[[Event], str]
    right: bool = True  # the alignment


def render(records: Sequence[Event], columns: Sequence[Column], output_format: str) -> str:
    """Render records as "md", "csv", "json" or "jsonl", without the last line end.

    Only "md" uses the columns; the other formats have every field.
    """
    if output_format == "json":
        return json.dumps(list(records), indent=2, ensure_ascii=False)
    if output_format == "jsonl":
        return "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    if output_format == "csv":
        return _csv(records)
    return "\n".join([markdown(records, columns), *_footer(records)])


def _csv(records: Sequence[Event]) -> str:
    """Render a header and a line for each record; a list or an object is JSON in its field."""
    out = io.StringIO()
    names = list(dict.fromkeys(name for record in records for name in record))
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for record in records:
        values = [record.get(name) for name in names]
        writer.writerow(json.dumps(v) if isinstance(v, list | dict | bool) else v for v in values)
    return out.getvalue().removesuffix("\n")


def markdown(records: Sequence[Event], columns: Sequence[Column]) -> str:
    """Render a markdown table, a row for each record."""
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
    return "\n".join([line([column.header for column in columns]), line(rule), *map(line, texts)])


def _footer(records: Sequence[Event]) -> list[str]:
    """Name the software, the machine, and the bandwidth of its memory."""
    if not records:
        return []
    facts = records[0]
    libraries = dict.fromkeys([*(record["library"] for record in records), facts["blas"]])
    software = [f"gptx {facts['gptx']}", f"Python {facts['python']}", *filter(None, libraries)]
    devices = filter(None, dict.fromkeys(record.get("device") for record in records))
    hardware = [*devices, facts["cpu"], f"{facts['cores']} cores"]
    lines = ["", f"{', '.join(software)}; {', '.join(hardware)}; {facts['date'][:10]}"]
    bandwidths = {
        (record["backend"], record["threads"]): record["bandwidth"]
        for record in records
        if record.get("bandwidth")
    }
    for (backend, threads), bandwidth in bandwidths.items():
        what = f"{backend}, {count(threads, 'thread')}" if threads else backend
        lines.append(f"memory read at {bandwidth / 1e9:.1f} GB/s ({what})")
    return lines


def count(n: int, noun: str) -> str:
    """Format a count: "1 thread", "2 threads"."""
    return f"{n} {noun}{'s' * (n != 1)}"


def duration(seconds: float | None) -> str:
    """Format seconds: 158 µs, 412 ms, 1.26 s."""
    if seconds is None:
        return NOTHING
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.{2 * (seconds < 0.1)}f} ms"


def ratio(value: float | None) -> str:
    """Format a ratio: 0.91."""
    return NOTHING if value is None else f"{value:.2f}"


def megabytes(n_bytes: float) -> str:
    """Format a size: 1,234 MB."""
    return f"{n_bytes / 1e6:,.0f} MB"


def token_rate(record: Event) -> str:
    """Format tokens per second: mean ± standard deviation."""
    mean, sd = record["tokens_per_second"], record["tokens_per_second_sd"]
    return f"{mean:.2f}" if sd is None else f"{mean:.2f} ± {sd:.2f}"


MODEL = Column("model", lambda r: r["model"], right=False)
BACKEND = Column("backend", lambda r: r["backend"] + ", generic" * r["generic"], right=False)
DTYPE = Column("dtype", lambda r: r["dtype"], right=False)
THREADS = Column("threads", lambda r: str(r["threads"] or NOTHING))
RATE = Column("t/s", token_rate)
LOAD = Column("load", lambda r: duration(r["load_time"]))
MEMORY = Column("peak memory", lambda r: megabytes(r["peak_memory"]))
