"""Files of token ids: those of nanoGPT, llm.c and staticgrad.

All have ids of 16 bits, little endian. llm.c's begin with a header of 1,024 bytes; those of nanoGPT
and staticgrad have none. Sources: karpathy/nanoGPT `data/*/prepare.py`, karpathy/llm.c
`dev/data/data_common.py`.
"""

from __future__ import annotations

import glob
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gptx.conversions.containers.binary import BinaryFile
from gptx.errors import (
    DataError,
    NotFoundError,
    ParameterError,
    StorageError,
    TokenizerError,
    argument,
)
from gptx.files import create

Array = np.ndarray

MAX_VOCABULARY = 2**16  # ids have 16 bits
HEADER_BYTES = 1024  # 256 numbers of 32 bits: magic, version, number of tokens, zeros
LLM_C_MAGIC, LLM_C_VERSION = 20240520, 1
MAX_LLM_C_TOKENS = 2**31 - 1  # in one file: its header has a signed number
# Other files of llm.c, which have the same suffix.
OTHER_MAGICS = {
    20240326: "a model of llm.c",
    20240327: "a debug state of llm.c",
    20240328: "a tokenizer of llm.c",
    20240522: "an evaluation of llm.c (HellaSwag, MMLU)",
    20240527: "an optimizer state of llm.c",
    20240801: "a token file of llm.c's Llama 3 with ids of 32 bits",
}
CHUNK_TOKENS = 2**20  # read at a time
PROBE_BYTES = 4096  # in which text differs from token ids


@dataclass(frozen=True)
class TokenFile:
    """One file of token ids.

    Attributes
    ----------
    path
        Path of the file.
    offset
        Position of the first id, in bytes.
    n_tokens
        Number of ids.
    """

    path: Path
    offset: int
    n_tokens: int


def open_token_file(path: Path) -> TokenFile:
    """Open a file of token ids, and find out whether it has a header.

    Raises
    ------
    DataError
        The file has no token ids of 16 bits, or is truncated.
    StorageError
        The file cannot be read.
    """
    file = BinaryFile(path)
    start = file.read(0, min(file.size, PROBE_BYTES), "the first bytes")
    header = np.frombuffer(start[: len(start) // 4 * 4], "<i4")
    magic = int(header[0]) if len(header) else 0
    if magic in OTHER_MAGICS:
        raise DataError(
            f"{path} is {OTHER_MAGICS[magic]}, expected token ids of 16 bits: make them with "
            "`gptx prepare`"
        )
    if magic == LLM_C_MAGIC:
        return _llm_c_file(file, header)
    if _is_text(start):
        raise DataError(
            f"{path} is a text, expected token ids of 16 bits: make them with `gptx prepare`"
        )
    if file.size % 2:
        raise DataError(
            f"{path} has {file.size} bytes, expected ids of two bytes: make it again with "
            "`gptx prepare`"
        )
    return TokenFile(path, 0, file.size // 2)


def _llm_c_file(file: BinaryFile, header: Array) -> TokenFile:
    if file.size < HEADER_BYTES:
        raise DataError(f"{file.path} is truncated: expected a header of {HEADER_BYTES} bytes")
    if header[1] != LLM_C_VERSION:
        raise DataError(
            f"{file.path} has version {header[1]} of llm.c's data, expected {LLM_C_VERSION}"
        )
    n_tokens = int(header[2])
    if n_tokens < 0 or file.size != HEADER_BYTES + 2 * n_tokens:
        raise DataError(
            f"{file.path} has {file.size} bytes, expected {HEADER_BYTES + 2 * n_tokens} for the "
            f"{n_tokens} tokens of its header: it is truncated or damaged"
        )
    return TokenFile(file.path, HEADER_BYTES, n_tokens)


def _is_text(start: bytes) -> bool:
    """Test for text in UTF-8. Token ids below 256 have a byte 0, and a text has none."""
    if len(start) < 16 or b"\0" in start:
        return False
    try:
        start.decode()
    except UnicodeDecodeError as error:
        return error.start >= len(start) - 3  # an incomplete character at the end
    return True


class TokenFiles:
    """The files of one split of a corpus as one sequence of token ids.

    Parameters
    ----------
    files
        Files in their order.

    Attributes
    ----------
    n_tokens
        Number of all ids.
    """

    def __init__(self, files: Sequence[TokenFile]) -> None:
        self.files = tuple(files)
        ends = np.cumsum([file.n_tokens for file in self.files])
        self._ends = ends
        self.n_tokens = int(ends[-1])

    @classmethod
    def open(cls, paths: Sequence[Path]) -> TokenFiles:
        """Open files of token ids; see `open_token_file` for the errors."""
        return cls([open_token_file(path) for path in paths])

    @property
    def name(self) -> str:
        """The path of the file, or that of the first one and the number of the others."""
        others = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{self.files[0].path}{others}"

    def split(self, n: int) -> tuple[TokenFiles, TokenFiles]:
        """Return the first `n` ids and the others; `n` is at least 1 and below `n_tokens`."""
        first: list[TokenFile] = []
        rest: list[TokenFile] = []
        for file in self.files:
            size = min(n, file.n_tokens)
            n -= size
            if size:
                first.append(TokenFile(file.path, file.offset, size))
            if size < file.n_tokens:
                rest.append(TokenFile(file.path, file.offset + 2 * size, file.n_tokens - size))
        return TokenFiles(first), TokenFiles(rest)

    def read(self, first: int, n: int) -> Array:
        """Read `n` ids from the position `first`: [n], uint16; see `windows`."""
        return self.windows([first], n)[0]

    def windows(self, firsts: Sequence[int], n: int) -> Array:
        """Read `n` ids from each of some positions: [positions, n], uint16.

        A window can span several files. Each call opens the files again and reads. A mapping would
        keep in memory all pages that were read.

        Raises
        ------
        StorageError, DataError
            A file cannot be read, or has become shorter.
        """
        rows = np.empty((len(firsts), n), "<u2")
        opened: _OpenFile | None = None
        try:
            for row in sorted(range(len(firsts)), key=firsts.__getitem__):
                done = 0
                while done < n:
                    first = firsts[row] + done
                    index = int(np.searchsorted(self._ends, first, side="right"))
                    if opened is None or opened.file is not self.files[index]:
                        if opened is not None:
                            opened.close()
                        opened = _OpenFile(self.files[index])
                    part = rows[row, done : done + int(self._ends[index]) - first]
                    opened.read(first - int(self._ends[index]) + opened.file.n_tokens, part)
                    done += len(part)
        finally:
            if opened is not None:
                opened.close()
        return rows

    def checksum(self) -> int:
        """Return the CRC-32 of the first and of the last `CHUNK_TOKENS` ids."""
        n = min(CHUNK_TOKENS, self.n_tokens)
        first, last = self.read(0, n), self.read(self.n_tokens - n, n)
        return zlib.crc32(last.tobytes(), zlib.crc32(first.tobytes()))

    def check_ids(self, vocab_size: int) -> None:
        """Check that all ids are below the size of a vocabulary.

        Raises
        ------
        DataError
            The first id that is not.
        """
        if vocab_size >= MAX_VOCABULARY:
            return
        for first in range(0, self.n_tokens, CHUNK_TOKENS):
            ids = self.read(first, min(CHUNK_TOKENS, self.n_tokens - first))
            if ids.max() >= vocab_size:
                at = int(np.argmax(ids >= vocab_size))
                raise DataError(
                    f"{self.name} has the token id {ids[at]} at position {first + at}, and the "
                    f"model has {vocab_size} tokens: prepare the text with the tokenizer of the "
                    "model, or train a model with the vocabulary of the data"
                )


class _OpenFile:
    """A file of token ids that is open for reading."""

    def __init__(self, file: TokenFile) -> None:
        self.file = file
        try:
            self._opened = open(file.path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._unreadable(error) from error

    def read(self, first: int, out: Array) -> None:
        """Fill an array of ids from the position `first`."""
        try:
            self._opened.seek(self.file.offset + 2 * first)
            n_bytes = self._opened.readinto(out.view(np.uint8).data)
        except OSError as error:
            raise self._unreadable(error) from error
        if n_bytes != out.nbytes:
            raise DataError(
                f"{self.file.path} has become shorter than its {self.file.n_tokens} tokens: "
                "prepare it again"
            )

    def close(self) -> None:
        self._opened.close()

    def _unreadable(self, error: OSError) -> StorageError:
        return StorageError(f"{self.file.path} cannot be read ({error.strerror or error})")


def find_files(pattern: str) -> list[Path]:
    """Return the file of a name, or the sorted files of a pattern such as `train_*.bin`.

    Raises
    ------
    NotFoundError
        There is none.
    """
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    found = sorted(Path(name) for name in glob.glob(str(path)) if Path(name).is_file())
    if not found:
        raise NotFoundError(f"{pattern} does not exist, expected a file of token ids")
    return found


class TokenWriter:
    """A writer of one split of a corpus: a file, or shards of equal size.

    Parameters
    ----------
    folder, name
        The file is `folder/name.bin`, shards are `folder/name_000000.bin` and so on.
    header
        Begin each file with llm.c's header.
    shard_tokens
        Number of ids of a shard; None for one file.

    Attributes
    ----------
    n_tokens
        Number of ids that were written.
    """

    def __init__(
        self, folder: Path, name: str, *, header: bool = False, shard_tokens: int | None = None
    ) -> None:
        self.n_tokens = 0
        self._folder, self._name = folder, name
        self._header = header
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        self._n_in_file = 0
        self._n_files = 0

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Complete the header of the last file, and close it."""
        self._close(complete=error is None)

    def write(self, ids: Array) -> None:
        """Append ids [n] of any integer type.

        Raises
        ------
        ParameterError
            llm.c's header cannot hold the number of tokens.
        TokenizerError
            An id has more than 16 bits.
        """
        if len(ids) and ids.max() >= MAX_VOCABULARY:
            raise TokenizerError(
                f"the tokenizer has the token id {ids.max()}, and token files have ids of 16 bits: "
                "give another tokenizer, as that of GPT-2"
            )
        while len(ids):
            if self._file is None:
                self._open()
            assert self._file is not None
            part = ids[: self._room()]
            self._file.write(part.astype("<u2").data)
            self._n_in_file += len(part)
            self.n_tokens += len(part)
            ids = ids[len(part) :]
            if self._n_in_file == self._shard_tokens:
                self._close()

    def _room(self) -> int | None:
        """Return the number of ids that the file can still hold; None if any number."""
        if self._shard_tokens is not None:
            return self._shard_tokens - self._n_in_file
        if self._header and self._n_in_file == MAX_LLM_C_TOKENS:
            raise ParameterError(
                f"the text has more than {MAX_LLM_C_TOKENS} tokens, the maximum of a file of "
                f"llm.c: write several files with {argument('shard_tokens', 100_000_000)}"
            )
        return MAX_LLM_C_TOKENS - self._n_in_file if self._header else None

    def _open(self) -> None:
        number = "" if self._shard_tokens is None else f"_{self._n_files:06d}"
        self._file = create(self._folder / f"{self._name}{number}.bin")
        self._n_files, self._n_in_file = self._n_files + 1, 0
        if self._header:
            self._file.write(bytes(HEADER_BYTES))

    def _close(self, *, complete: bool = True) -> None:
        if self._file is None:
            return
        with self._file as file:
            if self._header and complete:
                file.seek(0)
                numbers = [LLM_C_MAGIC, LLM_C_VERSION, self._n_in_file]
                file.write(np.array(numbers, "<i4").tobytes())
        self._file = None
