"""A session on a terminal: line editing, history, Ctrl-C and Ctrl-D."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any, cast

import click

from gptx.cli import signals
from gptx.cli.session import Commands, Session
from gptx.files import atomic_path
from gptx.generation.api import load_once
from gptx.generation.options import LoadOptions, Options, check_options
from gptx.generation.suggested import suggested_options

PROMPT, MORE = "> ", ". "
MAX_HISTORY_LINES = 1000


def run_session(
    model: str,
    load_options: LoadOptions,
    options: dict[str, Any],
    suggestible: Set[str],
    *,
    quiet: bool,
) -> None:
    """Load a model and read lines until Ctrl-D.

    With the option `generation_config`, the options `suggestible` are those of the model's file.
    """
    options["overflow"] = options["overflow"] or "slide"
    check_options(cast("Options", options))  # before the download of a large model
    loaded = load_once(model, None, lambda info: info.tokenizer, **load_options)
    if options.pop("generation_config"):
        suggested = suggested_options(loaded.files)
        options |= {k: x for k, x in suggested.items() if k in suggestible - {"n"}}
        check_options(cast("Options", options))
    commands = Commands(Session(loaded, options), quiet)
    if not quiet:
        click.echo(
            f"{loaded.name}, context of {loaded.config.n_positions} tokens: enter a text, and the "
            "model continues it; /help shows the commands, Ctrl-D ends the session.",
            err=True,
        )
    with _line_editing(commands.words):
        while True:
            signals.rearm()
            try:
                commands.read(_read_line())
            except EOFError:
                click.echo()  # the shell's prompt gets its own line
                return
            except KeyboardInterrupt:  # ends the line or the command, not the session
                click.echo()
            except UnicodeDecodeError as error:
                click.echo(f"Error: the line is not valid text ({error}): enter it again", err=True)


def _read_line() -> str:
    line = input(PROMPT)
    while line.endswith("\\"):
        line = f"{line[:-1]}\n{input(MORE)}"
    return line


@contextlib.contextmanager
def _line_editing(words: list[str]) -> Iterator[None]:
    """Edit lines with readline, if Python has it: history of earlier sessions, completion."""
    try:
        import readline
    except ImportError:  # Windows
        yield
        return

    def complete(start: str, index: int) -> str | None:
        return [*(word for word in words if word.startswith(start)), None][index]

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    is_libedit = "libedit" in (readline.__doc__ or "")  # of macOS, with its own syntax
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
    readline.set_history_length(MAX_HISTORY_LINES)
    with contextlib.suppress(OSError, RuntimeError):
        if (path := history_file()).is_file():  # a FIFO would block
            readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, RuntimeError):
            path = history_file()
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
                readline.write_history_file(temporary)
                temporary.chmod(0o600)


def history_file() -> Path:
    """Return the file of the lines that were entered; only the user can read it.

    Raises
    ------
    RuntimeError
        The user has no home folder.
    """
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "gptx" / "history"
