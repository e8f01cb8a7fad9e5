"""What `compare.py` measured, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.compare.peers import PRECISIONS, READING, TABLE

# The figure for fastGPT's whole process, with 2 threads on another machine.
FASTGPT_SECONDS = 0.84


@dataclass
class Run:
    """All figures of one run.

    Attributes
    ----------
    about
        Model, threads, processor, date.
    engines
        For each engine its version, and the bytes of its weights.
    agreement
        For each engine how many greedy tokens are the reference's, and the error of its logits if
        it tells them.
    seconds
        By workload and engine, one number a round; for decoding, seconds a step.
    """

    about: dict[str, Any]
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    agreement: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def median(self, workload: str, name: str) -> float | None:
        """Seconds of one engine; None if that was not measured."""
        values = self.seconds.get(workload, {}).get(name)
        return float(np.median(values)) if values else None

    def ratio(self, workload: str, ours: str, theirs: str) -> float | None:
        """Our time in terms of theirs, which is that of the fastest whose name begins so."""
        found = [x for x in self.seconds.get(workload, {}) if x.startswith(theirs)]
        peers = [median for x in found if (median := self.median(workload, x))]
        median = self.median(workload, ours)
        return median / min(peers) if median and peers else None

    def bandwidth(self) -> float | None:
        """Bytes a second at which the weights can be read."""
        seconds = self.median(READING, READING)
        return self.engines[READING]["n_bytes"] / seconds if seconds else None

    def of_bandwidth(self, workload: str, name: str) -> float | None:
        """What a decode step makes of it: reading its weights takes that part of its time."""
        seconds, bandwidth = self.median(workload, name), self.bandwidth()
        if not seconds or not bandwidth:
            return None
        return float(self.engines[name]["n_bytes"] / bandwidth / seconds)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for one line of JSON."""
        rounded = {
            workload: {name: [round(x, 7) for x in values] for name, values in engines.items()}
            for workload, engines in self.seconds.items()
        }
        goals = [
            {"goal": f"{text} {sign} {limit}", "value": value and round(value, 4)}
            for text, sign, limit, value in goals_of(self)
        ]
        return self.about | {
            "engines": self.engines,
            "agreement": self.agreement,
            "seconds": rounded,
            "goals": goals,
        }


def results_table(run: Run, workloads: dict[str, Any]) -> str:
    """One row for each workload and engine."""
    lines = [
        "| workload | engine | median | quartiles | tokens/s | × fastest of its precision "
        "| × fastest | of the bandwidth |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for key, workload in workloads.items():
        found = run.seconds.get(key, {})
        medians = {name: float(np.median(values)) for name, values in found.items()}
        for name in sorted(medians, key=lambda name: (_rank(name), medians[name])):
            low, middle, high = np.percentile(found[name], [25, 50, 75])
            peers = min(m for other, m in medians.items() if _rank(other) == _rank(name))
            part = run.of_bandwidth(key, name) if workload.part == "step" else None
            rate = f"{workload.n_counted / middle:.0f}" if workload.n_counted else ""
            lines.append(
                f"| {workload.title} | {name} | {_ms(middle)} ms | {_ms(low)}–{_ms(high)} | {rate} "
                f"| {middle / peers:.2f} | {middle / min(medians.values()):.2f} "
                f"| {'' if part is None else f'{part:.2f}'} |"
            )
    if bandwidth := run.bandwidth():
        low, middle, high = (
            _ms(x) for x in np.percentile(run.seconds[READING][READING], [25, 50, 75])
        )
        lines.append(
            f"| reading the float32 weights once | NumPy | {middle} ms | {low}–{high} | | | "
            f"| {bandwidth / 1e9:.1f} GB/s |"
        )
    return "\n".join(lines)


def _rank(name: str) -> int:
    return PRECISIONS.index(TABLE[name].precision)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _goal(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


PAIRS = {"float32": "F32", "int8": "Q8_0", "int4": "Q4_0"}  # our precision -> llama.cpp's


def goals_of(run: Run) -> list[tuple[str, str, float, float | None]]:
    """What is asked for, the sign, the limit, and what this run has.

    llama.cpp's time is that of its faster variant. It keeps keys and values in float16: where they
    are many, at a long context and in the larger models, so does what it meets.
    """
    if run.about["size"] in ("355M", "774M", "1558M"):
        ratio = run.ratio("decode", "gptx int4, f16 cache", "llama.cpp Q4_0")
        return [("decode int4, f16 cache / llama.cpp Q4_0", "≤", 0.75, ratio)]
    goals: list[tuple[str, str, float, float | None]] = []
    for key, title, limits in (
        ("decode", "decode", (1.00, 0.72, 0.65)),
        ("deep", "decode at 1,000", (0.95, 0.65, 0.60)),
        ("prefill512", "prefill 512", (0.80, 0.85, 1.00)),
        ("prefill19", "prefill 19", (1.00, 1.00, 1.00)),
    ):
        for (ours, theirs), limit in zip(PAIRS.items(), limits, strict=True):
            kind = f"gptx {ours}, f16 cache" if key == "deep" else f"gptx {ours}"
            ratio = run.ratio(key, kind, f"llama.cpp {theirs}")
            what = f"{title} {kind.removeprefix('gptx ')} / llama.cpp {theirs}"
            goals.append((what, "≤", limit, ratio))
    part = run.of_bandwidth("decode", "gptx float32")
    goals.insert(1, ("decode float32, of the read bandwidth", "≥", 0.88, part))
    one, eight = run.median("decode", "gptx int8"), run.median("batch", "gptx int8")
    gain = 8 * one / eight if one and eight else None
    goals.append(("batch of 8, int8: tokens per second / batch of 1", "≥", 3.0, gain))
    whole = run.ratio("process", "gptx float32", "fastGPT float32")
    goals.append(("whole process float32 / fastGPT", "≤", 0.75, whole))
    seconds = run.median("process", "gptx float32")
    whole = seconds / FASTGPT_SECONDS if seconds else None
    goals.append(("whole process float32 / fastGPT's 0.84 s elsewhere", "≤", 0.75, whole))
    return goals


def goals_table(goals: Sequence[tuple[str, str, float, float | None]]) -> str:
    """Goals as `goals_of` gives them, and whether they are met."""
    lines = ["| goal | limit | here | |", "|---|---:|---:|---|"]
    for text, sign, limit, value in goals:
        if value is None:
            lines.append(f"| {text} | {sign} {_goal(limit)} | | not measured |")
            continue
        verdict = "met" if (value <= limit if sign == "≤" else value >= limit) else "missed"
        lines.append(f"| {text} | {sign} {_goal(limit)} | {_goal(value)} | {verdict} |")
    return "\n".join(lines)
