"""meta.pkl: the characters of a corpus that nanoGPT has prepared.

It is a pickle of `{"vocab_size": V, "itos": {id: character}, "stoi": {character: id}}`
(karpathy/nanoGPT, data/shakespeare_char/prepare.py). It is read as data: no code of it runs.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from gptx.conversions.containers.safe_pickle import MAX_PICKLE_BYTES, Unpickled
from gptx.errors import DataError, StorageError, WeightsError
from gptx.files import create

META = "meta.pkl"
PROTOCOL = 4  # that of Python 3.8, which any Python reads


def write_meta(path: Path, tokens: dict[str, int]) -> None:
    """Write the tokens of a vocabulary: token -> id."""
    meta = {
        "vocab_size": max(tokens.values()) + 1,
        "itos": {id: token for token, id in tokens.items()},
        "stoi": tokens,
    }
    with create(path) as file:
        pickle.dump(meta, file, protocol=PROTOCOL)


def read_meta(path: Path) -> list[str]:
    """Read the characters of a corpus, in the order of their ids.

    Raises
    ------
    DataError
        The file is damaged, or is another pickle.
    StorageError
        The file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_PICKLE_BYTES + 1)
        meta = Unpickled(data).value
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror or error})") from error
    except WeightsError as error:
        raise DataError(f"{path}: {error.message}") from None
    stoi = meta.get("stoi") if isinstance(meta, dict) else None
    if not isinstance(stoi, dict) or not _is_vocabulary(stoi, meta.get("vocab_size")):
        raise DataError(
            f'{path} has no "stoi" of {meta.get("vocab_size") if isinstance(meta, dict) else "any"}'
            " characters with the ids from 0: make the folder again with `gptx prepare`"
        )
    return sorted(stoi, key=stoi.__getitem__)


def _is_vocabulary(stoi: dict[str, Any], size: Any) -> bool:
    """Test for characters with the ids 0 to size - 1."""
    ids = list(stoi.values())
    return (
        all(type(id) is int for id in ids)
        and sorted(ids) == list(range(len(ids)))
        and (len(ids) == size)
    )
