"""gptx.train: from a text, token files or examples to a model folder."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptx
from gptx.errors import DataError, GptxError, NotFoundError, ParameterError
from gptx.file_lock import lock_folder
from gptx.training import checkpoint
from gptx.training.reports.log_file import read_log
from gptx.training.trainer import TrainingResult
from tests.support.training import Records

TEXT = "".join(f"{i} green bottles hanging on the wall,\n" for i in range(99))
SMALL: dict[str, Any] = {
    "n_layer": 1, "n_head": 2, "n_embd": 16, "context": 8, "steps": 4, "batch_size": 2,
    "eval_every": 2, "eval_batches": 2, "schedule": "constant", "warmup": 1, "generic": True,
}  # fmt: skip


def train(data: Any = None, output: Path | None = None, **options: Any) -> TrainingResult:
    """Train a tiny model on the generic backend, which compiles nothing."""
    values = {**({} if options.get("resume") else SMALL), **options}
    generic = gptx.get_backend("numpy", generic=values.pop("generic", True))
    return gptx.train(data, output=output, backend=generic, **values)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "bottles.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps; tests do not change it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(text, folder)
    return folder


def test_a_text_becomes_a_model_that_generates(run: Path) -> None:
    model = gptx.load(run)
    assert model.config.n_positions == 8
    assert model.config.vocab_size == len(set(TEXT))
    assert model.decode(model.encode("green")) == "green"
    assert len(model.generate("9 ", max_tokens=5).tokens) == 5
    records = read_log(run / "log.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4]
    assert [r["step"] for r in records if "validation_loss" in r] == [0, 2, 4]


@pytest.mark.skipif(os.name != "posix", reason="folders are locked on POSIX only")
def test_two_runs_do_not_write_to_one_folder(text: Path, tmp_path: Path) -> None:
    with lock_folder(tmp_path) as is_free:
        assert is_free
        with pytest.raises(ParameterError, match=r"another run writes to .*: wait for its end"):
            train(text, tmp_path)
        assert list(tmp_path.iterdir()) == []
    train(text, tmp_path)


def test_a_moved_run_is_resumed_with_its_data_and_settings(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "moved")
    records = Records()
    result = train(output=tmp_path / "moved", resume=True, steps=6, callbacks=[records])
    assert result.step == 6
    assert [r.step for r in records.steps] == [5, 6]
    assert [r["step"] for r in read_log(tmp_path / "moved" / "log.jsonl") if "loss" in r] == [
        1, 2, 3, 4, 5, 6,
    ]  # fmt: skip


def test_the_backend_of_a_run_is_that_of_its_checkpoint(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run in bfloat16 on MLX would be resumed on NumPy, which does not have this type."""
    from gptx.training import api

    def note_backend(name: str, **options: Any) -> Any:
        taken.append((name, options["dtype"]))
        return gptx.get_backend("numpy", generic=True)

    taken: list[tuple[str, str]] = []
    stored = checkpoint.read_last(run)
    monkeypatch.setattr(api, "get_backend", note_backend)
    monkeypatch.setattr(
        checkpoint, "read_last", lambda folder: replace(stored, backend="mlx", dtype="float32")
    )
    gptx.train(output=run, resume=True)
    gptx.train(output=run, resume=True, backend="numpy")
    assert taken == [("mlx", "float32"), ("numpy", "float32")]


def test_a_resumed_run_without_its_data(run: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "data")
    with pytest.raises(NotFoundError, match="data, the prepared text of the run, does not exist"):
        train(output=tmp_path / "run", resume=True, steps=5)
    assert train(text, tmp_path / "run", resume=True, steps=5).step == 5


def test_a_run_without_output_saves_nothing(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = train(text)
    assert result.folder is None
    assert result.step == 4
    assert list(tmp_path.iterdir()) == []


def test_fine_tuning_takes_the_tokenizer_of_the_model(
    run: Path, text: Path, tmp_path: Path
) -> None:
    options = {**SMALL, "n_layer": None, "n_head": None, "n_embd": None, "context": None}
    train(text, tmp_path / "tuned", **{**options, "init": run})
    tuned, first = gptx.load(tmp_path / "tuned"), gptx.load(run)
    assert tuned.config == first.config
    assert tuned.encode("the wall") == first.encode("the wall")
    assert not np.array_equal(tuned.gpt2.weights.wte.weight, first.gpt2.weights.wte.weight)
    (tmp_path / "greek.txt").write_text("αβγ" * 50)
    with pytest.raises(DataError):
        train(tmp_path / "greek.txt", tmp_path / "greek", **{**options, "init": run})


def test_a_text_with_another_vocabulary_is_refused(run: Path, tmp_path: Path) -> None:
    """nanoGPT #483, RWKV-PEFT #52."""
    (tmp_path / "other.txt").write_text("other letters! " * 50)
    options = {**SMALL, "n_layer": None, "n_head": None, "n_embd": None}
    with pytest.raises(DataError, match="prepare the text with that tokenizer"):
        train(tmp_path / "other.txt", **{**options, "init": run, "tokenizer": "characters"})


@pytest.mark.filterwarnings("ignore:the tokenizer has no :gptx.errors.ModelWarning")
def test_examples_with_a_tokenizer(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    lines = [{"prompt": f"{i} ", "completion": "green"} for i in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert train(path, tokenizer=run).step == 4
    with pytest.raises(ParameterError, match="there is no tokenizer"):
        train(path)
    options = {**SMALL, "n_layer": None, "n_head": None, "n_embd": None}
    assert train(path, tmp_path / "tuned", **{**options, "init": run}).step == 4
    assert train(output=tmp_path / "tuned", resume=True, steps=5).step == 5


INVALID: dict[str, tuple[dict[str, Any], type[GptxError], str]] = {
    "unknown": ({"learnin_rate": 1}, ParameterError, "did you mean learning_rate"),
    "rate": ({"learning_rate": float("nan")}, ParameterError, "^learning_rate is nan"),
    "context": ({"context": 0}, ParameterError, "^context is 0, expected"),
    "layers": ({"n_layer": 0}, ParameterError, "^n_layer is 0, expected"),
    "heads": ({"n_head": 3}, ParameterError, "n_embd 16 is not a multiple of n_head 3"),
    "validation": ({"validation": 1.5}, ParameterError, r"^validation is 1\.5, expected"),
    "bytes": ({"max_bytes": -1}, ParameterError, "^max_bytes is -1, expected"),
    "both": ({"size": "124M"}, ParameterError, "^size and n_layer contradict"),
    "init": ({"init": "shakespeare"}, ParameterError, "^init has a size of its own: leave out n_l"),
    "long": ({"context": 100_000}, DataError, "expected at least 100001"),
    "tokenizer": ({"tokenizer": "/none"}, NotFoundError, "none"),
    "no tokenizer": ({"tokenizer": 5}, ParameterError, "^tokenizer is 5, expected a folder"),
    "no path": ({"validation": True}, ParameterError, "^validation is True, expected a path"),
    "state": ({"optimizer_state": "x"}, ParameterError, "^optimizer_state needs init"),
    "no text": ({"data": "x.bin", "max_bytes": 9}, ParameterError, "^max_bytes is for a text"),
}


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_option_is_one_line_and_writes_no_model(
    name: str, text: Path, tmp_path: Path
) -> None:
    options, error, message = INVALID[name]
    with pytest.raises(error, match=message) as caught:
        train(**{"data": text, "output": tmp_path / "run", **options})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "last").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "empty"), (b"\xff\xfe\x00", "UTF-"), (None, "does not exist")],
    ids=["empty", "binary", "missing"],
)
def test_bad_data_are_one_line(data: bytes | None, message: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "text.txt").write_bytes(data)
    with pytest.raises(GptxError, match=message) as caught:
        train(tmp_path / "text.txt", tmp_path / "run")
    assert caught.value.exit_code == (66 if data is None else 65)
    assert "\n" not in str(caught.value)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "context": ({"context": 7}, r"has context 8, not 7"),
    "size": ({"n_layer": 2}, "continues the model of the run in output: leave out n_layer"),
    "init": ({"init": "gpt2"}, "leave out init"),
    "setting": ({"learning_rate": 0.5}, r"learning_rate \(0\.001, not 0\.5\)"),
    "overwrite": ({"overwrite": True}, "resume=True continues a run and overwrite=True replaces"),
    "state": ({"optimizer_state": "x"}, "leave out optimizer_state"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_resumed_run_keeps_its_options(name: str, run: Path) -> None:
    options, message = REFUSED[name]
    with pytest.raises(ParameterError, match=message):
        train(output=run, resume=True, **options)


def test_the_defaults_depend_on_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptx.training import api

    found = api._with_defaults({"steps": 50}, {})
    assert (found.warmup, found.learning_rate, found.batch_size) == (5, 1e-3, 12)
    found = api._with_defaults({"batch_size": 8}, api.DEFAULTS_OF_INIT)
    assert (found.warmup, found.learning_rate, found.batch_size) == (100, 1e-4, 8)
    start = api._from_scratch("355M", {}, {}, {})
    assert isinstance(start.model, gptx.GPT2Config)
    assert (start.model.n_embd, start.source["context"]) == (1024, 1024)
    assert start.settings.learning_rate == 6e-4
