"""The grid: trials, the work that they measure, the figures, and the records of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptx.backends import get_backend
from gptx.bench import grid
from gptx.bench.grid import Trial, TrialRunner, plan_trials, trial_figures, weights_bytes
from gptx.bench.setups import GREEDY, Settings
from gptx.bench.sources import Source
from gptx.config import GPT2Config
from gptx.conversions import convert
from gptx.generation.engine import TokenGenerator
from gptx.generation.text_model import Model
from gptx.quantization import Quantization
from tests.emulator import cupy_stand_in
from tests.support.backends import make_backend
from tests.support.bench import records, run_in_process
from tests.support.models import make_model
from tests.support.random_models import CASES

SMALL = Source("small", Path("small"), GPT2Config(n_positions=64))
LARGE = Source("large", Path("large"), GPT2Config())


# In the worker


@pytest.fixture(params=["numpy", "mlx"])
def model(request: pytest.FixtureRequest) -> Model:
    if request.param == "numpy":
        return make_model(CASES["124M"], get_backend("numpy", generic=True, threads=1))
    return make_model(CASES["124M"], make_backend(request.param))


@pytest.mark.parametrize("batch", [1, 3])
def test_reading_gives_the_engine_s_token(
    model: Model, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache holds the same text at any depth, whatever the order of the trials."""
    trials = [Trial(4, 0, 20), Trial(7, 0, 0), Trial(9, 0, 10), Trial(0, 3, 20)]
    runner = TrialRunner(model, batch, trials)
    chosen: list[Any] = []
    real = type(model.backend).to_numpy
    monkeypatch.setattr(
        model.backend, "to_numpy", lambda x: chosen.append(real(model.backend, x)) or chosen[-1]
    )
    for trial in [*trials[:3], *reversed(trials)]:
        del chosen[:]
        assert min(runner.run(trial)) > 0
        texts = [text[: trial.depth + trial.prompt] for text in runner.texts]
        if trial.prompt:
            first = next(iter(TokenGenerator(model.gpt2, texts, GREEDY, max_tokens=1)))
            assert chosen[0].tolist() == [token.id for token in first]


@pytest.mark.parametrize(("batch", "depth"), [(1, 0), (1, 20), (3, 0), (3, 20)])
def test_generating_takes_the_steps_of_the_engine(
    model: Model, batch: int, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[list[int | None]] = []
    real = TokenGenerator.__iter__

    def spied(run: TokenGenerator) -> Any:
        for step in real(run):
            steps.append([token.id for token in step])
            yield step

    monkeypatch.setattr(TokenGenerator, "__iter__", spied)
    trial = Trial(0, 5, depth)
    runner = TrialRunner(model, batch, [trial])
    seconds = runner.run(trial)
    assert len(seconds) == 5
    assert min(seconds) > 0
    counted = list(steps)
    assert len(counted) == 6  # the first comes before the clock starts
    prompts = [text[: depth + 1] for text in runner.texts]
    assert counted == [
        [token.id for token in step]
        for step in real(TokenGenerator(model.gpt2, prompts, GREEDY, max_tokens=6))
    ]


def test_the_end_of_a_text_does_not_end_a_trial() -> None:
    config = replace(CASES["124M"], eos_token_id=0)
    model = make_model(config, get_backend("numpy", generic=True, threads=1))
    model.gpt2.weights.wte.weight[:] = 0  # all logits are equal, so token 0 is the best
    assert model.generate([1], max_tokens=9).tokens == []
    assert len(TrialRunner(model, 1, [Trial(0, 9)]).run(Trial(0, 9))) == 9


def test_the_figures_of_a_trial() -> None:
    two = trial_figures(Trial(10, 0, 3), 4, [9.0], [[1.0], [2.0]])
    assert two["test"] == "pp10 @ d3"
    assert two["tokens_per_second"] == 30
    assert two["tokens_per_second_sd"] == pytest.approx(np.std([40, 20], ddof=1))
    assert two["seconds_per_token"] == 1.5 / 40
    assert two["time_to_first_token"] == 1.5
    assert two["samples"] == [1.0, 2.0]
    assert two["first_run"] == 9
    assert two["step_p50"] is two["step_p99"] is None
    one = trial_figures(Trial(0, 4), 1, [7.0, 1.0], [[0.25, 0.25, 0.5, 1.0]])
    assert one["tokens_per_second"] == 2
    assert one["tokens_per_second_sd"] is None
    assert one["time_to_first_token"] is None
    assert one["first_run"] == 8
    assert one["step_p50"] == 0.375
    assert 0.9 < one["step_p99"] < 1


def test_a_setup_is_measured(folder: Callable[..., Path]) -> None:
    path = folder("124M", dtype="float16")
    setup = {"model": "m", "path": str(path), "threads": 1, "generic": True}
    events = list(grid.measure(setup, [[3, 0, 0], [0, 2, 1]], repetitions=2))
    assert [event["progress"] for event in events[:-2]] == [
        "pp3, warm-up",
        "tg2 @ d1, warm-up",
        "pp3, round 1 of 2",
        "tg2 @ d1, round 1 of 2",
        "pp3, round 2 of 2",
        "tg2 @ d1, round 2 of 2",
    ]
    for event in events[-2:]:
        assert len(event["samples"]) == 2
        assert event["parameters"] == CASES["124M"].n_parameters
        assert event["size"] == 4 * CASES["124M"].n_parameters
        assert event["read"] == event["size"] - 4 * 64 * 96
        assert event["load_time"] > 0
        assert event["peak_memory"] >= 0
        assert event["dtype"] == "float32"
        assert event["kernels"] is None
        assert event["device"] is None
        assert "path" not in event


@pytest.mark.parametrize(
    ("case", "quantization", "size", "read"),
    [
        ("tiny", None, 4, "all but wpe"),
        ("untied", None, 4, "all but wpe and wte"),
        ("124M", Quantization(32, 4), None, "all but wpe"),
    ],
)
def test_bytes_of_the_weights(
    case: str, quantization: Quantization | None, size: int | None, read: str
) -> None:
    config = CASES[case]
    model = make_model(
        config, make_backend("mlx" if quantization else "numpy"), quantization=quantization
    )
    shapes = config.tensor_shapes()
    whole, step = weights_bytes(model.gpt2)
    skipped = 4 * int(np.prod(shapes["wpe.weight"]))
    if "wte" in read:
        skipped += 4 * int(np.prod(shapes["wte.weight"]))
    assert whole - step == skipped
    if size:
        assert whole == size * config.n_parameters
    else:  # 4 bits a weight, a scale and an offset for 32 weights, and some floats
        assert 0.75 * config.n_parameters < whole < 1.5 * config.n_parameters


def test_the_dtype_of_quantized_weights(folder: Callable[..., Path], tmp_path: Path) -> None:
    """Quantize floats to the type of the setup, and keep the type of quantized files."""
    floats, int8 = folder("355M"), tmp_path / "quantized"
    convert(floats, int8, quantize="int8")
    for path, given, dtype in (
        (floats, "int8", "int8"),
        (floats, "int4/float64", "int4/float64"),
        (int8, "float32", "int8"),
    ):
        setup = {"model": "m", "path": str(path), "dtype": given, "threads": 1, "generic": True}
        assert list(grid.measure(setup, [[2, 0, 0]], 1))[-1]["dtype"] == dtype


def test_a_gpu_is_measured(folder: Callable[..., Path]) -> None:
    with cupy_stand_in.installed():
        setup = {"model": "m", "path": str(folder()), "backend": "cupy"}
        *progress, read, generated = grid.measure(setup, [[3, 0, 0], [0, 2, 4]], repetitions=1)
    turns = [event["progress"] for event in progress if "pp3" in event["progress"]]
    assert turns == ["pp3, warm-up"] * 7 + ["pp3, round 1 of 1"]
    assert len(read["samples"]) == 1
    assert read["threads"] is None
    assert read["library"].startswith("cupy ")
    assert read["device"] == "a stand-in, number 0"
    assert read["size"] == 4 * CASES["tiny"].n_parameters
    assert read["peak_memory"] > read["size"]  # of the pool
    assert read["time_to_first_token"] > 0
    assert 0 < generated["step_p50"] <= generated["step_p99"]
    assert generated["kernels"] > 0


# In the parent process


@pytest.mark.parametrize(
    ("settings", "source", "names"),
    [
        ({}, LARGE, ["pp512", "tg128"]),
        ({}, SMALL, ["pp64", "tg63"]),
        ({"depths": (0, 60)}, SMALL, ["pp4", "tg3", "pp4 @ d60", "tg3 @ d60"]),
        ({"depths": (63,)}, SMALL, ["pp1 @ d63"]),
        ({"prompts": (1, 8), "outputs": (2,)}, SMALL, ["pp1", "pp8", "tg2"]),
        ({"prompts": (0,)}, LARGE, ["tg128"]),
        ({"outputs": (0,)}, LARGE, ["pp512"]),
        ({"prompts": (0, 5), "outputs": (0,), "depths": (1, 2)}, SMALL, ["pp5 @ d1", "pp5 @ d2"]),
        ({"prompts": (64,), "outputs": (63,)}, SMALL, ["pp64", "tg63"]),
    ],
)
def test_trials(settings: dict[str, Any], source: Source, names: list[str]) -> None:
    assert [str(trial) for trial in plan_trials(Settings(**settings), source)] == names


def test_the_grid_is_complete(monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path]) -> None:
    tasks = run_in_process(monkeypatch)
    models = (str(folder("tiny", "a")), str(folder("124M", "b")))
    settings = Settings(
        models=models,
        dtypes=("float32", "float64"),
        threads=(1,),
        batches=(1, 2),
        prompts=(4,),
        outputs=(3,),
        depths=(0, 5),
        repetitions=2,
        generic=True,
    )
    found = records(grid.run(settings))
    trial_names = ("pp4", "tg3", "pp4 @ d5", "tg3 @ d5")
    expected = product(models, settings.dtypes, settings.batches, trial_names)
    assert [(r["model"], r["dtype"], r["batch"], r["test"]) for r in found] == list(expected)
    # A worker for each setup, and one for each backend and number of threads.
    assert tasks == ["gptx.bench.machine:measure_bandwidth", *["gptx.bench.grid:measure"] * 8]
    for record in found:
        assert len(record["samples"]) == 2
        assert record["generic"] is True
        assert record["threads"] == 1
        assert record["bandwidth"] > 0
        assert (record["of_bandwidth"] is None) == (record["output"] == 0)


def test_bandwidth_is_measured_only_for_generating(
    monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path]
) -> None:
    tasks = run_in_process(monkeypatch)
    settings = Settings(
        models=(str(folder()),), prompts=(2,), outputs=(0,), repetitions=1, generic=True
    )
    [record] = records(grid.run(settings))
    assert tasks == ["gptx.bench.grid:measure"]
    assert record["bandwidth"] is None
    assert record["of_bandwidth"] is None


def test_the_share_of_the_bandwidth() -> None:
    """8 sequences at 80 tokens a second are 10 steps, each reading 500 MB."""
    record = {"output": 5, "tokens_per_second": 80.0, "batch": 8, "read": 500e6}
    assert grid.add_bandwidth(record, 10e9)["of_bandwidth"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("limit", "counts"),
    [(1, (1,)), (2, (1, 2)), (4, (1, 2, 4)), (6, (1, 2, 4, 6)), (12, (1, 2, 4, 8, 12))],
)
def test_numbers_of_threads(limit: int, counts: tuple[int, ...]) -> None:
    assert grid.powers_of_two(limit) == counts
