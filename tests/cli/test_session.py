"""gptx.cli.session: the text that grows in turns, the commands, and what they print."""

from __future__ import annotations

from typing import Any

import pytest

from gptx.cli.session import HELP, SETTINGS, Commands, Session, Turn
from gptx.errors import Interrupted, PromptError
from gptx.generation.text_model import Model

DEFAULTS: dict[str, Any] = {
    "max_tokens": 8,
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "typical_p": 1.0,
    "no_repeat_ngram_size": 0,
    "dry_multiplier": 0.0,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "dry_range": 0,
    "min_tokens": 0,
    "seed": None,
    "stop": (),
    "ignore_eos": False,
    "overflow": "slide",
}


@pytest.fixture
def session(shakespeare: Model) -> Session:
    return Session(shakespeare, dict(DEFAULTS))


@pytest.fixture
def commands(session: Session) -> Commands:
    return Commands(session)


def text_of(model: Model, prompt: str, **options: Any) -> str:
    return str(model.generate(prompt, **{**DEFAULTS, **options}))


def test_a_turn_is_a_generation_from_the_text(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    first = session.enter("ROMEO:")
    n_cached = first.cached_tokens
    assert n_cached == 0
    assert str(first) == text_of(session.model, "ROMEO:")
    second = session.enter(" and")
    n_cached = second.cached_tokens
    prompt = f"ROMEO:{first} and"
    assert str(second) == text_of(session.model, prompt)
    assert 0 < n_cached < len(session.model.encode(prompt))
    assert session.text == prompt + str(second)
    assert capsys.readouterr().out == f"{first}{second}"


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("", "ROMEO:", "ROMEO:"),
        ("", " and", " and"),
        ("I come", "JULIET:", "I come\nJULIET:"),
        ("I come\n", "JULIET:", "I come\nJULIET:"),
        ("I come", " and go", "I come and go"),
        ("I come\n", " and go", "I come\n and go"),
        ("I come", "", "I come"),
        ("I come", "two\nlines", "I come\ntwo\nlines"),
    ],
)
def test_a_line_begins_a_new_one_or_continues_the_last(
    session: Session, text: str, line: str, expected: str
) -> None:
    session.turns = [Turn(text, "")] if text else []
    result = session.enter(line)
    assert session.text == expected + str(result)


def test_the_cache_has_the_turn_before(session: Session) -> None:
    """Only the newest token and the entry are computed: an empty entry computes one token."""
    session.enter("ROMEO:")
    result = session.enter("")
    n_cached = result.cached_tokens
    assert n_cached == result.prompt_tokens - 1


def test_a_text_longer_than_the_context_slides(session: Session) -> None:
    session.turns = [Turn("ROMEO:\n" * 100, "")]
    assert len(session.model.encode(session.text)) > session.model.config.n_positions
    result = session.enter("JULIET:")
    assert len(result.tokens) == 8


def test_an_interrupt_keeps_the_output_so_far(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def echo(text: str = "", **options: Any) -> None:
        assert options == {"nl": False}
        written.append(text)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("gptx.cli.streaming.click.echo", echo)
    result = session.enter("ROMEO:")
    assert result.finish_reason == "interrupted"
    assert session.turns == [Turn("ROMEO:", str(result))]
    assert str(result).startswith("".join(written[:3]))
    monkeypatch.undo()
    again = session.enter("")
    n_cached = again.cached_tokens
    assert again.finish_reason == "length"
    assert n_cached > 0


@pytest.mark.parametrize("error", [PromptError("bad"), Interrupted()])
def test_a_turn_that_fails_leaves_the_text_and_the_last_turn(
    session: Session, commands: Commands, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    session.enter("ROMEO:")
    turns = list(session.turns)

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("gptx.cli.session.stream_request", fail)
    for line in ("more", "/retry"):
        if isinstance(error, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                commands.read(line)
        else:
            commands.read(line)
        assert session.turns == turns


def test_commands_on_the_text(commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    session = commands.session
    commands.read("ROMEO:")
    first = session.text
    commands.read("JULIET:")
    assert len(session.turns) == 2
    capsys.readouterr()
    commands.read("/text")
    assert capsys.readouterr().out == f"{session.text}\n"
    commands.read("/undo")
    assert session.text == first
    assert capsys.readouterr().out == f"{first}\n"
    commands.read("/retry")
    assert session.text == first
    commands.read("/reset")
    assert session.text == ""
    for line in ("", "/undo", "/retry"):
        capsys.readouterr()
        commands.read(line)
        assert capsys.readouterr().err.startswith("Error: the text is empty: enter its first line")
    commands.read("//help")
    assert session.turns[0].entry == "/help"


def test_a_seed_repeats_and_retry_takes_another(commands: Commands) -> None:
    session = commands.session
    for line in ("/set temperature 1", "/set max-tokens 12", "/seed 5", "O"):
        commands.read(line)
    seeded = session.text
    assert seeded == "O" + text_of(session.model, "O", temperature=1, max_tokens=12, seed=5)
    commands.read("/retry")
    assert session.text == seeded
    commands.read("/seed")
    commands.read("/retry")
    assert session.text != seeded


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("/set temperature 0.8", "temperature", 0.8),
        ("/set max-tokens 5", "max_tokens", 5),
        ("/set max_tokens 5", "max_tokens", 5),
        ("/set top-k  7", "top_k", 7),
        ("/set ignore-eos on", "ignore_eos", True),
        ("/set overflow truncate", "overflow", "truncate"),
        ("/set seed 3", "seed", 3),
        ("/seed 3", "seed", 3),
        (r"/set stop \n\n", "stop", ("\n\n",)),
        ("/set stop the end", "stop", ("the end",)),
    ],
)
def test_a_setting_is_changed_and_set_back(
    commands: Commands, line: str, name: str, value: Any
) -> None:
    commands.read(line)
    assert commands.session.options == {**DEFAULTS, name: value}
    commands.read(f"/set {name}")
    assert commands.session.options == DEFAULTS


def test_seed_without_a_number_is_random(shakespeare: Model) -> None:
    """Also if the session has started with a seed; other settings are as at the start."""
    session = Session(shakespeare, {**DEFAULTS, "seed": 5, "top_k": 7})
    commands = Commands(session)
    for random in ("/seed", "/seed random", "/set seed random", "/set seed"):
        for line in ("/seed 6", "/set top-k 3", "/set top-k", random):
            commands.read(line)
        assert session.options == {**DEFAULTS, "seed": None, "top_k": 7}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temperature -1", "temperature is -1.0, expected a number from 0"),
        ("/set temperature warm", "temperature is 'warm', expected a number"),
        ("/set max-tokens 0", "max-tokens is 0, expected a whole number of at least 1"),
        ("/set overflow no", "overflow is 'no', expected error or truncate or slide"),
        ("/set ignore-eos maybe", "ignore-eos is 'maybe', expected on or off"),
        ("/set backend mlx", "unknown setting backend: expected one of max-tokens, temperature"),
        ("/seed x", "seed is 'x', expected a whole number"),
        ("/seed -1", "seed is -1, expected a whole number from 0 to 2^64 - 1"),
        ("/exit now", "unknown command /exit: see /help; Ctrl-D ends the session"),
        ("/undo 2", "/undo has '2' after it, expected nothing: see /help"),
        ("/", "unknown command /: see /help"),
        ("/_undo", "unknown command /_undo: see /help"),
    ],
)
def test_bad_commands_change_nothing(
    commands: Commands, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    commands.read(line)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"Error: {message}")
    assert err.count("\n") == 1
    assert commands.session.options == DEFAULTS
    assert commands.session.turns == []


def test_an_error_of_a_turn_names_the_setting(
    commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in ("/set overflow error", "/set max-tokens 9999", "ROMEO:"):
        commands.read(line)
    err = capsys.readouterr().err
    assert "lower max-tokens, or use /set overflow truncate or slide" in err
    assert commands.session.turns == []


def test_help_and_settings_are_complete(
    commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.read("/help")
    assert capsys.readouterr() == ("", f"{HELP}\n")
    for word in commands.words:
        if word.startswith("/"):
            assert f"  {word} " in HELP
    commands.read("/set")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0].replace("-", "_") for line in lines] == list(SETTINGS)
    shown = dict(line.split() for line in lines)
    assert (shown["seed"], shown["stop"], shown["ignore-eos"]) == ("random", "none", "off")
    for line in (r"/set stop \n", "/set ignore-eos on", "/seed 3", "/set"):
        commands.read(line)
    shown = dict(line.split() for line in capsys.readouterr().err.splitlines())
    assert (shown["seed"], shown["stop"], shown["ignore-eos"]) == ("3", repr("\n"), "on")


def test_statistics_follow_each_turn_unless_quiet(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    Commands(session).read("ROMEO:")
    assert capsys.readouterr().err.startswith("[prompt: 2 tokens, ")
    Commands(session).read("")
    assert "tokens (9 cached)" in capsys.readouterr().err
    Commands(session, quiet=True).read("")
    assert capsys.readouterr().err == ""
