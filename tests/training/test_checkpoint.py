"""gptx.training.checkpoint: resumed runs, ended processes, full disks."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptx
from gptx.errors import DataError, NotFoundError, ParameterError, StorageError
from gptx.safetensors_file import read_safetensors
from gptx.training import checkpoint
from gptx.training.trainer import Trainer
from tests.support.backends import make_backend
from tests.support.conversions import Failing, contents
from tests.support.training import (
    CONFIG,
    Records,
    TinyData,
    arrays_of,
    assert_same_arrays,
    tiny_settings,
)


def make_trainer(output: Path | None, **options: Any) -> Trainer:
    changes = options.pop("settings", {})
    data = options.pop("data", None) or TinyData()
    options.setdefault("backend", make_backend("numpy-generic"))  # compiles nothing
    return Trainer(CONFIG, data, tiny_settings(**changes), output=output, **options)


# Backend, its options, settings, and the step of the resumption.
RESUMED: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "numpy": ("numpy", {}, {"dropout": 0.1}, 10),
    "numpy-threads": ("numpy", {"threads": 2}, {"trainable": ["h.*"]}, 10),
    "mlx": ("mlx", {}, {}, 10),
    "mlx-float16": ("mlx", {"dtype": "float16"}, {}, 3),
    "generic-float64": ("numpy-generic", {"dtype": "float64"}, {}, 3),
    "generic-sgd": ("numpy-generic", {}, {"optimizer": "sgd", "momentum": 0.9}, 3),
    "generic-parts": ("numpy-generic", {}, {"accumulate": 2, "batch_size": 2}, 3),
}


@pytest.mark.parametrize("name", RESUMED)
def test_ten_steps_and_ten_are_twenty(name: str, tmp_path: Path) -> None:
    """A resumed run has the optimizer, and does not repeat batches.

    nanoGPT #467, build-nanogpt #83, mlx-lm #97.
    """
    library, options, settings, n = RESUMED[name]
    settings = {"eval_every": n // 2, "steps": 2 * n, **settings}

    def backend() -> Any:
        return make_backend(library, **options)

    whole_records, records = Records(), Records()
    whole = make_trainer(None, settings=settings, backend=backend(), callbacks=[whole_records])
    result = whole.run()
    make_trainer(
        tmp_path, settings={**settings, "steps": n}, backend=backend(), callbacks=[records]
    ).run()
    data = TinyData()
    resumed = make_trainer(
        tmp_path, settings=settings, data=data, backend=backend(), callbacks=[records], resume=True
    )
    assert resumed.run().loss == result.loss
    assert data.steps == list(range(n, 2 * n))
    assert_same_arrays(arrays_of(resumed), arrays_of(whole))
    assert resumed.state == whole.state
    numbers = [(r.step, r.loss, r.norm, r.learning_rate) for r in whole_records.steps]
    assert [(r.step, r.loss, r.norm, r.learning_rate) for r in records.steps] == numbers
    losses = [(r.step, r.validation_loss, r.is_best) for r in whole_records.evaluations]
    assert [(r.step, r.validation_loss, r.is_best) for r in records.evaluations] == losses


def test_the_folder_is_a_model_folder(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "a" / "run")
    trainer.run()
    folder = tmp_path / "a" / "run"
    model = ["config.json", "model.safetensors"]
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "last", model[1]]
    own = ["optimizer.safetensors", "training.json"]
    assert sorted(p.name for p in (folder / "last").iterdir()) == sorted(model + own)
    loaded = gptx.load(folder / "last")
    assert loaded.config == CONFIG
    assert np.array_equal(loaded.gpt2.weights.wte.weight, trainer.parameters.weights["wte.weight"])
    data = json.loads((folder / "config.json").read_text())
    assert (data["model_type"], data["torch_dtype"]) == ("gpt2", "float32")
    tensors, metadata = read_safetensors(folder / "model.safetensors")
    assert set(tensors) == set(CONFIG.tensor_shapes())
    assert metadata == {"format": "pt"}


# Folders that a run may not write


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    """The wrong folder is sampled, the wrong file trained: nanoGPT #161, llm.c #77."""
    (tmp_path / "thesis.txt").write_text("text")
    for overwrite in (False, True):
        with pytest.raises(ParameterError, match=r"is not the folder of a run, it has thesis\.txt"):
            make_trainer(tmp_path, overwrite=overwrite)
    with pytest.raises(ParameterError, match="is a file, expected the name of a folder"):
        make_trainer(tmp_path / "thesis.txt")
    with pytest.raises(NotFoundError, match="has no run to resume"):
        make_trainer(tmp_path, resume=True)
    assert contents(tmp_path) == {"thesis.txt": b"text"}


def test_a_run_is_replaced_only_on_request(tmp_path: Path) -> None:
    make_trainer(tmp_path, settings={"steps": 2}).run()
    before = contents(tmp_path / "last")
    with pytest.raises(ParameterError, match=r"has a run already: continue it with resume=True"):
        make_trainer(tmp_path, settings={"steps": 3})
    assert contents(tmp_path / "last") == before
    trainer = make_trainer(tmp_path, settings={"steps": 3, "seed": 1}, overwrite=True)
    assert not (tmp_path / "model.safetensors").exists(), "files of two runs would be mixed"
    trainer.run()
    assert make_trainer(tmp_path, settings={"steps": 3, "seed": 1}, resume=True).state.step == 3


def test_resume_and_overwrite_contradict_each_other(ten_steps: Path) -> None:
    with pytest.raises(ParameterError, match="give one of them"):
        make_trainer(ten_steps, settings={"steps": 10}, resume=True, overwrite=True)
    assert (ten_steps / "model.safetensors").exists(), "the best weights would be lost"


def test_a_replaced_run_may_be_the_model_to_start_from(tmp_path: Path) -> None:
    make_trainer(tmp_path, settings={"steps": 2}).run()
    tensors, _ = read_safetensors(tmp_path / "model.safetensors")
    options: dict[str, Any] = {"output": tmp_path, "overwrite": True}
    with pytest.raises(ParameterError, match="no weight"):
        Trainer(tmp_path, TinyData(), tiny_settings(trainable=["x"]), **options)
    assert (tmp_path / "model.safetensors").exists(), "an error loses nothing"
    tuned = Trainer(tmp_path, TinyData(), tiny_settings(), **options)
    np.testing.assert_array_equal(tuned.parameters.weights["wpe.weight"], tensors["wpe.weight"])


def test_the_replaced_run_may_have_another_size(tmp_path: Path) -> None:
    """No file of the old model stays beside the new weights."""
    make_trainer(tmp_path, settings={"steps": 1}).run()
    config = replace(CONFIG, n_layer=1)
    Trainer(config, TinyData(), tiny_settings(steps=1), output=tmp_path, overwrite=True).run()
    assert gptx.load(tmp_path).config.n_layer == 1


def test_the_data_and_the_log_of_a_run_may_be_first(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "log.jsonl").write_text("{}\n")
    (tmp_path / ".last.0123456789ab").mkdir()
    make_trainer(tmp_path, settings={"steps": 1}).run()
    names = ["config.json", "data", "last", "log.jsonl", "model.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


# Settings of a resumed run

OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"learning_rate": 0.5}, r"other settings: learning_rate \(0\.01, not 0\.5\); give"),
    ({"beta1": 0.5, "clip": None}, r"beta1 \(0\.9, not 0\.5\), clip \(1\.0, not None\); give"),
    ({"seed": 1}, r"seed \(0, not 1\)"),
    ({"batch_size": 2, "accumulate": 2}, r"batch_size \(4, not 2\), accumulate \(1, not 2\)"),
]


@pytest.fixture(scope="module")
def ten_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps; tests do not change it."""
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, settings={"steps": 10}).run()
    return folder


@pytest.mark.parametrize(("changes", "message"), OTHERS, ids=[" ".join(c) for c, _ in OTHERS])
def test_other_settings_are_refused_by_name(
    ten_steps: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ParameterError, match=message):
        make_trainer(ten_steps, settings={"steps": 10, **changes}, resume=True)


def test_other_data_and_types_are_refused(ten_steps: Path) -> None:
    with pytest.raises(ParameterError, match="other data: seed is 0, not 5"):
        make_trainer(ten_steps, settings={"steps": 10}, data=TinyData(seed=5), resume=True)
    ops = make_backend("numpy-generic", dtype="float64")
    with pytest.raises(ParameterError, match="computes in float32, not float64"):
        make_trainer(ten_steps, settings={"steps": 10}, backend=ops, resume=True)


def test_settings_that_change_no_weights_may_differ(ten_steps: Path) -> None:
    changes = {"eval_every": 3, "eval_batches": 1, "patience": 9, "save_every": 4}
    assert make_trainer(ten_steps, settings={"steps": 10, **changes}, resume=True).state.step == 10


def test_more_steps_are_possible_if_the_learning_rates_stay(tmp_path: Path) -> None:
    make_trainer(tmp_path / "wsd", settings={"steps": 20, "schedule": "wsd"}).run()
    with pytest.raises(ParameterError, match=r"steps \(20, not 100\)"):
        make_trainer(tmp_path / "wsd", settings={"steps": 100, "schedule": "wsd"}, resume=True)
    make_trainer(tmp_path / "constant").run()
    longer = make_trainer(tmp_path / "constant", settings={"steps": 22}, resume=True)
    assert longer.run().step == 22
    with pytest.raises(ParameterError, match=r"steps is 20, and the run in .* has 22 steps"):
        make_trainer(tmp_path / "constant", settings={"steps": 20}, resume=True)


# Damage


@pytest.mark.parametrize("resume", [True, False])
def test_a_crash_between_the_renames_of_an_exchange_loses_nothing(
    tmp_path: Path, resume: bool
) -> None:
    """`gptx.files.exchange` renames the old folder first, on a system without an exchange."""
    make_trainer(tmp_path, settings={"steps": 2}).run()
    before = contents(tmp_path / "last")
    (tmp_path / "last").rename(tmp_path / ".last.0123456789ab.old")
    (tmp_path / ".last.0123456789ab").mkdir()  # the new one, complete or not
    if resume:
        assert make_trainer(tmp_path, settings={"steps": 2}, resume=True).state.step == 2
    else:
        with pytest.raises(ParameterError, match="has a run already"):
            make_trainer(tmp_path)
    assert contents(tmp_path / "last") == before


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"version": 99}', b"\xff"])
def test_a_damaged_state_is_one_line(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "training.json").write_bytes(text)
    with pytest.raises(DataError, match=r"training\.json is damaged, or of another version"):
        make_trainer(tmp_path, resume=True)


def test_an_incomplete_checkpoint_is_one_line(tmp_path: Path) -> None:
    make_trainer(tmp_path, settings={"steps": 2}).run()
    path = tmp_path / "last" / "optimizer.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(DataError, match="truncated"):
        make_trainer(tmp_path, settings={"steps": 2}, resume=True)
    state = json.loads((tmp_path / "last" / "training.json").read_text())
    path.write_bytes(whole)
    for part in ("state", "settings"):
        broken = {name: value for name, value in state.items() if name != part}
        (tmp_path / "last" / "training.json").write_text(json.dumps(broken))
        with pytest.raises(DataError, match=r"training\.json is damaged"):
            make_trainer(tmp_path, settings={"steps": 2}, resume=True)


# A full disk, an ended process


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], Failing]:
    """Return a function that makes a checkpoint call a function at its n-th write."""
    import gptx.conversions.checkpoint
    import gptx.conversions.formats.hugging_face
    import gptx.files

    original = gptx.files.create
    modules = (
        gptx.files,
        gptx.conversions.checkpoint,
        gptx.conversions.formats.hugging_face,
        checkpoint,
    )

    def patch(at: int, fail: Callable[[], None]) -> Failing:
        counter = Failing(original, at, fail)
        for module in modules:
            monkeypatch.setattr(module, "create", counter)
        return counter

    return patch


def raise_no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_at_any_write_leaves_the_old_checkpoint(
    tmp_path: Path, failing: Callable[..., Failing]
) -> None:
    trainer = make_trainer(tmp_path / "run", data=TinyData(validation=0))
    trainer.save()
    best = tmp_path / "run" / "model.safetensors"
    before = contents(tmp_path / "run" / "last"), best.read_bytes()
    trainer.step()
    counter = failing(10**9, lambda: None)
    whole = make_trainer(tmp_path / "count", data=TinyData(validation=0))
    whole.save()
    n = 10**9 - counter.left
    assert n > len(CONFIG.tensor_shapes())
    for at in range(n):
        failing(at, raise_no_space)
        with pytest.raises(StorageError, match="No space left") as caught:
            trainer.save()
        assert caught.value.exit_code == 74
        now = contents(tmp_path / "run" / "last"), best.read_bytes()
        assert now == before
        assert not list((tmp_path / "run").glob(".*")), "a temporary file is left"
    failing(n, raise_no_space)
    trainer.save()
    assert contents(tmp_path / "run" / "last") != before[0]
    assert make_trainer(tmp_path / "run", resume=True).state.step == 1
