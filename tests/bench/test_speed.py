"""What a benchmark measures is what the engine does; and what it makes of the seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptx.backends import Backend, get_backend
from gptx.bench import bandwidth, machine, speed
from gptx.bench.plan import Trial
from gptx.bench.speed import Bench, record, weights_bytes
from gptx.generation.api import Model
from gptx.generation.engine import TokenGenerator
from gptx.quantization import Quantization
from gptx.random_weights import random_weights
from gptx.weights import quantize_weights
from tests.emulator import cupy_stand_in as cupy_on_cpu
from tests.support.backends import make_backend
from tests.support.conversions import save
from tests.support.models import make_model
from tests.support.random_models import CASES


@pytest.fixture(params=["numpy-generic", "mlx"])
def model(request: pytest.FixtureRequest) -> Model:
    return make_model(CASES["124M"], make_backend(request.param))


@pytest.mark.parametrize("batch", [1, 3])
def test_reading_gives_the_engine_s_token(
    model: Model, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any depth and in any order: the cache holds the same text."""
    trials = [Trial(4, 0, 20), Trial(7, 0, 0), Trial(9, 0, 10), Trial(0, 3, 20)]
    bench = Bench(model, batch, trials)
    chosen: list[Any] = []
    real = type(model.backend).to_numpy
    monkeypatch.setattr(
        model.backend, "to_numpy", lambda x: chosen.append(real(model.backend, x)) or chosen[-1]
    )
    for trial in [*trials[:3], *reversed(trials)]:
        del chosen[:]
        assert min(bench.run(trial)) > 0
        texts = [text[: trial.depth + trial.prompt] for text in bench.texts]
        if trial.prompt:
            first = next(iter(TokenGenerator(model.gpt2, texts, speed.GREEDY, max_tokens=1)))
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
    bench = Bench(model, batch, [trial])
    seconds = bench.run(trial)
    assert len(seconds) == 5
    assert min(seconds) > 0
    counted = list(steps)
    assert len(counted) == 6  # the first comes before the clock starts
    prompts = [text[: depth + 1] for text in bench.texts]
    assert counted == [
        [token.id for token in step]
        for step in real(TokenGenerator(model.gpt2, prompts, speed.GREEDY, max_tokens=6))
    ]


def test_the_end_of_a_text_does_not_end_a_trial() -> None:
    config = replace(CASES["124M"], eos_token_id=0)
    model = make_model(config, get_backend("numpy", generic=True))
    model.gpt2.weights.wte.weight[:] = 0  # all logits are equal, and the first token is taken
    assert model.generate([1], max_tokens=9).tokens == []
    assert len(Bench(model, 1, [Trial(0, 9)]).run(Trial(0, 9))) == 9


def test_the_numbers_of_a_record() -> None:
    two = record(Trial(10, 0, 3), 4, [9.0], [[1.0], [2.0]])
    assert two["test"] == "pp10 @ d3"
    assert two["tokens_per_second"] == 30
    assert two["tokens_per_second_sd"] == pytest.approx(np.std([40, 20], ddof=1))
    assert two["seconds_per_token"] == 1.5 / 40
    assert two["time_to_first_token"] == 1.5
    assert two["samples"] == [1.0, 2.0]
    assert two["first_run"] == 9
    assert two["step_p50"] is two["step_p99"] is None
    one = record(Trial(0, 4), 1, [7.0, 1.0], [[0.25, 0.25, 0.5, 1.0]])
    assert one["tokens_per_second"] == 2
    assert one["tokens_per_second_sd"] is None
    assert one["time_to_first_token"] is None
    assert one["first_run"] == 8
    assert one["step_p50"] == 0.375
    assert 0.9 < one["step_p99"] < 1


def test_a_setup_is_measured(folder: Callable[..., Path]) -> None:
    path = folder("124M", dtype="float16")
    setup = {"model": "m", "folder": str(path), "threads": 1, "generic": True}
    events = list(speed.measure(setup, [[3, 0, 0], [0, 2, 1]], repetitions=2))
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
        assert "folder" not in event


@pytest.mark.parametrize(
    ("case", "how", "size", "read"),
    [
        ("tiny", None, 4, "all but wpe"),
        ("untied", None, 4, "all but wpe and wte"),
        ("124M", Quantization(32, 4), None, "all but wpe"),
    ],
)
def test_bytes_of_the_weights(
    case: str, how: Quantization | None, size: int | None, read: str
) -> None:
    config = CASES[case]
    model = make_model(config, make_backend("mlx" if how else "numpy"), how=how)
    shapes = config.tensor_shapes()
    whole, step = weights_bytes(model.gpt2)
    skipped = 4 * int(np.prod(shapes["wpe.weight"]))
    if "wte" in read:
        skipped += 4 * int(np.prod(shapes["wte.weight"]))
    assert whole - step == skipped
    if size:
        assert whole == size * config.n_parameters
    else:  # codes of 4 bits, a scale and a bias for 32 of them, and some floats
        assert 0.75 * config.n_parameters < whole < 1.5 * config.n_parameters


@pytest.mark.parametrize("dtype", ["int8", "int4/float64"])
def test_quantized_weights_are_named_as_they_are_asked_for(
    folder: Callable[..., Path], dtype: str
) -> None:
    path, generic = str(folder("355M")), {"model": "m", "threads": 1, "generic": True}
    event = list(speed.measure({"folder": path, "dtype": dtype, **generic}, [[2, 0, 0]], 1))[-1]
    assert event["dtype"] == dtype


def test_quantized_files_are_named_so(tmp_path: Path) -> None:
    config = CASES["124M"]
    weights, quantized = quantize_weights(random_weights(config), config, Quantization(32, 8))
    save(tmp_path, quantized, weights)
    setup = {"model": "m", "folder": str(tmp_path), "threads": 1, "generic": True}
    event = list(speed.measure(setup, [[2, 0, 0]], repetitions=1))[-1]
    assert event["dtype"] == "int8"


def test_a_gpu_is_measured(folder: Callable[..., Path]) -> None:
    with cupy_on_cpu.installed():
        setup = {"model": "m", "folder": str(folder("124M")), "backend": "cupy"}
        *progress, read, generated = speed.measure(setup, [[3, 0, 0], [0, 2, 4]], repetitions=1)
    turns = [event["progress"] for event in progress if "pp3" in event["progress"]]
    assert turns == ["pp3, warm-up"] * 7 + ["pp3, round 1 of 1"]
    assert len(read["samples"]) == 1
    assert read["threads"] is None
    assert read["library"].startswith("cupy ")
    assert read["device"] == "a stand-in, number 0"
    assert read["size"] == 4 * CASES["124M"].n_parameters
    assert read["peak_memory"] > read["size"]  # of the pool
    assert read["time_to_first_token"] > 0
    assert 0 < generated["step_p50"] <= generated["step_p99"]
    assert generated["kernels"] > 0


@pytest.mark.parametrize("name", ["numpy", "mlx", "cupy-cpu"])
def test_bandwidth_of_a_backend(name: str) -> None:
    backend = make_backend(name)
    assert 1e7 < bandwidth.read(backend, 1_000_000) < 1e13


def test_the_buffer_is_larger_than_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(bandwidth, "read", lambda _, n_bytes: asked.append(n_bytes) or 1.0)
    for cache in (0, 200_000_000, 10**12):
        monkeypatch.setattr(bandwidth, "largest_cache", lambda cache=cache: cache)
        assert list(bandwidth.measure("numpy", 1)) == [{"bandwidth": 1.0}]
    assert asked == [256_000_000, 400_000_000, 2_000_000_000]
    monkeypatch.setattr(Backend, "device_name", lambda _: "a GPU", raising=True)
    monkeypatch.setattr(bandwidth, "largest_cache", lambda: 0)
    list(bandwidth.measure("numpy", 1))
    assert asked[3:] == [2_000_000_000]


def test_what_the_machine_is() -> None:
    about = machine.about(get_backend("numpy"))
    assert about["library"] == f"numpy {np.__version__}"
    assert about["cores"] >= 1
    assert all(isinstance(about[name], str) for name in ("cpu", "date", "gptx", "python", "blas"))
