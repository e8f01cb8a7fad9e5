"""Texts for training that the Hub has: tiny Shakespeare, and TinyStories.

Each file is downloaded once, compared with the hash that the Hub announces, and kept in the cache
of all Hugging Face tools.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gptx.errors import IntegrityError, ParameterError, StorageError, argument
from gptx.files import atomic_file
from gptx.hub.resolve import importing_hub
from gptx.training.data.token_files import CHUNK_TOKENS, TokenFiles
from gptx.training.data.vocabularies import read_tokenizer


@dataclass(frozen=True)
class Dataset:
    """A text on the Hub.

    Attributes
    ----------
    repository
        Hub id of the dataset.
    train
        Names of its files for training.
    validation
        Names of its files for validation; none if a part of the text is for that.
    has_special
        True if `<|endoftext|>` in the text separates documents.
    sha256
        For a text that is stored as token files of GPT-2 in llm.c's form: SHA-256 of the text.
        None for text files.
    """

    repository: str
    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    has_special: bool = False
    sha256: str | None = None


DATASETS = {
    # The repository of this name has a script only. llm.c's token files have the text.
    "tinyshakespeare": Dataset(
        "karpathy/llmc-starter-pack",
        ("tiny_shakespeare_val.bin", "tiny_shakespeare_train.bin"),
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    # The stories of GPT-4 only, which the authors recommend.
    "tinystories": Dataset(
        "roneneldan/TinyStories",
        ("TinyStoriesV2-GPT4-train.txt",),
        ("TinyStoriesV2-GPT4-valid.txt",),
        has_special=True,
    ),
}


@dataclass(frozen=True)
class FetchedDataset:
    """The text files of a dataset on this machine.

    Attributes
    ----------
    train, validation
        Text files in UTF-8; none for validation if the dataset has no such file.
    """

    train: list[Path]
    validation: list[Path]


def find_dataset(name: str) -> Dataset:
    """Return a dataset of `DATASETS`; raise ParameterError for any other name."""
    if name not in DATASETS:
        raise ParameterError(f"{argument('dataset')} is {name!r}, expected {' or '.join(DATASETS)}")
    return DATASETS[name]


def fetch(name: str, *, offline: bool = False) -> FetchedDataset:
    """Return the text of a dataset; download it if the cache lacks it.

    Raises
    ------
    ParameterError
        There is no dataset of this name.
    NotFoundError
        The Hub lacks a file; or the cache lacks it, and gptx is offline.
    HubUnavailableError, AuthorizationError, IntegrityError, StorageError
        See `gptx.hub.resolve.locate`.
    """
    dataset = find_dataset(name)
    with importing_hub():
        from huggingface_hub import constants

        from gptx.hub.cache import DATASET
        from gptx.hub.repository import Repository
    if dataset.sha256 is not None:
        path = Path(constants.HF_ASSETS_CACHE) / "gptx" / "datasets" / f"{name}.txt"
        if _has_hash(path, dataset.sha256):
            return FetchedDataset([path], [])
    source = Repository(
        dataset.repository, "main", offline, None, False, kind=DATASET, first_file=dataset.train[0]
    )
    train, validation = (
        [source.need(file) for file in files] for files in (dataset.train, dataset.validation)
    )
    source.write_ref()
    if dataset.sha256 is None:
        return FetchedDataset(train, validation)
    _write_text(train, path, offline=offline)
    if not _has_hash(path, dataset.sha256):
        path.unlink(missing_ok=True)
        raise IntegrityError(
            f"{dataset.repository} has another text than that of {name}: get the text elsewhere, "
            "and give its file"
        )
    return FetchedDataset([path], [])


def _has_hash(path: Path, sha256: str) -> bool:
    """Test for a file with this SHA-256."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except OSError:
        return False


def _write_text(token_files: list[Path], path: Path, *, offline: bool) -> None:
    """Write the text of token files, without the end-of-text tokens."""
    tokenizer = read_tokenizer("gpt2", offline=offline)
    tokens = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
    if tokenizer.end_of_text_id is not None:
        tokens[tokenizer.end_of_text_id] = b""
    try:
        os.makedirs(path.parent, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error.strerror or error})") from error
    with atomic_file(path) as file:
        for part in _ids(TokenFiles.open(token_files)):
            file.write(b"".join(tokens[id] for id in part))


def _ids(files: TokenFiles) -> Iterator[list[int]]:
    for first in range(0, files.n_tokens, CHUNK_TOKENS):
        yield files.read(first, min(CHUNK_TOKENS, files.n_tokens - first)).tolist()
