"""The client of a model store: uploads the files of a model, and continues by itself.

It uses the standard library only: huggingface_hub brings requests, httpx or httpx2, depending on
its version, and an upload needs five kinds of requests.
"""

from __future__ import annotations

import fnmatch
import hashlib
import http.client
import json
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

from gptx._version import __version__
from gptx.errors import (
    AuthorizationError,
    GptxError,
    HubUnavailableError,
    IntegrityError,
    NotFoundError,
    ParameterError,
    StorageError,
    WeightsError,
    argument,
    shown,
)
from gptx.server.uploads.model_check import find_model, regular_files
from gptx.server.uploads.protocol import PARTIAL_UPLOAD
from gptx.server.uploads.stored_models import check_file_name, check_model_name

Progress = Callable[[str, int, int], None]

CHUNK_BYTES = 2**23  # of one request; a lost connection repeats at most this
SLICE_BYTES = 2**18  # between two updates of the bar
TIMEOUT_SECONDS = 60.0  # without a byte
MAX_FAILURES = 8  # in a row, without a byte between them: about a minute
FIRST_WAIT_SECONDS = 0.5
MAX_WAIT_SECONDS = 30.0
MAX_POLL_SECONDS = 2.0
MAX_ANSWER_BYTES = 2**22

_TRANSIENT = {408, 423, 425, 429, 500, 502, 503, 504}
_MODEL_PATH = re.compile(r".*/models/([^/]+)")


class ModelFile(NamedTuple):
    """A file of a model on this machine.

    Attributes
    ----------
    path
        Path of the file.
    length
        Number of bytes.
    sha256
        SHA-256 of the file, in hexadecimal.
    """

    path: Path
    length: int
    sha256: str


class _Answer(NamedTuple):
    status: int
    headers: Message
    body: bytes

    def json(self) -> dict[str, Any]:
        """Return the body; an empty dict if it is no JSON object."""
        try:
            found = json.loads(self.body)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def offset(self) -> int | None:
        """Upload-Offset; None if it is missing."""
        text = self.headers.get("upload-offset", "")
        return int(text) if text.isdecimal() else None

    @property
    def detail(self) -> str:
        """The message of an error, in the form of RFC 9457 or of OpenAI."""
        found = self.json()
        error = found.get("error")
        message = error.get("message") if isinstance(error, dict) else None
        text = found.get("detail") or message or f"HTTP status {self.status}"
        return " ".join(str(text).split())[:500]


class _Fault(Exception):
    """A failure after which another attempt can succeed.

    Parameters
    ----------
    reason
        One line.
    wait
        Seconds that the server asks for; None if it does not.
    """

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def find_files(path: Path) -> dict[str, Path]:
    """Return the files of a model: name -> path.

    Parameters
    ----------
    path
        A file, or a folder. Of a folder, the files that its format has.

    Raises
    ------
    NotFoundError
        `path` does not exist.
    WeightsError
        It has no model in a format that gptx reads.
    ParameterError
        A file has a name that a store does not take.
    """
    from gptx.conversions import FORMATS, detect

    if path.is_dir():
        model = find_model(path)
        names = FORMATS[detect(path)].files if model == "." else (model,)
        names = (*names, *FORMATS["safetensors"].files) if names else ("*",)
        files = {
            file.name: file
            for file in regular_files(path)
            if any(fnmatch.fnmatchcase(file.name, pattern) for pattern in names)
        }
    else:
        detect(path)
        files = {path.name: path}
    for name in files:
        check_file_name(name)
    return files


def read_files(files: dict[str, Path], progress: Progress | None = None) -> dict[str, ModelFile]:
    """Compute the SHA-256 of the files of a model.

    Raises
    ------
    StorageError
        A file cannot be read.
    """
    found = {}
    try:
        total, done = sum(path.stat().st_size for path in files.values()), 0
        for name, path in files.items():
            hasher, length = hashlib.sha256(), 0
            with path.open("rb") as file:
                while block := file.read(SLICE_BYTES):
                    hasher.update(block)
                    length += len(block)
                    if progress is not None:
                        progress(f"SHA-256 of {name}", done + length, total)
            found[name] = ModelFile(path, length, hasher.hexdigest())
            done += length
    except OSError as error:
        raise StorageError(f"{error.filename} cannot be read ({error.strerror})") from error
    return found


def model_address(url: str, path: Path) -> str:
    """Return the address of a model in a store: SERVER/models/NAME.

    Parameters
    ----------
    url
        This address, or that of the server; then the name is that of the folder or file.

    Raises
    ------
    ParameterError
        The address or the name is invalid.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment or "@" in parts.netloc:
        raise ParameterError(
            f"{argument('url')} is {shown(url)}, expected http://HOST:PORT or "
            "http://HOST:PORT/models/NAME"
        )
    address = parts.path.rstrip("/")
    named = _MODEL_PATH.fullmatch(address)
    if named is None:
        path = path.resolve()
        name = path.name if path.is_dir() else path.stem
        address = f"{address}/models/{name}"
    else:
        name = named[1]
    try:
        check_model_name(name)
    except ParameterError as error:
        raise ParameterError(f"{error.message}, as in http://HOST:PORT/models/NAME") from None
    return urlunsplit((parts.scheme, parts.netloc, address, "", ""))


class Upload:
    """The upload of a model to a store.

    Parameters
    ----------
    address
        The result of `model_address`.
    files
        The result of `read_files`.
    api_key
        Key of the server; None without one.
    chunk_bytes
        Size of the content of a request.
    progress
        Function of the name of a file, the bytes that the server has, and all bytes.

    Raises
    ------
    ParameterError
        The key has other characters than those of a header field.
    """

    def __init__(
        self,
        address: str,
        files: dict[str, ModelFile],
        *,
        api_key: str | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        progress: Progress | None = None,
    ) -> None:
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ParameterError(f"{argument('api_key')} has characters other than printable ASCII")
        self.address = address
        self.files = files
        self.length = sum(file.length for file in files.values())
        self._headers = {"User-Agent": f"gptx/{__version__}"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._chunk_bytes = chunk_bytes
        self._progress = progress
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._failures = 0
        self._sent: dict[str, int] = dict.fromkeys(files, 0)  # bytes that the server has

    def drop(self) -> None:
        """Delete the model, or its unfinished upload, if the server has another one.

        Raises
        ------
        GptxError
            See `run`.
        """
        self._repeat(self._drop_other)

    def run(self, offset: int | None = None) -> dict[str, Any]:
        """Send what the server does not have; return its description of the model.

        Parameters
        ----------
        offset
            Begin at this byte of all files in their order, and do not ask the server.

        Raises
        ------
        ParameterError
            The server has a model of this name with other files, or another number of bytes than
            `offset`.
        AuthorizationError
            The key is missing or wrong.
        NotFoundError
            The server has no store.
        IntegrityError, WeightsError
            A file arrived damaged, or the server's check refused the model.
        StorageError
            A file cannot be read, or it changes; the disk of the server is full.
        HubUnavailableError
            The server did not answer, several times.
        """
        return self._repeat(lambda: self._run(offset))

    def setup(self) -> None:
        """Load the model on the server.

        Raises
        ------
        GptxError
            See `run`.
        """
        try:
            answer = self._request("POST", "/setup", timeout=None)
        except _Fault as fault:
            raise HubUnavailableError(f"the server did not load the model: {fault}") from fault
        if answer.status == 404:
            raise NotFoundError(f"the server did not load the model: {answer.detail}")
        _require(answer, 200)

    # Attempts

    def _repeat(self, attempt: Callable[[], Any]) -> Any:
        """Call a function until it succeeds, with a wait after each failure."""
        while True:
            try:
                return attempt()
            except _Fault as fault:
                self._wait_after(fault)

    def _wait_after(self, fault: _Fault) -> None:
        self._failures += 1
        if self._failures >= MAX_FAILURES:
            raise HubUnavailableError(
                f"{self.address} failed {MAX_FAILURES} times in a row ({fault}): run the same "
                "command later, which continues the upload"
            ) from fault
        wait = min(FIRST_WAIT_SECONDS * 2 ** (self._failures - 1), MAX_WAIT_SECONDS)
        time.sleep(wait * random.uniform(0.5, 1) if fault.wait is None else fault.wait)

    def _run(self, offset: int | None) -> dict[str, Any]:
        manifest = {
            "files": {
                name: {"length": file.length, "sha256": file.sha256}
                for name, file in self.files.items()
            }
        }
        body = json.dumps(manifest).encode()
        answer = self._request("POST", "", [body], {"Content-Type": "application/json"})
        if answer.status == 404:
            raise NotFoundError(
                f"{self.address} does not exist: start the server with gptx serve --store DIR"
            )
        if answer.status == 409:
            raise ParameterError(f"{answer.detail}; or use {argument('overwrite', True)}")
        model = _require(answer, 200, 201).json()
        if offset is not None:
            self._send_from(offset)
        else:
            for name, file in model["files"].items():
                self._sent[name] = file["offset"]
            for name in self.files:
                if self._sent[name] < self.files[name].length:
                    self._send(name)
        return self._await_check()

    def _drop_other(self) -> None:
        answer = self._request("GET", "")
        if answer.status == 404:
            return
        stored = _require(answer, 200).json()["files"]
        found = {name: (file["length"], file["sha256"]) for name, file in stored.items()}
        if found != {name: (file.length, file.sha256) for name, file in self.files.items()}:
            _require(self._request("DELETE", ""), 204)

    def _await_check(self) -> dict[str, Any]:
        """Wait for the check of the server, and return the model."""
        wait = 0.05
        while True:
            model = _require(self._request("GET", ""), 200).json()
            if model["state"] == "failed":
                raise WeightsError(f"the server refused the model: {model.get('error')}")
            if model["state"] == "uploading":
                raise _Fault("the server lost a part of the upload")
            if model["state"] != "checking":
                return model
            time.sleep(wait)
            wait = min(wait * 1.5, MAX_POLL_SECONDS)

    # Files

    def _send(self, name: str) -> None:
        """Send the rest of a file: ask for the offset, and append chunks."""
        answer = _require(self._request("HEAD", f"/files/{name}"), 200, 204)
        if answer.offset is None:
            raise HubUnavailableError(f"{self.address} sent no offset: check the address")
        self._sent[name] = answer.offset
        while self._sent[name] < self.files[name].length:
            answer = self._append(name, self._sent[name])
            if answer.status == 409:  # another client uploads the same model
                raise _Fault(answer.detail)
            self._take(name, answer)

    def _send_from(self, offset: int) -> None:
        """Send all bytes from an offset into all files, without asking the server."""
        if not 0 <= offset <= self.length:
            raise ParameterError(
                f"{argument('offset')} is {offset}, and the files have {self.length} bytes: leave "
                "it out to continue at the right one"
            )
        before = 0
        for name, file in self.files.items():
            self._sent[name] = min(max(offset - before, 0), file.length)
            while self._sent[name] < file.length:
                answer = self._append(name, self._sent[name])
                if answer.status == 409 and answer.offset is not None:
                    raise ParameterError(
                        f"{argument('offset')} is {offset}, which is byte {self._sent[name]} of "
                        f"{name}, and the server has {answer.offset} bytes of it: leave it out to "
                        "continue there"
                    )
                self._take(name, answer)
            before += file.length

    def _append(self, name: str, begin: int) -> _Answer:
        file = self.files[name]
        length = min(self._chunk_bytes, file.length - begin)
        headers = {
            "Content-Type": PARTIAL_UPLOAD,
            "Content-Length": str(length),
            "Upload-Offset": str(begin),
            "Upload-Complete": f"?{begin + length == file.length:d}",
        }
        return self._request("PATCH", f"/files/{name}", self._slices(name, begin, length), headers)

    def _take(self, name: str, answer: _Answer) -> None:
        """Note what the server has after an append."""
        offset = _require(answer, 200, 204).offset
        if offset is None:
            raise HubUnavailableError(f"{self.address} sent no offset: check the address")
        self._sent[name] = offset
        self._failures = 0

    def _slices(self, name: str, begin: int, length: int) -> Iterator[bytes]:
        """Yield a chunk of a file in slices, and update the bar."""
        done = sum(self._sent.values())
        try:
            with self.files[name].path.open("rb") as file:
                file.seek(begin)
                for sent in range(0, length, SLICE_BYTES):
                    data = file.read(min(SLICE_BYTES, length - sent))
                    if len(data) < min(SLICE_BYTES, length - sent):
                        raise StorageError(f"{file.name} became shorter: upload it again")
                    yield data
                    if self._progress is not None:
                        self._progress(name, done + sent + len(data), self.length)
        except OSError as error:
            if isinstance(error, GptxError):
                raise
            raise StorageError(f"{error.filename} cannot be read ({error.strerror})") from error

    def _request(
        self,
        method: str,
        path: str,
        content: list[bytes] | Iterator[bytes] | None = None,
        headers: dict[str, str] | None = None,
        timeout: float | None = TIMEOUT_SECONDS,
    ) -> _Answer:
        """Send one request; raise `_Fault` if another attempt can succeed."""
        sent = self._headers | (headers or {})
        if isinstance(content, list):
            sent["Content-Length"] = str(sum(map(len, content)))
        request = urllib.request.Request(
            f"{self.address}{path}",
            data=content,
            headers=sent,
            method=method,
        )
        try:
            answer = self._exchange(request, timeout)
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(cause, GptxError):  # of `_slices`
                raise cause from None
            raise _Fault(f"{type(cause).__name__}: {cause}") from error
        if answer.status in _TRANSIENT:
            wait = answer.headers.get("retry-after", "")
            raise _Fault(
                answer.detail, min(float(wait), MAX_WAIT_SECONDS) if wait.isdecimal() else None
            )
        return answer

    def _exchange(self, request: urllib.request.Request, timeout: float | None) -> _Answer:
        try:
            response = self._opener.open(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            response = error
        with response:
            return _Answer(response.status, response.headers, response.read(MAX_ANSWER_BYTES))


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: another server would get the key, and a PATCH would be lost."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _require(answer: _Answer, *statuses: int) -> _Answer:
    """Return an answer with one of these statuses; raise its error otherwise."""
    if answer.status in statuses:
        return answer
    detail = answer.detail
    if answer.status in (401, 403):
        raise AuthorizationError(
            f"the server refused the key ({detail}): give its key with {argument('api_key')}"
        )
    if answer.status == 404:
        raise _Fault(f"{detail} (the upload was deleted)")
    if answer.status in (413, 507):
        raise StorageError(f"the server has no space for the model: {detail}")
    if answer.status == 422:
        raise WeightsError(f"the server refused the model: {detail}")
    if answer.status == 460:
        raise IntegrityError(f"the server received a damaged file: {detail}")
    if answer.status in (400, 409, 415):
        raise ParameterError(f"the server refused the request: {detail}")
    location = answer.headers.get("location")
    raise HubUnavailableError(
        f"HTTP status {answer.status}: {detail}: "
        + (f"give the address {location}" if location else "check the address")
    )
