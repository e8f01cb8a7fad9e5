"""Routes of the model store: resumable uploads, the list of models, and their set-up.

The README of this folder has the scheme. `PATCH`, `HEAD` and `DELETE` on a file are the IETF draft
for resumable uploads, and tus 1.0. Functions of the store block, so they run in threads.
"""

from __future__ import annotations

import asyncio
import errno
import json
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, Protocol

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gptx.errors import (
    DataError,
    GptxError,
    IntegrityError,
    NotFoundError,
    ParameterError,
    StorageError,
    shown,
)
from gptx.server.uploads import protocol
from gptx.server.uploads.protocol import Checksum
from gptx.server.uploads.store import UPLOADS, Store
from gptx.server.uploads.stored_models import (
    ChecksumError,
    ConflictError,
    DiskFullError,
    LengthError,
    StoredFile,
    StoredModel,
    TooLargeError,
    WrongOffsetError,
)

JSON = "application/json"
BLOCK_BYTES = 2**20  # of one append
MAX_MANIFEST_BYTES = 2**18  # 256 files of at most 240 bytes each are 61 kB
IDLE_SECONDS = 60.0  # without a byte of a request
TUS_EXTENSIONS = "creation,creation-defer-length,creation-with-upload,termination,checksum"

_PROBLEM_TYPES = "https://iana.org/assignments/http-problem-types#"
# The first class of an error in this order decides: status, title, problem type.
_PROBLEMS: tuple[tuple[type[Exception], int, str, str], ...] = (
    (WrongOffsetError, 409, "Mismatching offset", f"{_PROBLEM_TYPES}mismatching-upload-offset"),
    (LengthError, 400, "Inconsistent length", f"{_PROBLEM_TYPES}inconsistent-upload-length"),
    (TooLargeError, 413, "Content too large", "about:blank"),
    (ConflictError, 409, "Conflict", "about:blank"),
    (ParameterError, 400, "Bad request", "about:blank"),
    (IntegrityError, 460, "Checksum mismatch", "about:blank"),
    (DataError, 422, "Invalid model", "about:blank"),
    (NotFoundError, 404, "Not found", "about:blank"),
    (DiskFullError, 507, "Insufficient storage", "about:blank"),
    (TimeoutError, 408, "Request timeout", "about:blank"),
    (Exception, 500, "Server error", "about:blank"),
)


class Models(Protocol):
    """The served models by name, as `gptx.server.models` has them."""

    @property
    def loaded(self) -> Collection[str]:
        """Names of the loaded models."""

    def names(self) -> Collection[str]:
        """Names of all models, with those of the store."""

    def is_loading(self, name: str) -> bool:
        """Test for a model that is being loaded."""

    def setup(self, name: str) -> object:
        """Load a model of the store; return when it is loaded."""

    def drop(self, name: str) -> None:
        """Release a model."""


def routes(store: Store, models: Models, *, idle_seconds: float = IDLE_SECONDS) -> list[Route]:
    """Return the routes of a store under /models.

    Checks that a restart interrupted begin again.

    Parameters
    ----------
    models
        The served models.
    idle_seconds
        Time after which a request that sends nothing ends.
    """
    uploads = _Uploads(store, models, idle_seconds)
    for model in store.models():
        uploads.check_if_complete(model)

    def route(path: str, **methods: Callable[[Request], Awaitable[Response]]) -> Route:
        return Route(path, _endpoint(store, methods), methods=[*methods, "OPTIONS"])

    return [
        route("/models", GET=uploads.list_models, HEAD=uploads.list_models),
        route(
            "/models/{name}",
            GET=uploads.show_model,
            HEAD=uploads.model_offset,
            POST=uploads.begin,
            DELETE=uploads.drop,
        ),
        route("/models/{name}/setup", POST=uploads.setup),
        route(
            "/models/{name}/files/{file}",
            HEAD=uploads.file_offset,
            PATCH=uploads.append,
            DELETE=uploads.drop_file,
        ),
    ]


def _endpoint(
    store: Store, methods: Mapping[str, Callable[[Request], Awaitable[Response]]]
) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint of several methods that answers each error, and OPTIONS."""
    limit = f"max-size={store.max_bytes}"

    async def endpoint(request: Request) -> Response:
        tus = protocol.is_tus(request.headers)
        if request.method == "OPTIONS":
            response = Response(status_code=204, headers=_abilities(store, limit))
        elif tus and request.headers["tus-resumable"] != protocol.TUS_VERSION:
            response = Response(status_code=412, headers={"Tus-Version": protocol.TUS_VERSION})
        else:
            try:
                response = await methods[request.method](request)
            except ClientDisconnect:
                response = Response(status_code=400)  # which no client reads
            except (GptxError, OSError) as error:
                response = _problem(error)
            if response.status_code in (201, 204, 413):
                response.headers["Upload-Limit"] = limit
        response.headers.setdefault("Cache-Control", "no-store")
        if tus or request.method == "OPTIONS":
            response.headers["Tus-Resumable"] = protocol.TUS_VERSION
        return response

    return endpoint


def _abilities(store: Store, limit: str) -> dict[str, str]:
    return {
        "Accept-Patch": f"{protocol.PARTIAL_UPLOAD}, {protocol.TUS_CONTENT}",
        "Upload-Limit": limit,
        "Tus-Version": protocol.TUS_VERSION,
        "Tus-Extension": TUS_EXTENSIONS,
        "Tus-Max-Size": str(store.max_bytes),
        "Tus-Checksum-Algorithm": protocol.CHECKSUM_ALGORITHMS,
    }


def _problem(error: Exception) -> Response:
    """Return an error in the form of RFC 9457."""
    if isinstance(error, OSError) and not isinstance(error, GptxError | TimeoutError):
        full = error.errno == errno.ENOSPC
        reason = f"the store cannot be written ({error.strerror})"
        error = DiskFullError(reason) if full else StorageError(reason)
    status, title, kind = next(row[1:] for row in _PROBLEMS if isinstance(error, row[0]))
    content: dict[str, Any] = {
        "type": kind,
        "title": title,
        "status": status,
        "detail": str(error),
    }
    headers = {}
    if isinstance(error, WrongOffsetError):
        content |= {"expected-offset": error.offset, "provided-offset": error.given}
        headers["Upload-Offset"] = str(error.offset)
    elif isinstance(error, IntegrityError) and not isinstance(error, ChecksumError):
        headers["Upload-Complete"] = "?1"  # of the draft: the whole file arrived, and is refused
    return JSONResponse(content, status, headers, media_type="application/problem+json")


class _Uploads:
    """The endpoints; see `routes` for the parameters."""

    def __init__(self, store: Store, models: Models, idle_seconds: float) -> None:
        self._store = store
        self._models = models
        self._idle_seconds = idle_seconds
        self._checks: dict[str, threading.Thread] = {}
        self._setups: set[str] = set()
        # File -> the request that may append to it: the last one. A lost connection can live on.
        self._turns: dict[tuple[str, str], Request] = {}
        self._appending = asyncio.Lock()

    # Models

    async def list_models(self, request: Request) -> Response:
        """Answer GET /models."""
        checking = set(self._checks)  # before the files are read: a check can end meanwhile
        models = await run_in_threadpool(self._store.models)
        shown = [self._shown(request, model, model.name in checking) for model in models]
        return JSONResponse({"models": shown})

    async def show_model(self, request: Request) -> Response:
        """Answer GET /models/NAME."""
        return JSONResponse(await self._current(request))

    async def model_offset(self, request: Request) -> Response:
        """Answer HEAD /models/NAME, with the sums over the files."""
        model = await self._model(request)
        return Response(status_code=204, headers=_state(model))

    async def begin(self, request: Request) -> Response:
        """Answer POST /models/NAME: a manifest, or the first request of one file."""
        marks = ("upload-complete", "upload-length", "upload-defer-length", "tus-resumable")
        if any(mark in request.headers for mark in marks):
            return await self._create(request)
        if _media_type(request) != JSON:  # a page of another origin cannot send it unasked
            return Response(status_code=415, headers={"Accept-Post": JSON})
        name = request.path_params["name"]
        await run_in_threadpool(self._require_free, name)
        files = _manifest_files(await self._body(request))
        model = await run_in_threadpool(self._store.begin, name, files)
        self.check_if_complete(model)
        headers = {"Location": _address(request, name)} | _state(model)
        return JSONResponse(await self._current(request), 200 if model.ready else 201, headers)

    async def drop(self, request: Request) -> Response:
        """Answer DELETE /models/NAME."""
        name = (await self._model(request)).name
        if self._is_loading(name):
            raise ConflictError(f"model {name} is being loaded: try again later")
        await run_in_threadpool(self._models.drop, name)
        await run_in_threadpool(self._store.drop, name)
        return Response(status_code=204)

    async def setup(self, request: Request) -> Response:
        """Answer POST /models/NAME/setup: publish a complete upload, and load the model."""
        name = (await self._model(request)).name
        if self._is_loading(name):
            raise ConflictError(f"model {name} is being loaded already: wait for it")
        self._setups.add(name)
        try:
            if (thread := self._checks.get(name)) is not None:
                await run_in_threadpool(thread.join)
            await run_in_threadpool(self._store.publish, name)
            await run_in_threadpool(self._models.setup, name)
        finally:
            self._setups.discard(name)
        return JSONResponse(await self._current(request))

    def check_if_complete(self, model: StoredModel) -> None:
        """Check a complete upload in a thread, and publish it."""
        name = model.name
        if model.ready or not model.sealed or not model.complete or model.error is not None:
            return
        if name not in self._checks:
            self._checks[name] = threading.Thread(target=self._check, args=(name,), daemon=True)
            self._checks[name].start()

    def _check(self, name: str) -> None:
        try:
            self._store.publish(name)
        except GptxError:
            pass  # the store has the error, or the upload was deleted
        finally:
            del self._checks[name]

    # Files

    async def file_offset(self, request: Request) -> Response:
        """Answer HEAD /models/NAME/files/FILE; a request that still appends to it ends."""
        name, file = request.path_params["name"], request.path_params["file"]
        self._turns.pop((name, file), None)
        async with self._appending:
            found = await run_in_threadpool(self._store.flush, name, file)
        return Response(status_code=204, headers=_state(found))

    async def append(self, request: Request) -> Response:
        """Answer PATCH /models/NAME/files/FILE."""
        name, file = request.path_params["name"], request.path_params["file"]
        kinds = (protocol.PARTIAL_UPLOAD, protocol.TUS_CONTENT)
        if _media_type(request) not in kinds:
            return Response(status_code=415, headers={"Accept-Patch": ", ".join(kinds)})
        offset = protocol.integer(request.headers, "upload-offset")
        if offset is None:
            raise ParameterError("Upload-Offset is missing or invalid: give the offset in bytes")
        return Response(
            status_code=204, headers=_state(await self._receive(request, name, file, offset))
        )

    async def drop_file(self, request: Request) -> Response:
        """Answer DELETE /models/NAME/files/FILE."""
        name, file = request.path_params["name"], request.path_params["file"]
        self._turns.pop((name, file), None)
        async with self._appending:
            await run_in_threadpool(self._store.drop_file, name, file)
        return Response(status_code=204)

    async def _create(self, request: Request) -> Response:
        name, headers = request.path_params["name"], request.headers
        file = protocol.file_name(headers)
        length = protocol.total_length(headers, 0)
        sha256 = protocol.file_sha256(headers)
        await run_in_threadpool(self._require_free, name)
        self._turns.pop((name, file), None)
        async with self._appending:
            await run_in_threadpool(self._store.create, name, file, length, sha256)
        found = await self._receive(request, name, file, 0)
        location = {"Location": f"{_address(request, name)}/files/{file}"}
        return Response(status_code=201, headers=location | _state(found))

    async def _receive(self, request: Request, name: str, file: str, offset: int) -> StoredFile:
        """Append the content of a request to a file, which is then flushed; return its state."""
        key = (name, file)
        self._turns[key] = request
        try:
            async with self._appending:
                found = await run_in_threadpool(self._store.flush, name, file)
            if found.offset != offset:
                raise WrongOffsetError(offset, found.offset)
            length = protocol.total_length(request.headers, offset)
            if length is not None and length != found.length:
                await run_in_threadpool(self._store.set_length, name, file, length)
                found = replace(found, length=length)
            content = protocol.integer(request.headers, "content-length") or 0
            if found.length is not None and offset + content > found.length:
                raise LengthError(
                    f"file {file} has {found.length} bytes, and the request ends at "
                    f"{offset + content}: check the file"
                )
            end = await self._append_content(request, key, offset)
            if protocol.is_last(request.headers) and end != found.length:
                await run_in_threadpool(self._store.set_length, name, file, end)
        finally:
            if self._turns.get(key) is request:
                del self._turns[key]
        found = await run_in_threadpool(self._store.flush, name, file)
        if found.complete and not found.verified:
            await run_in_threadpool(self._store.verify, name, file)
            self.check_if_complete(await self._model(request))
        return found

    async def _append_content(self, request: Request, key: tuple[str, str], offset: int) -> int:
        """Append the content of a request in blocks; return the end.

        If the connection is lost, all that arrived is appended.
        """
        blocks = self._blocks(request)
        if (checksum := protocol.checksum(request.headers)) is not None:
            blocks = self._verified(blocks, checksum)
        arrived = bytearray()
        try:
            async for block in blocks:
                arrived += block
                if len(arrived) >= BLOCK_BYTES:
                    offset = await self._append_block(request, key, offset, bytes(arrived))
                    arrived.clear()
        except (ClientDisconnect, TimeoutError):
            await self._append_block(request, key, offset, bytes(arrived))
            raise
        return await self._append_block(request, key, offset, bytes(arrived))

    async def _append_block(
        self, request: Request, key: tuple[str, str], offset: int, data: bytes
    ) -> int:
        if not data:
            return offset
        async with self._appending:
            if self._turns.get(key) is not request:
                raise ConflictError("another request has continued this upload: ask for its offset")
            return await run_in_threadpool(self._store.append, *key, offset, data)

    async def _verified(
        self, blocks: AsyncIterator[bytes], checksum: Checksum
    ) -> AsyncIterator[bytes]:
        """Yield the content of a request after a comparison of all of it with its checksum."""
        folder = self._store.root / UPLOADS
        with tempfile.SpooledTemporaryFile(BLOCK_BYTES, dir=str(folder)) as spool:
            async for block in blocks:
                checksum.hasher.update(block)
                await run_in_threadpool(spool.write, block)
            if checksum.hasher.digest() != checksum.digest:
                raise ChecksumError("the content differs from its checksum: send it again")
            spool.seek(0)
            while block := await run_in_threadpool(spool.read, BLOCK_BYTES):
                yield block

    async def _blocks(self, request: Request) -> AsyncIterator[bytes]:
        """Yield the content of a request; TimeoutError if it stops for too long."""
        stream = request.stream()
        while True:
            try:
                async with asyncio.timeout(self._idle_seconds):
                    block = await anext(stream)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise TimeoutError(
                    f"no byte arrived for {self._idle_seconds:g} s: continue the upload"
                ) from None
            if block:
                yield block

    async def _body(self, request: Request) -> bytes:
        body = b""
        async for block in self._blocks(request):
            body += block
            if len(body) > MAX_MANIFEST_BYTES:
                raise TooLargeError(f"the manifest has more than {MAX_MANIFEST_BYTES} bytes")
        return body

    # Descriptions

    async def _model(self, request: Request) -> StoredModel:
        return await run_in_threadpool(self._store.model, request.path_params["name"])

    def _require_free(self, name: str) -> None:
        """Raise ConflictError for the name of a model that is not from the store."""
        if name in self._models.names() and name not in self._store.names():
            raise ConflictError(f"the server has a model {name} already: use another name")

    def _is_loading(self, name: str) -> bool:
        return name in self._setups or self._models.is_loading(name)

    async def _current(self, request: Request) -> dict[str, Any]:
        """Return the model of a request as JSON."""
        checking = request.path_params["name"] in self._checks  # before the files are read
        return self._shown(request, await self._model(request), checking)

    def _shown(self, request: Request, model: StoredModel, checking: bool) -> dict[str, Any]:
        """Return a model as JSON."""
        address = _address(request, model.name)
        found: dict[str, Any] = {
            "name": model.name,
            "state": self._state_of(model, checking),
            "offset": model.offset,
            "length": model.length,
            "files": {
                name: {
                    "offset": file.offset,
                    "length": file.length,
                    "sha256": file.sha256,
                    "url": f"{address}/files/{name}",
                }
                for name, file in model.files.items()
            },
        }
        return found | ({"error": model.error} if model.error is not None else {})

    def _state_of(self, model: StoredModel, checking: bool) -> str:
        if model.ready:
            if self._is_loading(model.name):
                return "loading"
            return "loaded" if model.name in self._models.loaded else "ready"
        if model.error is not None:
            return "failed"
        return "checking" if checking else "uploading"


def _address(request: Request, name: str) -> str:
    """Return the path of a model, below the prefix of a proxy."""
    return f"{request.scope.get('root_path', '')}/models/{name}"


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _state(found: StoredFile | StoredModel) -> dict[str, str]:
    """Return the header fields of a state."""
    complete = found.ready if isinstance(found, StoredModel) else found.complete
    fields = {
        "Upload-Offset": str(found.offset),
        "Upload-Complete": f"?{complete:d}",
    }
    if found.length is not None:
        fields["Upload-Length"] = str(found.length)
    return fields


def _manifest_files(body: bytes) -> dict[str, StoredFile]:
    """Parse a manifest: {"files": {NAME: {"length": BYTES, "sha256": HEXADECIMAL}}}."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ParameterError(f"the manifest is no JSON ({error}): send one") from None
    form = 'expected {"files": {NAME: {"length": BYTES, "sha256": HEXADECIMAL}, …}}'
    if not isinstance(found, dict) or found.keys() != {"files"}:
        raise ParameterError(f"the manifest is {shown(found)}, {form}")
    if not isinstance(found["files"], dict):
        raise ParameterError(f"files is {shown(found['files'])}, {form}")
    files = {}
    for name, file in found["files"].items():
        if (
            not isinstance(file, dict)
            or file.keys() != {"length", "sha256"}
            or type(file["length"]) is not int
            or not isinstance(file["sha256"], str)
        ):
            raise ParameterError(f"file {shown(name)} is {shown(file)}, {form}")
        files[name] = StoredFile(0, file["length"], file["sha256"])
    return files
