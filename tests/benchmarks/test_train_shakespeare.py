"""The script that trains the embedded model again: its options, and its measurement."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest

from benchmarks import train_shakespeare
from gptx.cli.train import train
from gptx.embedded import EMBEDDED
from gptx.generation.text_model import Model

TEXT = "".join(f"ROMEO:\nO, speak again, bright angel number {i}!\n\n" for i in range(60))


def test_options_are_those_of_the_command() -> None:
    context = train.make_context("train", ["text", *shlex.split(train_shakespeare.SETTINGS)])
    expected = {"steps": 2600, "batch_size": 16, "context": 256, "n_layer": 6, "n_head": 6}
    expected |= {"n_embd": 192, "tokenizer": "shakespeare"}
    assert {name: context.params[name] for name in expected} == expected
    floats = {"weight_decay": 0.1, "dropout": 0.15, "learning_rate": 2e-3, "final_fraction": 0.05}
    assert {name: context.params[name] for name in floats} == pytest.approx(floats)


def test_the_loss_is_that_of_the_last_tenth(
    shakespeare: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(train_shakespeare, "train", lambda *args: started.append(args) or 2.0)
    text = tmp_path / "text"
    text.write_text(TEXT, "utf-8")
    model = EMBEDDED["shakespeare"]
    code = train_shakespeare.main([str(text), "-o", str(model), "--threads", "1"])
    assert started == [(text, model, ["--threads", "1"])]
    out = capsys.readouterr().out
    facts = json.loads(out.splitlines()[-1])
    score = shakespeare.score(TEXT[int(0.9 * len(TEXT)) :])
    assert facts["loss"] == pytest.approx(score.loss, rel=1e-6)
    characters = len(TEXT) - int(0.9 * len(TEXT))
    bits = score.loss * score.n_scored / math.log(2) / characters
    assert facts["bits_per_character"] == pytest.approx(bits, rel=1e-6)
    assert code == (score.loss > 3.43)
    assert ("missed" if code else "met") in out


def test_a_failure_of_the_training_ends_the_script(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        train_shakespeare.main([str(tmp_path / "absent"), "-o", str(tmp_path / "out"), "-q"])
    assert caught.value.code == 66
    assert "absent" in capfd.readouterr().err
