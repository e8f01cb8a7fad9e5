"""Messages name options in the language of their reader: flags here, arguments in Python."""

from __future__ import annotations

import ast
import copy
import math
import pickle
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest

import gptx
from gptx import errors
from gptx.cli.app import COMMANDS, flags_of, load_command
from gptx.errors import GptxError, ParameterError, argument
from gptx.generation.options import AllOptions
from tests.support.cli import GENERATE, run

ROOT = Path(gptx.__file__).parents[1]
SOURCES = [
    path
    for folder in ("gptx", "backends", "conversions")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if ROOT / "gptx" / "cli" not in path.parents
]
ERRORS = {
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, GptxError)
}
OPTIONS = {
    str(param.name)
    for name in COMMANDS
    for param in load_command(name).params
    if isinstance(param, click.Option)
}
IDENTIFIERS = {name for name in {*OPTIONS, *AllOptions.__annotations__} if "_" in name}
# An option's name where it is no English word, or where it is one with "is", "=" or "omit".
AN_OPTION = re.compile(
    rf"\b({'|'.join(IDENTIFIERS)})\b|\b({'|'.join(OPTIONS)})="
    rf"|(?<!the )\b({'|'.join(OPTIONS)}) is \0|\b(omit|lower|leave out) ({'|'.join(OPTIONS)})\b"
)
A_FLAG = re.compile(r"(?<![\w-])--[a-z]|(?<![\w-])-[a-z]\b")
# Commands of the shell, which are the same for all readers.
A_COMMAND = re.compile(r"`[^`]*`|(pip|hf|gptx|llama-[\w-]+) [^:;,]*")


@cache
def messages() -> list[tuple[str, str]]:
    """Return the place and the text of each message of an error; a value in it is NUL."""
    return list(_messages())


def _messages() -> Iterator[tuple[str, str]]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            function = node.func
            name = function.id if isinstance(function, ast.Name) else ""
            # A ConfigError speaks of the keys of a config.json.
            if name in ERRORS - {"ConfigError"} and node.args:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", _text(node.args[0])


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return "\0"


def test_messages_are_found() -> None:
    found = dict(messages())
    assert len(found) > 150
    assert sum("\0" in text for text in found.values()) > 100


def test_no_message_names_an_option_in_one_language_only() -> None:
    """A message that names an option has `argument(...)` in its place."""
    wrong = [
        (place, text)
        for place, text in messages()
        if AN_OPTION.search(text) or A_FLAG.search(A_COMMAND.sub("", text))
    ]
    assert wrong == []


FLAGS = flags_of(load_command("generate"))


@pytest.mark.parametrize(
    ("mark", "in_python", "as_flag"),
    [
        (argument("max_tokens"), "max_tokens", "-n/--max-tokens"),
        (argument("overflow", "truncate"), "overflow='truncate'", "--overflow truncate"),
        (argument("overflow", "error", "slide"), "overflow='error' or 'slide'", None),
        (argument("allow_special", True), "allow_special=True", "--allow-special"),
        (argument("top_k", 5), "top_k=5", "--top-k 5"),
        (argument("batch_size"), "batch_size", "batch_size"),  # no flag
    ],
)
def test_an_argument_in_both_languages(mark: str, in_python: str, as_flag: str | None) -> None:
    error = ParameterError(f"use {mark}, not 'x'")
    assert str(error) == f"use {in_python}, not 'x'"
    flag = as_flag or "--overflow error or slide"
    assert error.text(FLAGS) == f"use {flag}, not 'x'"


def test_items_of_a_list_have_the_flag_of_the_list() -> None:
    show = flags_of(load_command("bench"))
    assert show("model", []) == show("models", []) == "-m/--model"
    assert show("prompts", []) == "-p/--n-prompt"


def test_an_argument_of_a_command_has_the_name_of_its_usage() -> None:
    assert flags_of(load_command("convert"))("source", []) == "SRC"
    assert flags_of(load_command("info"))("model", ["'gpt2'"]) == "gpt2"
    assert flags_of(load_command("info"))("model", []) == "MODEL"
    assert FLAGS("model", ["'gpt2'"]) == "--model gpt2"


@pytest.mark.parametrize("kind", [getattr(errors, name) for name in sorted(ERRORS)])
def test_an_error_keeps_its_marks_through_pickle(kind: type[GptxError]) -> None:
    error = kind(f"lower {argument('max_tokens')}")
    for other in (error, pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is kind
        assert str(other) == "lower max_tokens"
        assert other.args == ("lower max_tokens",)
        assert other.text(FLAGS) == "lower -n/--max-tokens"


# A request that fails, and the parts of its message that differ.
BOTH = [
    (("-n", "0"), {"max_tokens": 0}, "-n/--max-tokens is 0", "max_tokens is 0"),
    (
        ("--temperature", "-1"),
        {"temperature": -1.0},
        "--temperature is -1.0",
        "temperature is -1.0",
    ),
    (("--top-k", "-1"), {"top_k": -1}, "--top-k is -1", "top_k is -1"),
    (("--top-p", "2"), {"top_p": 2.0}, "--top-p is 2.0", "top_p is 2.0"),
    (("--min-p", "2"), {"min_p": 2.0}, "--min-p is 2.0", "min_p is 2.0"),
    (
        ("--repetition-penalty", "0"),
        {"repetition_penalty": 0.0},
        "--repetition-penalty is 0.0",
        "repetition_penalty is 0.0",
    ),
    (
        ("--presence-penalty", "nan"),
        {"presence_penalty": math.nan},
        "--presence-penalty is nan",
        "presence_penalty is nan",
    ),
    (
        ("--frequency-penalty", "inf"),
        {"frequency_penalty": math.inf},
        "--frequency-penalty is inf",
        "frequency_penalty is inf",
    ),
    (("--logit-bias", "1=nan"), {"logit_bias": {1: math.nan}}, "--logit-bias", "logit_bias"),
    (("--logit-bias", "9999=1"), {"logit_bias": {9999: 1.0}}, "--logit-bias", "logit_bias"),
    (("--seed", "-1"), {"seed": -1}, "-s/--seed is -1", "seed is -1"),
    (("--typical-p", "2"), {"typical_p": 2.0}, "--typical-p is 2.0", "typical_p is 2.0"),
    (("--n", "0"), {"n": 0}, "--n is 0", "n is 0"),
    (
        ("--n", "3", "--best-of", "2"),
        {"n": 3, "best_of": 2},
        "--best-of is 2, expected at least --n, which is 3",
        "best_of is 2, expected at least n, which is 3",
    ),
    (
        ("-n", "5", "--min-tokens", "6"),
        {"max_tokens": 5, "min_tokens": 6},
        "--min-tokens is 6, -n/--max-tokens is 5: give a smaller --min-tokens",
        "min_tokens is 6, max_tokens is 5: give a smaller min_tokens",
    ),
    (("--ban", ""), {"ban": ""}, "--ban has ''", "ban has ''"),
    (
        ("--stop-token-id", "9999"),
        {"stop_token_ids": [9999]},
        "--stop-token-id has token 9999",
        "stop_token_ids has token 9999",
    ),
    (
        ("--dry-multiplier", "1", "--dry-sequence-breaker", "zzzz"),
        {"dry_multiplier": 1.0, "dry_sequence_breakers": ["zzzz"]},
        "--dry-sequence-breaker has 'zzzz'",
        "dry_sequence_breakers has 'zzzz'",
    ),
    (
        ("--sequence-bias", "a=nan"),
        {"sequence_bias": {"a": math.nan}},
        "--sequence-bias of 'a' is nan",
        "sequence_bias of 'a' is nan",
    ),
    (("--dry-base", "0.5"), {"dry_base": 0.5}, "--dry-base is 0.5", "dry_base is 0.5"),
    (("--stop", ""), {"stop": ""}, "--stop has ''", "stop has ''"),
    (("-t", "0"), {"threads": 0}, "-t/--threads is 0", "threads is 0"),
    (
        ("-b", "mlx", "-t", "2"),
        {"backend": "mlx", "threads": 2},
        "-t/--threads is 2",
        "threads is 2",
    ),
    (
        ("--dtype", "bfloat16"),
        {"dtype": "bfloat16"},
        "--dtype is 'bfloat16'",
        "dtype is 'bfloat16'",
    ),
    (
        ("--cache-dtype", "bfloat16"),
        {"cache_dtype": "bfloat16"},
        "--cache-dtype is 'bfloat16'",
        "cache_dtype is 'bfloat16'",
    ),
    (
        ("--group-size", "32"),
        {"group_size": 32},
        "give --quantize int8 or int4",
        "give quantize='int8' or 'int4'",
    ),
    (
        ("--quantize", "int4", "--group-size", "5"),
        {"quantize": "int4", "group_size": 5},
        "--group-size is 5",
        "group_size is 5",
    ),
    (("--revision", "x"), {"revision": "x"}, "--revision is 'x'", "revision is 'x'"),
    (
        ("-n", "300"),
        {"max_tokens": 300},
        "lower -n/--max-tokens, or use --overflow truncate or slide",
        "lower max_tokens, or use overflow='truncate' or 'slide'",
    ),
    (("-p", ""), {"prompt": ""}, "with --allow-special", "with allow_special=True"),
]


@pytest.mark.parametrize(("args", "options", "flag", "name"), BOTH, ids=lambda x: str(x)[:30])
def test_a_message_in_both_languages(
    args: tuple[str, ...], options: dict[str, Any], flag: str, name: str
) -> None:
    if options.get("backend") == "mlx":
        pytest.importorskip("mlx.core")
    prompt = () if args[0] == "-p" else ("O",)
    done = run(*GENERATE, *args, *prompt)
    assert (done.code, done.out) in {(2, ""), (65, "")}
    assert flag in done.err
    assert not [x for x in IDENTIFIERS if re.search(rf"\b{x}\b", done.err)]
    with pytest.raises(GptxError) as caught:
        gptx.generate(**{"prompt": "O", "model": "shakespeare", **options})
    assert name in str(caught.value)
    assert not A_FLAG.search(str(caught.value))


def test_convert_names_its_flag(tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_bytes(b"")
    done = run("convert", "shakespeare", str(tmp_path / "out.gguf"))
    assert (done.code, done.out) == (2, "")
    assert done.err.endswith("already exists: give another name, or --overwrite\n")
