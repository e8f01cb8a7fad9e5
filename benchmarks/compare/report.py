"""The tables of the comparison: results and goals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.compare.peers import PRECISIONS, TABLE
from benchmarks.compare.workloads import WORKLOADS
from benchmarks.goals import Goal
from benchmarks.instruction_sets import is_restricted
from gptx.bench.tables import NOTHING, Column, markdown, ratio

FASTGPT_SECONDS = 0.84  # fastGPT's whole process with 2 threads, on another machine
# With AVX2, at most this part of the time of the fastest other engine that is restricted to it.
AVX2_LIMITS = {
    "decode": (0.95, 0.70, 0.65),
    "deep": (0.80, 0.60, 0.60),
    "prefill19": (0.90, 0.85, 0.85),
    "prefill512": (0.90, 0.80, 0.80),
    "batch": (0.85, 0.75, 0.75),
    "process": (1.00, 1.10, 1.10),
}
PAIRS = {"float32": "F32", "int8": "Q8_0", "int4": "Q4_0"}  # precision of gptx -> of llama.cpp


@dataclass
class Run:
    """All figures of one run.

    Attributes
    ----------
    about
        Model, threads, processor, date.
    engines
        Version and bytes of the weights of each engine.
    agreement
        For each engine, the number of greedy tokens that equal the reference's, and the error of
        its logits if it reports them.
    seconds
        By workload and engine, a number for each round; for decoding, the seconds of a step.
    bandwidth
        Bytes per second at which the memory was read in each round.
    """

    about: dict[str, Any]
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    agreement: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    bandwidth: list[float] = field(default_factory=list)

    def median(self, workload: str, name: str) -> float | None:
        """Return the seconds of an engine; None if they were not measured."""
        values = self.seconds.get(workload, {}).get(name)
        return float(np.median(values)) if values else None

    def compare(self, workload: str, ours: str, prefix: str) -> float | None:
        """Return the time of an engine relative to the fastest whose name begins with `prefix`."""
        names = [name for name in self.seconds.get(workload, {}) if name.startswith(prefix)]
        peers = [median for name in names if (median := self.median(workload, name))]
        median = self.median(workload, ours)
        return median / min(peers) if median and peers else None

    def unrestricted(self) -> list[str]:
        """Return the engines that may use instructions beyond those of `--isa`."""
        isa = self.about["isa"]
        return [
            name
            for name, engine in self.engines.items()
            if not is_restricted(isa, name, engine["version"])
        ]

    def compare_to_restricted(self, workload: str, ours: str) -> float | None:
        """Return the time of gptx relative to the fastest other engine of the same precision."""
        peers = [
            median
            for name in self.seconds.get(workload, {})
            if _rank(name) == _rank(ours) and not name.startswith("gptx")
            if name not in self.unrestricted() and (median := self.median(workload, name))
        ]
        median = self.median(workload, ours)
        return median / min(peers) if median and peers else None

    def bandwidth_share(self, workload: str, name: str) -> float | None:
        """Return the share of a decode step's time that reading the weights takes."""
        seconds = self.median(workload, name)
        if not seconds or not self.bandwidth:
            return None
        return float(self.engines[name]["n_bytes"] / np.median(self.bandwidth) / seconds)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, for one line of JSON."""
        rounded = {
            workload: {name: [round(x, 7) for x in values] for name, values in engines.items()}
            for workload, engines in self.seconds.items()
        }
        goals = [
            {
                "goal": f"{goal.text} {goal.sign} {goal.limit}",
                "value": goal.value and round(goal.value, 4),
            }
            for goal in list_goals(self)
        ]
        return self.about | {
            "engines": self.engines,
            "agreement": self.agreement,
            "seconds": rounded,
            "bandwidth": self.bandwidth,
            "goals": goals,
        }


COLUMNS = (
    Column("workload", lambda r: r["workload"], right=False),
    Column("engine", lambda r: r["engine"], right=False),
    Column("median", lambda r: f"{_ms(r['quartiles'][1])} ms"),
    Column("quartiles", lambda r: f"{_ms(r['quartiles'][0])}–{_ms(r['quartiles'][2])}"),
    Column("tokens/s", lambda r: r["rate"]),
    Column("× fastest of its precision", lambda r: ratio(r["to_peers"])),
    Column("× fastest", lambda r: ratio(r["to_all"])),
    Column("of the bandwidth", lambda r: ratio(r["share"])),
)


def results_table(run: Run, workloads: Iterable[str]) -> str:
    """Render a row for each workload and engine, and the bandwidth."""
    table = markdown([row for key in workloads for row in _rows(run, key)], COLUMNS)
    if not run.bandwidth:
        return table
    low, median, high = np.percentile(run.bandwidth, [25, 50, 75]) / 1e9
    return f"{table}\n\nmemory read at {median:.1f} GB/s ({low:.1f}–{high:.1f})"


def _rows(run: Run, key: str) -> Iterator[dict[str, Any]]:
    workload, seconds = WORKLOADS[key], run.seconds.get(key, {})
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    for name in sorted(medians, key=lambda name: (_rank(name), medians[name])):
        median = medians[name]
        yield {
            "workload": workload.title,
            "engine": name,
            "quartiles": np.percentile(seconds[name], [25, 50, 75]),
            "rate": f"{workload.n_counted / median:.0f}" if workload.n_counted else NOTHING,
            "to_peers": median / min(m for x, m in medians.items() if _rank(x) == _rank(name)),
            "to_all": median / min(medians.values()),
            "share": run.bandwidth_share(key, name) if workload.part == "step" else None,
        }


def _rank(name: str) -> int:
    return PRECISIONS.index(TABLE[name].precision)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def list_goals(run: Run) -> list[Goal]:
    """Return the goals of gptx for the size of this run.

    They depend on the processor. llama.cpp's time is that of its faster variant. Its keys and
    values are float16. At a long context and in the larger models, where they count, gptx is
    compared with a float16 cache too.
    """
    if run.about["size"] in ("355M", "774M", "1558M"):
        value = run.compare("decode", "gptx int4, f16 cache", "llama.cpp Q4_0")
        return [Goal("decode int4, f16 cache / llama.cpp Q4_0", "≤", 0.75, value)]
    if run.about["instructions"] == "AVX2":
        return list(_avx2_goals(run))
    goals: list[Goal] = []
    for key, title, limits in (
        ("decode", "decode", (1.00, 0.72, 0.65)),
        ("deep", "decode at 1,000", (0.95, 0.65, 0.60)),
        ("prefill512", "prefill 512", (0.80, 0.85, 1.00)),
        ("prefill19", "prefill 19", (1.00, 1.00, 1.00)),
    ):
        for (ours, theirs), limit in zip(PAIRS.items(), limits, strict=True):
            name = f"gptx {ours}, f16 cache" if key == "deep" else f"gptx {ours}"
            text = f"{title} {name.removeprefix('gptx ')} / llama.cpp {theirs}"
            goals.append(Goal(text, "≤", limit, run.compare(key, name, f"llama.cpp {theirs}")))
    share = run.bandwidth_share("decode", "gptx float32")
    goals.insert(1, Goal("decode float32, of the read bandwidth", "≥", 0.88, share))
    one, eight = run.median("decode", "gptx int8"), run.median("batch", "gptx int8")
    gain = 8 * one / eight if one and eight else None
    goals.append(Goal("batch of 8, int8: tokens per second / batch of 1", "≥", 3.0, gain))
    whole = run.compare("process", "gptx float32", "fastGPT float32")
    goals.append(Goal("whole process float32 / fastGPT", "≤", 0.75, whole))
    seconds = run.median("process", "gptx float32")
    whole = seconds / FASTGPT_SECONDS if seconds else None
    goals.append(Goal("whole process float32 / fastGPT's 0.84 s elsewhere", "≤", 0.75, whole))
    return goals


def _avx2_goals(run: Run) -> Iterator[Goal]:
    for key, limits in AVX2_LIMITS.items():
        for precision, limit in zip(PAIRS, limits, strict=True):
            name = f"gptx {precision}, f16 cache" if key == "deep" else f"gptx {precision}"
            text = f"{WORKLOADS[key].title}, {name.removeprefix('gptx ')} / others"
            yield Goal(text, "≤", limit, run.compare_to_restricted(key, name))
            if key == "decode" and precision == "float32":
                share = run.bandwidth_share(key, name)
                yield Goal("or: of the read bandwidth", "≥", 0.95, share)
