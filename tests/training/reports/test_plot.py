"""loss.png: what is drawn, and runs without it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptx.errors import StorageError
from gptx.training.callbacks import EvaluationRecord
from gptx.training.reports import plot
from gptx.training.reports.plot import LossPlot, draw

pytest.importorskip("matplotlib")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STEPS = [{"step": step, "loss": 4.0 - step / 500} for step in range(1, 1001)]
EVALUATIONS = [
    {"step": 0, "validation_loss": 4.2},
    {"step": 500, "validation_loss": 3.1},
    {"step": 1000, "validation_loss": 3.4},
]


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of each figure that is saved; no file is written, which takes long."""
    saved: list[Axes] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.extend(figure.axes))
    return saved


def labels(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def test_a_png_file(tmp_path: Path) -> None:
    assert draw([*STEPS, *EVALUATIONS], tmp_path / "loss.png", title="model")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]


def test_the_lines_and_their_labels(tmp_path: Path, axes: list[Axes]) -> None:
    draw([*STEPS, *EVALUATIONS], tmp_path / "loss.png", title="model")
    [ax] = axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "loss (nats per token)")
    assert ax.get_title(loc="left") == "model"
    assert labels(ax) == ["training, mean of 10 steps", "validation, best 3.1000 at step 500"]
    each, means, validation, ring = ax.lines
    assert list(map(len, (each.get_xdata(), means.get_xdata()))) == [1000, 100]
    assert means.get_xydata()[0].tolist() == pytest.approx([5.5, 4.0 - 5.5 / 500])
    assert validation.get_xydata().tolist() == [[0, 4.2], [500, 3.1], [1000, 3.4]]
    assert ring.get_xydata().tolist() == [[500, 3.1]]
    assert validation.get_marker() == "o"  # readable in gray
    assert validation.get_linestyle() == "--"


def test_one_spike_does_not_decide_the_scale(tmp_path: Path, axes: list[Axes]) -> None:
    draw([*STEPS[:500], {"step": 501, "loss": 500.0}, *STEPS[501:]], tmp_path / "loss.png")
    assert axes[0].get_ylim()[1] < 60


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        (STEPS[:1], ["training"]),
        (EVALUATIONS[:1], ["validation, best 4.2000 at step 0"]),
        ([{"step": 1, "loss": None}, *STEPS[1:50]], ["training"]),
    ],
    ids=["one step", "one evaluation", "a loss that is not finite"],
)
def test_short_runs(
    tmp_path: Path, axes: list[Axes], records: list[dict[str, Any]], expected: list[str]
) -> None:
    assert draw(records, tmp_path / "loss.png")
    assert labels(axes[0]) == expected


def test_no_plot_without_a_loss(tmp_path: Path) -> None:
    assert not draw([{"step": 1, "loss": None}], tmp_path / "loss.png")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written"):
        draw(STEPS, tmp_path / "none" / "loss.png")


def trainer(output: Path | None) -> Any:
    return SimpleNamespace(output=output, config=SimpleNamespace(n_parameters=812_345))


def run(output: Path | None) -> None:
    """Plot a run whose log has a few steps."""
    if output is not None:
        (output / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    callback = LossPlot()
    callback.on_start(trainer(output))
    callback.on_evaluation(EvaluationRecord(2, 1.5, True, 0.1))
    callback.on_end(trainer(output))


def test_a_run_has_its_plot_at_the_end(tmp_path: Path, axes: list[Axes]) -> None:
    run(tmp_path)
    [ax] = axes
    assert ax.get_title(loc="left") == f"{tmp_path.name}: 0.8M parameters"


def test_a_plot_at_an_evaluation(
    tmp_path: Path, axes: list[Axes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "SECONDS_BETWEEN_DRAWINGS", 0.0)
    run(tmp_path)
    assert len(axes) == 2


def test_a_run_without_an_output_or_without_matplotlib_has_none(
    tmp_path: Path, axes: list[Axes], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run(tmp_path)
    assert axes == []
