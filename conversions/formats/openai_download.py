"""OpenAI's own files by their size: `openai:124M` and its like, fetched once and kept.

They lie in the cache that Hugging Face's tools share, as an asset of gptx (`HF_HOME` moves it all),
and huggingface_hub is what fetches them. Sizes and checksums are those of the checkpoint's index. A
folder gets its name after everything in it was read and found to be right; until then it is called
`.incomplete`, and a later run goes on from there. `GPTX_OPENAI_URL` names a mirror.
"""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # not in its __all__

from gptx.config import SIZES
from gptx.conversions.containers.tensor_bundle import Bundle
from gptx.conversions.formats import openai_tensorflow as openai_checkpoint
from gptx.errors import (
    AuthorizationError,
    DataError,
    GptxError,
    HubUnavailableError,
    IntegrityError,
    NotFoundError,
    ParameterError,
    StorageError,
)
from gptx.hub.errors import is_of_storage, reason, status_of

PREFIX = "openai:"
URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"

INDEX = "model.ckpt.index"
FILES = ("checkpoint", "hparams.json", "encoder.json", "vocab.bpe", INDEX)  # and those of numbers


class _NotResumedError(HubUnavailableError):
    """The connection was cut, and the server sends a file only from its start."""


def fetch(name: str, *, revision: str | None = None, offline: bool = False) -> Path:
    """The folder of one of OpenAI's models; it is downloaded if the cache lacks it.

    Parameters
    ----------
    name
        "openai:124M", "openai:355M", "openai:774M" or "openai:1558M".
    revision
        None: there is one of each.
    offline
        Use the cache alone; `HF_HUB_OFFLINE=1` does the same.

    Raises
    ------
    NotFoundError
        There is no such model, or the server lacks a file; or it is not cached, and gptx is
        offline.
    HubUnavailableError
        No connection, a cut one, or an error of the server.
    IntegrityError
        What came is not whole or has wrong checksums. It was not kept.
    AuthorizationError
        The server refuses.
    StorageError
        The disk is full, or the cache cannot be read or written.
    ParameterError
        `revision` or GPTX_OPENAI_URL is no good.
    """
    size = name.removeprefix(PREFIX)
    if size not in SIZES:
        names = ", ".join(PREFIX + size for size in SIZES)
        raise NotFoundError(f"there is no model {name!r}, expected one of {names}")
    if revision is not None:
        raise ParameterError(f"revision is {revision!r}, but {name!r} is not from the Hub")
    folder = Path(constants.HF_ASSETS_CACHE) / "gptx" / "openai" / size
    if folder.is_dir():
        return folder
    if offline or constants.HF_HUB_OFFLINE:
        raise NotFoundError(
            f"{name} is not in the cache {folder.parent}, and gptx is offline: "
            "convert it with a connection first"
        )
    url = f"{_server()}/{size}"
    with _translated(url, folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder.with_name(f"{size}.lock")):
            if not folder.is_dir():  # else another process was faster
                partial = folder.with_name(f"{size}.incomplete")
                partial.mkdir(exist_ok=True)
                _fill(partial, url)
                os.replace(partial, folder)
    return folder


def _server() -> str:
    url = os.environ.get("GPTX_OPENAI_URL") or URL
    if not re.fullmatch(r"https?://[!-~]+", url):
        raise ParameterError(f"GPTX_OPENAI_URL is {url!r}, expected the address of a server")
    return url.rstrip("/")


def _fill(folder: Path, url: str) -> None:
    """Complete a folder, going on where an earlier run was interrupted."""
    begun = any(folder.glob("*.data-*"))
    try:
        try:
            _complete(folder, url)
        except (IntegrityError, _NotResumedError):
            if not begun:
                raise
            # Perhaps only what was there does not fit: once more from the start.
            shutil.rmtree(folder)
            folder.mkdir()
            _complete(folder, url)
    except (IntegrityError, StorageError):
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _complete(folder: Path, url: str) -> None:
    for name in FILES:
        (folder / name).unlink(missing_ok=True)  # of a few kB, and nothing says how many
        _receive(folder / name, f"{url}/{name}")
    try:
        for path, size in Bundle(folder / INDEX).sizes.items():
            _receive(path, f"{url}/{path.name}", size)
        for tensor in openai_checkpoint.read(folder).stored.values():
            tensor.read()  # which looks at its checksum
    except IntegrityError:
        raise
    except DataError as error:
        raise IntegrityError(f"{url} sent what it should not, try again: {error}") from error


def _receive(path: Path, url: str, size: int | None = None) -> None:
    """Download a file, or the rest of it."""
    with _translated(url, path.parent), _Partial(io.FileIO(path, "ab")) as file:
        http_get(
            url,
            file,
            resume_size=file.tell(),
            expected_size=size,
            displayed_filename=path.name,
        )
        file.flush()
        os.fsync(file.fileno())  # its name must not survive a crash that it does not


class _Partial(io.BufferedWriter):
    """A file of which the end is still to come.

    If a server sends the whole file in the place of the rest, `http_get` empties it and begins
    again, which never ends if that server always cuts. Here it ends.
    """

    def truncate(self, size: int | None = None, /) -> int:
        raise _NotResumedError(
            f"{Path(self.name).name}: the server cut the connection and cannot go on from there: "
            "try again"
        )


@contextmanager
def _translated(url: str, folder: Path) -> Iterator[None]:
    """Raise every foreign exception as the gptx exception that it amounts to."""
    try:
        yield
    except GptxError:
        raise
    except Exception as error:
        raise _translate(error, url, folder) from error


def _translate(error: Exception, url: str, folder: Path) -> GptxError:
    status = status_of(error)
    if status in (404, 410):
        return NotFoundError(f"{url} does not exist: if GPTX_OPENAI_URL is set, is it right?")
    if status in (401, 403):
        return AuthorizationError(f"{url} is refused (HTTP status {status}): choose another server")
    if status == 416 or (is_of_storage(error) and getattr(error, "errno", None) is None):
        return IntegrityError(f"{url} has another size than its index says, and was not kept")
    if is_of_storage(error):
        why = getattr(error, "strerror", None) or error
        return StorageError(
            f"cannot keep {url} in {folder} ({why}): make room there, or choose another place with "
            "HF_HOME"
        )
    return HubUnavailableError(
        f"{url} was not delivered ({reason(error)}): check the connection and try again"
    )
