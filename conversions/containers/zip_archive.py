"""Zip archives whose files are stored as they are, and so can be read at their places.

The layout is that of APPNOTE.TXT 6.3 (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT),
sections 4.3 and 4.5.3: the files, each behind a header; the directory; and at the very end where it
is, in 64 bits if need be. An archive with anything else (compression, encryption, a comment,
several disks) is refused, and so is one that has been cut or added to.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from gptx.conversions.containers.binary import BinaryFile
from gptx.errors import WeightsError

MAX_DIRECTORY = 2**22  # bytes: some forty thousand files

HEADER = struct.Struct("<4s5H3I2H")
ENTRY = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
LOCATOR_64 = struct.Struct("<4sIQI")
END_64 = struct.Struct("<4sQ2H2I4Q")

FULL = 2**32 - 1  # the number is in 64 bits elsewhere
ENCRYPTED = 1  # of an entry's flags


@dataclass(frozen=True, slots=True)
class Record:
    """A file in the archive.

    Attributes
    ----------
    name
        Its path there.
    header
        Where its header is; its bytes follow that.
    n_bytes
        Their number.
    crc
        Their CRC-32; 0 if it was not computed.
    """

    name: str
    header: int
    n_bytes: int
    crc: int

    def start(self, file: BinaryFile) -> int:
        """Where its bytes begin.

        Raises
        ------
        WeightsError
            There is no such file where the directory says, or it does not fit there.
        """
        mark, *_, n_name, n_extra = HEADER.unpack(file.read(self.header, HEADER.size, self.name))
        name = file.read(self.header + HEADER.size, n_name, self.name)
        start: int = self.header + HEADER.size + n_name + n_extra
        if mark != b"PK\3\4" or name != self.name.encode() or start + self.n_bytes > file.size:
            raise _damaged(file, f"{self.name} is not where its directory says")
        return start


def records(file: BinaryFile) -> dict[str, Record]:
    """The files of an archive, by name.

    Raises
    ------
    WeightsError
        It is damaged, or no archive of stored files.
    """
    begin, n_bytes, count = _directory(file)
    if n_bytes > MAX_DIRECTORY:
        raise _damaged(file, f"its directory has more than {MAX_DIRECTORY} bytes")
    data = file.read(begin, n_bytes, "the directory")
    found: dict[str, Record] = {}
    at = 0
    while at < len(data):
        if len(data) - at < ENTRY.size:
            raise _damaged(file, "its directory breaks off")
        fields = ENTRY.unpack_from(data, at)
        mark, _, _, flags, method, _, _, crc, packed, size = fields[:10]
        n_name, n_extra, n_comment, disk, _, _, header = fields[10:]
        at += ENTRY.size
        name = data[at : at + n_name]
        extra = data[at + n_name : at + n_name + n_extra]
        at += n_name + n_extra + n_comment
        if mark != b"PK\1\2" or at > len(data) or disk or not _is_plain(name):
            raise _damaged(file, "its directory makes no sense")
        if flags & ENCRYPTED or method:
            raise _damaged(file, f"{name.decode()} is compressed or encrypted")
        size, packed, header = _in_64_bits([size, packed, header], extra)
        if size != packed or name.decode() in found:
            raise _damaged(file, f"its directory contradicts itself about {name.decode()}")
        found[name.decode()] = Record(name.decode(), header, size, crc)
    if len(found) != count:
        raise _damaged(file, f"its directory has {len(found)} files, not {count}")
    return found


def _directory(file: BinaryFile) -> tuple[int, int, int]:
    """Where the directory begins, its bytes, and how many files it lists."""
    at = file.size - END.size
    mark, disk, first, here, count, n_bytes, begin, n_comment = END.unpack(
        file.read(at, END.size, "the end of the archive")
    )
    if mark != b"PK\5\6" or n_comment:
        raise _damaged(file, "it does not end as an archive does")
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
                raise _damaged(file, "it does not end as an archive does")
    if disk or first or here != count or begin + n_bytes != at:
        raise _damaged(file, "its directory is not where its end says")
    return begin, n_bytes, count


def _is_plain(name: bytes) -> bool:
    return name.isascii() and name.decode("ascii").isprintable() and len(name) <= 500


def _in_64_bits(numbers: list[int], extra: bytes) -> list[int]:
    """Those numbers that are full, from the extra field that holds them (4.5.3)."""
    at = 0
    while at + 4 <= len(extra):
        kind, n_bytes = struct.unpack_from("<2H", extra, at)
        at += 4
        if kind == 1:
            count = min(n_bytes, len(extra) - at) // 8
            wide = iter(struct.unpack_from(f"<{count}Q", extra, at))
            return [next(wide, FULL) if number == FULL else number for number in numbers]
        at += n_bytes
    return numbers


def _damaged(file: BinaryFile, why: str) -> WeightsError:
    return WeightsError(f"{file.path} is damaged or no archive that PyTorch writes ({why})")
