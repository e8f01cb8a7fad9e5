"""What can go wrong between gptx and the Hub, in gptx's own exceptions and in one line each."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

from huggingface_hub import constants, errors

from gptx.errors import (
    AuthorizationError,
    GptxError,
    HubUnavailableError,
    IntegrityError,
    NotFoundError,
    StorageError,
)

# huggingface_hub has used requests, httpx and httpx2, whose errors have no base in common.
_HTTP_LIBRARIES = ("httpx", "httpcore", "h11", "requests", "urllib3")


class NoSuchFileError(NotFoundError):
    """The repository is there, but lacks a file; or the cache does, while offline."""


class NotResumedError(HubUnavailableError):
    """The connection was cut, and the Hub sends a file only from its start."""


@contextmanager
def translated(repository: str, revision: str, filename: str) -> Iterator[None]:
    """Raise every foreign exception as the gptx exception that it amounts to."""
    try:
        yield
    except GptxError:
        raise
    except Exception as error:
        raise _translate(error, repository, f"{filename} of {repository}@{revision}") from error


def no_such_file(what: str) -> NoSuchFileError:
    """The Hub has the repository and the revision, but not this file."""
    return NoSuchFileError(
        f"{what} does not exist on {constants.ENDPOINT}: expected a GPT-2 with config.json and "
        "model.safetensors"
    )


def broken_promise(what: str) -> IntegrityError:
    """The content is not the one that its hash or its size announced."""
    return IntegrityError(
        f"{what} came with another hash or size than {constants.ENDPOINT} had announced, and was "
        "not kept: try again"
    )


def _translate(error: Exception, repository: str, what: str) -> GptxError:
    hub = constants.ENDPOINT
    response = getattr(error, "response", None)
    status = status_of(error)
    has_token = response is not None and "authorization" in response.request.headers
    gated = isinstance(error, errors.GatedRepoError)  # also a RepositoryNotFoundError

    if isinstance(error, errors.RevisionNotFoundError):
        return NotFoundError(
            f"{what} does not exist on {hub}: the repository lacks this revision, expected a "
            "branch, a tag or a commit hash"
        )
    if isinstance(error, errors.RepositoryNotFoundError) and not gated:
        # The Hub does not tell a stranger whether a repository is private or absent.
        remedy = "this token may not read it" if has_token else "needs a token: set HF_TOKEN"
        return NotFoundError(
            f"{what} does not exist on {hub}: there is no such repository, or it is private and "
            f"{remedy}"
        )
    if gated or status in (401, 403):
        how = "to this token" if has_token else "without a token"
        return AuthorizationError(
            f"{hub} refuses {what} {how}: accept the terms at {hub}/{repository}, then set "
            "HF_TOKEN or run `hf auth login`"
        )
    if isinstance(error, errors.EntryNotFoundError) or status in (404, 410):
        return no_such_file(what)
    if status == 416:  # the part to be resumed is longer than the file
        return broken_promise(what)

    if is_of_storage(error):
        if error.errno is None:  # how http_get reports a wrong size
            return broken_promise(what)
        return StorageError(
            f"cannot keep {what} in {constants.HF_HUB_CACHE} ({error.strerror}): make room there, "
            "or choose another place with HF_HOME"
        )
    return HubUnavailableError(
        f"{hub} did not deliver {what} ({reason(error)}): check the connection and try again, or "
        "go offline with what is cached"
    )


def status_of(error: Exception) -> int | None:
    """The HTTP status that an error is about, if it is about one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_of_storage(error: Exception) -> TypeGuard[OSError]:
    """Whether the disk failed (or, without an `errno`, a size is wrong), not the connection."""
    origins = [kind.__module__ for kind in type(error).__mro__]
    return (
        status_of(error) is None
        and isinstance(error, OSError)
        and not isinstance(error, (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError))
        and not any(origin.startswith(_HTTP_LIBRARIES) for origin in origins)
    )


def reason(error: Exception) -> str:
    """What the connection failed of, in a few words."""
    if (status := status_of(error)) is not None:
        return f"HTTP status {status}"
    text = " ".join(str(error).split())
    if not text or "Bearer" in text:  # a refused header is quoted with the token in it
        return type(error).__name__
    return f"{type(error).__name__}: {text[:200]}"
