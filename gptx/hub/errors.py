"""Translate errors of huggingface_hub, its HTTP library and the disk into gptx's errors."""

from __future__ import annotations

import errno
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
    argument,
)
from gptx.hub.connection import certificate_problem, explain, is_connection_fault, status_of

EMBEDDED_HINT = f"{argument('model', 'shakespeare')}, which needs no download"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NoSuchFileError(NotFoundError):
    """The repository lacks a file, or the cache lacks it while gptx is offline."""


class NotResumableError(HubUnavailableError):
    """A download was interrupted, and the server sends the file only from its start."""


class InvalidSettingError(HubUnavailableError):
    """A setting of the connection is invalid: another attempt fails, too."""


@contextmanager
def translated(
    repository: str, revision: str, filename: str, kind: str = "model"
) -> Iterator[None]:
    """Raise any exception as a gptx error about this file; `kind` is that of the repository."""
    try:
        yield
    except GptxError:
        raise
    except Exception as error:
        raise _translate(error, repository, revision, filename, kind) from error


def no_such_file(
    repository: str, revision: str, filename: str, kind: str = "model"
) -> NoSuchFileError:
    """Make the error for a file that an existing revision lacks."""
    missing = f"{filename} of {repository}@{revision} does not exist on {constants.ENDPOINT}"
    if kind != "model":
        return NoSuchFileError(f"{missing}: get the text elsewhere, and give its file")
    return NoSuchFileError(
        f"{missing}: expected a GPT-2 with config.json and model.safetensors; "
        f"{other_format_hint(repository)}"
    )


def other_format_hint(repository: str) -> str:
    """Return the end of an error about a repository with a model of another format."""
    return (
        "for one of another format (see `gptx convert --list`), run "
        f"`hf download {repository} --local-dir FOLDER`, and give gptx its path"
    )


def wrong_content(subject: str) -> IntegrityError:
    """Make the error for a file with another hash or size than the promised one."""
    return IntegrityError(
        f"{subject} arrived with another hash or size than {constants.ENDPOINT} announced, and was "
        "deleted: try again"
    )


def _translate(
    error: Exception, repository: str, revision: str, filename: str, kind: str
) -> GptxError:
    hub = constants.ENDPOINT
    subject = f"{filename} of {repository}@{revision}"
    response = getattr(error, "response", None)
    status = status_of(error)
    has_token = response is not None and "authorization" in response.request.headers
    gated = isinstance(error, errors.GatedRepoError)  # also a RepositoryNotFoundError

    if isinstance(error, errors.RevisionNotFoundError):
        return NotFoundError(
            f"revision {revision} does not exist in {repository} on {hub}: give a branch, a tag or "
            "a commit hash of 40 digits"
        )
    if isinstance(error, errors.RepositoryNotFoundError) and not gated:
        # Without a valid token, the Hub gives the same answer for a private and a missing one.
        remedy = "this token may not read it" if has_token else "needs a token: set HF_TOKEN"
        return NotFoundError(
            f"{subject} does not exist on {hub}: the repository does not exist, or it is private "
            f"and {remedy}"
        )
    if gated or status in (401, 403):
        how = "with this token" if has_token else "without a token"
        return AuthorizationError(
            f"{hub} refuses {subject} {how}: accept the terms at {hub}/{repository}, then set "
            "HF_TOKEN or run `hf auth login`"
        )
    if isinstance(error, errors.EntryNotFoundError) or status in (404, 410):
        return no_such_file(repository, revision, filename, kind)
    if is_storage_fault(error):
        return not_stored(subject, constants.HF_HUB_CACHE, error)
    fault = explain(error, hub)
    cls = InvalidSettingError if fault.is_setting else HubUnavailableError
    other = EMBEDDED_HINT if kind == "model" else "a file of your own"
    return cls(
        f"{hub} did not deliver {subject} ({fault.reason}): {fault.remedy}, or use a cached {kind} "
        f"with {argument('offline', True)}, or {other}"
    )


def not_stored(subject: str, folder: object, error: OSError) -> StorageError:
    """Make the error for a cache that refuses a file."""
    remedy = "free space there" if error.errno in _DISK_FULL else "allow reading and writing there"
    return StorageError(
        f"cannot store {subject} in {folder} ({error.strerror or error}): {remedy}, or choose "
        "another folder with HF_HOME"
    )


def is_storage_fault(error: Exception) -> TypeGuard[OSError]:
    """Test for an error of the disk."""
    return (
        isinstance(error, OSError)
        and error.errno is not None
        and status_of(error) is None
        and not is_connection_fault(error)
        and certificate_problem(error) is None
    )
