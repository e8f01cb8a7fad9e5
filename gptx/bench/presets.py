"""What `gptx bench` can run: the grid, and the presets that end in the tables people know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gptx.bench import budget, grid, ladder, report, total
from gptx.bench.plan import Settings
from gptx.bench.process import Event, Events
from gptx.bench.report import Column

EVERYWHERE = frozenset({"models", "threads", "prompts", "outputs", "repetitions", "offline"})


@dataclass(frozen=True)
class Preset:
    """One row of the table below.

    Attributes
    ----------
    run
        Yields progress and records.
    columns
        Of its markdown table, given the records.
    takes
        The fields of `Settings` that mean something to it.
    """

    run: Callable[[Settings], Events]
    columns: Callable[[Sequence[Event]], Sequence[Column]]
    takes: frozenset[str]


GRID = Preset(
    grid.run,
    report.grid_columns,
    EVERYWHERE | {"backends", "dtypes", "batches", "depths", "generic", "plot"},
)

TABLE = {
    "ablation": Preset(ladder.run, lambda _: report.ABLATION, EVERYWHERE),
    "threads": Preset(grid.threads, report.grid_columns, GRID.takes - {"threads"}),
    "budget": Preset(
        budget.run,
        report.budget_columns,
        EVERYWHERE - {"outputs"} | {"backends", "dtypes", "budget"},
    ),
    "total": Preset(
        total.run, lambda _: report.TOTAL, EVERYWHERE | {"backends", "dtypes", "generic"}
    ),
}
