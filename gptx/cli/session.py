"""A session: a text that user and model write in turn, and the commands that act on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import click

from gptx.cli.app import load_command
from gptx.cli.streaming import print_chunks, print_statistics
from gptx.errors import GptxError, Interrupted
from gptx.generation.options import Options, check_options
from gptx.generation.request import Request
from gptx.generation.results import Result
from gptx.generation.text_model import Model, stream_request
from gptx.kv_cache import KVCache

HELP = """\
The model continues the text that you enter, line by line.
  A line that begins with a space continues the last line; any other begins a new one.
  An empty line lets the model continue. A line that ends with \\ has another line after it.
  Ctrl-C ends the output, Ctrl-D the session.
Commands:
  /help          show this
  /text          show the text so far
  /undo          remove the last entry and its continuation
  /retry         continue the last entry again
  /reset         start with an empty text
  /seed [N]      use the seed N; without N, a random one each time
  /set           show the settings
  /set NAME [X]  change a setting, such as /set temperature 0.8; without X, as at the start
  //             enter a line that begins with /"""
# Options of `gptx generate` that `/set` changes.
SETTINGS = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_range",
    "min_tokens",
    "seed",
    "stop",
    "ignore_eos",
    "overflow",
)
# Values of a setting, by the type of its option.
_EXPECTED = {"integer": "a whole number", "float": "a number", "boolean": "on or off"}


@dataclass(frozen=True)
class Turn:
    """An entry of the user, as it is in the text, and the model's continuation."""

    entry: str
    output: str


class Session:
    """A text that grows in turns.

    Attributes
    ----------
    model
        The model that continues the text.
    options
        Options of `Model.generate` for the next turn.
    turns
        All turns so far; their text is the start of the next prompt.
    """

    def __init__(self, model: Model, options: dict[str, Any]) -> None:
        self.model = model
        self.options = options
        self.turns: list[Turn] = []
        self._cache: KVCache | None = None

    @property
    def text(self) -> str:
        """Text so far."""
        return "".join(turn.entry + turn.output for turn in self.turns)

    def enter(self, line: str) -> Result:
        """Add a line to the text, which begins a new one unless it begins with a space.

        Returns and raises as `continue_text`.
        """
        text = self.text
        begins = line and text and not (line.startswith(" ") or text.endswith("\n"))
        return self.continue_text(f"\n{line}" if begins else line)

    def continue_text(self, entry: str) -> Result:
        """Add an entry to the text and print its continuation.

        The result is that of a generation with the text and the entry as the prompt. What the KV
        cache of the turn before has is not computed again. After an interrupt, the output so far
        belongs to the text.

        Raises
        ------
        GptxError, Interrupted
            There is no result; the text is unchanged.
        """
        prompt = self.text + entry
        options = check_options(cast("Options", {**self.options, "cache": self._cache}))
        chunks = stream_request(self.model, Request([prompt], options), self._keep)
        try:
            result = print_chunks(chunks)
        except Interrupted as interrupt:
            if not interrupt.results:
                raise
            result = interrupt.results[0]
        self.turns.append(Turn(entry, str(result)))
        return result

    def _keep(self, cache: KVCache) -> None:
        self._cache = cache


class Commands:
    """The user's side of a session: lines and commands, and what they print."""

    def __init__(self, session: Session, quiet: bool = False) -> None:
        self.session = session
        self.quiet = quiet
        params = {param.name: param for param in load_command("generate").params}
        self._params = {name: params[name] for name in SETTINGS}
        self._defaults = dict(session.options)
        self._commands: dict[str, Callable[[], None]] = {
            "help": lambda: click.echo(HELP, err=True),
            "text": lambda: click.echo(session.text),
            "undo": self._undo,
            "retry": self._retry,
            "reset": session.turns.clear,
        }
        self._commands_with_value: dict[str, Callable[[str], None]] = {
            "seed": lambda value: self._set(f"seed {value}"),
            "set": self._set,
        }

    @property
    def words(self) -> list[str]:
        """Words that can be completed: the commands and the settings."""
        commands = (*self._commands, *self._commands_with_value)
        return [*(f"/{name}" for name in commands), *map(_spelled, SETTINGS)]

    def read(self, line: str) -> None:
        """Run a command, or enter a line into the text; print an error if that fails."""
        try:
            if not line.startswith("/") or line.startswith("//"):
                self._enter(line.removeprefix("/"))
                return
            name, _, value = line[1:].partition(" ")
            self._run(name, value.strip())
        except GptxError as error:
            click.echo(f"Error: {error.text(_setting)}", err=True)
        except click.ClickException as error:
            click.echo(f"Error: {error.format_message()}", err=True)

    def _run(self, name: str, value: str) -> None:
        if name in self._commands_with_value:
            self._commands_with_value[name](value)
        elif name not in self._commands:
            raise click.UsageError(f"unknown command /{name}: see /help; Ctrl-D ends the session")
        elif value:
            raise click.UsageError(f"/{name} has {value!r} after it, expected nothing: see /help")
        else:
            self._commands[name]()

    def _enter(self, line: str) -> None:
        if not line and not self.session.turns:
            raise click.UsageError("the text is empty: enter its first line, or /help")
        self._end(self.session.enter(line))

    def _end(self, result: Result) -> None:
        if not str(result).endswith("\n"):
            click.echo()
        if not self.quiet:
            print_statistics(result)

    def _last(self) -> Turn:
        if not self.session.turns:
            raise click.UsageError("the text is empty: enter its first line")
        return self.session.turns.pop()

    def _undo(self) -> None:
        self._last()
        click.echo(self.session.text)

    def _retry(self) -> None:
        turn = self._last()
        try:
            result = self.session.continue_text(turn.entry)
        except BaseException:
            self.session.turns.append(turn)
            raise
        self._end(result)

    def _set(self, arguments: str) -> None:
        """Change a setting, or show all of them."""
        options = self.session.options
        if not arguments:
            for name in SETTINGS:
                click.echo(f"{_spelled(name):<20} {_shown(options[name])}", err=True)
            return
        name, _, text = arguments.partition(" ")
        name, text = name.replace("-", "_"), text.strip()
        if name not in self._params:
            known = ", ".join(map(_spelled, SETTINGS))
            raise click.UsageError(f"unknown setting {_spelled(name)}: expected one of {known}")
        value: Any = None if name == "seed" else self._defaults[name]
        if text and (name, text) != ("seed", "random"):
            kind = self._params[name].type
            try:
                value = kind.convert(text, None, None)
            except click.BadParameter:
                expected = _EXPECTED.get(kind.name) or " or ".join(getattr(kind, "choices", ()))
                raise click.UsageError(
                    f"{_spelled(name)} is {text!r}, expected {expected}"
                ) from None
            if name == "stop":
                value = (value.replace("\\n", "\n"),)
        changed = {**options, name: value}
        check_options(cast("Options", changed))
        self.session.options = changed


def _spelled(name: str) -> str:
    return name.replace("_", "-")


def _setting(name: str, values: list[str]) -> str:
    """Name an option of an error in the words of a session; see `GptxError.text`."""
    if name in SETTINGS and values:
        shown = " or ".join(value.strip("'") for value in values)
        return f"/set {_spelled(name)} {shown}"
    return _spelled(name) if name in SETTINGS else name


def _shown(value: Any) -> str:
    """Return the value of a setting as `/set` shows it."""
    if value is None:
        return "random"  # the seed
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (tuple, list)):
        return " ".join(map(repr, value)) or "none"
    return str(value)
