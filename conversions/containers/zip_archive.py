"""Zip archives of stored (not compressed) files, which can be read in place.

The layout is that of APPNOTE.TXT 6.3 (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT),
sections 4.3 and 4.5.3: the files, each after a header; the directory; and an end record with the
position of the directory, with 64-bit numbers if necessary. An archive with a comment or several
disks is not supported. Missing or additional bytes are an error.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from gptx.conversions.containers.binary import BinaryFile
from gptx.errors import WeightsError

MAX_DIRECTORY_BYTES = 2**22  # about 40,000 files
MAX_NAME_BYTES = 500

HEADER = struct.Struct("<4s5H3I2H")
ENTRY = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
LOCATOR_64 = struct.Struct("<4sIQI")
END_64 = struct.Struct("<4sQ2H2I4Q")

SEE_EXTRA_FIELD = 2**32 - 1  # the value is a 64-bit number in the extra field
ENCRYPTED = 1  # flag of an entry


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """A file in the archive.

    Attributes
    ----------
    name
        Its path in the archive.
    header
        Position of its header, which comes before its bytes.
    n_bytes
        Its size in bytes.
    crc
        Its CRC-32; 0 if the archive has none.
    is_stored
        False if it is compressed or encrypted. Then it cannot be read.
    """

    name: str
    header: int
    n_bytes: int
    crc: int
    is_stored: bool = True

    def start(self, file: BinaryFile) -> int:
        """Return the position of its first byte.

        Raises
        ------
        WeightsError
            It is not stored, or the directory has another position or size than the header.
        """
        if not self.is_stored:
            raise _damaged(file, f"{self.name} is compressed or encrypted: not supported")
        mark, *_, n_name, n_extra = HEADER.unpack(file.read(self.header, HEADER.size, self.name))
        name = file.read(self.header + HEADER.size, n_name, self.name)
        start: int = self.header + HEADER.size + n_name + n_extra
        if mark != b"PK\3\4" or name != self.name.encode() or start + self.n_bytes > file.size:
            raise _damaged(file, f"{self.name} is not at the position in its directory")
        return start


def zip_entries(file: BinaryFile) -> dict[str, ZipEntry]:
    """Read the directory of an archive: name -> file.

    Raises
    ------
    WeightsError
        The file is damaged, or not an archive.
    """
    begin, n_bytes, count = _directory(file)
    if n_bytes > MAX_DIRECTORY_BYTES:
        raise _damaged(
            file, f"its directory has {n_bytes} bytes, expected at most {MAX_DIRECTORY_BYTES}"
        )
    data = file.read(begin, n_bytes, "the directory")
    found: dict[str, ZipEntry] = {}
    at = 0
    while at < len(data):
        if len(data) - at < ENTRY.size:
            raise _damaged(file, "its directory is truncated")
        fields = ENTRY.unpack_from(data, at)
        mark, _, _, flags, method, _, _, crc, packed, size = fields[:10]
        n_name, n_extra, n_comment, disk, _, _, header = fields[10:]
        at += ENTRY.size
        name = data[at : at + n_name]
        extra = data[at + n_name : at + n_name + n_extra]
        at += n_name + n_extra + n_comment
        if mark != b"PK\1\2" or at > len(data) or disk or not _is_plain(name):
            raise _damaged(file, "its directory is invalid")
        is_stored = not (flags & ENCRYPTED or method)
        size, packed, header = _from_extra_field([size, packed, header], extra)
        if (is_stored and size != packed) or name.decode() in found:
            raise _damaged(file, f"its directory has a duplicate or invalid entry {name.decode()}")
        found[name.decode()] = ZipEntry(name.decode(), header, size, crc, is_stored)
    if len(found) != count:
        raise _damaged(file, f"its directory has {len(found)} files, expected {count}")
    return found


def _directory(file: BinaryFile) -> tuple[int, int, int]:
    """Return the position of the directory, its size in bytes, and the number of its files."""
    at = file.size - END.size
    mark, disk, first, here, count, n_bytes, begin, n_comment = END.unpack(
        file.read(at, END.size, "the end of the archive")
    )
    if mark != b"PK\5\6" or n_comment:
        raise _damaged(file, "its end record is invalid")
    if at >= LOCATOR_64.size:
        mark, _, end_64, _ = LOCATOR_64.unpack(
            file.read(at - LOCATOR_64.size, LOCATOR_64.size, "the end of the archive")
        )
        if mark == b"PK\6\7":
            at = end_64
            mark, _, _, _, disk, first, here, count, n_bytes, begin = END_64.unpack(
                file.read(at, END_64.size, "the end of the archive")
            )
            if mark != b"PK\6\6" or at + END_64.size + LOCATOR_64.size + END.size != file.size:
                raise _damaged(file, "its end record is invalid")
    if disk or first or here != count or begin + n_bytes != at:
        raise _damaged(file, "its directory is not at the position in its end record")
    return begin, n_bytes, count


def _is_plain(name: bytes) -> bool:
    return name.isascii() and name.decode("ascii").isprintable() and len(name) <= MAX_NAME_BYTES


def _from_extra_field(numbers: list[int], extra: bytes) -> list[int]:
    """Replace each number that is `SEE_EXTRA_FIELD` by the one of the extra field (4.5.3)."""
    at = 0
    while at + 4 <= len(extra):
        kind, n_bytes = struct.unpack_from("<2H", extra, at)
        at += 4
        if kind == 1:
            count = min(n_bytes, len(extra) - at) // 8
            wide = iter(struct.unpack_from(f"<{count}Q", extra, at))
            return [
                next(wide, SEE_EXTRA_FIELD) if number == SEE_EXTRA_FIELD else number
                for number in numbers
            ]
        at += n_bytes
    return numbers


def _damaged(file: BinaryFile, why: str) -> WeightsError:
    return WeightsError(f"{file.path} is damaged or not an archive of PyTorch ({why})")
