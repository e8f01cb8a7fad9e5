"""The registry of `gptx bench`: the grid, and the presets that end in other tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gptx.bench import ablation, budget, grid, total
from gptx.bench.setups import Settings
from gptx.bench.tables import Column
from gptx.bench.worker import Event, Events

COMMON = frozenset({"models", "threads", "prompts", "outputs", "repetitions", "offline"})


@dataclass(frozen=True)
class Preset:
    """A row of the registry.

    Attributes
    ----------
    run
        The generator of progress and records.
    columns
        The columns of its markdown table, given the records.
    takes
        The fields of `Settings` that it uses, and "plot".
    """

    run: Callable[[Settings], Events]
    columns: Callable[[Sequence[Event]], Sequence[Column]]
    takes: frozenset[str]


GRID = Preset(
    grid.run,
    grid.columns,
    COMMON | {"backends", "dtypes", "batches", "depths", "generic", "plot"},
)

TABLE = {
    "ablation": Preset(ablation.run, lambda _: ablation.COLUMNS, COMMON),
    "threads": Preset(grid.run_threads, grid.columns, GRID.takes - {"threads"}),
    "budget": Preset(
        budget.run, budget.columns, COMMON - {"outputs"} | {"backends", "dtypes", "budget"}
    ),
    "total": Preset(total.run, lambda _: total.COLUMNS, COMMON | {"backends", "dtypes", "generic"}),
}
