"""`gptx train`: options, and gpt-burn's command lines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptx.cli import train
from gptx.cli.train import SYNONYMS
from gptx.training import api
from gptx.training.trainer import TrainingResult
from tests.support.cli import run

RESULT = TrainingResult(10, 2.0, 1.75, 1.5, 8, 0, "steps", None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of each call of `gptx.train`, which trains nothing."""
    made: list[dict[str, Any]] = []

    def call(data: Any, **options: Any) -> TrainingResult:
        made.append({"data": data, **options})
        return RESULT

    monkeypatch.setattr(api, "train", call)
    return made


def options_of(calls: list[dict[str, Any]], *args: str) -> dict[str, Any]:
    """Run a command that succeeds; return the options of its call that are no defaults."""
    done = run("train", *args)
    assert (done.code, done.out) == (0, "")
    call = calls.pop()
    defaults = {"output": "model", "resume": False, "overwrite": False, "offline": False}
    del call["callbacks"]
    return {name: x for name, x in call.items() if name not in defaults or x != defaults[name]}


def test_only_what_is_given_is_passed_on(calls: list[dict[str, Any]]) -> None:
    assert options_of(calls, "a.txt") == {"data": ["a.txt"]}
    assert options_of(calls, "a.txt", "b.txt", "-o", "out") == {
        "data": ["a.txt", "b.txt"],
        "output": "out",
    }
    assert options_of(calls, "--resume", "out", "--patience", "3") == {
        "data": None,
        "output": "out",
        "resume": True,
        "patience": 3,
    }


def test_options_and_their_types(calls: list[dict[str, Any]]) -> None:
    args = (
        "--init gpt2 --optimizer-state s.bin --steps 200 -r 1e-4 --trainable h.11.* "
        "--trainable ln_f.* -s 0 --dropout 0"
    )
    assert options_of(calls, "data", *args.split()) == {
        "data": ["data"],
        "init": "gpt2",
        "optimizer_state": "s.bin",
        "steps": 200,
        "learning_rate": 1e-4,
        "trainable": ("h.11.*", "ln_f.*"),
        "seed": 0,
        "dropout": 0.0,
    }
    args = "-b mlx --dtype bfloat16 -t 4 -c 32 -l 3 --n-head 5 -d 40 --overwrite --clip 0.5"
    assert options_of(calls, "data", *args.split()) == {
        "data": ["data"],
        "backend": "mlx",
        "dtype": "bfloat16",
        "threads": 4,
        "context": 32,
        "n_layer": 3,
        "n_head": 5,
        "n_embd": 40,
        "overwrite": True,
        "clip": 0.5,
    }
    assert options_of(calls, "data", "--validation", "0.2")["validation"] == 0.2
    assert options_of(calls, "data", "--validation", "val.txt")["validation"] == "val.txt"
    assert options_of(calls, "data", "--clip", "0")["clip"] is None
    assert options_of(calls, "data", "--no-save")["output"] is None


def test_the_command_line_of_gpt_burn(calls: list[dict[str, Any]]) -> None:
    """That of its README, which has no argument and no output."""
    args = (
        "--context-length 128 --n-layers 12 --n-heads 12 --d-model 768 --batch-size 128 "
        "--learning-rate 0.0003 --seed 0 --text-corpus ./corpus.txt"
    )
    assert options_of(calls, *args.split()) == {
        "data": ["./corpus.txt"],
        "context": 128,
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "batch_size": 128,
        "learning_rate": 0.0003,
        "seed": 0,
    }


def test_the_other_options_of_gpt_burn(calls: list[dict[str, Any]]) -> None:
    short = "-o out -c 64 -d 64 -l 2 -h 2 -n 50 -b 32 -r 0.003 -s 0 -t corpus.txt -m 2"
    long = "--output-path out --context-length 64 --d-model 64 --n-layers 2 --n-heads 2 " \
        "--n-steps 50 --batch-size 32 --learning-rate 0.003 --seed 0 --text-corpus corpus.txt " \
        "--n-mega-bytes 2"  # fmt: skip
    expected = {
        "data": ["corpus.txt"],
        "output": "out",
        "context": 64,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 2,
        "steps": 5000,
        "batch_size": 32,
        "learning_rate": 0.003,
        "seed": 0,
        "max_bytes": 2 << 20,
    }
    assert options_of(calls, *short.split()) == expected
    assert options_of(calls, *long.split()) == expected
    assert options_of(calls, "-x", "-t", "corpus.txt")["output"] is None


def test_the_steps_of_gpt_burn_are_explained(calls: list[dict[str, Any]]) -> None:
    done = run("train", "a.txt", "--n-steps", "50")
    assert (done.code, calls[0]["steps"]) == (0, 5000)
    assert "Note: --n-steps 50 is --steps 5000: a step of gpt-burn has 100 updates\n" in done.err


@pytest.mark.parametrize("args", [("-h",), ("a.txt", "-h"), ("-h", "-c", "3")])
def test_help_keeps_its_letter(calls: list[dict[str, Any]], args: tuple[str, ...]) -> None:
    done = run("train", *args)
    assert (done.code, done.err, calls) == (0, "", [])
    assert done.out.startswith("Usage: gptx train [OPTIONS] [DATA]...\n")


@pytest.mark.parametrize("columns", [80, 100])
def test_the_help_fits_a_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    help = run("train", "--help").out
    assert max(map(len, help.splitlines())) <= columns
    for name in SYNONYMS:
        assert f"--{name}" in help


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "missing DATA: give a text file, or --resume FOLDER"),
        (("--resume", "a", "-o", "b"), "--resume FOLDER saves in that folder: leave out -o"),
        (("--resume", "a", "-x"), "leave out -o and --no-save"),
        (("a", "-n", "1", "--steps", "9"), "--n-steps and --steps contradict each other"),
        (("a", "-m", "0"), "-m/--n-mega-bytes is 0, expected at least 1"),
        (("a", "--log-every", "0"), "--log-every is 0, expected at least 1"),
        (("a", "--sample-every", "-1"), "--sample-every is -1, expected at least 0"),
        (("a", "--steps", "many"), "'many' is not a valid integer"),
        (("a", "-l"), "requires an argument"),
        (("a", "--schedule", "poly"), "'poly' is not one of 'cosine', 'linear', 'constant', 'wsd'"),
        (("a", "--size", "9M"), "'9M' is not one of '124M', '355M', '774M', '1558M'"),
        (("a", "-b", "jax"), "'jax' is not one of 'numpy'"),
        (("a", "--n-layerz", "3"), "--n-layerz"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_bad_usage(calls: list[dict[str, Any]], args: tuple[str, ...], message: str) -> None:
    done = run("train", *args)
    assert (done.code, done.out, calls) == (2, "", [])
    [line] = done.err.splitlines()
    assert line.startswith("Error: ")
    assert message in line


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["10 steps in 0:00, best validation loss 1.5000 at step 8"]),
        ({"best_loss": None, "best_step": None}, ["10 steps in 0:00"]),
        (
            {"reason": "patience", "skipped": 3, "step": 1234},
            [
                "1,234 steps in 0:00, best validation loss 1.5000 at step 8 (stopped early: no "
                "better one since), updates skipped: 3"
            ],
        ),
        (
            {"folder": Path("my model"), "best_loss": None},
            ["10 steps in 0:00", "my model: gptx generate -m 'my model' --temperature 0.8"],
        ),
    ],
    ids=["steps", "no validation", "patience", "saved"],
)
def test_the_summary(
    changes: dict[str, Any], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train._Run().summarize(replace(RESULT, **changes))
    captured = capsys.readouterr()
    assert (captured.out, captured.err.splitlines()) == ("", expected)
