"""The store of uploaded models: partial uploads, checks, and publication by rename.

A store is a folder. `STORE/NAME` is a model, with its files as they were uploaded. An upload is in
`STORE/.uploads/NAME` until all of its files are complete and checked; then one rename publishes it.
The size of a partial file is its offset, so an append needs no other record of it. All changes are
made under one lock, which processes share.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from gptx.errors import (
    GptxError,
    IntegrityError,
    NotFoundError,
    ParameterError,
    StorageError,
    shown,
)
from gptx.file_lock import lock
from gptx.server.uploads.model_check import check_apart, find_model, regular_files
from gptx.server.uploads.stored_models import (
    MANIFEST,
    ConflictError,
    DiskFullError,
    LengthError,
    Manifest,
    StoredFile,
    StoredModel,
    TooLargeError,
    WrongOffsetError,
    check_files,
    check_model_name,
    is_model_name,
)

UPLOAD_SECONDS = 24 * 3600.0  # default time without a byte after which an upload is deleted
MAX_MODEL_BYTES = 2**36  # 1558M as JSON, the largest format that gptx reads, has about 34 GB

UPLOADS = ".uploads"
_LOCK = ".lock"
_TEMPORARY = ".tmp-"  # folders that are not uploads yet, or no longer
_ABSENT = (FileNotFoundError, NotADirectoryError)
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT
_APPEND |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


class Store:
    """A folder of models, and of uploads that become models.

    Parameters
    ----------
    root
        The folder; it is created if it does not exist.
    max_bytes
        Limit of the bytes of one model.
    upload_seconds
        Time since its last byte after which an incomplete upload is deleted, when the store is
        opened or another upload begins.
    check
        Function that raises a `DataError` for the path of an invalid model.

    Raises
    ------
    StorageError
        The folder cannot be written.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        max_bytes: int = MAX_MODEL_BYTES,
        upload_seconds: float = UPLOAD_SECONDS,
        check: Callable[[Path], None] = check_apart,
    ) -> None:
        self.root = Path(root).absolute()
        self.max_bytes = max_bytes
        self._upload_seconds = upload_seconds
        self._check = check
        self._uploads = self.root / UPLOADS
        with _storage_errors(self.root):
            self._uploads.mkdir(parents=True, exist_ok=True)
        with self._changing():
            for path in self._uploads.glob(f"{_TEMPORARY}*"):  # left by a crash
                shutil.rmtree(path, ignore_errors=True)
            self._expire()

    # Reading

    def models(self) -> list[StoredModel]:
        """Return all models and uploads, sorted by name."""
        found = {}
        with _storage_errors(self.root):
            for folder in (self._uploads, self.root):  # in the order in which an upload moves
                for path in folder.iterdir():
                    if is_model_name(path.name) and path.is_dir():
                        with suppress(*_ABSENT):
                            found[path.name] = self._describe(path)
        return [found[name] for name in sorted(found)]

    def names(self) -> list[str]:
        """Return the names of all models, without those of uploads."""
        with _storage_errors(self.root):
            folders = [path for path in self.root.iterdir() if is_model_name(path.name)]
            return sorted(path.name for path in folders if path.is_dir())

    def model(self, name: str) -> StoredModel:
        """Return a model, or its upload.

        Raises
        ------
        NotFoundError
            The store has neither.
        """
        check_model_name(name)
        for folder in (self.root, self._uploads, self.root):  # it can be published meanwhile
            with suppress(*_ABSENT):
                return self._describe(folder / name)
        raise NotFoundError(f"model {name} does not exist: upload it first")

    def path(self, name: str) -> Path:
        """Return the file or folder that `gptx.load` takes for a model.

        Raises
        ------
        NotFoundError
            The model does not exist, or its upload is not complete.
        WeightsError
            The folder was not uploaded, and has no model.
        """
        if not self.model(name).ready:
            raise NotFoundError(f"model {name} is not complete: finish its upload first")
        folder = self.root / name
        model = Manifest.read(folder).model if (folder / MANIFEST).is_file() else None
        return folder / (model or find_model(folder))

    # Beginning and dropping

    def begin(self, name: str, files: Mapping[str, StoredFile]) -> StoredModel:
        """Begin the upload of a model with these files, or continue it.

        The same call again returns what the store has, and changes nothing.

        Parameters
        ----------
        files
            Name -> length and SHA-256.

        Raises
        ------
        ParameterError
            A name, a length or a SHA-256 is missing or invalid.
        ConflictError
            The model, or an upload of it, has other files; or a name differs in case only.
        TooLargeError
            The model is larger than `max_bytes`.
        DiskFullError
            The disk has too little space for it.
        """
        check_model_name(name)
        check_files(files)
        for file, given in files.items():
            if given.length is None or given.sha256 is None:
                raise ParameterError(f"file {file} has no length or no SHA-256: give both")
        wanted = {x: StoredFile(0, given.length, given.sha256) for x, given in files.items()}
        with self._changing():
            with suppress(*_ABSENT):
                return _same_model(self._describe(self.root / name), wanted)
            folder = self._uploads / name
            with suppress(*_ABSENT):
                found = _same_model(self._describe(folder), wanted)
                if found.error is not None:  # the check begins again
                    manifest = Manifest.read(folder)
                    manifest.error = None
                    manifest.write(folder)
                return replace(found, error=None)
            self._expire()
            self._require_space(name, wanted)
            self._create(name, Manifest(files=wanted, sealed=True))
            return self._describe(folder)

    def create(
        self, name: str, file: str, length: int | None = None, sha256: str | None = None
    ) -> StoredFile:
        """Begin the upload of one file, from its start.

        Without `begin`, the files of a model are those that exist when `publish` is called.

        Raises
        ------
        ParameterError, ConflictError, TooLargeError, DiskFullError
            See `begin`; the length and the SHA-256 may be unknown.
        """
        check_model_name(name)
        new = StoredFile(0, length, sha256)
        folder = self._uploads / name
        with self._changing():
            if (self.root / name).exists():
                raise ConflictError(f"model {name} exists: delete it first, or use another name")
            manifest = None
            with suppress(*_ABSENT):
                manifest = Manifest.read(folder)
            if manifest is not None and manifest.sealed:
                old = manifest.files.get(file)
                if (
                    old is None
                    or length not in (None, old.length)
                    or sha256 not in (None, old.sha256)
                ):
                    raise ConflictError(
                        f"the upload of model {name} has no such file {shown(file)}, or another "
                        "length or SHA-256 of it: delete the upload first"
                    )
                new = StoredFile(0, old.length, old.sha256)
            others = self._sizes(folder, manifest) if manifest else {}
            files = others | {file: new}
            check_files(files)
            if manifest is None:
                self._expire()
            self._require_space(name, files)
            if manifest is None:
                self._create(name, Manifest(files=files))
            else:
                (folder / file).unlink(missing_ok=True)
                manifest.files[file] = new
                manifest.write(folder)
                (folder / file).touch()
            return new

    def drop(self, name: str) -> None:
        """Delete a model, or its upload.

        Raises
        ------
        NotFoundError
            The store has neither.
        """
        check_model_name(name)
        dropped = self._temporary()
        with self._changing():
            for folder in (self.root / name, self._uploads / name):
                if folder.is_symlink():
                    folder.unlink()
                    return
                if folder.is_dir():
                    folder.rename(dropped)  # a crash while files are deleted leaves no half model
                    break
            else:
                raise NotFoundError(f"model {name} does not exist")
        shutil.rmtree(dropped, ignore_errors=True)

    def drop_file(self, name: str, file: str) -> None:
        """Delete one file of an upload; after `begin`, the upload needs it again from its start.

        Raises
        ------
        NotFoundError
            There is no such upload.
        """
        with self._changing():
            folder, manifest, old = self._uploading(name, file)
            if manifest.sealed:
                manifest.files[file] = StoredFile(0, old.length, old.sha256)
            else:
                del manifest.files[file]
            (folder / file).unlink(missing_ok=True)
            manifest.write(folder)

    # Appending

    def append(self, name: str, file: str, offset: int, data: bytes) -> int:
        """Append bytes to a file of an upload, and return its new offset.

        The bytes are on the disk after `flush`.

        Raises
        ------
        NotFoundError
            There is no such upload.
        WrongOffsetError
            The file has another number of bytes than `offset`; nothing is appended.
        LengthError, TooLargeError
            The file would be longer than its length, or the model than the limit.
        StorageError
            The disk is full; the store may have a part of the bytes.
        """
        with self._changing():
            folder, manifest, old = self._uploading(name, file)
            if old.offset != offset:
                raise WrongOffsetError(offset, old.offset)
            end = offset + len(data)
            if old.length is None:
                sizes = self._sizes(folder, manifest)
                self._require_limit(name, sizes | {file: replace(old, offset=end)})
            elif end > old.length:
                raise LengthError(
                    f"file {file} has {old.length} bytes, and the request ends at {end}: check "
                    "the file"
                )
            descriptor = os.open(folder / file, _APPEND, 0o664)
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            finally:
                os.close(descriptor)
            return end

    def set_length(self, name: str, file: str, length: int) -> None:
        """Set the length of a file that began without one.

        Raises
        ------
        NotFoundError
            There is no such upload.
        LengthError
            The file has another length, or more bytes.
        TooLargeError, DiskFullError
            See `begin`.
        """
        with self._changing():
            folder, manifest, old = self._uploading(name, file)
            if old.length == length:
                return
            if old.length is not None or length < old.offset:
                raise LengthError(
                    f"the length of file {file} is {length}, expected "
                    f"{old.length if old.length is not None else f'at least {old.offset}'}"
                )
            sizes = self._sizes(folder, manifest)
            self._require_space(name, sizes | {file: replace(old, length=length)})
            manifest.files[file] = StoredFile(0, length, old.sha256)
            manifest.write(folder)

    def flush(self, name: str, file: str) -> StoredFile:
        """Flush the bytes of a file to the disk, and return its state.

        Raises
        ------
        NotFoundError
            Neither a model nor an upload has this file.
        """
        with suppress(*_ABSENT):
            with self._changing():
                folder, _, found = self._uploading(name, file)
                descriptor = os.open(folder / file, _APPEND, 0o664)
            with _storage_errors(self.root):  # without the lock: it can take seconds
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            return found
        found_files = self.model(name).files
        if file not in found_files:
            raise NotFoundError(f"model {name} has no file {shown(file)}")
        return found_files[file]

    # Checking and publishing

    def verify(self, name: str, file: str) -> None:
        """Compare a complete file with its SHA-256; delete the bytes of one that differs.

        Raises
        ------
        NotFoundError
            There is no such upload.
        IntegrityError
            It differs.
        """
        with self._changing():
            folder, manifest, found = self._uploading(name, file)
        if found.verified:
            return
        with _storage_errors(folder), open(folder / file, "rb") as opened:
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        with self._changing():
            folder, current, found = self._uploading(name, file)
            if current.id != manifest.id or not found.complete:
                raise NotFoundError(f"the upload of {name} was deleted during its check")
            if found.sha256 in (None, sha256):
                current.files[file] = StoredFile(0, found.length, sha256, verified=True)
                current.write(folder)
                return
            os.truncate(folder / file, 0)
        raise IntegrityError(
            f"file {file} has SHA-256 {sha256}, expected {found.sha256}: upload it again"
        )

    def publish(self, name: str) -> Path:
        """Check a complete upload, and make it a model by one rename; return `path`.

        Raises
        ------
        NotFoundError
            There is neither a model nor an upload of this name.
        ConflictError
            A file is not complete.
        IntegrityError
            A file has another SHA-256; its bytes are deleted.
        DataError
            The model is invalid; the upload stays, with the error.
        """
        folder = self._uploads / name
        with self._changing():
            found = self.model(name)
            if found.ready:
                return self.path(name)
            if not found.complete:
                missing = [x for x, file in found.files.items() if not file.complete]
                raise ConflictError(
                    f"the upload of {name} is not complete ({', '.join(missing) or 'no file'}): "
                    "send the rest first"
                )
            manifest = Manifest.read(folder)
            manifest.sealed = True
            manifest.write(folder)
        for file in manifest.files:
            self.verify(name, file)
        try:
            model = find_model(folder)
            self._check(folder / model)
        except GptxError as error:
            text = error.message.replace(f"{folder}{os.sep}", "").replace(str(folder), name)
            self._finish(name, manifest, error=text)
            raise type(error)(text) from error
        self._finish(name, manifest, model=model)
        return self.path(name)

    def _finish(
        self, name: str, manifest: Manifest, *, model: str | None = None, error: str | None = None
    ) -> None:
        """Publish the upload of a manifest, or store its error, unless it was deleted."""
        folder = self._uploads / name
        with self._changing(), suppress(*_ABSENT):
            current = Manifest.read(folder)
            if current.id != manifest.id:
                return
            current.model, current.error = model, error
            current.write(folder)
            if model is not None:
                os.rename(folder, self.root / name)
                _sync_folder(self.root)

    # Parts of the methods above, under the lock

    def _uploading(self, name: str, file: str) -> tuple[Path, Manifest, StoredFile]:
        """Return the folder of an upload, its manifest, and one of its files."""
        check_model_name(name)
        folder = self._uploads / name
        with suppress(*_ABSENT):
            manifest = Manifest.read(folder)
            if file in manifest.files:
                return folder, manifest, self._sizes(folder, manifest)[file]
        raise NotFoundError(f"there is no upload of file {shown(file)} of model {name}")

    def _sizes(self, folder: Path, manifest: Manifest) -> dict[str, StoredFile]:
        """Return the files of a manifest with their offsets."""
        return {x: replace(y, offset=_size(folder / x)) for x, y in manifest.files.items()}

    def _describe(self, folder: Path) -> StoredModel:
        """Return the model or the upload in a folder; FileNotFoundError if there is none."""
        ready = folder.parent == self.root
        if ready and folder.is_dir() and not (folder / MANIFEST).is_file():  # copied by hand
            sizes = {path.name: path.stat().st_size for path in regular_files(folder)}
            files = {x: StoredFile(size, size) for x, size in sizes.items()}
            return StoredModel(folder.name, True, files)
        manifest = Manifest.read(folder)
        files = self._sizes(folder, manifest)
        return StoredModel(folder.name, ready, files, manifest.sealed, manifest.error)

    def _create(self, name: str, manifest: Manifest) -> None:
        """Create the folder of an upload, with its manifest and empty files, atomically."""
        for path in (*self.root.iterdir(), *self._uploads.iterdir()):
            if path.name.lower() == name.lower():  # one folder, where case is ignored
                raise ConflictError(f"model {name} exists as {path.name}: use another name")
        temporary = self._temporary()
        temporary.mkdir()
        manifest.write(temporary)
        for file in manifest.files:
            (temporary / file).touch()
        temporary.rename(self._uploads / name)
        _sync_folder(self._uploads)

    def _expire(self) -> None:
        """Delete the incomplete uploads that have got no byte for too long."""
        oldest = time.time() - self._upload_seconds
        for folder in self._uploads.iterdir():
            if not is_model_name(folder.name):
                continue
            with suppress(*_ABSENT):
                is_complete = self._describe(folder).complete
                last_change = max(path.stat().st_mtime for path in folder.iterdir())
                if not is_complete and last_change < oldest:
                    dropped = self._temporary()
                    folder.rename(dropped)
                    shutil.rmtree(dropped, ignore_errors=True)

    def _temporary(self) -> Path:
        return self._uploads / f"{_TEMPORARY}{os.urandom(6).hex()}"

    def _require_limit(self, name: str, files: dict[str, StoredFile]) -> None:
        length = sum(max(file.length or 0, file.offset) for file in files.values())
        if length > self.max_bytes:
            raise TooLargeError(
                f"model {name} has {length} bytes, expected at most {self.max_bytes}"
            )

    def _require_space(self, name: str, files: dict[str, StoredFile]) -> None:
        self._require_limit(name, files)
        rest = sum(max((file.length or 0) - file.offset, 0) for file in files.values())
        free = shutil.disk_usage(self.root).free
        if rest > free:
            raise DiskFullError(
                f"the upload of {name} needs {rest} bytes, and the disk has {free}: delete models"
            )

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock of the store; translate errors of the disk."""
        with _storage_errors(self.root), lock(self._uploads / _LOCK):
            yield


def _same_model(found: StoredModel, wanted: dict[str, StoredFile]) -> StoredModel:
    """Return a model or an upload; ConflictError if it has other files than `wanted`."""
    files = {x: StoredFile(0, file.length, file.sha256) for x, file in found.files.items()}
    if not found.sealed or files != wanted:
        kind = "model" if found.ready else "an upload of model"
        raise ConflictError(
            f"{kind} {found.name} exists, with other files: delete it first, or use another name"
        )
    return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    """Translate errors of the disk."""
    try:
        yield
    except OSError as error:
        if isinstance(error, GptxError):
            raise
        full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
        kind = DiskFullError if full else StorageError
        reason = error.strerror or str(error)
        raise kind(f"the store {path.name} cannot be written ({reason})") from error
