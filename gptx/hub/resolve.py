"""Resolve the name of a model to files: embedded models, folders, the Hugging Face Hub.

`locate` reads no tensor. It imports huggingface_hub only for a name that leads to the Hub.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from gptx.embedded import EMBEDDED
from gptx.errors import HubUnavailableError, NotFoundError, ParameterError, argument
from gptx.model_files import CONFIG, Folder, ModelFiles, Source, find_files, is_file

_OPENAI_SIZES = {"gpt2": "124M", "gpt2-medium": "355M", "gpt2-large": "774M", "gpt2-xl": "1558M"}
ALIASES: dict[str, str] = {
    **{name: f"openai-community/{name}" for name in _OPENAI_SIZES},
    **{size: f"openai-community/{name}" for name, size in _OPENAI_SIZES.items()},
    "distilgpt2": "distilbert/distilgpt2",
}
# Hub ids from before names had owners: the cache of other tools may have them.
FORMER_NAMES = {repo: name for name, repo in ALIASES.items() if repo.endswith(f"/{name}")}

OPENAI = "openai:"  # before the size of one of OpenAI's own models

# Suffixes of files of models: a name with one is not taken for a Hub id.
FILE_SUFFIXES = (
    *(".bin", ".ckpt", ".dat", ".gguf", ".h5", ".index", ".json", ".mpk", ".msgpack", ".npz"),
    *(".onnx", ".pt", ".pth", ".safetensors"),
)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_HUB_ADDRESS = re.compile(rf"(?:https?://)?(?:huggingface\.co|hf\.co)/({_HUB_ID.pattern})")
_CACHE_FOLDER = re.compile(r"models--(.+)")

# No "..", no slash at an end: a revision becomes a path in the cache.
_REVISION = re.compile(r"(?!/)(?!.*\.\.)[^\s\\:\0]+(?<!/)")


def locate(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    offline: bool = False,
    token: str | None = None,
    weights: bool = True,
    verify_cached: bool = False,
) -> ModelFiles:
    """Find the files of a model; download those that the cache lacks.

    Parameters
    ----------
    model
        An embedded name (`gptx.embedded.EMBEDDED`), a folder, an alias (`ALIASES`) or a Hub id,
        tried in this order.
    revision
        Branch, tag or commit of a Hub model; "main" if None. All files come from one commit.
    offline
        Use only the cache and open no connection; `HF_HUB_OFFLINE=1` does the same.
    token
        For private and gated models; `HF_TOKEN` or the saved login if None.
    weights
        Also find the weights, not only the config and the tokenizer.
    verify_cached
        Also hash files that are in the cache, and download damaged ones again.

    Returns
    -------
    ModelFiles
        Paths of the files. Each file that this call downloaded has the hash that the Hub promised.

    Raises
    ------
    ParameterError
        `model` is empty, or `revision` was given for a model that has none.
    NotFoundError
        The folder, repository, revision or file does not exist; or it is not cached, and gptx is
        offline.
    AuthorizationError
        The model is gated, or the token may not read it.
    HubUnavailableError
        No connection, an interrupted one, too many requests, or an error of the Hub.
    IntegrityError
        A file is not the one that the Hub promised. It was not put into the cache.
    StorageError
        The disk is full, or the cache cannot be read or written.
    WeightsError
        The index of a sharded model is damaged.
    """
    source = find_source(
        model, revision=revision, offline=offline, token=token, verify_cached=verify_cached
    )
    files = find_files(source, weights=weights)
    source.write_ref()
    return files


def find_source(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    offline: bool = False,
    token: str | None = None,
    verify_cached: bool = False,
) -> Source:
    """Find the folder or the repository of a model, without its files; see `locate`.

    After the last file, the caller calls `write_ref` of the source.
    """
    try:
        name = os.fspath(model)
    except TypeError:
        name = ""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise ParameterError(f"{argument('model')} is {model!r}, expected {_expected()}")
    path = os.path.expanduser(name)
    is_embedded = isinstance(model, str) and name in EMBEDDED
    if is_embedded or os.path.isdir(path):
        if revision is not None:
            raise ParameterError(
                f"{argument('revision')} is {revision!r}, but {name!r} is not from the Hub"
            )
        folder = EMBEDDED[name] if is_embedded else Path(path).absolute()
        return Folder(folder, name, hub_reading(name))
    if os.path.exists(path) and name not in ALIASES:
        raise NotFoundError(
            f"{name!r} is a file, expected a folder with config.json, or a Hub id such as "
            "openai-community/gpt2"
        )
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if looks_like_path or _names_file(name) or not isinstance(model, str):
        raise _no_such_path(name)
    _check_revision(revision)

    with importing_hub():
        from gptx.hub.repository import Repository, is_repository_name
    repository = ALIASES.get(name, name)
    if not is_repository_name(repository):
        before, _, after = name.partition("@")
        if after and is_repository_name(before):
            expected = f"{before!r} and {argument('revision', after)}"
            raise NotFoundError(f"model {name!r} is not a Hub id, expected {expected}")
        raise NotFoundError(f"model {name!r} does not exist, expected {_expected()}")
    former = FORMER_NAMES.get(repository)
    try:
        return Repository(
            repository, revision or "main", offline, token or None, verify_cached, former
        )
    except (NotFoundError, HubUnavailableError) as error:
        if "/" in repository or not (meant := _known_name_like(name)):
            raise
        raise type(error)(f"{error.message}; did you mean {meant}?") from None


def _names_file(name: str) -> bool:
    return Path(name).suffix.lower() in FILE_SUFFIXES


def _no_such_path(name: str) -> NotFoundError:
    """Make the error for a name that is no Hub id: a missing path, or an address."""
    on_hub = _HUB_ADDRESS.match(name)
    if on_hub or "://" in name:
        expected = f"the Hub id {on_hub[1]}" if on_hub else _expected()
        return NotFoundError(f"{name!r} is an address, expected {expected}")
    what = "file" if _names_file(name) else "folder"
    return NotFoundError(f"{what} {name!r} does not exist, expected {_expected()}")


def _known_name_like(name: str) -> str | None:
    """Return the name of a model that a misspelled name resembles."""
    from difflib import get_close_matches

    names = {known.lower(): known for known in (*ALIASES, *EMBEDDED)}
    meant = get_close_matches(name.lower(), names, 1)
    return names[meant[0]] if meant else None


def is_openai(model: object) -> bool:
    """Test for the name of one of OpenAI's own models: "openai:124M"."""
    return isinstance(model, str) and model.startswith(OPENAI)


def local_path(model: str | os.PathLike[str]) -> Path | None:
    """Return the existing file or folder that `model` names; None for any other name.

    An embedded name is not a path, nor is an alias beside a file of that name. The common prefix of
    the files of OpenAI's checkpoint names it; the path is that of its index.

    Raises
    ------
    StorageError
        A folder of the path, or the folder itself, may not be searched.
    """
    try:
        name = os.fspath(model)
        path = Path(os.path.expanduser(name))
        if not name or (isinstance(model, str) and name in EMBEDDED):
            return None
        is_file(path)  # raises the error; the methods of Path do so in some versions of Python
        if path.is_dir():
            is_file(path / CONFIG)
            return path
        if path.exists() and not (isinstance(model, str) and name in ALIASES):
            return path
        index = Path(f"{path}.index")
        return index if index.is_file() else None
    except (TypeError, ValueError):  # no name of a file
        return None


def _check_revision(revision: str | None) -> None:
    if revision is not None and not (isinstance(revision, str) and _REVISION.fullmatch(revision)):
        raise ParameterError(
            f"{argument('revision')} is {revision!r}, expected a branch, a tag or a commit hash"
        )


def _expected() -> str:
    names = ", ".join(EMBEDDED)
    return f"an embedded name ({names}), a path, or a Hub id such as openai-community/gpt2"


def hub_reading(name: str | os.PathLike[str]) -> str:
    """Return the end of an error about a folder whose name could be a Hub id; else nothing."""
    given = os.fspath(name).rstrip("/")
    if cached := next(filter(None, map(_CACHE_FOLDER.fullmatch, Path(given).parts)), None):
        return f"; it is in the cache of the Hub: give the id {cached[1].replace('--', '/')}"
    if given not in ALIASES and not _HUB_ID.fullmatch(given):
        return ""
    return (
        f"; the folder hides the model {ALIASES.get(given, given)} of the Hub: rename the folder, "
        "or run gptx in another one, to use that model"
    )


@contextmanager
def importing_hub() -> Iterator[None]:
    """Wrap an import of huggingface_hub, which reads its environment variables then.

    Raises
    ------
    ParameterError
        One of them is invalid.
    """
    try:
        with redirect_stdout(sys.stderr):  # huggingface_hub prints warnings
            yield
    except ValueError as error:
        raise ParameterError(
            f"an HF_ environment variable is invalid ({error}): correct or unset it"
        ) from error
