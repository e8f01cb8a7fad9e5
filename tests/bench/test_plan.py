"""What a benchmark plans to measure: the grid, the trials, the models."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import gptx
from gptx import config
from gptx.bench import grid, sources
from gptx.bench.machine import cores
from gptx.bench.plan import Settings, Setup, Trial, setups, trials
from gptx.bench.sources import Source
from gptx.config import GPT2Config
from gptx.errors import BackendError, NotFoundError, ParameterError, StorageError
from tests.support.bench import in_this_process, records
from tests.support.refusals import refused

SMALL = Source("small", Path("small"), GPT2Config(n_positions=64))
LARGE = Source("large", Path("large"), GPT2Config())


@pytest.mark.parametrize(
    ("trial", "name"),
    [
        (Trial(512, 0), "pp512"),
        (Trial(0, 128), "tg128"),
        (Trial(16, 0, 100), "pp16 @ d100"),
        (Trial(0, 128, 1000), "tg128 @ d1000"),
    ],
)
def test_trials_are_named_as_llama_bench_names_them(trial: Trial, name: str) -> None:
    assert str(trial) == name


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
    assert [str(trial) for trial in trials(Settings(**settings), source)] == names


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"prompts": (65,)}, "pp65 needs 65 tokens of context, small has 64"),
        ({"outputs": (64,)}, "tg64 needs 65 tokens of context, small has 64"),
        ({"outputs": (10,), "depths": (0, 60)}, "tg10 @ d60 needs 71 tokens"),
        ({"depths": (64,)}, "a depth of 64 needs 65 tokens of context"),
        ({"prompts": (0,), "outputs": (0,)}, "there is nothing to measure"),
    ],
)
def test_trials_that_cannot_be(settings: dict[str, Any], says: str) -> None:
    with refused(ParameterError, says):
        trials(Settings(**settings), SMALL)


def test_setups_are_every_combination() -> None:
    settings = Settings(
        dtypes=("float32", "float64", "int8", "int4"), threads=(1, 2), batches=(1, 8)
    )
    found = setups(settings, [SMALL, LARGE])
    expected = product(("small", "large"), settings.dtypes, (1, 2), (1, 8))
    assert [(s.model, s.dtype, s.threads, s.batch) for s in found] == list(expected)


def test_threads_are_one_for_each_core() -> None:
    [setup] = setups(Settings(), [SMALL])
    assert setup.threads == cores() >= 1


def test_a_backend_without_threads_runs_once() -> None:
    pytest.importorskip("mlx.core")
    settings = Settings(backends=("numpy", "mlx"), threads=(1, 2))
    assert [(s.backend, s.threads) for s in setups(settings, [SMALL])] == [
        ("numpy", 1),
        ("numpy", 2),
        ("mlx", None),
    ]
    with refused(BackendError, "threads is 2, but the mlx backend has no setting for threads"):
        setups(Settings(backends=("mlx",), threads=(2,)), [SMALL])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"backends": ("jax",)}, "backend is 'jax'"),
        ({"dtypes": ("float32", "float8")}, "dtype is 'float8'"),
        ({"dtypes": ("float16",)}, "dtype is 'float16', the numpy backend computes in float32"),
        ({"dtypes": ("int8/float16",)}, "dtype is 'float16', the numpy backend computes in"),
    ],
)
def test_setups_that_cannot_be(settings: dict[str, Any], says: str) -> None:
    with refused(BackendError, says):
        setups(Settings(**settings), [SMALL])


def test_only_quantized_weights_are_of_another_type_than_the_rest() -> None:
    with refused(ParameterError, "dtype is 'float32/float64': before the slash, expected"):
        setups(Settings(dtypes=("float32/float64",)), [SMALL])


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float64", {"dtype": "float64"}),
        ("int8", {"quantize": "int8"}),
        ("int4/float64", {"quantize": "int4", "dtype": "float64"}),
    ],
)
def test_a_setup_says_how_to_load(dtype: str, options: dict[str, str]) -> None:
    setup = Setup("m", "f", dtype=dtype, threads=2, generic=True)
    expected = {"backend": "numpy", "threads": 2, "generic": True} | options
    assert setup.options == expected
    assert str(setup) == f"m numpy generic {dtype} 2 threads"


def test_random_weights_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(config.SIZES, "tiny", (2, 2, 8))
    monkeypatch.setitem(sources.SIZES, "tiny", (2, 2, 8))
    with sources.sources(["random:tiny"]) as found:
        source = found["random:tiny"]
        sources.write(source)
        before = (source.folder / "model.safetensors").stat().st_mtime_ns
        sources.write(source)  # which is there already
        assert (source.folder / "model.safetensors").stat().st_mtime_ns == before
        model = gptx.load(source.folder, generic=True)
        assert model.config == source.config == GPT2Config(n_layer=2, n_head=2, n_embd=8)
        assert float(model.gpt2.weights.ln_f.weight.min()) == 1
        assert 0.019 < float(model.gpt2.weights.wte.weight.std()) < 0.021
        assert len(model.generate([1, 2, 3], max_tokens=3, ignore_eos=True).tokens) == 3
        del model
    assert not source.folder.exists()


def test_random_weights_need_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e6))
    with (
        sources.sources(["random:124M"]) as found,
        refused(StorageError, "0.0 GB left, the weights of random:124M take 0.5 GB", "TMPDIR"),
    ):
        sources.write(found["random:124M"])


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("random:9M", ParameterError, "expected one of random:124M, random:355M"),
        ("random:", ParameterError, "model is 'random:'"),
        ("./no-such-folder", NotFoundError, "does not exist"),
    ],
)
def test_models_that_are_not_there(name: str, kind: Any, says: str) -> None:
    with refused(kind, says), sources.sources([name]):
        pass


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with refused(NotFoundError, "does not exist"), sources.sources(["shakespeare", "./no"]):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_grid_is_complete(monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path]) -> None:
    ran = in_this_process(monkeypatch)
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
    # A process for each setup, and one for the memory of each backend and number of threads.
    assert [task for task, _ in ran] == ["bandwidth", *["speed"] * 8]
    for record in found:
        assert len(record["samples"]) == 2
        assert record["generic"] is True
        assert record["threads"] == 1
        assert record["bandwidth"] > 0
        assert (record["of_bandwidth"] is None) == (record["output"] == 0)


def test_bandwidth_is_measured_only_for_what_it_limits(
    monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path]
) -> None:
    ran = in_this_process(monkeypatch)
    settings = Settings(
        models=(str(folder()),), prompts=(2,), outputs=(0,), repetitions=1, generic=True
    )
    [record] = records(grid.run(settings))
    assert [task for task, _ in ran] == ["speed"]
    assert record["bandwidth"] is None
    assert record["of_bandwidth"] is None


def test_the_share_of_the_bandwidth() -> None:
    """8 sequences at 80 tokens a second are 10 steps, each reading 500 MB."""
    record = {"output": 5, "tokens_per_second": 80.0, "batch": 8, "read": 500e6}
    assert grid.with_bandwidth(record, 10e9)["of_bandwidth"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("limit", "counts"),
    [(1, (1,)), (2, (1, 2)), (4, (1, 2, 4)), (6, (1, 2, 4, 6)), (12, (1, 2, 4, 8, 12))],
)
def test_numbers_of_threads(limit: int, counts: tuple[int, ...]) -> None:
    assert grid.powers(limit) == counts
