"""gptx.errors: classes, exit codes, and the error of an interrupt.

The messages of errors are tested in `tests/cli/test_messages.py`.
"""

from __future__ import annotations

import builtins
import re

import pytest

from gptx import errors
from gptx.errors import GptxError, Interrupted, argument

TREE = re.findall(r"^ {4}\W*(\w+)(?: +(\d+))?(?: +(\w+))?$", errors.__doc__ or "", re.MULTILINE)
CODES = {
    "GptxError": 1,
    "ParameterError": 2,
    "BackendError": 2,
    "DataError": 65,
    "ConfigError": 65,
    "WeightsError": 65,
    "TokenizerError": 65,
    "PromptError": 65,
    "IntegrityError": 65,
    "NotFoundError": 66,
    "HubUnavailableError": 69,
    "NonFiniteError": 70,
    "DeviceOutOfMemory": 71,
    "StorageError": 74,
    "AuthorizationError": 77,
    "Interrupted": 130,
}


def test_exit_codes() -> None:
    found = {
        name: kind.exit_code for name, kind in vars(errors).items() if hasattr(kind, "exit_code")
    }
    assert found == CODES


@pytest.mark.parametrize(("name", "code", "builtin"), TREE, ids=[row[0] for row in TREE])
def test_the_tree_of_the_docstring(name: str, code: str, builtin: str) -> None:
    kind = getattr(errors, name)
    assert not code or kind.exit_code == int(code)
    assert not builtin or issubclass(kind, getattr(builtins, builtin))
    if name != "Interrupted":
        assert issubclass(kind, GptxError)
        assert not issubclass(kind, KeyboardInterrupt)


def test_the_tree_is_complete() -> None:
    assert [name for name, *_ in TREE] == list(CODES)


def test_a_message_with_several_arguments() -> None:
    marks = [argument("a"), argument("b", 1, "x"), argument("c"), argument("d")]
    error = GptxError(" ".join(marks))
    assert str(error) == "a b=1 or 'x' c d"
    assert error.text(lambda name, values: f"-{name}{len(values)}") == "-a0 -b2 -c0 -d0"


def test_an_interrupt_has_its_results() -> None:
    assert Interrupted().results == []
    assert Interrupted(["result"]).results == ["result"]
    assert str(Interrupted()) == "interrupted"
