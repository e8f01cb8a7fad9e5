"""Setups of a run, and the sources of its models."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import gptx
from gptx import config
from gptx.bench import sources
from gptx.bench.setups import Settings, Setup, plan_setups
from gptx.bench.sources import Source, open_sources, random_ids, write_source
from gptx.bench.worker import Worker
from gptx.config import GPT2Config
from gptx.conversions import convert
from gptx.errors import BackendError, NotFoundError, ParameterError, StorageError
from gptx.process import count_cores
from gptx.quantization import Quantization
from gptx.random_weights import random_weights
from tests.support.cli import raises_error

SMALL = Source("small", Path("small"), GPT2Config(n_positions=64))


def test_threads_are_one_for_each_core() -> None:
    [setup] = plan_setups(Settings(), [SMALL])
    assert setup.threads == count_cores() >= 1


def test_a_backend_without_threads_runs_once() -> None:
    pytest.importorskip("mlx.core")
    settings = Settings(backends=("numpy", "mlx"), threads=(1, 2))
    assert [(s.backend, s.threads) for s in plan_setups(settings, [SMALL])] == [
        ("numpy", 1),
        ("numpy", 2),
        ("mlx", None),
    ]
    with raises_error(BackendError, "threads is 2, but the mlx backend has no setting for threads"):
        plan_setups(Settings(backends=("mlx",), threads=(2,)), [SMALL])


def test_a_quantization_is_checked_before_any_measurement() -> None:
    int4 = Source("int4", Path("int4"), replace(SMALL.config, quantization=Quantization(64, 4)))
    assert len(plan_setups(Settings(dtypes=("int4", "float32")), [SMALL, int4])) == 4
    with raises_error(ParameterError, "are int4 in groups of 64 already, int8"):
        plan_setups(Settings(dtypes=("int8",)), [SMALL, int4])
    narrow = Source("narrow", Path("narrow"), GPT2Config(n_embd=48, n_head=1))
    with raises_error(ParameterError, "wte.weight has 48 inputs"):
        plan_setups(Settings(dtypes=("int8/float64",)), [narrow])


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float64", {"dtype": "float64"}),
        ("int8", {"quantize": "int8"}),
        ("int4/float64", {"quantize": "int4", "dtype": "float64"}),
    ],
)
def test_options_of_a_setup(dtype: str, options: dict[str, str]) -> None:
    setup = Setup("m", "f", dtype=dtype, threads=2, generic=True)
    expected = {"backend": "numpy", "threads": 2, "generic": True} | options
    assert setup.options == expected
    assert str(setup) == f"m numpy generic {dtype} 2 threads"


def test_random_weights_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(config.SIZES, "tiny", (2, 2, 8))
    monkeypatch.setitem(sources.SIZES, "tiny", (2, 2, 8))
    with open_sources(["random:tiny"]) as found:
        source = found["random:tiny"]
        write_source(source)
        before = (source.path / "model.safetensors").stat().st_mtime_ns
        write_source(source)  # already written
        assert (source.path / "model.safetensors").stat().st_mtime_ns == before
        model = gptx.load(source.path, generic=True)
        assert model.config == source.config == GPT2Config(n_layer=2, n_head=2, n_embd=8)
        np.testing.assert_array_equal(
            model.gpt2.weights.wte.weight, random_weights(model.config)["wte.weight"]
        )
        assert len(model.generate([1, 2, 3], max_tokens=3, ignore_eos=True).tokens) == 3
        del model
    assert not source.path.exists()


def test_random_weights_need_disk_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e6))
    with (
        open_sources(["random:124M"]) as found,
        raises_error(StorageError, "0.0 GB left, the weights of random:124M take 0.5 GB", "TMPDIR"),
    ):
        write_source(found["random:124M"])


def test_temporary_files_are_deleted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with raises_error(NotFoundError, "does not exist"), open_sources(["shakespeare", "./no"]):
        pass
    assert list(tmp_path.iterdir()) == []


def test_random_ids_repeat() -> None:
    ids = random_ids(SMALL.config, 2, 3)
    assert [len(row) for row in ids] == [3, 3]
    assert random_ids(SMALL.config, 2, 3) == ids != random_ids(SMALL.config, 2, 3, seed=1)


def test_a_file_is_measured_in_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker has another working folder, and prints no notes."""
    convert("shakespeare", tmp_path / "model", "staticgrad")
    monkeypatch.chdir(tmp_path)
    settings = Settings(models=("model",), generic=True, threads=(1,))
    with open_sources(settings.models) as found:
        assert found["model"].path == tmp_path / "model"
        assert found["model"].config.n_layer == 6
        [setup] = plan_setups(settings, found.values())
        with (tmp_path / "log").open("w+") as log, Worker(log=log) as worker:
            [size] = worker.run("tests.bench.worker_tasks:parameters", setup=asdict(setup))
            assert (tmp_path / "log").read_text() == ""
    assert size == {"model": "model", "parameters": 2_915_328}
