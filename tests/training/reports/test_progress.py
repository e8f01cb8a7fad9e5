"""Progress of a run: the bar of a terminal, and the lines elsewhere."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest

from gptx.training.callbacks import EvaluationRecord, StepRecord
from gptx.training.reports import progress
from gptx.training.reports.progress import CLEAR_LINE, WHOLES, Progress, Status, duration

STATUS = Status(1250, 2000, 1.8432, 0.8412, 6.1e-4, 21_345.0, 65.2, 1.912)


class Terminal(io.StringIO):
    """A text stream that says that it is a terminal, whose width is that of COLUMNS."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def trainer(steps: int, *, has_validation: bool = True) -> SimpleNamespace:
    sizes = {"n_parameters": 1000, "n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 16}
    return SimpleNamespace(
        settings=SimpleNamespace(steps=steps, sequences=4),
        config=SimpleNamespace(**sizes, vocab_size=65),
        data=SimpleNamespace(context=8, sequences_per_epoch=1500, has_validation=has_validation),
    )


def report(stream: io.StringIO, steps: int, *, every: int | None = None) -> Progress:
    """Report a run of some steps, with an evaluation in the middle."""
    shown = Progress(stream, every=every)
    shown.on_start(trainer(steps))
    for step in range(1, steps + 1):
        shown.on_step(StepRecord(step, 2.0, 1.0, 1e-3, 768, 0.1))
        if step == steps // 2:
            shown.on_evaluation(EvaluationRecord(step, 1.75, True, 0.1))
    return shown


def test_a_bar_of_the_usual_width() -> None:
    line = STATUS.bar(77)
    assert line == ("1250/2000 |████▍  | loss 1.843 val 1.912 norm 0.84 lr 6.1e-4 21.3k tok/s 1:05")
    assert len(line) == 77
    assert STATUS.bar(97).endswith(
        "| loss 1.843 val 1.912 norm 0.84 lr 6.1e-4 21.3k tok/s 1:05 left"
    )


@pytest.mark.parametrize("columns", range(1, 130))
def test_a_bar_fits(columns: int) -> None:
    line = STATUS.bar(columns)
    assert len(line) <= columns
    assert line.startswith("1250/2000"[:columns])
    if columns >= 20:
        assert "loss 1.843" in line


def test_a_narrow_bar_drops_the_least_important_figures() -> None:
    assert STATUS.bar(57) == "1250/2000 loss 1.843 val 1.912 norm 0.84 21.3k tok/s 1:05"
    assert STATUS.bar(35) == "1250/2000 loss 1.843 val 1.912 1:05"
    assert STATUS.bar(20) == "1250/2000 loss 1.843"


def test_the_bar_is_filled_at_the_end() -> None:
    begin, end = (Status(step, 10, 2.0, 1.0, 1e-3, 1.0, 0.0) for step in (0, 10))
    assert "█" not in begin.bar(79)
    assert f"|{27 * '█'}|" in end.bar(79)
    assert f"|{27 * '#'}|" in end.bar(79, WHOLES)


def test_a_line_elsewhere() -> None:
    assert STATUS.line() == (
        "step 1,250/2,000: loss 1.8432, norm 0.84, learning rate 6.1e-4, 21,345 tokens/s, 1:05 left"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (65.5, "1:06"), (3599.6, "1:00:00"), (90061, "25:01:01")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(8.6, "9"), (999.4, "999"), (999.6, "1.0k"), (21345, "21.3k"), (1e6, "1.0M")]
)
def test_rates(rate: float, text: str) -> None:
    assert f" {text} tok/s" in Status(1, 2, 1.0, 1.0, 1e-3, rate, 1.0).bar(100)


def test_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    report(stream, 1200).on_end(trainer(1200))
    lines = stream.getvalue().splitlines()
    assert lines[:2] == [
        "1,000 parameters, layers 2, heads 2, width 8, context 16, vocabulary 65",
        "1,200 steps of 4 sequences of 8 tokens, 3.2 epochs of 1,500",
    ]
    steps = [line for line in lines if line.startswith("step") and "tokens/s" in line]
    assert len(steps) == 100
    assert steps[0].startswith("step 12/1,200: loss 2.0000, norm 1.00, learning rate 1.0e-3, ")
    assert "step 600: validation loss 1.7500 (the best so far), training loss 2.0000" in lines
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_data_without_validation() -> None:
    stream = io.StringIO()
    Progress(stream).on_start(trainer(10, has_validation=False))
    assert stream.getvalue().endswith(" 0.0 epochs of 1,500, no validation\n")


def test_the_number_of_steps_between_two_lines() -> None:
    stream = io.StringIO()
    report(stream, 25, every=10)
    assert re.findall(r"^step (\d+)/25", stream.getvalue(), re.MULTILINE) == ["10", "20", "25"]


def test_a_terminal_has_one_status_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_DRAWINGS", 0.0)
    stream = Terminal()
    shown = report(stream, 4)
    *lines, last = stream.getvalue().split("\n")
    assert len(lines) == 3  # the model, the steps and the evaluation
    assert lines[2].endswith(f"{CLEAR_LINE}step 2: validation loss 1.7500 (the best so far), "
                             "training loss 2.0000")  # fmt: skip
    drawn = last.split(CLEAR_LINE)[1:]
    assert [text.split()[0] for text in drawn] == ["2/4", "3/4", "4/4"]
    assert [len(text) for text in drawn[1:]] == [97, 97]  # and room for ^C
    shown.on_end(trainer(4))
    assert stream.getvalue().endswith(CLEAR_LINE)


def test_a_fast_run_is_not_drawn_at_each_step() -> None:
    stream = Terminal()
    report(stream, 1000)
    assert stream.getvalue().count(CLEAR_LINE) < 500


def test_a_step_that_is_skipped_is_a_line_that_stays() -> None:
    stream = io.StringIO()
    shown = Progress(stream)
    shown.on_start(trainer(2))
    shown.on_step(StepRecord(1, float("nan"), float("nan"), 1e-3, 8, 0.1, "non-finite"))
    shown.on_step(StepRecord(2, 2.5, 1.5, 1e-3, 8, 0.1))
    assert "step 1: the update is skipped (non-finite)\n" in stream.getvalue()
    assert "step 2/2: loss 2.5000, norm 1.50," in stream.getvalue()  # means of finite numbers


def test_a_sample_cannot_control_the_terminal() -> None:
    stream = io.StringIO()
    Progress(stream).sample(500, "To be\n\tor\x1b[2J not\r\x07\n\n")
    assert stream.getvalue() == (
        "--- sample after 500 steps\nTo be\n\tor\ufffd[2J not\ufffd\ufffd\n---\n"
    )


def test_an_encoding_without_blocks_has_another_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Terminal, "encoding", "ascii")
    stream = Terminal()
    report(stream, 4)
    assert stream.getvalue().isascii()
    assert "|######" in stream.getvalue()
