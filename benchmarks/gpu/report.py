"""The tables of the GPU benchmark: device, checks, times, goals and failures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from benchmarks.goals import Goal, goals_table
from benchmarks.gpu.times import GPTX, PLAIN, TRANSFORMERS
from gptx.bench.tables import NOTHING, Column, duration, markdown, megabytes, ratio
from gptx.bench.worker import Event

PEERS = (*PLAIN, *TRANSFORMERS)
ROW_FIELDS = ("size", "dtype", "quantize", "batch", "prompt", "new")


class Results:
    """All records of one or more runs, with derived figures."""

    def __init__(self, records: Iterable[Event]) -> None:
        self.records = list(records)
        self.rates = {r["name"]: r["value"] for r in self.of("rates")}
        self.kernels = {
            (r["size"], r["engine"]): r["kernels"] for r in self.of("kernels") if "kernels" in r
        }
        for r in self.of("times"):
            if "first" in r:
                r |= self._derived(r)
        self.times = [r for r in self.of("times") if "first" in r]
        for r in self.times:
            r["speedup"] = self._speedup(r)

    def of(self, section: str) -> list[Event]:
        """Return the records of one section, in their order."""
        return [record for record in self.records if record["section"] == section]

    def _derived(self, r: Event) -> Event:
        """Compute medians, and shares of the upper limits of the device."""
        read, matmul = self.rates.get("read"), self.rates.get("matmul")
        step = r.get("step_p50")
        read_seconds = (r["weights_read"] + r["cache_read"]) / read if read else None
        first = float(np.median(r["first"]))
        kernels = self.kernels.get((r["size"], r["engine"]), r["kernels"])
        return {
            "first_median": first,
            "of_floor": read_seconds / step if read_seconds and step else None,
            "of_matmul": r["prompt_flops"] / matmul / first if matmul else None,
            "kernels": kernels,
        }

    def _speedup(self, ours: Event) -> float | None:
        """Return the speed relative to the fastest PyTorch engine that ran in the same job."""
        if ours["engine"] not in GPTX:
            return None
        speedups = [
            _time(theirs) / _time(beside)
            for theirs in self.times
            if theirs["engine"] in PEERS and _row(theirs) == _row(ours)
            for beside in self.times
            if beside["engine"] == ours["engine"]
            and _row(beside) == _row(ours)
            and beside["job"] == theirs["job"]
        ]
        return min(speedups, default=None)

    def best(self, engine: str, name: str, **row: Any) -> float | None:
        """Return the largest median of a figure among the rows that match; None if none does."""
        values = [
            r[name]
            for r in self.times
            if r["engine"] == engine and all(r[key] == value for key, value in row.items())
        ]
        values = [float(np.median(value)) for value in values if value is not None]
        return max(values, default=None)


def _row(record: Event) -> tuple[Any, ...]:
    return tuple(record[key] for key in ROW_FIELDS)


def _time(record: Event) -> float:
    """Return the seconds of a step, or of the prompt in a row without steps."""
    return float(record.get("step_p50") or record["first_median"])


def _precision(r: Event) -> str:
    return f"{r['quantize']}/{r['dtype']}" if r["quantize"] else r["dtype"]


def _step(r: Event) -> str:
    if "step_p50" not in r:
        return NOTHING
    return f"{duration(r['step_p50'])} / {duration(r['step_p99'])}"


def _rate(r: Event) -> str:
    if "rate" not in r:
        return NOTHING
    low, middle, high = np.percentile(r["rate"], [25, 50, 75])
    return f"{middle:,.0f} ({low:,.0f}–{high:,.0f})"


def _device(r: Event) -> str:
    return f"{duration(r['first_device'])} / {duration(r.get('step_device'))}"


COLUMNS = (
    Column("model", lambda r: r["size"], right=False),
    Column("precision", _precision, right=False),
    Column("batch", lambda r: str(r["batch"])),
    Column("tokens", lambda r: f"{r['prompt']} + {r['new']}"),
    Column("engine", lambda r: r["engine"], right=False),
    Column("first token", lambda r: duration(r["first_median"])),
    Column("of matmul", lambda r: ratio(r["of_matmul"])),
    Column("a token p50 / p99", _step),
    Column("tokens/s (quartiles)", _rate),
    Column("of the floor", lambda r: ratio(r["of_floor"])),
    Column("events: first / token", _device),
    Column("kernels", lambda r: NOTHING if r["kernels"] is None else f"{r['kernels']:.0f}"),
    Column("memory", lambda r: megabytes(r["memory"])),
    Column("compile", lambda r: duration(r["compile_time"])),
    Column("× PyTorch", lambda r: ratio(r["speedup"])),
)


TRAINING_COLUMNS = (
    Column("model", lambda r: r["size"], right=False),
    Column("precision", _precision, right=False),
    Column("sequences × tokens", lambda r: f"{r['batch']} × {r['tokens']}"),
    Column("engine", lambda r: r["engine"], right=False),
    Column("an update", lambda r: duration(float(np.median(r["seconds"])))),
    Column("tokens/s", lambda r: f"{r['batch'] * r['tokens'] / np.median(r['seconds']):,.0f}"),
    Column("memory", lambda r: megabytes(r["memory"])),
    Column("× PyTorch", lambda r: ratio(r["speedup"])),
)


def _training_rows(results: Results) -> list[Event]:
    """Return the records of training, with the speed relative to PyTorch in the same job."""
    rows = [dict(r) for r in results.of("training") if "seconds" in r]
    for r in rows:
        beside = [x for x in rows if x["job"] == r["job"] and x["engine"] == "torch eager"]
        r["speedup"] = None
        if beside and r["engine"] == "gptx":
            r["speedup"] = float(np.median(beside[0]["seconds"]) / np.median(r["seconds"]))
    return rows


def list_goals(results: Results) -> list[Goal]:
    """Return the goals for an H200, and stretch goals."""
    small = {"size": "124M", "dtype": "bfloat16", "quantize": ""}
    short = small | {"batch": 1, "prompt": 16}
    rate = results.best("gptx", "rate", **short)
    deep = results.best("gptx", "rate", **small, batch=1, prompt=1000)
    large = results.best("gptx", "of_floor", **(short | {"size": "1558M"}))
    batch = results.best("gptx", "whole_rate", **small, batch=128, prompt=128)
    first = [r["first_median"] for r in results.times if _is_prefill(r, small)]
    prefill_ms = min(first) * 1e3 if first else None
    speedups = [r["speedup"] for r in results.times if r["engine"] == "gptx" and r["speedup"]]
    goals: list[Goal] = []

    def add(text: str, sign: str, value: float | None, *limits: float) -> None:
        goals.extend(
            Goal(f"{text}{' (stretch)' * i}", sign, limit, value) for i, limit in enumerate(limits)
        )

    add("124M bfloat16, context 16 to 144, tokens/s", "≥", rate, 4500, 8000)
    add("1558M bfloat16, of the floor", "≥", large, 0.70, 0.85)
    add("124M, context 1,000 / context 16", "≥", deep / rate if deep and rate else None, 0.8)
    add("124M bfloat16, batch 128, 128 + 128, tokens/s with the prompts", "≥", batch,
        120_000, 200_000)  # fmt: skip
    add("124M bfloat16, prompt of 1,024, ms", "≤", prefill_ms, 1.5, 0.8)
    add("× the fastest of PyTorch, slowest row", "≥", min(speedups, default=None), 1.3, 2.0)
    return goals


def _is_prefill(r: Event, model: Event) -> bool:
    row = model | {"engine": "gptx", "batch": 1, "prompt": 1024, "new": 1}
    return all(r[key] == value for key, value in row.items())


def render_tables(records: Iterable[Event]) -> str:
    """Render everything in markdown: the device, the checks, the times, the goals, failures."""
    results = Results(records)
    parts = [_device_text(results), _checks_table(results)]
    if results.times:
        order = sorted(results.times, key=lambda r: [*map(str, _row(r)[:3]), *_row(r)[3:]])
        parts += [markdown(order, COLUMNS), goals_table(list_goals(results))]
    if rows := _training_rows(results):
        parts.append(markdown(rows, TRAINING_COLUMNS))
    parts.append("\n".join(_failures(results)))
    return "\n\n".join(part for part in parts if part)


def _device_text(results: Results) -> str:
    facts = {
        k: v for r in results.of("device") for k, v in r.items() if k not in ("section", "job")
    }
    lines = [", ".join(f"{name} {value}" for name, value in facts.items())] if facts else []
    units = {
        "copy": ("device to device copy", 1e12, "TB/s read and written"),
        "read": ("reading", 1e12, "TB/s"),
        "matmul": ("bfloat16 product", 1e12, "TFLOP/s"),
        "launch": ("a launch", 1e-6, "µs on the host"),
        "graph_node": ("a node of a graph", 1e-6, "µs"),
        "round_trip": ("a number read on the host", 1e-6, "µs"),
    }
    rates = [
        f"{title} {results.rates[name] / scale:.3g} {unit}"
        for name, (title, scale, unit) in units.items()
        if name in results.rates
    ]
    return "\n".join([*lines, *([", ".join(rates)] if rates else [])])


def _checks_table(results: Results) -> str:
    groups: dict[str, list[Event]] = {}
    for check in results.of("checks"):
        groups.setdefault(check["group"], []).append(check)
    rows = []
    for group, checks in groups.items():
        shares = [c["error"] / c["limit"] for c in checks if c["ok"] and c["limit"]]
        bad = [f"{c['check']}: {_error(c)}" for c in checks if not c["ok"]]
        verdict = "WRONG: " + "; ".join(bad) if bad else "right"
        share = max(shares, default=0.0)
        rows.append({"group": group, "n": len(checks), "share": share, "verdict": verdict})
    columns = (
        Column("checked", lambda r: r["group"], right=False),
        Column("findings", lambda r: str(r["n"])),
        Column("largest share of the limit", lambda r: ratio(r["share"])),
        Column("", lambda r: r["verdict"], right=False),
    )
    return markdown(rows, columns) if rows else ""


def _error(check: Event) -> str:
    error = check["error"]
    return error if isinstance(error, str) else f"{error:.2g}, limit {check['limit']:.2g}"


def _failures(results: Results) -> Iterator[str]:
    """Yield a line for each engine or job that failed."""
    for record in results.records:
        if "error" in record and record["section"] != "checks":
            fields = [record.get(key) for key in ("size", "dtype", "quantize", "batch", "prompt")]
            text = " ".join(str(x) for x in (record.get("engine"), *fields) if x)
            yield f"- {record['job']}: {text}: {record['error']}"
        if record["section"] == "note":
            yield f"- {record['job']}: {record['text']}"
