"""Goals of a benchmark, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptx.bench import tables
from gptx.bench.tables import Column


@dataclass(frozen=True)
class Goal:
    """A figure that a benchmark aims at.

    Attributes
    ----------
    sign, limit
        "≥" or "≤", and the number.
    value
        The measured number; None if it was not measured.
    """

    text: str
    sign: str
    limit: float
    value: float | None

    @property
    def verdict(self) -> str:
        """ "met", "missed" or "not measured"."""
        if self.value is None:
            return "not measured"
        met = self.value <= self.limit if self.sign == "≤" else self.value >= self.limit
        return "met" if met else "missed"


def goals_table(goals: Sequence[Goal]) -> str:
    """Render goals, their limits, values and verdicts."""
    columns = (
        Column("goal", lambda r: r["text"], right=False),
        Column("limit", lambda r: f"{r['sign']} {_goal_number(r['limit'])}"),
        Column(
            "here", lambda r: tables.NOTHING if r["value"] is None else _goal_number(r["value"])
        ),
        Column("", lambda r: r["verdict"], right=False),
    )
    return tables.markdown([vars(goal) | {"verdict": goal.verdict} for goal in goals], columns)


def _goal_number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"
