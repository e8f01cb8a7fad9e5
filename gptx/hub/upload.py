"""Upload a model to the Hugging Face Hub in one commit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, errors
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, not in __all__
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from gptx.errors import (
    AuthorizationError,
    GptxError,
    HubUnavailableError,
    NotFoundError,
    ParameterError,
    StorageError,
)
from gptx.hub.authorization import find_token
from gptx.hub.connection import explain, status_of
from gptx.hub.errors import is_storage_fault
from gptx.hub.repository import is_repository_name


def upload(
    path: str | Path,
    repository: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Upload a file, or all files of a folder, to a repository of the Hub, atomically.

    Parameters
    ----------
    path
        A file, or a folder without its hidden files.
    repository
        Hub id, "OWNER/NAME". A repository that does not exist is created.
    private
        Make a created repository private; if False, the settings of the owner decide.
    token
        Token with write access; `HF_TOKEN` or the saved login if None.
    revision
        Existing branch; "main" if None.
    message
        Commit message; "Upload NAME with gptx" if None.

    Returns
    -------
    str
        Address of the repository, or of the branch.

    Raises
    ------
    ParameterError
        `repository` is an invalid name, or the folder is empty.
    NotFoundError
        `path` or the branch does not exist.
    AuthorizationError
        The token is missing, or has no write access.
    HubUnavailableError
        No connection, an interrupted one, or the Hub rejects the files.
    StorageError
        A file cannot be read.
    """
    path = Path(path)
    token = check_repository(repository, token=token)
    files = _files(path)
    with _translated(f"{path.name} to {repository}", repository), _bars_only_on_a_terminal():
        api = HfApi(endpoint=constants.ENDPOINT, token=token)
        api.create_repo(repository, private=private or None, exist_ok=True)
        operations = [CommitOperationAdd(name, str(file)) for name, file in files.items()]
        api.create_commit(
            repository,
            operations,
            commit_message=message or f"Upload {path.name} with gptx",
            revision=revision,
        )
    return f"{constants.ENDPOINT}/{repository}" + (f"/tree/{revision}" if revision else "")


def check_repository(repository: str, *, token: str | None = None) -> str:
    """Check the name of a repository before any request; return the token for the upload.

    Raises
    ------
    ParameterError, AuthorizationError
        See `upload`.
    """
    if repository.count("/") != 1 or not is_repository_name(repository):
        raise ParameterError(f"repository is {repository!r}, expected OWNER/NAME")
    with _translated(f"files to {repository}", repository):
        found = find_token(token)
    if not found:
        raise AuthorizationError(
            f"{constants.ENDPOINT} accepts no uploads without a token: run `hf auth login`, or set "
            "HF_TOKEN to a token with write access"
        )
    return found


def _files(path: Path) -> dict[str, Path]:
    """Map names in the repository to files."""
    if path.is_file():
        return {path.name: path}
    if not path.is_dir():
        raise NotFoundError(f"{path} does not exist, expected a file or a folder to upload")
    files = {file.relative_to(path): file for file in sorted(path.rglob("*")) if file.is_file()}
    shown = {
        name.as_posix(): file
        for name, file in files.items()
        if not any(part.startswith(".") for part in name.parts)
    }
    if not shown:
        raise ParameterError(f"folder {path} holds no files, expected a model to upload")
    return shown


@contextmanager
def _bars_only_on_a_terminal() -> Iterator[None]:
    """Disable progress bars of huggingface_hub, which also draws them into files."""
    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _translated(subject: str, repository: str) -> Iterator[None]:
    """Raise any exception as a gptx error about this upload."""
    try:
        yield
    except GptxError:
        raise
    except Exception as error:
        raise _translate(error, subject, repository) from error


def _translate(error: Exception, subject: str, repository: str) -> GptxError:
    hub = constants.ENDPOINT
    origin = _origin(error)
    status = status_of(origin)
    if status in (401, 403):
        return AuthorizationError(
            f"{hub} refuses the upload of {subject} with this token (HTTP status {status}): run "
            f"`hf auth login` with a token that has write access to {repository}"
        )
    if isinstance(origin, errors.RevisionNotFoundError):
        return NotFoundError(
            f"{hub} refuses the upload of {subject}: the branch does not exist, create it first"
        )
    if isinstance(origin, errors.RepositoryNotFoundError):
        return NotFoundError(
            f"{hub} refuses the upload of {subject}: the repository does not exist, create it first"
        )
    if is_storage_fault(origin):
        return StorageError(
            f"cannot upload {subject} ({origin.strerror or origin}): expected readable files"
        )
    message = " ".join(str(getattr(origin, "server_message", None) or "").split())[:200]
    fault = explain(origin, hub)
    details = fault.reason + (f": {message}" if message else "")
    return HubUnavailableError(f"{hub} did not accept {subject} ({details}): {fault.remedy}")


def _origin(error: Exception) -> Exception:
    """Unwrap an error of huggingface_hub that only names the file."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error
