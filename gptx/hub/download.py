"""Download one file over HTTP; resume an interrupted download."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import constants, get_session
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, not in __all__
    hf_raise_for_status,
    tqdm,
)

from gptx._version import __version__
from gptx.hub.connection import is_connection_fault, status_of
from gptx.hub.errors import NotResumableError

CHUNK_BYTES = 1 << 16
MAX_FAILURES = 5  # in a row, without a byte between them
MAX_WAIT_SECONDS = 8


def download(
    url: str, path: Path, *, size: int | None = None, label: str = "", token: str | None = None
) -> None:
    """Download the rest of a file, and flush the file to the disk.

    Parameters
    ----------
    url
        Redirects are followed; the token is not sent to other hosts.
    path
        Partial file, or a file that does not exist. After an error it keeps the bytes that arrived.
    size
        Expected size in bytes, None if unknown. A file of this size needs no request. The caller
        compares the final size.
    label
        Name in the progress bar, which appears only on a terminal.
    token
        Sent as authorization.

    Raises
    ------
    NotResumableError
        The server sends the file only from its start.
    Exception
        Errors of huggingface_hub, of its HTTP library and of the disk;
        `gptx.hub.errors.translated` translates them.
    """
    with path.open("ab") as file:
        failures = 0
        while size is None or file.tell() < size:
            begin = file.tell()
            try:
                _append(url, file, size, label, token)
                break
            except Exception as error:
                failures = 1 if file.tell() > begin else failures + 1
                if failures == MAX_FAILURES or not _is_transient(error):
                    raise
            time.sleep(min(2 ** (failures - 1), MAX_WAIT_SECONDS))
        file.flush()
        os.fsync(file.fileno())  # else a crash could truncate a file that is published later


def _append(url: str, file: BinaryIO, size: int | None, label: str, token: str | None) -> None:
    begin = file.tell()
    # Without compression: a range and a length count the bytes of the file.
    headers = {"accept-encoding": "identity", "user-agent": f"gptx/{__version__}"}
    if token:
        headers["authorization"] = f"Bearer {token}"
    if begin:
        headers["range"] = f"bytes={begin}-"
    with _get(url, headers) as (response, chunks):
        hf_raise_for_status(response)
        if begin and response.status_code != 206:
            raise NotResumableError(
                f"{url} was interrupted, and its server does not resume downloads: try again"
            )
        with tqdm(  # type: ignore[no-untyped-call]
            desc=label, total=size, initial=begin, unit="B", unit_scale=True, disable=None
        ) as progress:
            for chunk in chunks:
                file.write(chunk)
                progress.update(len(chunk))


@contextmanager
def _get(url: str, headers: dict[str, str]) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """Open a response and an iterator over its body, with huggingface_hub's HTTP session."""
    session: Any = get_session()
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    if callable(session.stream):  # a client of httpx: huggingface_hub 1.0 and later
        with session.stream(
            "GET", url, headers=headers, timeout=timeout, follow_redirects=True
        ) as response:
            yield response, response.iter_bytes(CHUNK_BYTES)
    else:  # a session of requests
        with session.get(url, headers=headers, timeout=timeout, stream=True) as response:
            yield response, response.iter_content(CHUNK_BYTES)


def _is_transient(error: Exception) -> bool:
    """Test for an error after which another attempt can succeed."""
    status = status_of(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return is_connection_fault(error) and not isinstance(error, NotResumableError)
