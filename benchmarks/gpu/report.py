"""What `gpu.py` measured, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.compare.report import goals_table
from benchmarks.gpu.times import GPTX, PLAIN, TRANSFORMERS
from gptx.bench.report import NOTHING, Column, duration, markdown

Record = dict[str, Any]
OURS = tuple(GPTX)
PEERS = (*PLAIN, *TRANSFORMERS)
ROW = ("size", "dtype", "quantize", "batch", "prompt", "new")


class Results:
    """All records of one run or several, by section."""

    def __init__(self, records: Iterable[Record]) -> None:
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

    def of(self, section: str) -> list[Record]:
        """Those of one section, as they came."""
        return [record for record in self.records if record["section"] == section]

    def _derived(self, r: Record) -> Record:
        """Medians, and parts of what the machine can do at best."""
        read, matmul = self.rates.get("read"), self.rates.get("matmul")
        step = r.get("step_p50")
        floor = (r["weights_read"] + r["cache_read"]) / read if read else None
        first = float(np.median(r["first"]))
        kernels = self.kernels.get((r["size"], r["engine"]), r["kernels"])
        return {
            "first_median": first,
            "of_floor": floor / step if floor and step else None,
            "of_matmul": r["prompt_flops"] / matmul / first if matmul else None,
            "kernels": kernels,
        }

    def _speedup(self, ours: Record) -> float | None:
        """How many times as fast as the fastest of PyTorch's ways, each beside it in turns."""
        if ours["engine"] not in OURS:
            return None
        times = [
            _time(theirs) / _time(beside)
            for theirs in self.times
            if theirs["engine"] in PEERS and _row(theirs) == _row(ours)
            for beside in self.times
            if beside["engine"] == ours["engine"]
            and _row(beside) == _row(ours)
            and beside["job"] == theirs["job"]
        ]
        return min(times, default=None)

    def found(self, engine: str, name: str, **row: Any) -> float | None:
        """One number of one row: the best, where it was measured several times."""
        values = [
            r[name]
            for r in self.times
            if r["engine"] == engine and all(r[key] == value for key, value in row.items())
        ]
        values = [float(np.median(value)) for value in values if value is not None]
        return max(values, default=None)


def _row(record: Record) -> tuple[Any, ...]:
    return tuple(record[key] for key in ROW)


def _time(record: Record) -> float:
    """What engines are compared by: a step, or a prompt where there are no steps."""
    return float(record.get("step_p50") or record["first_median"])


def _precision(r: Record) -> str:
    return f"{r['quantize']}/{r['dtype']}" if r["quantize"] else r["dtype"]


def _step(r: Record) -> str:
    if "step_p50" not in r:
        return NOTHING
    return f"{duration(r['step_p50'])} / {duration(r['step_p99'])}"


def _rate(r: Record) -> str:
    if "rate" not in r:
        return NOTHING
    low, middle, high = np.percentile(r["rate"], [25, 50, 75])
    return f"{middle:,.0f} ({low:,.0f}–{high:,.0f})"


def _part(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def _device(r: Record) -> str:
    return f"{duration(r['first_device'])} / {duration(r.get('step_device'))}"


COLUMNS = (
    Column("model", lambda r: r["size"], right=False),
    Column("precision", _precision, right=False),
    Column("batch", lambda r: str(r["batch"])),
    Column("tokens", lambda r: f"{r['prompt']} + {r['new']}"),
    Column("engine", lambda r: r["engine"], right=False),
    Column("first token", lambda r: duration(r["first_median"])),
    Column("of matmul", lambda r: _part(r["of_matmul"])),
    Column("a token p50 / p99", _step),
    Column("tokens/s (quartiles)", _rate),
    Column("of the floor", lambda r: _part(r["of_floor"])),
    Column("events: first / token", _device),
    Column("kernels", lambda r: NOTHING if r["kernels"] is None else f"{r['kernels']:.0f}"),
    Column("memory", lambda r: f"{r['memory'] / 1e6:,.0f} MB"),
    Column("compile", lambda r: duration(r["compile_time"])),
    Column("× PyTorch", lambda r: _part(r["speedup"])),
)


def goals_of(results: Results) -> list[tuple[str, str, float, float | None]]:
    """The issue's goals and stretches for an H200: what, the sign, the limit, and the value."""
    small = {"size": "124M", "dtype": "bfloat16", "quantize": ""}
    short = small | {"batch": 1, "prompt": 16}
    many = small | {"batch": 128, "prompt": 128}
    rate = results.found("gptx", "rate", **short)
    deep = results.found("gptx", "rate", **small, batch=1, prompt=1000)
    large = results.found(
        "gptx", "of_floor", size="1558M", dtype="bfloat16", quantize="", batch=1, prompt=16
    )
    first = [r["first_median"] for r in results.times if _is_prefill(r, small)]
    speedups = [r["speedup"] for r in results.times if r["engine"] == "gptx" and r["speedup"]]
    goals: list[tuple[str, str, float, float | None]] = []

    def goal(what: str, sign: str, value: float | None, *limits: float) -> None:
        goals.extend((f"{what}{' (stretch)' * i}", sign, x, value) for i, x in enumerate(limits))

    goal("124M bfloat16, context 16 to 144, tokens/s", "≥", rate, 4500, 8000)
    goal("1558M bfloat16, of the floor", "≥", large, 0.70, 0.85)
    goal("124M, context 1,000 / context 16", "≥", deep / rate if deep and rate else None, 0.8)
    goal("124M bfloat16, batch 128, 128 + 128, tokens/s with the prompts", "≥",
         results.found("gptx", "whole_rate", **many), 120_000, 200_000)  # fmt: skip
    goal("124M bfloat16, prompt of 1,024, ms", "≤", min(first) * 1e3 if first else None, 1.5, 0.8)
    goal("× the fastest of PyTorch, slowest row", "≥", min(speedups, default=None), 1.3, 2.0)
    return goals


def _is_prefill(r: Record, model: Record) -> bool:
    row = model | {"engine": "gptx", "batch": 1, "prompt": 1024, "new": 1}
    return all(r[key] == value for key, value in row.items())


def tables(records: Iterable[Record]) -> str:
    """Everything in markdown: the device, the checks, the times, the goals, what failed."""
    results = Results(records)
    parts = [_about(results), _checks(results)]
    if results.times:
        order = sorted(results.times, key=lambda r: [*map(str, _row(r)[:3]), *_row(r)[3:]])
        parts.append("\n".join(markdown(order, COLUMNS)))
        parts.append(goals_table(goals_of(results)))
    parts.append("\n".join(_failures(results)))
    return "\n\n".join(part for part in parts if part)


def _about(results: Results) -> str:
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
    told = [
        f"{title} {results.rates[name] / scale:.3g} {unit}"
        for name, (title, scale, unit) in units.items()
        if name in results.rates
    ]
    return "\n".join([*lines, *([", ".join(told)] if told else [])])


def _checks(results: Results) -> str:
    checks = results.of("checks")
    if not checks:
        return ""
    groups: dict[str, list[Record]] = {}
    for check in checks:
        groups.setdefault(check["group"], []).append(check)
    lines = ["| checked | findings | largest part of the limit | |", "|---|---:|---:|---|"]
    for group, found in groups.items():
        parts = [c["error"] / c["limit"] for c in found if c["ok"] and c["limit"]]
        bad = [f"{c['check']}: {_error(c)}" for c in found if not c["ok"]]
        verdict = "right" if not bad else "WRONG: " + "; ".join(bad)
        lines.append(f"| {group} | {len(found)} | {max(parts, default=0):.2f} | {verdict} |")
    return "\n".join(lines)


def _error(check: Record) -> str:
    error = check["error"]
    return error if isinstance(error, str) else f"{error:.2g}, limit {check['limit']:.2g}"


def _failures(results: Results) -> Sequence[str]:
    """What was left out, and why."""
    lines = []
    for record in results.records:
        if "error" in record and record["section"] != "checks":
            where = [record.get(key) for key in ("size", "dtype", "quantize", "batch", "prompt")]
            what = " ".join(str(x) for x in (record.get("engine"), *where) if x)
            lines.append(f"- {record['job']}: {what}: {record['error']}")
        if record["section"] == "note":
            lines.append(f"- {record['job']}: {record['text']}")
    return lines
