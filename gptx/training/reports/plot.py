"""A plot of a run: training loss and validation loss by step, as a PNG file."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptx.files import atomic_file
from gptx.plot_style import STYLE
from gptx.training.callbacks import Callback, EvaluationRecord
from gptx.training.reports import log_file

NAME = "loss.png"
PNG_DPI = 160
SECONDS_BETWEEN_DRAWINGS = 30.0
MAX_POINTS, MAX_MEANS = 2000, 100  # of the line of all losses, and of the line of their means
# Okabe and Ito's blue and vermilion differ for readers with color blindness; markers in gray.
TRAINING, VALIDATION, EACH_STEP, TEXT = "#0072b2", "#d55e00", "#c9d3dd", "#444444"

Point = tuple[float, float]


class LossPlot(Callback):
    """Draw `loss.png` beside the log of a run, at evaluations and at the end.

    It does nothing for a run that saves nothing, and without matplotlib.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._title = ""
        self._drawn = time.monotonic()

    def on_start(self, trainer: Any) -> None:
        if trainer.output is not None and is_available():
            self._folder = trainer.output
            size = trainer.config.n_parameters / 1e6
            self._title = f"{trainer.output.resolve().name}: {size:,.1f}M parameters"

    def on_evaluation(self, record: EvaluationRecord) -> None:
        if time.monotonic() - self._drawn >= SECONDS_BETWEEN_DRAWINGS:
            self._draw()

    def on_end(self, trainer: Any) -> None:
        self._draw()

    def _draw(self) -> None:
        if self._folder is not None:
            records = log_file.read_log(self._folder / log_file.NAME)
            draw(records, self._folder / NAME, title=self._title)
            self._drawn = time.monotonic()


def is_available() -> bool:
    """Return True if matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(records: Iterable[Mapping[str, Any]], path: str | Path, *, title: str = "") -> bool:
    """Draw the records of a log to a PNG file.

    Parameters
    ----------
    records
        Records of `gptx.training.reports.log_file.read_log`. The `loss` of a step and the
        `validation_loss` of an evaluation are drawn; null is left out.
    path
        The file to write.
    title
        Title of the plot.

    Returns
    -------
    bool
        False if the records have no loss, so that there is nothing to draw.

    Raises
    ------
    StorageError
        The file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    records = list(records)
    losses = _points(records, "loss")
    validation = _points(records, "validation_loss")
    if not losses and not validation:
        return False
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.subplots()
        shown = [*_plot_losses(axes, losses), *_plot_validation(axes, validation)]
        # A spike of one step does not decide the scale.
        low, high = (pick(y for _, y in shown) for pick in (min, max))
        margin = 0.05 * (high - low) or 0.1
        axes.set_ylim(low - 2 * margin, high + margin)
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats per token)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.xaxis.set_major_formatter("{x:,.6g}")
        axes.set_title(title, loc="left")
        axes.legend(loc="upper right")
        with atomic_file(path) as file:
            figure.savefig(file, format="png", dpi=PNG_DPI)
    return True


def _plot_losses(axes: Any, losses: Sequence[Point]) -> list[Point]:
    """Draw the losses of all steps in pale, and their means over them; return the means."""
    if not losses:
        return []
    size = _group_size(losses, MAX_MEANS)
    means = _means(losses, size)
    label, marker = "training", "o" if len(means) == 1 else ""
    if size > 1:
        each = _means(losses, _group_size(losses, MAX_POINTS))
        axes.plot(*_columns(each), color=EACH_STEP, linewidth=0.8)
        label = f"training, mean of {size:,} steps"
    axes.plot(*_columns(means), marker, color=TRAINING, linewidth=1.8, label=label)
    return means


def _plot_validation(axes: Any, validation: Sequence[Point]) -> Sequence[Point]:
    """Draw the validation losses, with a ring around the lowest one; return them."""
    if validation:
        style = {"color": VALIDATION, "linewidth": 1.8, "linestyle": "--", "marker": "o"}
        step, loss = min(validation, key=lambda point: point[1])
        label = f"validation, best {loss:.4f} at step {step:,}"
        axes.plot(*_columns(validation), markeredgecolor="white", label=label, **style)
        axes.plot(step, loss, "o", markersize=11, markerfacecolor="none", color=TEXT)
    return validation


def _points(records: Iterable[Mapping[str, Any]], name: str) -> list[Point]:
    return [(record["step"], record[name]) for record in records if record.get(name) is not None]


def _group_size(points: Sequence[Point], most: int) -> int:
    """Return the size of groups of neighbors, of which there are at most `most`."""
    return -(-len(points) // most) or 1


def _means(points: Sequence[Point], size: int) -> list[Point]:
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x) / len(x), sum(y) / len(y)) for x, y in (_columns(group) for group in groups)]


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
