"""Plots of the grid: rate, time and speedup by threads, and rate by context; PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptx.bench.tables import count
from gptx.bench.worker import Event
from gptx.errors import ParameterError, argument
from gptx.files import atomic_file
from gptx.plot_style import STYLE as COMMON_STYLE

# Okabe and Ito's colors are distinct for readers with color blindness.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vPX"
DASHES = ("-", "--", ":", "-.")  # the next one for each further round of colors
IDEAL = "ideal"
STYLE: dict[Any, Any] = {
    **COMMON_STYLE,
    "axes.titlesize": 11,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "gptx",  # the same plot gives the same file
}
PNG_DPI = 200
PANELS = {"prompt": "reading a prompt", "output": "generating"}


def _rate(record: Event) -> float:
    return float(record["tokens_per_second"])


def _rate_deviation(record: Event) -> float | None:
    deviation: float | None = record["tokens_per_second_sd"]
    return deviation


@dataclass(frozen=True)
class Plot:
    """A plot: its file, its labels, the field on the x axis, and the number on the y axis."""

    file: str
    title: str
    x: str = "threads"
    x_label: str = "threads"
    y_label: str = "tokens per second"
    y: Callable[[Event], float] = _rate
    deviation: Callable[[Event], float | None] = lambda record: None
    relative: bool = False  # to the first point of each line; the ideal line is y = x
    example: str = "-t 1,2"  # option that gives several x


PLOTS = (
    Plot("tokens-per-second-by-threads", "Speed by number of threads", deviation=_rate_deviation),
    Plot(
        "seconds-per-token-by-threads",
        "Time of a token by number of threads",
        y_label="milliseconds per token",
        y=lambda r: 1e3 * r["seconds_per_token"],
    ),
    Plot(
        "speedup-by-threads",
        "Speedup by number of threads",
        y_label="times as fast",
        relative=True,
    ),
    Plot(
        "tokens-per-second-by-context",
        "Speed by length of the context",
        "depth",
        "tokens in the cache before",
        deviation=_rate_deviation,
        example="-d 0,512",
    ),
)


def prepare_folder(folder: str) -> Path:
    """Make the folder and import matplotlib, before any measurement.

    Raises
    ------
    ParameterError
        matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ParameterError(
            f"{argument('plot')} needs matplotlib, which cannot be imported ({error}): "
            "run `pip install '.[plot]'` in a checkout of gptx"
        ) from error
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    return path


def draw(records: Sequence[Event], folder: Path) -> tuple[list[Path], list[str]]:
    """Draw the plots that the records have at least two x for.

    Backends without a number of threads are in the plot by context only.

    Returns
    -------
    written, omitted
        The files, and a sentence about each plot that is not drawn.
    """
    import matplotlib

    written, omitted = [], []
    with matplotlib.rc_context(STYLE):
        for plot in PLOTS:
            chosen = [record for record in records if record[plot.x] is not None]
            if len({record[plot.x] for record in chosen}) < 2:
                omitted.append(
                    f"{plot.file} is not drawn: it needs results for at least two numbers of "
                    f"{plot.x_label}, such as {plot.example}"
                )
                continue
            figure = _figure(plot, chosen)
            for ending, options in (
                ("png", {"dpi": PNG_DPI}),
                ("svg", {"metadata": {"Date": None}}),
            ):
                path = folder / f"{plot.file}.{ending}"
                with atomic_file(path) as file:
                    figure.savefig(file, format=ending, **options)
                written.append(path)
    return written, omitted


def _figure(plot: Plot, records: Sequence[Event]) -> Any:
    from matplotlib.figure import Figure

    panels = {}
    for kind, title in PANELS.items():
        if chosen := [record for record in records if record[kind]]:
            lengths = {record[kind] for record in chosen}
            length = f", {count(lengths.pop(), 'token')}" if len(lengths) == 1 else ""
            panels[title + length] = _lines(chosen, plot)
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    figure = Figure(figsize=(1.0 + 4.6 * len(panels), 4.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    figure.suptitle(f"{plot.title}\n", x=0.01, ha="left", weight="bold", size=13)
    figure.text(0.01, 0.925, _subtitle(records), ha="left", va="top", color="#555555", size=9)
    shown: dict[str, Any] = {}
    for ax, (title, lines) in zip(axes, panels.items(), strict=True):
        ax.set_title(title, loc="left")
        ax.set_xlabel(plot.x_label)
        ax.set_ylabel(plot.y_label)
        shown |= _panel(ax, plot, lines, labels)
    if len(shown) > 1:
        ordered = sorted(shown, key=[*labels, IDEAL].index)
        handles = [shown[label] for label in ordered]
        figure.legend(handles, ordered, loc="outside right center")
    return figure


def _lines(records: Sequence[Event], plot: Plot) -> dict[str, list[Event]]:
    """Group the records to lines: label -> points."""
    names = [name for name in FIELDS if name != plot.x and len({r[name] for r in records}) > 1]
    lines: dict[str, list[Event]] = {}
    for record in sorted(records, key=lambda record: record[plot.x]):
        label = ", ".join(filter(None, (FIELDS[name](record) for name in names)))
        lines.setdefault(label or "all", []).append(record)
    return lines


def _panel(
    ax: Any, plot: Plot, lines: dict[str, list[Event]], labels: Sequence[str]
) -> dict[str, Any]:
    """Draw lines, styled by their index in `labels`; return label -> handle for the legend."""
    shown = {}
    highest = 0.0
    for label, points in lines.items():
        number = labels.index(label)
        unit = plot.y(points[0]) / points[0][plot.x] if plot.relative else 1.0
        x = [point[plot.x] for point in points]
        y = [plot.y(point) / unit for point in points]
        deviations = [plot.deviation(point) or 0.0 for point in points]
        style: dict[str, Any] = {
            "color": COLORS[number % len(COLORS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": DASHES[number // len(COLORS) % len(DASHES)],
        }
        [shown[label]] = ax.plot(x, y, **style)
        ax.errorbar(x, y, deviations, fmt="none", ecolor=style["color"], capsize=3)
        highest = max(highest, *(a + b for a, b in zip(y, deviations, strict=True)))
    ticks = sorted({point[plot.x] for points in lines.values() for point in points})
    if plot.relative:
        highest = max(highest, ticks[-1])
        [shown[IDEAL]] = ax.plot(ticks, ticks, color="#888888", linestyle="--", zorder=1)
    ax.set_xticks(_thin_out(ticks))
    ax.margins(x=0.08)
    ax.set_ylim(0, 1.08 * highest)
    ax.yaxis.set_major_formatter("{x:,.6g}")
    return shown


def _thin_out(ticks: Sequence[int]) -> list[int]:
    """Return the ticks whose labels do not overlap, from the last one down."""
    kept = [ticks[-1]]
    for tick in reversed(ticks[:-1]):
        if kept[-1] - tick >= 0.06 * (ticks[-1] - ticks[0]):
            kept.append(tick)
    return kept


FIELDS: dict[str, Callable[[Event], str]] = {
    "model": lambda r: r["model"],
    "backend": lambda r: r["backend"],
    "generic": lambda r: "generic" if r["generic"] else "",
    "dtype": lambda r: r["dtype"],
    "threads": lambda r: count(r["threads"], "thread") if r["threads"] else "",
    "batch": lambda r: f"batch {r['batch']}",
    "prompt": lambda r: f"{r['prompt']} tokens" if r["prompt"] else "",
    "output": lambda r: f"{r['output']} tokens" if r["output"] else "",
    "depth": lambda r: f"after {count(r['depth'], 'token')}",
}
DEFAULTS = {"batch": 1, "depth": 0}  # not shown


def _subtitle(records: Sequence[Event]) -> str:
    """Name the fields that all records share."""
    first = records[0]
    shared = [name for name in FIELDS if all(record[name] == first[name] for record in records)]
    parts = [FIELDS[name](first) for name in shared if first[name] != DEFAULTS.get(name)]
    return " · ".join(filter(None, [*parts, first["cpu"], first["date"][:10]]))
