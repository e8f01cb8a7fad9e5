"""The errors of gptx, each with its exit code.

A message is one line: what was given, what was expected, what to do. It names the options of a
call with `argument`: `str(error)` has them in Python's syntax, the command line prints its flags.
Each class also derives from a built-in exception (`ValueError`, `OSError`, ...), which callers can
catch without gptx::

    GptxError                     1
    ├── ParameterError            2   ValueError
    ├── BackendError              2   ImportError
    ├── DataError                65   ValueError
    │   ├── ConfigError
    │   ├── WeightsError
    │   ├── TokenizerError
    │   ├── PromptError
    │   └── IntegrityError
    ├── NotFoundError            66   FileNotFoundError
    ├── HubUnavailableError      69   ConnectionError
    ├── NonFiniteError           70   ArithmeticError
    ├── DeviceOutOfMemory        71   MemoryError
    ├── StorageError             74   OSError
    └── AuthorizationError       77   PermissionError
    Interrupted                 130   KeyboardInterrupt
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MAX_SHOWN_CHARACTERS = 60  # of an invalid value in a message

# Control characters, which no name or value of an option has.
_MARK, _SEPARATOR = "\x1d", "\x1f"


def shown(value: Any) -> str:
    """Return the start of the `repr` of a value, in one line."""
    try:
        text = repr(value)
    except ValueError:  # Python limits the digits of an int
        text = f"too long ({type(value).__name__})"
    return " ".join(text.split())[:MAX_SHOWN_CHARACTERS]


def argument(name: str, *values: Any) -> str:
    """Return a mark for the message of a `GptxError`: the name of an option, or some values of it.

    >>> str(GptxError(f"lower {argument('max_tokens')}"))
    'lower max_tokens'
    >>> str(GptxError(f"use {argument('overflow', 'truncate', 'slide')}"))
    "use overflow='truncate' or 'slide'"

    The command line prints "lower -n/--max-tokens" and "use --overflow truncate or slide". An error
    that quotes another keeps its marks by `error.message`.
    """
    return f"{_MARK}{_SEPARATOR.join([name, *map(repr, values)])}{_MARK}"


def _in_python(name: str, values: list[str]) -> str:
    return f"{name}={' or '.join(values)}" if values else name


class GptxError(Exception):
    """Base class of every error that gptx raises.

    Parameters
    ----------
    message
        One line, with marks of `argument`.

    Attributes
    ----------
    message
        The message as given; `str(error)` has the options in Python's syntax.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        self.message = message
        super().__init__(self.text(_in_python))

    def text(self, show: Callable[[str, list[str]], str]) -> str:
        """Return the message with `show(name, values)` for each option; a value is a `repr`."""
        parts = self.message.split(_MARK)
        parts[1::2] = [show(name, values) for name, *values in
                       (mark.split(_SEPARATOR) for mark in parts[1::2])]  # fmt: skip
        return "".join(parts)


class ParameterError(GptxError, ValueError):
    """A parameter is out of range, or two parameters contradict each other."""

    exit_code = 2


class BackendError(GptxError, ImportError):
    """A backend is unknown, is not installed, or does not support the request."""

    exit_code = 2


class DataError(GptxError, ValueError):
    """A file, a model or a prompt is invalid."""

    exit_code = 65


class ConfigError(DataError):
    """A config.json is invalid, or describes a model that gptx does not support."""


class WeightsError(DataError):
    """A weights file is damaged, or lacks tensors of its config."""


class TokenizerError(DataError):
    """A tokenizer is damaged, or is missing where text is read or written."""


class PromptError(DataError):
    """A prompt is empty or too long, is invalid text, or has unknown token ids."""


class IntegrityError(DataError):
    """A downloaded file differs from the one that the server announced."""


class NotFoundError(GptxError, FileNotFoundError):
    """A model, a file or a revision does not exist."""

    exit_code = 66


class HubUnavailableError(GptxError, ConnectionError):
    """The server does not answer, reports an error, or closed the connection."""

    exit_code = 69


class NonFiniteError(GptxError, ArithmeticError):
    """The model computed a NaN or an infinity."""

    exit_code = 70


class DeviceOutOfMemory(GptxError, MemoryError):
    """The memory of the device is too small."""

    exit_code = 71


class StorageError(GptxError, OSError):
    """A file cannot be read or written: disk full, read-only, input/output error."""

    exit_code = 74


class AuthorizationError(GptxError, PermissionError):
    """The server requires a token, or does not accept this one."""

    exit_code = 77


class ModelWarning(UserWarning):
    """A note on a model: an assumption of its reader, or a difference between its files."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a generation.

    Attributes
    ----------
    results : list[Result]
        One result per prompt, or `n` of them, up to the interruption. An unfinished one has the
        `finish_reason` "interrupted".
    """

    exit_code = 130

    def __init__(self, results: list[Any] | None = None) -> None:
        super().__init__("interrupted")
        self.results = results or []
