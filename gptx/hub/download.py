"""One repository of the Hugging Face Hub, in the cache that all Hugging Face tools share.

The layout (blobs, snapshots, refs, .no_exist) and the locks are those of huggingface_hub, so that
each uses what the other fetched. One thing differs: a file gets its published name only after its
content was hashed and found to be what the Hub had announced. `hf_hub_download` renames without
hashing; so this file takes the functions below it, `get_hf_file_metadata` and `http_get`, and
hashes in between. That also resumes a file where an earlier run was interrupted.

huggingface_hub is imported here and in `hub_errors.py`; `hub.py` imports these two only when a
name leads to the Hub.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import (
    constants,
    errors,
    get_hf_file_metadata,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, not in an __all__
    WeakFileLock,
    build_hf_headers,
    validate_repo_id,
)

from gptx.errors import (
    GptxError,
    HubUnavailableError,
    IntegrityError,
    NotFoundError,
    StorageError,
)
from gptx.hub.errors import (
    NoSuchFileError,
    NotResumedError,
    broken_promise,
    no_such_file,
    translated,
)

_COMMIT = re.compile("[0-9a-f]{40}")
_HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_FILE_NAME = re.compile(r"\w[\w.-]*")


def is_repository_name(name: str) -> bool:
    """Could the Hub have a repository of this name?"""
    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        return False
    return name.isascii()


class _Promise(NamedTuple):
    """What the Hub says of a file before it sends it."""

    commit: str | None
    etag: str  # names the blob; a SHA-256 of the content, or the SHA-1 that git gives it
    size: int | None


class Repository:
    """A repository at one commit.

    Attributes
    ----------
    name
        Hub id.
    revision
        Hash of the commit that every file is taken from.
    """

    def __init__(
        self, name: str, revision: str, offline: bool, token: str | None, verify_cached: bool
    ) -> None:
        self.name = name
        self.revision = self._asked = revision
        self._token, self._verify_cached = token, verify_cached
        self._offline = offline or constants.HF_HUB_OFFLINE
        self._cache = Path(constants.HF_HUB_CACHE)
        stem = repo_folder_name(repo_id=name, repo_type="model")
        self._folder, self._locks = self._cache / stem, self._cache / ".locks" / stem
        self._promises: dict[str, _Promise] = {}
        self._reached = False  # the Hub has answered
        self._fetched = False  # something was downloaded
        self._down: HubUnavailableError | None = None
        self.revision = self._pin()

    def find(self, filename: str) -> Path | None:
        """Path of a file, or None if the repository lacks it."""
        try:
            return self.need(filename)
        except NoSuchFileError:
            return None
        except HubUnavailableError as error:
            if self._reached:
                raise
            self._down = error  # the Hub never answered: what is cached has to do
            return None

    def need(self, filename: str) -> Path:
        """Path of a file that has to be there; it is downloaded if the cache lacks it."""
        with self._translated(filename):
            path = self._cached(filename)
            if path and (not self._verify_cached or self._is_sound(path, filename)):
                return path
            if path and self._offline:
                raise IntegrityError(f"{path} is damaged: fetch it again with a connection")
            if self._offline:
                raise self._not_cached(filename)
            if path:
                self._discard(path)
            if self._down:
                raise self._down
            return self._fetch(filename)

    def no_weights(self) -> GptxError:
        """What to raise if there is no safetensors file."""
        if self._offline:
            return self._not_cached("model.safetensors")
        if self._down:
            return self._down
        has = ""
        with suppress(GptxError):
            self._ask("pytorch_model.bin", tries=1)
            has = "pytorch_model.bin and "
        return NotFoundError(
            f"{self.name}@{self._asked} has {has}no model.safetensors: get what it has with "
            f"`hf download {self.name} --local-dir FOLDER`, then run `gptx convert FOLDER DST`"
        )

    def write_ref(self) -> None:
        """Note in the cache which commit the branch or tag stands for.

        Comes last, so that the name never leads to a commit whose files are still to come.
        """
        if self._asked == self.revision or not self._reached:
            return
        ref = self._folder / "refs" / self._asked
        try:
            with self._translated("the ref"):
                if ref.is_file() and ref.read_text(encoding="utf-8") == self.revision:
                    return
                with _written_aside(ref) as aside:
                    aside.write_text(self.revision, encoding="utf-8")
        except StorageError:
            if self._fetched:  # else all was there, and the cache may well be read-only
                raise

    def _pin(self) -> str:
        """The commit that the revision stands for: the Hub knows, or else the cache remembers."""
        if _COMMIT.fullmatch(self._asked):
            return self._asked
        path = None
        with self._translated("config.json"), suppress(NoSuchFileError):
            path = self._cached("config.json")
        if self._offline and path is None:
            raise self._not_cached("config.json")
        if not self._offline:
            try:
                promise = self._ask("config.json", tries=1 if path else 3)
            except HubUnavailableError as error:
                if path is None:
                    raise
                self._down = error
            else:
                return self._plain(promise.commit, "config.json")
        assert path is not None
        return path.parent.name

    def _cached(self, filename: str) -> Path | None:
        found = try_to_load_from_cache(self.name, filename, self._cache, self.revision)
        if found is not None and not isinstance(found, str):
            raise no_such_file(self._describe(filename))  # the cache knows that there is none
        return Path(found) if found else None

    def _is_sound(self, path: Path, filename: str) -> bool:
        """Does a cached file have its hash, which is the name of the blob that it links to?"""
        if path.is_symlink():
            return _matches(path, Path(os.readlink(path)).name, None)
        if self._offline or self._down:
            return True  # without symlinks only the Hub knows the hash
        promise = self._ask(filename)
        return _matches(path, promise.etag, promise.size)

    def _discard(self, path: Path) -> None:
        if path.is_symlink():
            (self._folder / "blobs" / Path(os.readlink(path)).name).unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    def _ask(self, filename: str, tries: int = 3) -> _Promise:
        """What the Hub announces of a file: one HEAD request, repeated if it fails."""
        if filename in self._promises:
            return self._promises[filename]
        url = hf_hub_url(self.name, filename, revision=self.revision)
        try:
            with self._translated(filename):
                head = get_hf_file_metadata(url, token=self._token)
        except NoSuchFileError:
            self._reached = True
            raise
        except HubUnavailableError:
            if tries == 1:
                raise
            time.sleep(1)
            return self._ask(filename, tries - 1)
        promise = _Promise(head.commit_hash, self._plain(head.etag, filename), head.size)
        self._reached = True
        self._promises[filename] = promise
        return promise

    def _plain(self, value: str | None, filename: str) -> str:
        """Check an answer of the Hub that becomes part of a path."""
        if value is None or not _FILE_NAME.fullmatch(value):
            raise HubUnavailableError(
                f"{constants.ENDPOINT} sent no usable commit and ETag for "
                f"{self._describe(filename)}: is HF_ENDPOINT the address of a Hub?"
            )
        return value

    def _fetch(self, filename: str) -> Path:
        """Download, verify, publish."""
        try:
            promise = self._ask(filename)
        except NoSuchFileError:
            with suppress(OSError):  # it would only have spared the next question
                marker = self._folder / ".no_exist" / self.revision / filename
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.touch()
            raise
        blob = self._folder / "blobs" / promise.etag
        pointer = self._folder / "snapshots" / self.revision / filename
        for folder in (blob.parent, pointer.parent, self._locks):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(self._locks / f"{promise.etag}.lock"):
            # Another process may have been faster, or another commit may have the same file.
            if not (blob.is_file() and _matches(blob, promise.etag, promise.size)):
                partial = blob.with_name(f"{blob.name}.incomplete")
                self._download(filename, promise, partial)
                os.replace(partial, blob)
            _point(pointer, blob)
        self._fetched = True
        return pointer

    def _download(self, filename: str, promise: _Promise, partial: Path) -> None:
        """Fill `partial`, going on where an earlier run was interrupted."""
        begun = partial.stat().st_size if partial.exists() else 0
        try:
            self._receive(filename, promise, partial)
        except (IntegrityError, NotResumedError):
            if not begun:
                raise
            # Perhaps only what was there does not fit: once more from the start.
            partial.unlink(missing_ok=True)
            self._receive(filename, promise, partial)

    def _receive(self, filename: str, promise: _Promise, partial: Path) -> None:
        url = hf_hub_url(self.name, filename, revision=self.revision)
        try:
            with self._translated(filename), _Partial(io.FileIO(partial, "ab")) as file:
                http_get(
                    url,
                    file,
                    resume_size=file.tell(),
                    headers=build_hf_headers(token=self._token),
                    expected_size=promise.size,
                    displayed_filename=filename,
                )
                file.flush()
                os.fsync(file.fileno())  # its name must not survive a crash that it does not
            if not _matches(partial, promise.etag, promise.size):
                raise broken_promise(self._describe(filename))
        except (IntegrityError, StorageError):
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise

    def _translated(self, filename: str) -> AbstractContextManager[None]:
        return translated(self.name, self._asked, filename)

    def _describe(self, filename: str) -> str:
        return f"{filename} of {self.name}@{self._asked}"

    def _not_cached(self, filename: str) -> NoSuchFileError:
        return NoSuchFileError(
            f"{self._describe(filename)} is not in the cache {self._cache}, and gptx is offline: "
            f"run `gptx download {self.name}` with a connection first"
        )


class _Partial(io.BufferedWriter):
    """A file of which the end is still to come.

    After a cut, `http_get` asks for the rest. If a server sends the whole file instead, it empties
    the file and begins again, which never ends if that server always cuts. Here it ends.
    """

    def truncate(self, size: int | None = None, /) -> int:
        raise NotResumedError(
            f"{constants.ENDPOINT} cut the connection and cannot go on from there: try again"
        )


def _matches(path: Path, etag: str, size: int | None) -> bool:
    """Is this the content that the ETag stands for? One that is no hash cannot tell."""
    actual = path.stat().st_size
    if size is not None and size != actual:
        return False
    if not _HASH.fullmatch(etag):
        return True
    with path.open("rb") as file:
        if len(etag) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest() == etag
        blob = hashlib.sha1(b"blob %d\0" % actual, usedforsecurity=False)
        return hashlib.file_digest(file, lambda: blob).hexdigest() == etag


def _point(pointer: Path, blob: Path) -> None:
    """Let an entry of a snapshot show a blob; it never shows half of one."""
    if pointer.exists() and pointer.samefile(blob):
        return
    pointer.unlink(missing_ok=True)
    if not getattr(constants, "HF_HUB_DISABLE_SYMLINKS", False):
        with suppress(OSError):
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
            return
    try:  # no symlinks here
        os.link(blob.resolve(), pointer)
    except OSError:
        with _written_aside(pointer) as aside:
            shutil.copyfile(blob, aside)


@contextmanager
def _written_aside(path: Path) -> Iterator[Path]:
    """A file that takes the place of `path` at the end, all at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
