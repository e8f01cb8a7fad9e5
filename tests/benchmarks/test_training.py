"""The benchmark of training: engines on one batch, the check of their losses, the tables."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from benchmarks import training
from benchmarks.compare.engine_process import LeftOut
from benchmarks.training import (
    WORKLOADS,
    EngineProcess,
    Run,
    check_losses,
    list_goals,
    parse_options,
    results_table,
)
from benchmarks.training_peers import base
from benchmarks.training_peers.gptx_peer import GptxTraining
from benchmarks.training_peers.llm_c_peer import LlmCTraining
from tests.support.bench import parse_table
from tests.support.random_models import CASES, random_ids

TOKENS = random_ids(CASES["tiny"], 2, 9)


def steps(name: str, folder: Path, n: int) -> dict[str, Any]:
    """Run the tasks of a worker in this process."""
    [about] = base.load_engine(name, str(folder), 1, TOKENS.tolist())
    [found] = base.run_steps(n)
    return about | found


def test_gptx_trains_on_the_batch(folder: Callable[..., Path]) -> None:
    found = steps("gptx", folder(), 3)
    assert found["version"].startswith("gptx ")
    check_losses("gptx", found["losses"], found["losses"][0])
    assert len(found["seconds"]) == 3
    assert min(found["seconds"]) > 0
    assert found["peak_memory"] > 2**20


def test_a_missing_engine_is_left_out(
    folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLM_C", raising=False)
    options = argparse.Namespace(threads=1, isa=None)
    with pytest.raises(LeftOut, match=r"llm\.c is left out: LLM_C is not .*llm\.c, see"):
        EngineProcess("llm.c", folder(), TOKENS.tolist(), options, tmp_path / "log")


def test_engines_that_compute_something_else_are_left_out() -> None:
    check_losses("gptx", [5.0004, 4.9], 5.0)
    for losses, message in (
        ([5.001, 4.9], r"its loss is 5\.00100, not 5\.00000"),
        ([float("nan"), 4.9], "its loss is nan"),
        ([5.0, 5.0], r"its loss does not fall \(5\.0 to 5\.0\)"),
        ([5.0, float("nan")], "does not fall"),
    ):
        with pytest.raises(LeftOut, match=message):
            check_losses("gptx", losses, 5.0)


class FakeEngine:
    """An engine in the place of a process: absent, wrong, broken in the second round, or good."""

    closed: ClassVar[list[str]] = []

    def __init__(self, name: str, folder: Path, tokens: Any, threads: int, log: Path) -> None:
        if name == "PyTorch compiled":
            raise LeftOut(f"{name} is left out: no module")
        assert np.shape(tokens) == (12, 65)
        self.name, self.about, self.rounds = name, {"version": "1"}, 0

    def run_steps(self, n: int) -> dict[str, Any]:
        self.rounds += 1
        if self.name == "PyTorch eager" and self.rounds == 3:
            raise LeftOut(f"{self.name} is left out: it failed")
        losses = [4.0 + (self.name == "llm.c"), 3.0]
        return {"losses": losses, "seconds": [1.0, 5.0, 2.0], "peak_memory": self.rounds}

    def close(self) -> None:
        self.closed.append(self.name)


def test_a_workload_is_measured_in_rounds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "EngineProcess", FakeEngine)
    monkeypatch.setattr(training, "pause", lambda seconds: True)
    monkeypatch.setattr(FakeEngine, "closed", [])
    run = Run({"pauses": 0, "busy_pauses": 0})
    args = parse_options(["--rounds", "3"])
    training.measure(run, WORKLOADS["small-12x64"], Path("model"), args.engines, args)
    good, broken = run.records
    expected = {"workload": "small-12x64", "version": "1", "losses": [4.0, 3.0]}
    assert good == expected | {"engine": "gptx", "seconds": 3 * [2.0], "peak_memory": 4}
    assert broken == expected | {"engine": "PyTorch eager", "seconds": [2.0], "peak_memory": 2}
    assert run.about == {"pauses": 5, "busy_pauses": 5}
    assert sorted(FakeEngine.closed) == ["PyTorch eager", "gptx", "llm.c"]
    messages = capsys.readouterr().err
    for text in ("no module", "llm.c is left out: its loss is 5.00000", "it failed"):
        assert text in messages


def record(workload: str, engine: str, seconds: list[float], memory: float) -> dict[str, Any]:
    facts = {"workload": workload, "engine": engine, "version": f"{engine} 1"}
    return facts | {"seconds": seconds, "peak_memory": memory, "losses": [5.0]}


def test_the_tables() -> None:
    run = Run(
        {"instructions": "AVX2"},
        [
            record("124M-4x64", "gptx", [1.0, 2.0, 3.0], 1e9),
            record("124M-4x64", "PyTorch eager", [4.0], 2e9),
            record("124M-4x64", "llm.c", [], 0),
            record("small-4x256", "gptx", [0.5], 1e8),
        ],
    )
    rows = [list(row.values()) for row in parse_table(results_table(run))]
    assert rows == [
        ["124M-4x64", "gptx", "2,000 ms", "1,500–2,500", "128", "1,000 MB", "0.50", "0.50"],
        ["124M-4x64", "PyTorch eager", "4,000 ms", "4,000–4,000", "64", "2,000 MB", "1.00", "1.00"],
        ["small-4x256", "gptx", "500 ms", "500–500", "2,048", "100 MB", "–", "–"],
    ]
    assert [(goal.limit, goal.value) for goal in list_goals(run)] == [
        (0.75, 0.5),
        (0.8, 0.5),
        (0.75, None),
    ]
    run.about["instructions"] = "AVX-512"
    assert list_goals(run)[0].limit == 0.95
    assert run.to_dict()["goals"][0]["verdict"] == "met"


def test_options() -> None:
    args = parse_options(["--workloads", "small-12x64", "--engines", "gptx", "--rounds", "2"])
    assert (args.workloads, args.engines, args.rounds) == (["small-12x64"], ["gptx"], 2)


def test_llm_c_has_the_same_loss(folder: Callable[..., Path]) -> None:
    if "LLM_C" not in os.environ:
        pytest.skip("LLM_C is not set to the folder of a clone of karpathy/llm.c")
    with closing(LlmCTraining(folder(), 1, TOKENS)) as engine:
        losses = [step.loss for step in engine.steps(3)]
        assert engine.peak_memory() > 2**20
    check_losses("llm.c", losses, GptxTraining(folder(), 1, TOKENS).step())


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of the compiler, by itself
@pytest.mark.parametrize("name", ["PyTorch eager", "PyTorch compiled"])
def test_pytorch_has_the_same_losses(name: str, folder: Callable[..., Path]) -> None:
    pytest.importorskip("transformers")
    found = steps(name, folder(), 4)
    np.testing.assert_allclose(found["losses"], steps("gptx", folder(), 4)["losses"], rtol=1e-5)
