"""gptx.hub.errors: exceptions of other libraries by their kind."""

from __future__ import annotations

import errno
import ssl
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import get_session

from gptx.errors import HubUnavailableError, StorageError
from gptx.hub.connection import is_connection_fault, reason
from gptx.hub.download import _is_transient
from gptx.hub.errors import NotResumableError, is_storage_fault, not_stored, translated
from tests.support.hub import hub_settings

CONNECTION = [ConnectionResetError(), TimeoutError(), ssl.SSLError()]
STORAGE = [OSError(errno.ENOSPC, "full"), PermissionError(errno.EACCES, "denied")]
OTHER = [TypeError("x"), ValueError("x"), OSError("without a number")]


@pytest.mark.parametrize("error", [*CONNECTION, *STORAGE, *OTHER], ids=repr)
def test_kinds(error: Exception) -> None:
    assert is_connection_fault(error) == (error in CONNECTION) == _is_transient(error)
    assert is_storage_fault(error) == (error in STORAGE)
    expected = StorageError if error in STORAGE else HubUnavailableError
    with pytest.raises(expected, match="a of b@main") as caught, translated("b", "main", "a"):
        raise error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free space there"),
        (errno.EDQUOT, "free space there"),
        (errno.EACCES, "allow reading and writing there"),
        (errno.ENOTDIR, "allow reading and writing there"),
    ],
)
def test_remedy_of_the_disk(number: int, remedy: str) -> None:
    message = str(not_stored("a of b", "/cache", OSError(number, "why")))
    assert message == (
        f"cannot store a of b in /cache (why): {remedy}, or choose another folder with HF_HOME"
    )


def test_error_of_the_http_library(tmp_path: Path) -> None:
    session: Any = get_session()
    with hub_settings("http://127.0.0.1:9", tmp_path), pytest.raises(Exception) as caught:  # noqa: PT011
        session.get("http://127.0.0.1:9")
    assert is_connection_fault(caught.value)
    assert not is_storage_fault(caught.value)


def test_server_without_ranges_gets_no_other_request() -> None:
    assert not _is_transient(NotResumableError("x"))


def test_reason_hides_a_token() -> None:
    error = ValueError("invalid header b'Bearer hf_secret\\n'")
    assert reason(error) == "ValueError"
    assert reason(ValueError("a\nb")) == "ValueError: a b"
    assert len(reason(ValueError("x" * 10_000))) < 250
