"""One repository of the Hub at one commit: find files in the cache, download missing ones.

A file gets its published name only after its content had the promised hash. `hf_hub_download` does
not hash, and deletes interrupted downloads; `download.py` replaces it.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, not in __all__
    validate_repo_id,
)

from gptx.errors import (
    GptxError,
    HubUnavailableError,
    IntegrityError,
    NotFoundError,
    StorageError,
    argument,
)
from gptx.hub.authorization import check_token, find_token
from gptx.hub.cache import COMMIT, MODEL, RepositoryCache
from gptx.hub.download import download
from gptx.hub.errors import (
    EMBEDDED_HINT,
    InvalidSettingError,
    NoSuchFileError,
    NotResumableError,
    no_such_file,
    other_format_hint,
    translated,
    wrong_content,
)
from gptx.hub.staging import remove
from gptx.hub.verify import matches
from gptx.model_files import CONFIG

METADATA_ATTEMPTS = 3
MAX_NAMED_COMMITS = 3
RETRY_SECONDS = 1

_PATH_COMPONENT = re.compile(r"\w[\w.-]*")


class FileMetadata(NamedTuple):
    """Commit, hash and size of a file, as the Hub promises them."""

    commit: str | None
    etag: str  # name of the blob: SHA-256 of the content, or SHA-1 of the git blob
    size: int | None  # bytes


class Repository:
    """A repository at one commit, which the constructor requests from the Hub.

    Parameters
    ----------
    name
        Hub id.
    revision
        Branch, tag or commit hash.
    offline
        Use only the cache.
    token
        None for `HF_TOKEN` or the saved login.
    verify_cached
        Also hash files that are in the cache.
    former_name
        Hub id that the repository had before, and that its cache may still have.
    kind
        "model" or "dataset".
    first_file
        A file that every revision has: its request gives the commit.

    Attributes
    ----------
    revision
        Commit hash that every file is taken from.

    Raises
    ------
    GptxError
        See `gptx.hub.resolve.locate`, for each method too.
    """

    def __init__(
        self,
        name: str,
        revision: str,
        offline: bool,
        token: str | None,
        verify_cached: bool,
        former_name: str | None = None,
        *,
        kind: str = MODEL,
        first_file: str = CONFIG,
    ) -> None:
        check_token(token)
        self.name = name
        self._kind, self._first_file = kind, first_file
        self.revision = self._requested = revision
        self._token, self._verify_cached = token, verify_cached
        self._offline = offline or constants.HF_HUB_OFFLINE
        self._caches = [RepositoryCache(known, kind) for known in (name, former_name) if known]
        self._metadata: dict[str, FileMetadata] = {}
        self._hub_answered = False
        self._downloaded = False
        self._hub_error: HubUnavailableError | None = None
        self._cache = self._best_cache(revision)
        self.revision = self._resolve()
        self._cache = self._best_cache(self.revision)

    def find(self, filename: str) -> Path | None:
        """Return the path of an optional file, None if the repository lacks it."""
        try:
            return self.need(filename)
        except NoSuchFileError:
            return None
        except HubUnavailableError as error:
            if self._hub_answered:
                raise
            self._hub_error = error  # continue with the files in the cache
            return None

    def need(self, filename: str) -> Path:
        """Return the path of a required file; download it if the cache lacks it."""
        with self._translated(filename):
            path = self._cached(filename)
            if path and (not self._verify_cached or self._is_intact(path, filename)):
                return path
            if self._offline:
                if path:
                    raise IntegrityError(f"{path} is damaged: download it again with a connection")
                raise self._not_cached(filename)
            if path:
                self._cache.discard(path)
            if self._hub_error:
                raise self._hub_error
            return self._download(filename)

    def no_weights(self) -> GptxError:
        """Make the error for a repository without weights."""
        if self._offline:
            return self._not_cached("model.safetensors")
        if self._hub_error:
            return self._hub_error
        return NotFoundError(
            f"{self.name}@{self._requested} has no model.safetensors and no pytorch_model.bin; "
            f"{other_format_hint(self.name)}"
        )

    def write_ref(self) -> None:
        """Store the commit of the branch or tag in the cache.

        The caller does this last. A ref moves only to a commit with its weights; without them
        another commit may be complete.
        """
        if self._requested == self.revision or not self._hub_answered:
            return
        try:
            with self._translated("the ref"):
                complete = self._kind != MODEL or self._cache.has_weights(self.revision)
                self._cache.write_ref(self._requested, self.revision, move=complete)
        except StorageError:
            if self._downloaded:  # else all files were cached, and the cache may be read-only
                raise

    def _best_cache(self, revision: str) -> RepositoryCache:
        """Return the first cache with the weights of a revision, or else with its config."""
        with self._translated(CONFIG):
            return max(
                self._caches,
                key=lambda cache: (cache.has_weights(revision), bool(cache.find(CONFIG, revision))),
            )

    def _resolve(self) -> str:
        """Return the commit of the revision: from the Hub, or else from the cache."""
        if COMMIT.fullmatch(self._requested):
            return self._requested
        path = None
        with self._translated(self._first_file), suppress(NoSuchFileError):
            path = self._cached(self._first_file)
        if self._offline and path is None:
            raise self._not_cached(self._first_file)
        if not self._offline:
            attempts = 1 if path else METADATA_ATTEMPTS
            try:
                metadata = self._request_metadata(self._first_file, attempts)
            except HubUnavailableError as error:
                if path is None:
                    raise HubUnavailableError(f"{error.message}{self._other_commits()}") from error
                self._hub_error = error
            else:
                return self._path_component(metadata.commit, self._first_file)
        assert path is not None
        return path.parent.name

    def _cached(self, filename: str) -> Path | None:
        if self._cache.lacks(filename, self.revision):
            raise no_such_file(self.name, self._requested, filename, self._kind)
        return self._cache.find(filename, self.revision)

    def _is_intact(self, path: Path, filename: str) -> bool:
        """Compare a cached file with its hash, which a symlink or else the Hub gives."""
        if path.is_symlink():
            return matches(path, self._cache.etag(path), None)
        if self._offline or self._hub_error:
            return True
        metadata = self._request_metadata(filename)
        return matches(path, metadata.etag, metadata.size)

    def _request_metadata(self, filename: str, attempts: int = METADATA_ATTEMPTS) -> FileMetadata:
        """Request commit, hash and size of a file: one HEAD request, repeated if it fails."""
        if filename in self._metadata:
            return self._metadata[filename]
        try:
            with self._translated(filename):
                head = get_hf_file_metadata(
                    self._url(filename),
                    token=self._authorization() or False,
                    timeout=constants.HF_HUB_ETAG_TIMEOUT,
                )
        except NoSuchFileError:
            self._hub_answered = True
            raise
        except HubUnavailableError as error:
            if attempts == 1 or isinstance(error, InvalidSettingError):
                raise
            time.sleep(RETRY_SECONDS)
            return self._request_metadata(filename, attempts - 1)
        etag = self._path_component(head.etag, filename)
        self._hub_answered = True
        self._metadata[filename] = FileMetadata(head.commit_hash, etag, head.size)
        return self._metadata[filename]

    def _path_component(self, value: str | None, filename: str) -> str:
        """Return an answer of the Hub that becomes part of a path; refuse an unsafe one."""
        if value is None or not _PATH_COMPONENT.fullmatch(value):
            raise HubUnavailableError(
                f"{constants.ENDPOINT} sent no valid commit and ETag for "
                f"{self._describe(filename)}: set HF_ENDPOINT to the address of a Hub"
            )
        return value

    def _download(self, filename: str) -> Path:
        """Download, verify, publish."""
        try:
            metadata = self._request_metadata(filename)
        except NoSuchFileError:
            self._cache.mark_missing(filename, self.revision)
            raise
        blob = self._cache.blob(metadata.etag)
        with self._cache.staging(metadata.etag) as partial:
            # Another process may have published it meanwhile, or another commit may have it.
            if not (blob.is_file() and matches(blob, metadata.etag, metadata.size)):
                self._fill(partial, filename, metadata)
                os.replace(partial, blob)
            path = self._cache.publish(filename, self.revision, metadata.etag)
        self._downloaded = True
        return path

    def _fill(self, partial: Path, filename: str, metadata: FileMetadata) -> None:
        """Complete a partial download; start again if its hash is wrong."""
        resumed = partial.exists()
        try:
            self._receive(partial, filename, metadata)
        except (IntegrityError, NotResumableError):
            if not resumed:
                raise
            remove(partial)
            self._receive(partial, filename, metadata)

    def _receive(self, partial: Path, filename: str, metadata: FileMetadata) -> None:
        """Download the rest of a file and verify it; delete it if that fails."""
        try:
            with self._translated(filename):
                download(
                    self._url(filename),
                    partial,
                    size=metadata.size,
                    label=filename,
                    token=self._authorization(),
                )
                if not matches(partial, metadata.etag, metadata.size):
                    raise wrong_content(self._describe(filename))
        except (IntegrityError, StorageError):
            remove(partial)
            raise

    def _url(self, filename: str) -> str:
        return hf_hub_url(self.name, filename, repo_type=self._kind, revision=self.revision)

    def _authorization(self) -> str | None:
        if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
            return self._token
        return find_token(self._token)

    def _translated(self, filename: str) -> AbstractContextManager[None]:
        return translated(self.name, self._requested, filename, self._kind)

    def _describe(self, filename: str) -> str:
        return f"{filename} of {self.name}@{self._requested}"

    def _not_cached(self, filename: str) -> NoSuchFileError:
        missing = f"{self._describe(filename)} is not in the cache {self._cache.root}"
        if self._kind != MODEL:
            return NoSuchFileError(f"{missing}, and gptx is offline: try again with a connection")
        return NoSuchFileError(
            f"{missing}, and gptx is offline: run `gptx download {self.name}` with a connection "
            f"first, or use {EMBEDDED_HINT}{self._other_commits()}"
        )

    def _other_commits(self) -> str:
        """Name the commits that are complete in the cache, for an error about another one."""
        commits = {name for cache in self._caches for name in cache.complete_commits()}
        if not (others := sorted(commits - {self.revision})):
            return ""
        named = " and ".join(others[:MAX_NAMED_COMMITS])
        return f"; the cache has commit {named}: give {argument('revision', others[0])}"


def is_repository_name(name: str) -> bool:
    """Test for a name that follows the Hub's rules for repositories."""
    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        return False
    return name.isascii()
