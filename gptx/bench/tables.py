"""Tables: records as markdown, csv, json or jsonl, and the columns that presets share.

A narrow table has the main columns and fits a width; a wide one has all columns.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from gptx.bench.worker import Event

NOTHING = "–"
NARROW = 100  # characters, where no terminal has another width
SHORTEST_NAME = 12  # characters of a model


@dataclass(frozen=True)
class Column:
    """A column of a markdown table.

    Attributes
    ----------
    header
        Text in the first line.
    text
        Function that returns the text of a record.
    right
        True for alignment to the right.
    wide
        True for a column of the wide table only.
    setup
        True for a part of the setup, False for a figure.
    usual
        Text that says nothing new: without another text, the column is in the wide table only.
    """

    header: str
    text: Callable[[Event], str]
    right: bool = True
    wide: bool = False
    setup: bool = False
    usual: str = NOTHING


def render(
    records: Sequence[Event],
    columns: Sequence[Column],
    output_format: str,
    *,
    width: int | None = None,
) -> str:
    """Render records as "md", "csv", "json" or "jsonl", without the last line end.

    JSON is ASCII, and so is exact in every encoding of standard output.

    Only "md" uses the columns; the other formats have every field.

    Parameters
    ----------
    width
        Maximum width of a narrow table in characters; None for a wide one.
    """
    if output_format == "json":
        return json.dumps(list(records), indent=2)
    if output_format == "jsonl":
        return "\n".join(map(json.dumps, records))
    if output_format == "csv":
        return _csv(records)
    table = markdown(records, columns) if width is None else narrow(records, columns, width)
    return "\n".join([table, *_footer(records)])


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


def narrow(records: Sequence[Event], columns: Sequence[Column], width: int) -> str:
    """Render a markdown table of the main columns in at most `width` characters, if possible.

    While it is too wide, the widest part of the setup that all rows share moves to a line above the
    table. Then the names of the models lose their beginnings.
    """
    texts = {column: {column.text(record) for record in records} for column in columns}
    shown = [column for column in columns if not column.wide and texts[column] != {column.usual}]
    above = []
    while _width(records, shown) > width:
        shared = [column for column in shown if column.setup and len(texts[column]) == 1]
        if not shared:
            break
        widest = max(shared, key=lambda column: _column_width(records, column))
        shown.remove(widest)
        above.append(widest)
    lines = [f"{column.header}: {column.text(records[0])}" for column in columns if column in above]
    excess = _width(records, shown) - width
    if excess > 0 and shown[0] is MODEL:
        limit = max(SHORTEST_NAME, _column_width(records, MODEL) - excess)
        shown[0] = replace(MODEL, text=lambda record: _shorten(MODEL.text(record), limit))
    return "\n".join([*(["; ".join(lines), ""] if lines else []), markdown(records, shown)])


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else f"…{text[1 - width :]}"


def _width(records: Sequence[Event], columns: Sequence[Column]) -> int:
    return 1 + sum(3 + _column_width(records, column) for column in columns)


def _column_width(records: Sequence[Event], column: Column) -> int:
    return max(3, len(column.header), *(len(_cell(column, record)) for record in records))


def _cell(column: Column, record: Event) -> str:
    return column.text(record).replace("|", "\\|")


def markdown(records: Sequence[Event], columns: Sequence[Column]) -> str:
    """Render a markdown table, a row for each record."""
    texts = [[_cell(column, record) for column in columns] for record in records]
    widths = [_column_width(records, column) for column in columns]

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
    """Name the software, the machine, the bandwidth of its memory, and notes on the models."""
    if not records:
        return []
    facts = records[0]
    libraries = dict.fromkeys([*(record["library"] for record in records), facts["blas"]])
    software = [f"gptx {facts['gptx']}", f"Python {facts['python']}", *filter(None, libraries)]
    devices = filter(None, dict.fromkeys(record.get("device") for record in records))
    hardware = [*devices, facts["cpu"], f"{facts['cores']} cores"]
    lines = ["", ", ".join(software), f"{', '.join(hardware)}; {facts['date'][:10]}"]
    bandwidths = {
        (record["backend"], record["threads"]): record["bandwidth"]
        for record in records
        if record.get("bandwidth")
    }
    for (backend, threads), bandwidth in bandwidths.items():
        what = f"{backend}, {count(threads, 'thread')}" if threads else backend
        lines.append(f"memory read at {bandwidth / 1e9:.1f} GB/s ({what})")
    notes = [f"{r['model']}, {r['dtype']}: {note}" for r in records for note in r.get("notes", ())]
    return lines + list(dict.fromkeys(notes))


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


def percent(value: float | None) -> str:
    """Format a ratio: 91 %."""
    return NOTHING if value is None else f"{100 * value:.0f} %"


def parameters(n: int) -> str:
    """Format a number of parameters: 4.99 K, 2.92 M, 124 M."""
    number, unit = (n / 1e6, "M") if n >= 1e6 else (n / 1e3, "K")
    return f"{number:,.{_decimals(number, 3)}f} {unit}"


def megabytes(n_bytes: float) -> str:
    """Format a size: 1,234 MB."""
    return f"{n_bytes / 1e6:,.0f} MB"


def token_rate(record: Event) -> str:
    """Format tokens per second: mean ± standard deviation."""
    mean, sd = record["tokens_per_second"], record["tokens_per_second_sd"]
    digits = _decimals(mean, 4)
    return f"{mean:.{digits}f}" if sd is None else f"{mean:.{digits}f} ± {sd:.{digits}f}"


def _decimals(number: float, digits: int) -> int:
    """Return the decimals that give a number at least so many digits, at most 2."""
    return max(0, min(2, digits - len(f"{number:.0f}")))


MODEL = Column("model", lambda r: r["model"], right=False, setup=True)
BACKEND = Column(
    "backend", lambda r: r["backend"] + ", generic" * r["generic"], right=False, setup=True
)
DTYPE = Column("dtype", lambda r: r["dtype"], right=False, setup=True)
THREADS = Column("threads", lambda r: str(r["threads"] or NOTHING), setup=True)
RATE = Column("t/s", token_rate)
LOAD = Column("load", lambda r: duration(r["load_time"]))
MEMORY = Column("peak memory", lambda r: megabytes(r["peak_memory"]), wide=True)
