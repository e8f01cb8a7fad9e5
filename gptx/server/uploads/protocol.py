"""Header fields of resumable uploads: those of the IETF draft, and those of tus 1.0.

Sources: draft-ietf-httpbis-resumable-upload; RFC 9530 (digests); RFC 9651 (structured fields);
https://tus.io/protocols/resumable-upload. Both protocols have the names Upload-Offset and
Upload-Length in common.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Mapping
from email.message import Message
from typing import Any, NamedTuple

from gptx.errors import ParameterError, shown
from gptx.server.uploads.stored_models import LengthError

PARTIAL_UPLOAD = "application/partial-upload"
TUS_CONTENT = "application/offset+octet-stream"
TUS_VERSION = "1.0.0"

_INTEGER = re.compile(r"\s*(\d{1,15})\s*(?:;.*)?")  # of RFC 9651, not negative
_BOOLEAN = re.compile(r"\s*\?([01])\s*(?:;.*)?")
_SHA256_MEMBER = re.compile(r"(?:^|,)\s*sha-256\s*=\s*:([A-Za-z0-9+/=]*):")
_ALGORITHMS: dict[str, Callable[[], Any]] = {
    "md5": lambda: hashlib.md5(usedforsecurity=False),
    "sha1": lambda: hashlib.sha1(usedforsecurity=False),
    "sha256": hashlib.sha256,
}
CHECKSUM_ALGORITHMS = ",".join(_ALGORITHMS)


class Checksum(NamedTuple):
    """A checksum of the content of one request.

    Attributes
    ----------
    hasher
        A new object of `hashlib`.
    digest
        The expected digest.
    """

    hasher: Any
    digest: bytes


def is_tus(headers: Mapping[str, str]) -> bool:
    """Test for a request of a tus client."""
    return "tus-resumable" in headers


def integer(headers: Mapping[str, str], name: str) -> int | None:
    """Return a number that is not negative; None if the field is missing or invalid."""
    found = _INTEGER.fullmatch(headers.get(name, ""))
    return int(found[1]) if found else None


def is_last(headers: Mapping[str, str]) -> bool | None:
    """Return the value of Upload-Complete; None if the field is missing or invalid."""
    found = _BOOLEAN.fullmatch(headers.get("upload-complete", ""))
    return found[1] == "1" if found else None


def total_length(headers: Mapping[str, str], offset: int) -> int | None:
    """Return the length of the whole file: from Upload-Length, or from the end of this request.

    Raises
    ------
    LengthError
        The two differ.
    """
    stated = integer(headers, "upload-length")
    content = integer(headers, "content-length")
    if is_last(headers) and content is not None:
        if stated not in (None, offset + content):
            raise LengthError(
                f"Upload-Length is {stated}, and the last request ends at {offset + content}: "
                "check the file"
            )
        return offset + content
    return stated


def file_name(headers: Mapping[str, str]) -> str:
    """Return the name of a new file: from Content-Disposition, or from Upload-Metadata.

    Raises
    ------
    ParameterError
        Both are missing or invalid.
    """
    disposition = Message()
    disposition["content-disposition"] = headers.get("content-disposition", "")
    metadata = _metadata(headers)
    name = disposition.get_filename() or metadata.get("filename") or metadata.get("name")
    if not name:
        raise ParameterError(
            "the name of the file is missing: add a Content-Disposition with a filename, or an "
            "Upload-Metadata with one"
        )
    return name


def file_sha256(headers: Mapping[str, str]) -> str | None:
    """Return the SHA-256 of a new file in hexadecimal; None if there is none."""
    digest = _sha256_member(headers, "repr-digest")
    return digest.hex() if digest is not None else _metadata(headers).get("sha256")


def checksum(headers: Mapping[str, str]) -> Checksum | None:
    """Return the checksum of the content of a request; None if it has none.

    Raises
    ------
    ParameterError
        The algorithm is not supported, or the digest is invalid.
    """
    if (digest := _sha256_member(headers, "content-digest")) is not None:
        return Checksum(hashlib.sha256(), digest)
    given = headers.get("upload-checksum")
    if given is None:
        return None
    algorithm, _, text = given.partition(" ")
    if algorithm not in _ALGORITHMS:
        raise ParameterError(
            f"Upload-Checksum has the algorithm {shown(algorithm)}, expected one of "
            f"{CHECKSUM_ALGORITHMS}"
        )
    return Checksum(_ALGORITHMS[algorithm](), _decode("Upload-Checksum", text))


def _sha256_member(headers: Mapping[str, str], name: str) -> bytes | None:
    found = _SHA256_MEMBER.search(headers.get(name, ""))
    return _decode(name, found[1]) if found else None


def _metadata(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the pairs of Upload-Metadata: "key base64, key base64, …"."""
    pairs = (pair.strip().partition(" ") for pair in headers.get("upload-metadata", "").split(","))
    return {
        key: _decode("Upload-Metadata", value).decode("utf-8", "replace") for key, _, value in pairs
    }


def _decode(name: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ParameterError(f"{name} has {shown(text)}, expected base64") from None
