"""The files of a model: config.json, safetensors in one file or in shards, a tokenizer.

This module handles paths only; `gptx.weights` reads the tensors.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gptx.errors import GptxError, NotFoundError, StorageError, WeightsError
from gptx.lfs_pointer import check_content
from gptx.tokenization.finding import find_tokenizer

CONFIG = "config.json"
MAX_INDEX_BYTES = 2**23  # that of 1558M has 0.05 MB
GENERATION = "generation_config.json"
WEIGHTS = "model.safetensors"
TORCH_WEIGHTS = "pytorch_model.bin"  # of models from before safetensors
INDEX = f"{WEIGHTS}.index.json"
WEIGHT_FILES = (WEIGHTS, INDEX, TORCH_WEIGHTS, f"{TORCH_WEIGHTS}.index.json")

# No separator and no leading dot: a shard is stored beside its index.
_PLAIN_NAME = re.compile(r"(?!\.)[\w.+=@-]+")


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model.

    Attributes
    ----------
    name
        An embedded name, the path of a file or folder, or a Hub id.
    folder
        Folder that holds the files.
    config
        Path of config.json; of the file or folder of a model that `gptx.conversions` reads.
    weights
        The weights file, or its shards in the order of the index; empty if not requested. The
        format is that of `WEIGHTS`, or of `TORCH_WEIGHTS` in a place without the former. Of a model
        that `gptx.conversions` reads: its file or folder.
    tokenizer
        Name -> path, of the files of the tokenizer; empty without a vocabulary.
    revision
        Commit hash of a Hub snapshot; None for an embedded model or a folder.
    """

    name: str
    folder: Path
    config: Path
    weights: tuple[Path, ...]
    tokenizer: dict[str, Path]
    revision: str | None


class Source(Protocol):
    """A place that holds the files of a model: a folder, or a repository of the Hub."""

    name: str

    @property
    def revision(self) -> str | None:
        """Commit hash of a repository; None for a folder."""

    def find(self, filename: str) -> Path | None:
        """Path of a file; None if it is missing."""

    def need(self, filename: str) -> Path:
        """Path of a required file.

        Raises
        ------
        NotFoundError
            It is missing.
        """

    def no_weights(self) -> GptxError:
        """The error for a source without weights."""

    def write_ref(self) -> None:
        """Store the commit of a repository in the cache, after all its files."""


class Folder:
    """A folder on this machine as a `Source`.

    Parameters
    ----------
    path
        Path of the folder.
    name
        Name of the model; the path if None.
    hint
        End of the error about a missing file.
    """

    revision = None

    def __init__(self, path: Path, name: str | None = None, hint: str = "") -> None:
        self.path = path
        self.name = str(path) if name is None else name
        self._hint = hint

    def find(self, filename: str) -> Path | None:
        path = self.path / filename
        if not is_file(path):
            return None
        check_content(path)
        return path

    def need(self, filename: str) -> Path:
        if path := self.find(filename):
            return path
        raise NotFoundError(
            f"{filename} is missing in folder {self.path}: expected config.json and "
            "model.safetensors (or its index and every shard in it), or a model of another format "
            f"in `gptx convert --list`{self._hint}"
        )

    def no_weights(self) -> GptxError:
        return NotFoundError(
            f"model.safetensors is missing in folder {self.path}, which has no weights of another "
            f"format in `gptx convert --list` either: fetch it{self._hint}"
        )

    def write_ref(self) -> None:
        """Do nothing: a folder has no commit."""


def is_file(path: str | os.PathLike[str]) -> bool:
    """Test for a regular file, or a link to one.

    Raises
    ------
    StorageError
        A folder on the path may not be searched.
    """
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except PermissionError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror})") from error
    except OSError:
        return False


def find_files(source: Source, *, weights: bool = True) -> ModelFiles:
    """Find the files of a model in `source`.

    Parameters
    ----------
    weights
        Find the weights too, not only the config and the tokenizer.

    Raises
    ------
    NotFoundError
        A file is missing.
    DataError
        A file is a pointer of git-lfs, or the index of a sharded model is invalid.
    StorageError
        A file or its folder cannot be read.
    """
    config = source.need(CONFIG)
    source.find(GENERATION)  # beside config.json, for `GPT2Config.from_file`
    # Vocabularies of several forms have the same contents: of the Hub's files, one is enough.
    tokenizer = find_tokenizer(source.find, all_forms=source.revision is None)
    return ModelFiles(
        name=source.name,
        folder=config.parent,
        config=config,
        weights=find_weights(source) if weights else (),
        tokenizer=tokenizer,
        revision=source.revision,
    )


def find_weights(source: Source) -> tuple[Path, ...]:
    """Find the weights in `source`, see `ModelFiles`.

    Raises
    ------
    NotFoundError
        There are none, or a shard is missing.
    WeightsError
        The index of a sharded model is invalid.
    """
    for name in (WEIGHTS, TORCH_WEIGHTS):
        if single := source.find(name):
            return (single,)
        if index := source.find(f"{name}.index.json"):
            return tuple(source.need(shard) for shard in shard_names(index))
    raise source.no_weights()


def shard_names(index: Path) -> list[str]:
    """Read the file names of an index, without duplicates, in its order.

    Raises
    ------
    WeightsError
        The index is invalid, or a name in it leads out of the folder.
    StorageError
        The index cannot be read.
    """
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError
        names = list(json.loads(index.read_bytes())["weight_map"].values())
    except OSError as error:
        raise StorageError(f"{index} cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise WeightsError(
            f'{index} is invalid: expected JSON with an object "weight_map", of at most '
            f"{MAX_INDEX_BYTES} bytes: fetch the model again"
        ) from None
    for name in names:
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise WeightsError(
                f"{index} has the shard {name!r}, expected a file name without a path: "
                "fetch the model again"
            )
    if not names:
        raise WeightsError(f'{index} has an empty "weight_map": fetch the model again')
    return list(dict.fromkeys(names))
