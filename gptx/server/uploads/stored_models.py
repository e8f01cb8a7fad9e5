"""Models of a store: their files, the record beside them, valid names, and errors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gptx.errors import IntegrityError, ParameterError, StorageError, shown
from gptx.files import atomic_write

MANIFEST = ".manifest.json"
MAX_FILES = 256  # of one model

# ASCII without separators: no traversal, no absolute path, and one spelling in every file system.
_MODEL_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?")
_FILE_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.+=@-]{0,126}[A-Za-z0-9_+=@-])?")
# Source: "Naming Files, Paths, and Namespaces" of Windows.
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ConflictError(ParameterError):
    """The request contradicts the state of the model or of its upload."""


class WrongOffsetError(ConflictError):
    """An append begins elsewhere than at the end of the file.

    Attributes
    ----------
    given : int
        Offset of the append.
    offset : int
        Number of bytes that the store has.
    """

    def __init__(self, given: int, offset: int) -> None:
        super().__init__(f"offset is {given}, expected {offset}: append there")
        self.given, self.offset = given, offset


class LengthError(ParameterError):
    """Bytes beyond the length of a file, or a second length that differs from the first."""


class ChecksumError(IntegrityError):
    """The content of one request differs from its checksum."""


class TooLargeError(ParameterError):
    """A model is larger than the limit of the store."""


class DiskFullError(StorageError):
    """The disk of the store has too little space."""


@dataclass(frozen=True)
class StoredFile:
    """A file of a model or of its upload.

    Attributes
    ----------
    offset
        Number of bytes that the store has.
    length
        Number of bytes of the whole file; None if unknown.
    sha256
        SHA-256 of the whole file, in hexadecimal; None if unknown.
    verified
        True if the bytes have been compared with `sha256`.
    """

    offset: int = 0
    length: int | None = None
    sha256: str | None = None
    verified: bool = False

    @property
    def complete(self) -> bool:
        """True if every byte is there."""
        return self.offset == self.length


@dataclass(frozen=True)
class StoredModel:
    """A model or its upload.

    Attributes
    ----------
    name
        Name of the model.
    ready
        True if it is published.
    files
        Name -> file.
    sealed
        True if the model has these files and no others.
    error
        The reason why the check refused it; None otherwise.
    """

    name: str
    ready: bool
    files: dict[str, StoredFile]
    sealed: bool = True
    error: str | None = None

    @property
    def complete(self) -> bool:
        """True if every byte of every file is there."""
        return bool(self.files) and all(file.complete for file in self.files.values())

    @property
    def offset(self) -> int:
        """Number of bytes that the store has."""
        return sum(file.offset for file in self.files.values())

    @property
    def length(self) -> int | None:
        """Number of bytes of all files; None if unknown."""
        lengths = [file.length for file in self.files.values()]
        return sum(x for x in lengths if x is not None) if self.sealed and lengths else None


@dataclass
class Manifest:
    """The record beside the files of a model or of its upload.

    Attributes
    ----------
    id
        Random name of the upload, so that a check does not publish a later one.
    files
        Name -> length, SHA-256, and the result of the comparison; the offset is not stored.
    sealed, error
        See `StoredModel`.
    model
        The file to load; "." for the folder. None before the check.
    """

    id: str = field(default_factory=lambda: os.urandom(8).hex())
    files: dict[str, StoredFile] = field(default_factory=dict)
    sealed: bool = False
    error: str | None = None
    model: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        found = json.loads((folder / MANIFEST).read_bytes())
        files = {name: StoredFile(**file) for name, file in found.pop("files").items()}
        return cls(files=files, **found)

    def write(self, folder: Path) -> None:
        atomic_write(folder / MANIFEST, json.dumps(asdict(self), indent=1).encode())


def is_model_name(name: str) -> bool:
    """Test for a name that a model can have in a store."""
    return bool(_MODEL_NAME.fullmatch(name)) and not _DEVICE.fullmatch(name)


def check_model_name(name: str) -> None:
    """Raise ParameterError for a name that a model cannot have in a store."""
    if not is_model_name(name):
        raise ParameterError(
            f"the name of the model is {shown(name)}, expected at most 96 letters, digits, dots, "
            "dashes and underscores, with a letter or a digit first: use another name"
        )


def check_file_name(name: str) -> None:
    """Raise ParameterError for a name that a file of a model cannot have in a store."""
    if not _FILE_NAME.fullmatch(name) or _DEVICE.fullmatch(name):
        raise ParameterError(
            f"the name of the file is {shown(name)}, expected at most 128 letters, digits and "
            "_.+=@-, without a folder and without a dot at its ends: rename it"
        )


def check_files(files: Mapping[str, StoredFile]) -> None:
    """Raise ParameterError for files that no upload can have: names, number, lengths, SHA-256."""
    if not 1 <= len(files) <= MAX_FILES:
        raise ParameterError(f"a model has {len(files)} files, expected 1 to {MAX_FILES}")
    spellings: dict[str, str] = {}
    for name, file in files.items():
        check_file_name(name)
        other = spellings.setdefault(name.lower(), name)
        if other != name:
            raise ParameterError(f"files {other} and {name} differ in case only: rename one")
        if file.length is not None and file.length < 0:
            raise ParameterError(f"file {name} has length {file.length}, expected at least 0")
        if file.sha256 is not None and not _SHA256.fullmatch(file.sha256):
            raise ParameterError(
                f"file {name} has SHA-256 {shown(file.sha256)}, expected 64 hexadecimal digits"
            )
