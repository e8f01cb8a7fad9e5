"""Autotuning between graphs of one pass, on the stand-in for CuPy."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.emulator.cupy_stand_in import installed


class Clock:
    """The device's clock, and the letters of the launched graphs."""

    def __init__(self) -> None:
        self.now, self.launched = 0.0, ""


class Event:
    def __init__(self, clock: Clock) -> None:
        self.clock, self.time = clock, 0.0

    def record(self) -> None:
        self.time = self.clock.now

    def synchronize(self) -> None:
        pass


class Graph:
    """A graph whose launches take these times; the last one repeats."""

    def __init__(self, clock: Clock, name: str, times: list[float]) -> None:
        self.clock, self.name, self.times = clock, name, list(times)

    def launch(self) -> None:
        self.clock.launched += self.name
        self.clock.now += self.times.pop(0) if len(self.times) > 1 else self.times[0]


@pytest.fixture
def module() -> Iterator[Any]:
    with installed():
        yield importlib.import_module("gptx.backends.cuda.capture")


@pytest.mark.parametrize(
    ("a", "b", "faster"),
    [([2.0], [1.0], "b"), ([1.0], [2.0], "a"), ([1.0], [1.0], "a"), ([1.0], [9.0, 0.9], "b")],
)
def test_the_faster_graph_is_chosen_after_timed_launches(
    module: Any, monkeypatch: pytest.MonkeyPatch, a: list[float], b: list[float], faster: str
) -> None:
    clock, cuda = Clock(), module.cupy.cuda
    monkeypatch.setattr(cuda, "Event", lambda: Event(clock))
    monkeypatch.setattr(cuda, "get_elapsed_time", lambda start, end: end.time - start.time)
    graphs = module.AutotunedGraph({False: Graph(clock, "a", a), True: Graph(clock, "b", b)})
    for i in range(12):
        assert (graphs.chosen is None) == (i < 6)
        graphs.launch()
    assert clock.launched == "abbaab" + 6 * faster
    assert graphs.chosen == (faster == "b")


def test_a_single_graph_is_not_timed(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.delattr(module.cupy.cuda, "Event")
    graphs = module.AutotunedGraph({True: Graph(clock, "a", [1.0])})
    for _ in range(3):
        graphs.launch()
    assert clock.launched == "aaa"
    assert graphs.chosen is True
