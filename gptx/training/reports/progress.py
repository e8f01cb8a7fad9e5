"""Progress of a run on standard error: a bar on a terminal, a line now and then elsewhere.

A terminal shows one status line, which the next one overwrites. Evaluations, samples and notes are
lines that stay.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TextIO

from gptx.training.callbacks import Callback, EvaluationRecord, StepRecord

CLEAR_LINE = "\r\x1b[K"
SECONDS_BETWEEN_DRAWINGS = 0.1
RECENT_STEPS = 50
MIN_BAR_COLUMNS, MAX_BAR_COLUMNS = 6, 42
WIDE_COLUMNS = 90  # of a line with room for more words
EIGHTHS = " ▏▎▍▌▋▊▉█"  # of a column of the bar
WHOLES = " #"  # for encodings without those
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # of a control character in a sample


@dataclass(frozen=True)
class Status:
    """The figures of a status line.

    Attributes
    ----------
    step, steps
        Number of steps that are done, and number of steps of the run.
    loss, norm
        Means of the loss and of the gradient's norm over the last `RECENT_STEPS` steps.
    learning_rate
        Learning rate of the last step.
    tokens_per_second
        Rate over the last `RECENT_STEPS` steps, without evaluations.
    seconds_left
        Estimated time to the end of the run.
    validation_loss
        Loss of the last evaluation; None before the first one.
    """

    step: int
    steps: int
    loss: float
    norm: float
    learning_rate: float
    tokens_per_second: float
    seconds_left: float
    validation_loss: float | None = None

    def line(self) -> str:
        """Return the figures as a sentence."""
        return (
            f"step {self.step:,}/{self.steps:,}: loss {self.loss:.4f}, norm {self.norm:.2f}, "
            f"learning rate {_scientific(self.learning_rate)}, "
            f"{self.tokens_per_second:,.0f} tokens/s, {duration(self.seconds_left)} left"
        )

    def bar(self, columns: int, levels: str = EIGHTHS) -> str:
        """Return a bar and the figures in at most `columns` columns.

        A narrow line drops the bar, then figures: learning rate, norm, rate, validation loss, time.
        """
        figures = {
            "step": f"{self.step:{len(str(self.steps))}}/{self.steps}",
            "loss": f"loss {self.loss:.3f}",
            "validation": "" if self.validation_loss is None else f"val {self.validation_loss:.3f}",
            "norm": f"norm {self.norm:.2f}",
            "learning_rate": f"lr {_scientific(self.learning_rate)}",
            "rate": f"{_thousands(self.tokens_per_second)} tok/s",
            "time": duration(self.seconds_left) + (" left" if columns >= WIDE_COLUMNS else ""),
        }
        for name in ("", "learning_rate", "norm", "rate", "validation", "time", "loss"):
            figures.pop(name, None)
            first, *others = filter(None, figures.values())
            room = columns - len(" ".join([first, *others]))
            if room >= 0:
                break
        if room - 1 >= MIN_BAR_COLUMNS:
            others.insert(0, self._blocks(min(room - 1, MAX_BAR_COLUMNS), levels))
        return " ".join([first, *others])[:columns]

    def _blocks(self, width: int, levels: str) -> str:
        """Return a bar of `width` columns, filled to the share of the steps that are done."""
        width -= 2  # the ends
        full = len(levels) - 1
        filled = min(self.step, self.steps) * width * full // self.steps
        blocks = (levels[max(0, min(full, filled - full * i))] for i in range(width))
        return f"|{''.join(blocks)}|"


class Progress(Callback):
    """Show the progress of a run on a text stream.

    Parameters
    ----------
    stream
        Standard error, or another text stream.
    every
        Number of steps between two lines, if the stream is no terminal. None: a hundredth of the
        run, at least 10.
    """

    def __init__(self, stream: TextIO, *, every: int | None = None) -> None:
        self._stream = stream
        self._every = every
        self._on_terminal = stream.isatty()
        self._levels = EIGHTHS if _encodes(stream, EIGHTHS) else WHOLES
        self._recent: deque[StepRecord] = deque(maxlen=RECENT_STEPS)
        self._validation_loss: float | None = None
        self._first: tuple[int, float] | None = None  # number and end of the first step
        self._drawn = -math.inf  # time of the last drawing
        self._status = ""  # the line that the next one overwrites
        self._steps = 0

    def on_start(self, trainer: Any) -> None:
        config, data, settings = trainer.config, trainer.data, trainer.settings
        self._steps = settings.steps
        n = data.sequences_per_epoch
        validation = "" if data.has_validation else ", no validation"
        self.note(
            f"{config.n_parameters:,} parameters, layers {config.n_layer}, heads {config.n_head}, "
            f"width {config.n_embd}, context {config.n_positions}, vocabulary {config.vocab_size}\n"
            f"{settings.steps:,} steps of {settings.sequences} sequences of {data.context} tokens, "
            f"{settings.steps * settings.sequences / n:.1f} epochs of {n:,}{validation}"
        )

    def on_step(self, record: StepRecord) -> None:
        self._recent.append(record)
        now = time.monotonic()
        if self._first is None:  # compiles: its time says nothing about the others
            self._first = (record.step, now)
        if record.skipped:
            self.note(f"step {record.step:,}: the update is skipped ({record.skipped})")
        last = record.step == self._steps
        if self._on_terminal:
            if last or now - self._drawn >= SECONDS_BETWEEN_DRAWINGS:
                self._drawn = now
                status = self._figures(record, now)
                self._draw(status.bar(_columns(self._stream) - len("^C "), self._levels))
        elif last or record.step % (self._every or max(10, math.ceil(self._steps / 100))) == 0:
            self._write(f"{self._figures(record, now).line()}\n")

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self._validation_loss = record.validation_loss
        mark = " (the best so far)" if record.is_best else ""
        loss = _mean([step.loss for step in self._recent])
        training = f", training loss {loss:.4f}" if self._recent else ""
        self.note(
            f"step {record.step:,}: validation loss {record.validation_loss:.4f}{mark}{training}"
        )

    def on_end(self, trainer: Any) -> None:
        if self._status:
            self._draw("")

    def sample(self, step: int, text: str) -> None:
        """Show a text that the model generated after a step."""
        shown = "".join(c if c.isprintable() or c in "\n\t" else REPLACEMENT for c in text)
        self.note(f"--- sample after {step:,} steps\n{shown.rstrip()}\n---")

    def note(self, text: str) -> None:
        """Write a text that stays, and the status line below it again."""
        status = self._status
        if status:
            self._draw("")
        self._write(f"{text}\n")
        if status:
            self._draw(status)

    def _figures(self, record: StepRecord, now: float) -> Status:
        assert self._first is not None
        first, start = self._first
        # The first step has no other to go by.
        seconds = (now - start) / (record.step - first) if record.step > first else record.seconds
        recent = self._recent
        return Status(
            record.step,
            self._steps,
            _mean([step.loss for step in recent]),
            _mean([step.norm for step in recent]),
            record.learning_rate,
            sum(step.tokens for step in recent) / max(sum(step.seconds for step in recent), 1e-9),
            (self._steps - record.step) * seconds,
            self._validation_loss,
        )

    def _draw(self, status: str) -> None:
        self._status = status
        self._write(CLEAR_LINE + status)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def duration(seconds: float) -> str:
    """Return a time as minutes and seconds, "1:05"; with hours, "2:01:05"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _scientific(x: float) -> str:
    """Return a number as "1.0e-3", without the zeros of Python's exponent."""
    mantissa, exponent = f"{x:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _thousands(x: float) -> str:
    """Return a rate as "812", "21.3k" or "1.2M"."""
    if x < 999.5:
        return f"{x:.0f}"
    return f"{x / 1e3:.1f}k" if x < 999.95e3 else f"{x / 1e6:.1f}M"


def _mean(values: Iterable[float]) -> float:
    """Return the mean of the finite values; NaN if there are none."""
    finite = [x for x in values if math.isfinite(x)]
    return sum(finite) / len(finite) if finite else math.nan


def _encodes(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _columns(stream: TextIO) -> int:
    """Return the width of a terminal now: a window changes its size."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns
