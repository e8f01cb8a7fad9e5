"""API keys: the comparison that takes the same time for each wrong key, and salts."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from pathlib import Path

from gptx.errors import NotFoundError, ParameterError, StorageError, argument

SALT_CHARACTERS = 16


class Keys:
    """The API keys of a server.

    Parameters
    ----------
    keys
        Keys; without any, every caller is let in.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def salt(self, authorization: str | None) -> str | None:
        """Return the word of the caller of an Authorization header; None for a wrong key.

        All keys are compared, by digests of one length, so that times tell nothing about them.
        """
        if not self._digests:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            return None
        return given.hex()[:SALT_CHARACTERS]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def read_keys(given: Sequence[str], file: str | None) -> tuple[str, ...]:
    """Return the keys of options, and those of a file: one a line, # begins a comment.

    Raises
    ------
    NotFoundError, StorageError
        The file cannot be read.
    ParameterError
        A key is empty, or the file has none.
    """
    keys = list(given)
    if file is not None:
        try:
            lines = Path(file).read_text("utf-8").splitlines()
        except FileNotFoundError:
            raise NotFoundError(f"file of keys {file} does not exist") from None
        except (OSError, UnicodeDecodeError) as error:
            raise StorageError(f"file of keys {file} cannot be read: {error}") from None
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise ParameterError(f"{argument('api_key_file')} {file} has no key: add one a line")
        keys += found
    if not all(key.strip() for key in keys):
        raise ParameterError(f"{argument('api_key')} is empty: give at least one character")
    return tuple(keys)
