"""A model on its way to the Hugging Face Hub: a repository, and one commit with all files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, errors, get_token
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, not in an __all__
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
from gptx.hub.download import is_repository_name
from gptx.hub.errors import is_of_storage, reason, status_of


def upload(
    path: str | Path,
    repository: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Put a file, or all files of a folder, into a repository of the Hub: all of them or none.

    Parameters
    ----------
    path
        A file, or a folder; hidden files in it are left out.
    repository
        Its Hub id, "owner/name"; it is made if there is no such repository.
    private
        If it is made, make it private; otherwise that is as the owner's settings say.
    token
        One that may write; `HF_TOKEN` or the saved login if None.
    revision
        A branch that exists; "main" if None.
    message
        Of the commit.

    Returns
    -------
    str
        The address of what was uploaded.

    Raises
    ------
    ParameterError
        `repository` is no such name, or the folder is empty.
    NotFoundError
        There is nothing at `path`, or no such branch.
    AuthorizationError
        There is no token, or it may not write there.
    HubUnavailableError
        No connection, a cut connection, or the Hub does not take what it gets.
    StorageError
        A file cannot be read.
    """
    path = Path(path)
    found = check_repository(repository, token=token)
    files = _files(path)
    with _translated(f"{path.name} to {repository}", repository), _bars_on_terminals_alone():
        api = HfApi(token=found)
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
    """What can be known before anything is sent: the token with which to try it.

    Raises
    ------
    ParameterError, AuthorizationError
        See `upload`.
    """
    if repository.count("/") != 1 or not is_repository_name(repository):
        raise ParameterError(f"repository is {repository!r}, expected OWNER/NAME")
    with _translated(f"files to {repository}", repository):
        found = token or get_token()
    if not found:
        raise AuthorizationError(
            f"{constants.ENDPOINT} takes no uploads without a token: run `hf auth login`, or set "
            "HF_TOKEN to one that may write"
        )
    return found


def _files(path: Path) -> dict[str, Path]:
    """Names in the repository -> files."""
    if path.is_file():
        return {path.name: path}
    if not path.is_dir():
        raise NotFoundError(f"{path} does not exist: there is nothing to upload")
    files = {file.relative_to(path): file for file in sorted(path.rglob("*")) if file.is_file()}
    shown = {
        name.as_posix(): file
        for name, file in files.items()
        if not any(part.startswith(".") for part in name.parts)
    }
    if not shown:
        raise ParameterError(f"folder {path} holds no files: there is nothing to upload")
    return shown


@contextmanager
def _bars_on_terminals_alone() -> Iterator[None]:
    """huggingface_hub draws them anywhere."""
    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _translated(what: str, repository: str) -> Iterator[None]:
    """Raise every foreign exception as the gptx exception that it amounts to."""
    try:
        yield
    except GptxError:
        raise
    except Exception as error:
        raise _translate(error, what, repository) from error


def _translate(error: Exception, what: str, repository: str) -> GptxError:
    hub = constants.ENDPOINT
    origin = _origin(error)
    status = status_of(origin)
    if status in (401, 403):
        return AuthorizationError(
            f"{hub} refuses to take {what} with this token (HTTP status {status}): run "
            f"`hf auth login` with one that may write to {repository}"
        )
    if isinstance(origin, errors.RevisionNotFoundError):
        return NotFoundError(
            f"{hub} cannot take {what}: the repository has no such branch, make it there first"
        )
    if isinstance(origin, errors.RepositoryNotFoundError):
        return NotFoundError(f"{hub} cannot take {what}: there is no such repository")
    if is_of_storage(origin) and origin.errno is not None:
        return StorageError(f"cannot upload {what} ({origin.strerror or origin})")
    said = " ".join(str(getattr(origin, "server_message", None) or "").split())[:200]
    why = reason(origin) + (f": {said}" if said else "")
    return HubUnavailableError(
        f"{hub} did not take {what} ({why}): check the connection and try again"
    )


def _origin(error: Exception) -> Exception:
    """What an error that only says which file it was about was raised for."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error
