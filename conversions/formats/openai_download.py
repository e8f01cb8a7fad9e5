"""Download OpenAI's own files by their size: `openai:124M` and its like.

They are stored in the cache of Hugging Face's tools, as an asset of gptx (`HF_ASSETS_CACHE`). Sizes
and checksums are those of the checkpoint's index. A folder gets its name after every file in it was
verified; until then its name ends in ".incomplete", and a later run resumes it. `GPTX_OPENAI_URL`
names a mirror.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants

from gptx.config import SIZES, GPT2Config
from gptx.conversions.containers.tensor_bundle import TensorBundle
from gptx.conversions.formats import openai_tensorflow
from gptx.errors import (
    AuthorizationError,
    DataError,
    GptxError,
    HubUnavailableError,
    IntegrityError,
    NotFoundError,
    ParameterError,
    StorageError,
    argument,
)
from gptx.hub.connection import explain, status_of
from gptx.hub.download import download
from gptx.hub.errors import NotResumableError, is_storage_fault, not_stored
from gptx.hub.resolve import OPENAI
from gptx.hub.staging import remove, staging
from gptx.tokenization.pipeline import PipelineTokenizer

URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"

INDEX = "model.ckpt.index"
SMALL_FILES = ("checkpoint", "hparams.json", "encoder.json", "vocab.bpe", INDEX)
DATA_FILES = "*.data-*"


def fetch(name: str, *, revision: str | None = None, offline: bool = False) -> Path:
    """Return the folder of one of OpenAI's models; download it if the cache lacks it.

    Parameters
    ----------
    name
        "openai:124M", "openai:355M", "openai:774M" or "openai:1558M".
    revision
        None: each model has one revision.
    offline
        Use only the cache; `HF_HUB_OFFLINE=1` does the same.

    Raises
    ------
    NotFoundError
        The model does not exist, or the server lacks a file; or it is not cached, and gptx is
        offline.
    HubUnavailableError
        No connection, an interrupted one, or an error of the server.
    IntegrityError
        A file is incomplete or has a wrong checksum. The download was deleted.
    AuthorizationError
        The server refuses the request.
    StorageError
        The disk is full, or the cache cannot be read or written.
    ParameterError
        `revision` is given, or GPTX_OPENAI_URL is invalid.
    """
    folder = _folder(name, revision)
    if not folder.is_dir():
        with _staging(name, folder, offline) as (partial, url):
            if not folder.is_dir():  # another process may have completed it meanwhile
                partial.mkdir(exist_ok=True)
                _fill(partial, url)
                os.replace(partial, folder)
    return folder


def fetch_settings(
    name: str, *, revision: str | None = None, offline: bool = False
) -> tuple[GPT2Config, PipelineTokenizer | None]:
    """Return config and tokenizer of one of OpenAI's models without its tensors; see `fetch`."""
    folder = _folder(name, revision)
    if not folder.is_dir():
        with _staging(name, folder, offline) as (partial, url):
            if not folder.is_dir():
                partial.mkdir(exist_ok=True)
                _receive_small_files(partial, url)
                return openai_tensorflow.read_settings(partial)
    return openai_tensorflow.read_settings(folder)


def _folder(name: str, revision: str | None) -> Path:
    """Return the folder of a model in the cache."""
    size = name.removeprefix(OPENAI)
    if size not in SIZES:
        names = ", ".join(OPENAI + size for size in SIZES)
        raise NotFoundError(f"model {name!r} does not exist, expected one of {names}")
    if revision is not None:
        raise ParameterError(
            f"{argument('revision')} is {revision!r}, but {name!r} is not from the Hub"
        )
    return Path(constants.HF_ASSETS_CACHE) / "gptx" / "openai" / size


@contextmanager
def _staging(name: str, folder: Path, offline: bool) -> Iterator[tuple[Path, str]]:
    """Yield the folder of a partial download and its URL; raise the errors of `fetch`."""
    if offline or constants.HF_HUB_OFFLINE:
        raise NotFoundError(
            f"{name} is not in the cache {folder.parent}, and gptx is offline: "
            f"run `gptx download {name}` with a connection first"
        )
    url = f"{_server()}/{folder.name}"
    with (
        _translated(url, folder.parent),
        staging(folder, folder.with_name(f"{folder.name}.lock")) as partial,
    ):
        yield partial, url


def _server() -> str:
    url = os.environ.get("GPTX_OPENAI_URL") or URL
    if not (re.fullmatch(r"https?://[!-~]+", url) and _has_valid_host(url)):
        raise ParameterError(f"GPTX_OPENAI_URL is {url!r}, expected the http address of a server")
    return url.rstrip("/")


def _has_valid_host(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


def _fill(folder: Path, url: str) -> None:
    """Complete a folder; start again if its sizes or checksums are wrong."""
    resumed = any(folder.glob(DATA_FILES))
    try:
        try:
            _complete(folder, url)
        except (IntegrityError, NotResumableError):
            if not resumed:
                raise
            remove(folder)
            folder.mkdir()
            _complete(folder, url)
    except (IntegrityError, StorageError):
        remove(folder)
        raise


def _complete(folder: Path, url: str) -> None:
    """Download the missing files of a folder, and verify all files."""
    _receive_small_files(folder, url)
    try:
        for path, size in TensorBundle(folder / INDEX).sizes.items():
            _receive(path, f"{url}/{path.name}", size)
            if path.stat().st_size != size:
                raise IntegrityError(
                    f"{url}/{path.name} has another size than its index gives, and was deleted: "
                    "try again"
                )
        for tensor in openai_tensorflow.read(folder).stored.values():
            tensor.read()  # compares its checksum
    except IntegrityError:
        raise
    except DataError as error:
        raise IntegrityError(f"{url} sent an invalid file, try again: {error}") from error


def _receive_small_files(folder: Path, url: str) -> None:
    for name in SMALL_FILES:
        (folder / name).unlink(missing_ok=True)  # their sizes are unknown, so download them again
        _receive(folder / name, f"{url}/{name}")


def _receive(path: Path, url: str, size: int | None = None) -> None:
    with _translated(url, path.parent):
        download(url, path, size=size, label=path.name)


@contextmanager
def _translated(url: str, folder: Path) -> Iterator[None]:
    """Raise any exception as a gptx error about this URL."""
    try:
        yield
    except GptxError:
        raise
    except Exception as error:
        raise _translate(error, url, folder) from error


def _translate(error: Exception, url: str, folder: Path) -> GptxError:
    status = status_of(error)
    if status in (404, 410):
        return NotFoundError(f"{url} does not exist: correct or unset GPTX_OPENAI_URL")
    if status in (401, 403):
        return AuthorizationError(
            f"{url} is refused (HTTP status {status}): choose another server with GPTX_OPENAI_URL"
        )
    if is_storage_fault(error):
        return not_stored(url, folder, error)
    fault = explain(error, url)
    return HubUnavailableError(f"{url} was not delivered ({fault.reason}): {fault.remedy}")
