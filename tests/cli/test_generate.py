"""`gptx generate`: prompts, options, the text, the JSON and the statistics."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from gptx.cli.formatting import print_json
from gptx.errors import ModelWarning
from gptx.generation.params import random_seed
from gptx.generation.results import Result
from gptx.generation.text_model import Model
from tests.support.cli import GENERATE, STATISTICS, run, start


def test_standard_output_has_only_the_text(shakespeare: Model) -> None:
    done = run(*GENERATE, "-n", "12", "ROMEO:")
    assert done.code == 0
    assert done.out == f"{shakespeare.generate('ROMEO:', max_tokens=12).text}\n"
    found = STATISTICS.fullmatch(done.err.strip())
    assert found
    assert found[1] == "length"


def test_quiet_prints_no_statistics() -> None:
    done = run(*GENERATE, "-n", "2", "-q", "ROMEO:")
    assert (done.code, done.err) == (0, "")
    assert done.out


def test_a_text_that_ends_with_a_newline(shakespeare: Model) -> None:
    assert shakespeare.generate("ROMEO:", max_tokens=1).text == "\n"
    assert run(*GENERATE, "-n", "1", "ROMEO:").out == "\n"


def test_a_default_number_of_tokens_beyond_the_context_slides(shakespeare: Model) -> None:
    """The model has 256 positions; as for a model that was trained with fewer than 100."""
    prompt = "to be or not " * 40
    assert 156 < len(shakespeare.encode(prompt)) < 256
    done = run(*GENERATE, "--json", prompt)
    assert done.code == 0
    assert len(json.loads(done.out)["tokens"]) == 100
    for args in (("-n", "100", prompt), ("--overflow", "error", prompt), (prompt * 2,)):
        done = run(*GENERATE, *args)
        assert (done.code, done.out) == (65, "")
        assert "use --overflow truncate or slide" in done.err


@pytest.mark.parametrize(
    ("args", "stdin"),
    [
        (("ROMEO:",), b""),
        (("-p", "ROMEO:"), b""),
        (("--prompt", "ROMEO:"), b""),
        (("--prompt=ROMEO:",), b""),
        (("-",), b"ROMEO:"),
        (("-",), b"ROMEO:\n"),
    ],
)
def test_sources_of_a_prompt(args: tuple[str, ...], stdin: bytes) -> None:
    done = run(*GENERATE, "-n", "1", "--json", *args, stdin=stdin)
    assert done.code == 0
    assert json.loads(done.out)["prompt"] == "ROMEO:"


@pytest.mark.parametrize(
    ("args", "stdin", "prompt"),
    [
        (("-",), b"one\n\n", "one\n"),
        (("-",), "ROMÉO\n".encode(), "ROMÉO"),
        (("-p", "-"), b"not read", "-"),
        (("--", "-n"), b"", "-n"),
    ],
)
def test_characters_of_a_prompt_are_kept(args: Any, stdin: bytes, prompt: str) -> None:
    assert json.loads(run(*GENERATE, "--json", "-n1", *args, stdin=stdin).out)["prompt"] == prompt


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ((), "missing prompt"),
        (("a", "-p", "b"), "duplicate prompt"),
        (("-", "-p", "b"), "duplicate prompt"),
        (("to", "be", "or"), "extra arguments (be or): put a prompt of several words in quotes"),
    ],
)
def test_missing_and_duplicate_prompts(args: tuple[str, ...], problem: str) -> None:
    done = run(*GENERATE, *args)
    assert (done.code, done.out) == (2, "")
    assert problem in done.err


def test_json_has_every_field_of_the_result(shakespeare: Model) -> None:
    done = run(*GENERATE, "-n", "5", "--json", "ROMÉO:")
    assert done.out.count("\n") == 1
    data = json.loads(done.out)
    about = {"model", "backend", "dtype", "cached_tokens"}
    assert set(data) == about | {field.name for field in fields(Result)}
    expected = shakespeare.generate("ROMÉO:", max_tokens=5)
    for name in ("prompt", "text", "tokens", "finish_reason", "prompt_tokens", "logprobs"):
        assert data[name] == getattr(expected, name)
    assert [data[name] for name in ("model", "backend", "dtype", "cached_tokens")] == [
        "shakespeare",
        "numpy",
        "float32",
        0,
    ]
    assert STATISTICS.fullmatch(done.err.strip())


def test_stop_strings(shakespeare: Model) -> None:
    text = shakespeare.generate("ROMEO:", max_tokens=60).text
    assert text is not None
    assert " of" in text
    done = run(*GENERATE, "-n", "60", "--stop", "zzz", "--stop", " of", "ROMEO:")
    assert done.out == text[: text.find(" of")] + "\n"
    assert "finish: stop" in done.err


def test_a_seed_repeats_the_text() -> None:
    def text(seed: int) -> str:
        return run(*GENERATE, "-n", "20", "--temperature", "1", "-s", str(seed), "-q", "O").out

    assert text(3) == text(3)
    assert text(3) != text(4)


def test_the_reported_seed_repeats_the_text() -> None:
    first = json.loads(run(*GENERATE, "--temperature", "1.5", "--json", "-n", "20", "O").out)
    seed = str(first["seed"])
    again = run(*GENERATE, "--temperature", "1.5", "--seed", seed, "--json", "-n", "20", "O")
    assert json.loads(again.out)["tokens"] == first["tokens"]


def test_top_k_above_the_vocabulary_keeps_every_token() -> None:
    outs = {
        run(*GENERATE, "-n", "20", "--temperature", "1", "-s", "1", "--top-k", k, "O").out
        for k in ("0", "1024", "1000000")
    }
    assert len(outs) == 1


@pytest.mark.parametrize(
    ("args", "options"),
    [
        (("--threads", "1"), {}),
        (("-t", "1"), {}),
        (("--temperature", "1", "-s", "2", "--top-k", "3"), {"temperature": 1, "top_k": 3}),
        (("--temperature", "1", "-s", "2", "--top-p", "0.3"), {"temperature": 1, "top_p": 0.3}),
        (("--temperature", "1", "-s", "2", "--min-p", "0.2"), {"temperature": 1, "min_p": 0.2}),
        (("--repetition-penalty", "1.5"), {"repetition_penalty": 1.5}),
        (("--presence-penalty", "2"), {"presence_penalty": 2}),
        (
            ("--temperature", "1", "-s", "2", "--typical-p", "0.4"),
            {"temperature": 1, "typical_p": 0.4},
        ),
        (("--no-repeat-ngram-size", "1"), {"no_repeat_ngram_size": 1}),
        (
            ("--dry-multiplier", "3", "--dry-allowed-length", "1", "--dry-base", "2"),
            {"dry_multiplier": 3, "dry_allowed_length": 1, "dry_base": 2},
        ),
        (
            ("--dry-multiplier", "9", "--dry-sequence-breaker", "e", "--dry-range", "5"),
            {"dry_multiplier": 9, "dry_sequence_breakers": ["e"], "dry_range": 5},
        ),
        (("--ban", "my", "--ban", "\n"), {"ban": ["my", "\n"]}),
        (
            ("--sequence-bias", " my lord=5", "--sequence-bias", "==-inf"),
            {"sequence_bias": {" my lord": 5, "=": -math.inf}},
        ),
        (
            ("--stop-token-id", "199", "--min-tokens", "3"),
            {"stop_token_ids": [199], "min_tokens": 3},
        ),
        (("--frequency-penalty", "1.5"), {"frequency_penalty": 1.5}),
        (
            ("--logit-bias", "199=-inf", "--logit-bias", "41=-2.5"),
            {"logit_bias": {199: -math.inf, 41: -2.5}},
        ),
    ],
)
def test_options_equal_those_of_python(
    shakespeare: Model, args: tuple[str, ...], options: Any
) -> None:
    done = run(*GENERATE, "-n", "20", "-q", *args, "O")
    assert done.code == 0
    assert done.out == f"{shakespeare.generate('O', max_tokens=20, seed=2, **options).text}\n"


@pytest.mark.parametrize(("backend", "dtype"), [("numpy", "float64"), ("mlx", "float16")])
def test_backend_and_dtype(shakespeare: Model, backend: str, dtype: str) -> None:
    if backend == "mlx":
        pytest.importorskip("mlx.core")
    done = run(*GENERATE, "-n", "3", "-b", backend, "--dtype", dtype, "--json", "ROMEO:")
    data = json.loads(done.out)
    assert (data["backend"], data["dtype"]) == (backend, dtype)
    assert data["text"] == shakespeare.generate("ROMEO:", max_tokens=3).text


def test_ignore_eos(folder: Callable[..., Path], shakespeare: Model) -> None:
    path = copy_of_shakespeare(shakespeare, folder())
    config = json.loads((path / "config.json").read_text())
    first = shakespeare.generate("ROMEO:", max_tokens=1).tokens[0]
    (path / "config.json").write_text(json.dumps(config | {"eos_token_id": first}))
    args = ("generate", "-m", str(path), "-n", "4", "--json", "ROMEO:")
    ended, ignored = (json.loads(run(*args, *more).out) for more in ((), ("--ignore-eos",)))
    assert (ended["finish_reason"], ended["tokens"]) == ("stop", [])
    assert (ignored["finish_reason"], len(ignored["tokens"])) == ("length", 4)


def copy_of_shakespeare(model: Model, folder: Path) -> Path:
    for path in model.files.folder.glob("*.*"):
        if path.suffix != ".py":
            shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "cp1252", "ascii", "utf-16", "shift_jis"])
def test_json_is_exact_in_every_encoding(encoding: str) -> None:
    """Escaped where a reader of UTF-8 would read something else."""
    prompt = "naïve — 漢 🙂"
    done = run(*GENERATE, "-n", "3", "-q", "--json", "-p", prompt, encoding=encoding)
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["prompt"] == prompt
    assert done.out.isascii() == (encoding != "utf-8")


@pytest.mark.parametrize(("encoding", "text"), [("latin-1", "???"), ("utf-8", "\ufffd" * 3)])
def test_a_note_on_text_that_the_encoding_lacks(encoding: str, text: str) -> None:
    """The bias generates the first byte of a character, which is decoded as U+FFFD."""
    args = (*GENERATE, "-n", "3", "-q", "--logit-bias", "163=1e6", "A")
    done = run(*args, encoding=encoding)
    assert (done.code, done.out) == (0, f"{text}\n")
    notes = done.err.splitlines()
    assert len(notes) == (encoding != "utf-8")
    assert all(note.startswith("Note: standard output is in latin-1, without") for note in notes)


def test_characters_in_a_process_without_a_locale() -> None:
    """Python reports ASCII there, and click writes UTF-8."""
    args = (*GENERATE, "-n", "3", "-q", "--json", "-p", "ROMÉO 漢")
    with start(*args, PYTHONIOENCODING="ascii", PYTHONUTF8="0") as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, b"")
    assert json.loads(out.decode())["prompt"] == "ROMÉO 漢"


@pytest.mark.parametrize("options", [("-n", "0"), ("--stop", ""), ("--temperature", "-1")])
def test_options_are_checked_before_the_model_is_loaded(options: tuple[str, ...]) -> None:
    assert run("generate", "-m", "./nowhere", "O", *options).code == 2


@pytest.mark.parametrize("value", ["5", "x=", "x=y"])
def test_a_text_bias_that_is_no_pair(value: str) -> None:
    done = run(*GENERATE, "--sequence-bias", value, "O")
    assert (done.code, done.out) == (2, "")
    assert f"{value!r} is not TEXT=X, such as" in done.err


@pytest.mark.parametrize("value", ["5", "x=1", "5=", "=1", "5=x", "1.5=2"])
def test_a_bias_that_is_no_pair(value: str) -> None:
    done = run(*GENERATE, "--logit-bias", value, "O")
    assert (done.code, done.out) == (2, "")
    assert f"{value!r} is not ID=X, such as 198=-inf" in done.err


def test_a_bias_given_twice() -> None:
    done = run(*GENERATE, "--logit-bias", "5=1", "--logit-bias", "5=2", "O")
    assert (done.code, done.out) == (2, "")
    assert "a token id is given twice" in done.err


def test_special_tokens_of_a_prompt(shakespeare: Model) -> None:
    def tokens(*args: str) -> int:
        done = run(*GENERATE, "-n", "1", "--json", *args, "<|endoftext|>")
        n: int = json.loads(done.out)["prompt_tokens"]
        return n

    assert tokens("--allow-special") == 1
    assert tokens() == len(shakespeare.encode("<|endoftext|>")) > 1


def test_logprobs(shakespeare: Model) -> None:
    """In the JSON; and on standard error, beside the text."""
    expected = shakespeare.generate("ROMEO:", max_tokens=3, logprobs=True)
    assert expected.logprobs is not None
    args = (*GENERATE, "-n", "3", "-q", "--logprobs", "ROMEO:")
    assert json.loads(run(*args, "--json").out)["logprobs"] == expected.logprobs
    done = run(*args)
    assert done.out == f"{expected}\n"
    head, *lines = done.err.splitlines()
    assert head.split() == ["logprob", "id", "token"]
    rows = zip(expected.logprobs, expected.tokens, strict=True)
    assert [line.split(maxsplit=2) for line in lines] == [
        [f"{logprob:.4f}", str(id), repr(shakespeare.decode([id]))] for logprob, id in rows
    ]


def test_logprobs_of_the_most_probable_tokens_and_of_the_prompt(shakespeare: Model) -> None:
    expected = shakespeare.generate("ROMEO:", max_tokens=3, logprobs=2, prompt_logprobs=2)
    args = (*GENERATE, "-n", "3", "-q", "--logprobs", "--prompt-logprobs", "--top-logprobs", "2")
    data = json.loads(run(*args, "--json", "ROMEO:").out)
    assert data["logprobs"] == expected.logprobs
    assert data["prompt_logprobs"] == expected.prompt_logprobs
    assert expected.top_logprobs is not None
    assert data["top_logprobs"] == [
        {str(id): x for id, x in top.items()} for top in expected.top_logprobs
    ]
    lines = run(*args, "ROMEO:").err.splitlines()
    assert [line for line in lines if line.endswith(":")] == ["prompt:", "output:"]
    assert len(lines) == 2 + 2 + 2 + 3
    assert lines[2].split() == ["-", str(expected.prompt_ids[0]), "'ROMEO'"]
    [(first, x), (second, y)] = expected.top_logprobs[0].items()
    texts = [shakespeare.decode([id]) for id in (first, second)]
    assert lines[-3].endswith(f"  ({texts[0]!r} {x:.4f}, {texts[1]!r} {y:.4f})")


def test_top_logprobs_alone_are_those_of_the_output() -> None:
    data = json.loads(run(*GENERATE, "-n", "2", "-q", "--top-logprobs", "3", "--json", "O").out)
    assert [len(top) for top in data["top_logprobs"]] == [3, 3]
    assert data["prompt_logprobs"] is None


def test_logprobs_have_the_end_token(shakespeare: Model) -> None:
    done = run(*GENERATE, "-n", "9", "-q", "--logprobs", "--stop-token-id", "199", "ROMEO:")
    assert (done.code, done.out) == (0, "\n")
    assert done.err.splitlines()[1].split()[1:] == ["199", r"'\n'"]


def test_several_continuations(shakespeare: Model) -> None:
    """One after the other; their statistics separate them, or an empty line with --quiet."""
    args = (*GENERATE, "-n", "6", "--temperature", "1", "-s", "3", "--n", "3")
    options: Any = {"max_tokens": 6, "temperature": 1, "seed": 3}
    expected = [str(result) for result in shakespeare.generate("ROMEO:", n=3, **options)]
    done = run(*args, "ROMEO:")
    assert done.out == "".join(f"{text}\n" for text in expected)
    assert len(done.err.splitlines()) == 3
    assert run(*args, "-q", "ROMEO:").out == "\n".join(f"{text}\n" for text in expected)
    lines = run(*args, "--json", "ROMEO:").out.splitlines()
    assert [json.loads(line)["text"] for line in lines] == expected
    best = shakespeare.generate("ROMEO:", n=2, best_of=6, **options)
    done = run(*args[:-1], "2", "--best-of", "6", "-q", "ROMEO:")
    assert done.out == "\n".join(f"{result}\n" for result in best)


def test_several_continuations_have_no_prompt_cache(tmp_path: Path) -> None:
    done = run(*GENERATE, "--n", "2", "--prompt-cache", str(tmp_path / "x"), "O")
    assert (done.code, done.out) == (2, "")
    assert "--prompt-cache is for one continuation" in done.err


def test_generation_config(folder: Callable[..., Path], shakespeare: Model) -> None:
    """A value of the command line has precedence, also if it is the default."""
    path = copy_of_shakespeare(shakespeare, folder())
    settings = {"do_sample": True, "temperature": 0.7, "top_k": 5, "max_new_tokens": 9}
    (path / "generation_config.json").write_text(json.dumps(settings))

    def tokens(*args: str) -> list[int]:
        done = run("generate", "-m", str(path), "--json", "-q", "-s", "3", *args, "ROMEO:")
        assert done.code == 0, done.err
        found: list[int] = json.loads(done.out)["tokens"]
        return found

    def expected(**options: Any) -> list[int]:
        return shakespeare.generate("ROMEO:", **({"seed": 3} | options)).tokens

    own: Any = {"temperature": 0.7, "top_k": 5, "max_tokens": 9}
    assert tokens("--generation-config") == expected(**own)
    assert tokens("--generation-config", "-n", "100")[:9] == expected(**own)
    assert tokens("--generation-config", "--temperature", "0") == expected(max_tokens=9)
    assert tokens("--generation-config", "--top-k", "0") == expected(**(own | {"top_k": 0}))
    assert tokens("-n", "9") == expected(max_tokens=9)
    (path / "generation_config.json").write_text('{"num_beams": 3}')
    done = run("generate", "-m", str(path), "--generation-config", "ROMEO:")
    assert (done.code, done.out) == (65, "")
    assert "has num_beams 3, which gptx does not support" in done.err


def test_a_model_without_generation_config() -> None:
    done = run(*GENERATE, "--generation-config", "O")
    assert (done.code, done.out) == (66, "")
    assert "leave out --generation-config" in done.err


def test_a_fresh_seed_is_exact_in_json_readers_that_use_floats() -> None:
    for _ in range(20):
        seed = random_seed()
        assert 0 <= seed < 2**53
        assert int(float(seed)) == seed
    assert max(random_seed() for _ in range(50)) > 2**47


def test_a_given_seed_of_64_bits_is_kept() -> None:
    seed = 2**64 - 1
    done = run(*GENERATE, "-n", "1", "--json", "--seed", str(seed), "O")
    assert json.loads(done.out)["seed"] == seed


def test_json_has_no_numbers_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": math.nan, "b": [-math.inf, 1.5], "c": (math.inf, {"d": math.nan}), "e": "x"})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, 1.5],
        "c": [None, {"d": None}],
        "e": "x",
    }


@pytest.mark.parametrize("quiet", [(), ("-q",)])
def test_warnings_about_a_model_are_notes(
    shakespeare: Model, monkeypatch: pytest.MonkeyPatch, quiet: tuple[str, ...]
) -> None:
    """Each time, and not as Python prints warnings, with the line of the source."""

    def load(*args: Any, **options: Any) -> Model:
        warnings.warn("model: the head is tied", ModelWarning, stacklevel=1)
        return shakespeare

    monkeypatch.setattr("gptx.cli.generate.load_once", load)
    for _ in range(2):
        done = run(*GENERATE, "-n", "1", *quiet, "O")
        assert done.code == 0
        first, *rest = done.err.splitlines()
        assert first == "Note: model: the head is tied"
        assert len(rest) == (0 if quiet else 1)
