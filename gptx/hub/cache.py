"""One repository in the cache that all Hugging Face tools share.

Layout under `HF_HUB_CACHE`, as huggingface_hub documents it::

    models--OWNER--NAME/                or datasets--OWNER--NAME
        blobs/HASH                      content; HASH.incomplete is a partial download
        snapshots/COMMIT/FILE           link to a blob
        refs/BRANCH                     commit of a branch or a tag
        .no_exist/COMMIT/FILE           empty; the commit lacks this file
    .locks/models--OWNER--NAME/HASH.lock
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache

from gptx.files import check_replaceable
from gptx.hub.staging import staging
from gptx.model_files import CONFIG, WEIGHT_FILES

COMMIT = re.compile("[0-9a-f]{40}")
MODEL, DATASET = "model", "dataset"  # kinds of repositories


class RepositoryCache:
    """Files of one repository on this machine.

    Attributes
    ----------
    root
        Folder of the cache.
    """

    def __init__(self, repository: str, kind: str = MODEL) -> None:
        self.root = Path(constants.HF_HUB_CACHE)
        self._repository, self._kind = repository, kind
        name = f"{kind}s--{repository.replace('/', '--')}"
        self._folder, self._locks = self.root / name, self.root / ".locks" / name

    def find(self, filename: str, revision: str) -> Path | None:
        """Return the path of a file of a branch, tag or commit; None if it is not cached."""
        found = self._load(filename, revision)
        return Path(found) if isinstance(found, str) else None

    def lacks(self, filename: str, revision: str) -> bool:
        """Test for the cache's mark that the commit lacks a file."""
        found = self._load(filename, revision)
        return found is not None and not isinstance(found, str)

    def has_weights(self, revision: str) -> bool:
        """Test for the weights of a revision; of shards, for their index."""
        return any(self.find(name, revision) for name in WEIGHT_FILES)

    def complete_commits(self) -> list[str]:
        """List the commits with a config and weights."""
        with suppress(OSError):
            names = filter(COMMIT.fullmatch, os.listdir(self._folder / "snapshots"))
            return [name for name in names if self.find(CONFIG, name) and self.has_weights(name)]
        return []

    def _load(self, filename: str, revision: str) -> object:
        found: object = None
        with suppress(UnicodeDecodeError):  # a damaged ref, like none
            found = try_to_load_from_cache(
                self._repository, filename, self.root, revision, self._kind
            )
        if found is None:  # also in a folder without permissions, which the system names
            with suppress(FileNotFoundError):
                (self._folder / "snapshots" / self._commit(revision) / filename).stat()
        return found

    def _commit(self, revision: str) -> str:
        """Return the commit of a branch or a tag; a commit is its own."""
        return self._read_ref(revision) or revision

    def _read_ref(self, revision: str) -> str | None:
        """Return the commit of a branch or a tag; None without a readable ref."""
        with suppress(FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
            return (self._folder / "refs" / revision).read_text(encoding="utf-8")
        return None

    def mark_missing(self, filename: str, commit: str) -> None:
        """Mark that a commit lacks a file, which saves the next request."""
        marker = self._folder / ".no_exist" / commit / filename
        with suppress(OSError):
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()

    def blob(self, etag: str) -> Path:
        """Return the path of the content with this hash."""
        return self._folder / "blobs" / etag

    def staging(self, etag: str) -> AbstractContextManager[Path]:
        """Reserve the path of the partial download of a blob, see `gptx.hub.staging`."""
        return staging(self.blob(etag), self._locks / f"{etag}.lock")

    def publish(self, filename: str, commit: str, etag: str) -> Path:
        """Link a file of a snapshot to its blob, atomically; return the path of the link."""
        link, blob = self._folder / "snapshots" / commit / filename, self.blob(etag)
        if not (link.exists() and link.samefile(blob)):
            with _replacement(link) as new:
                _link_or_copy(blob, new)
        return link

    def discard(self, path: Path) -> None:
        """Delete a file of a snapshot and its blob."""
        if path.is_symlink():
            self.blob(self.etag(path)).unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    @staticmethod
    def etag(path: Path) -> str:
        """Return the hash in the name of the blob that a snapshot links to."""
        return Path(os.readlink(path)).name

    def write_ref(self, revision: str, commit: str, *, move: bool = True) -> None:
        """Store the commit of a branch or a tag, atomically.

        Parameters
        ----------
        move
            Replace the commit of an existing ref.
        """
        ref = self._folder / "refs" / revision
        stored = self._read_ref(revision)
        if stored != commit and (move or stored is None):
            with _replacement(ref) as new:
                new.write_text(commit, encoding="utf-8")


def _link_or_copy(source: Path, link: Path) -> None:
    if not getattr(constants, "HF_HUB_DISABLE_SYMLINKS", False):  # older versions lack it
        with suppress(OSError):  # Windows refuses without developer mode
            link.symlink_to(os.path.relpath(source, link.parent))
            return
    try:
        os.link(source.resolve(), link)
    except OSError:
        shutil.copyfile(source, link)


@contextmanager
def _replacement(path: Path) -> Iterator[Path]:
    """Yield a new path beside `path`; a file written there then replaces `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    check_replaceable(path)
    new = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield new
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
