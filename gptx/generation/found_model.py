"""A model that is found and not loaded: its config and tokenizer are read, its weights are not.

So a request is checked before a download of gigabytes. A Hugging Face folder, an embedded model and
a repository of the Hub are read here; `gptx.conversions` reads every other format.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptx import weights
from gptx.backends import Backend
from gptx.config import GPT2Config
from gptx.errors import ParameterError, TokenizerError, argument
from gptx.hub.resolve import find_source, importing_hub, local_path
from gptx.model_files import (
    CONFIG,
    WEIGHT_FILES,
    ModelFiles,
    Source,
    find_files,
    find_weights,
)
from gptx.quantization import Quantization
from gptx.stored_weights import open_weights, type_name
from gptx.tokenization.finding import describe_unreadable
from gptx.tokenization.pipeline import PipelineTokenizer
from gptx.tokenization.protocol import Tokenizer
from gptx.weights import LoadedWeights

if TYPE_CHECKING:
    from gptx.conversions.checkpoint import Checkpoint

OPENAI = "openai:"  # before the size of one of OpenAI's own models


class ModelInfo:
    """Everything of a model but its weights.

    Attributes
    ----------
    files
        Files of the model.
    config
        Settings of the model.
    """

    def __init__(
        self, files: ModelFiles, config: GPT2Config, tokenizer: Tokenizer | None = None
    ) -> None:
        self.files = files
        self.config = config
        self._tokenizer = tokenizer  # None: that of the files, if they have one

    @property
    def name(self) -> str:
        """Name of the model as given: an embedded name, a path or a Hub id."""
        return self.files.name

    @property
    def has_tokenizer(self) -> bool:
        """True if the model has a tokenizer."""
        return self._tokenizer is not None or bool(self.files.tokenizer)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the model, read at the first use.

        Raises
        ------
        TokenizerError
            The model has none, or its files are damaged.
        """
        if self._tokenizer is not None:
            return self._tokenizer
        if not self.files.tokenizer:
            if unreadable := describe_unreadable(self.files.folder):
                raise TokenizerError(f"{self.name} has no tokenizer that gptx reads: {unreadable}")
            raise TokenizerError(
                f"{self.name} has no tokenizer: give {argument('tokenizer')}, a folder or a model "
                "that has one (such as gpt2), or put tokenizer.json (or vocab.json and merges.txt) "
                f"into {self.files.folder}, or give token ids instead of text"
            )
        return PipelineTokenizer(self.files.tokenizer)


@dataclass(frozen=True)
class StoredFacts:
    """The weights of a model in its files, from the headers.

    Attributes
    ----------
    format
        Title of the format.
    types
        Types of the tensors: "float32", "int4", "Q6_K".
    n_bytes
        Size of the files, or of the tensors in a folder of another format.
    config
        Config that fits the tensors.
    notes
        See `gptx.generation.text_model.Model.notes`.
    """

    format: str
    types: tuple[str, ...]
    n_bytes: int
    config: GPT2Config
    notes: tuple[str, ...]


class FoundModel(ABC):
    """A model whose weights are not loaded.

    Attributes
    ----------
    info
        Files, config and tokenizer.
    """

    info: ModelInfo

    @abstractmethod
    def fetch(self) -> Path:
        """Download the weights if necessary; return a path that `find_model` takes.

        Raises
        ------
        NotFoundError, HubUnavailableError, AuthorizationError, IntegrityError, StorageError
            There are no weights, or they cannot be downloaded.
        """

    @abstractmethod
    def describe_weights(self) -> StoredFacts | None:
        """Read the headers of the weights; None if they are on the Hub."""

    @abstractmethod
    def load_weights(
        self,
        backend: Backend,
        *,
        quantization: Quantization | None = None,
        threads: int | None = None,
    ) -> LoadedWeights:
        """Read the weights, after a download if necessary, and bring them to a backend.

        See `gptx.weights.load` for the parameters and the errors.
        """


class _FolderModel(FoundModel):
    """config.json, weights and tokenizer in a folder, or in a repository of the Hub."""

    def __init__(self, source: Source, config: GPT2Config | None, ignore_unknown: bool) -> None:
        files = find_files(source, weights=False)
        self.info = ModelInfo(files, config or GPT2Config.from_file(files.config))
        self._source = source
        self._given_config = config
        self._ignore_unknown = ignore_unknown
        if source.revision is None:
            self.fetch()  # missing files of a folder are the first error
        else:
            source.write_ref()  # `gptx info` needs no weights, and can be offline after that

    def fetch(self) -> Path:
        paths = find_weights(self._source)
        self._source.write_ref()
        self.info.files = replace(self.info.files, weights=paths)
        return self.info.files.folder

    def describe_weights(self) -> StoredFacts | None:
        if self._source.revision is not None:
            return None
        if not self._is_safetensors():
            return _describe_checkpoint(*self._open(), self.info.files.weights)
        paths = self.info.files.weights
        stored = open_weights(paths, self.info.config, ignore_unknown=self._ignore_unknown)
        types = {tensor.file_type or type_name(tensor) for tensor in stored.tensors.values()}
        return StoredFacts(
            "safetensors",
            tuple(sorted(types)),
            sum(path.stat().st_size for path in paths),
            stored.config or self.info.config,
            stored.notes,
        )

    def load_weights(self, backend: Backend, **options: Any) -> LoadedWeights:
        self.fetch()
        if not self._is_safetensors():
            return _load_checkpoint(self._open()[1], backend, **options)
        return weights.load(
            self.info.files.weights,
            self.info.config,
            backend,
            ignore_unknown=self._ignore_unknown,
            **options,
        )

    def _is_safetensors(self) -> bool:
        return self.info.files.weights[0].suffix == ".safetensors"

    def _open(self) -> tuple[str, Checkpoint]:
        """Open weights that are no safetensors."""
        from gptx.conversions.registry import read

        return read(
            self.info.files.folder,
            config=self._given_config,
            ignore_unknown=self._ignore_unknown,
        )


class _CheckpointModel(FoundModel):
    """A model that `gptx.conversions` has opened."""

    def __init__(self, name: str, path: Path, format: str, checkpoint: Checkpoint) -> None:
        files = _files_at(name, path)
        self.info = ModelInfo(files, checkpoint.config, checkpoint.tokenizer)
        self._format = format
        self._checkpoint = checkpoint

    def fetch(self) -> Path:
        return self.info.files.config

    def describe_weights(self) -> StoredFacts:
        return _describe_checkpoint(self._format, self._checkpoint, self.info.files.weights)

    def load_weights(self, backend: Backend, **options: Any) -> LoadedWeights:
        return _load_checkpoint(self._checkpoint, backend, **options)


class _OpenAIModel(FoundModel):
    """One of OpenAI's own models, whose tensors may have to be downloaded."""

    def __init__(self, name: str, offline: bool, revision: str | None, **given: Any) -> None:
        from gptx.conversions.registry import read_tokenizer

        with importing_hub():
            from gptx.conversions.formats.openai_download import fetch_settings
        config, tokenizer = fetch_settings(name, revision=revision, offline=offline)
        config = given["config"] or config
        if given["tokenizer"] is not None:
            tokenizer = read_tokenizer(given["tokenizer"], config, offline=offline)
        self.info = ModelInfo(_files_at(name, Path(name)), config, tokenizer)
        self._offline = offline
        self._given = given

    def fetch(self) -> Path:
        from gptx.conversions.formats.openai_download import fetch

        path = fetch(self.info.name, offline=self._offline)
        self.info.files = _files_at(self.info.name, path)
        return path

    def describe_weights(self) -> None:
        return None

    def load_weights(self, backend: Backend, **options: Any) -> LoadedWeights:
        from gptx.conversions.registry import read

        _, checkpoint = read(self.fetch(), offline=self._offline, **self._given)
        return _load_checkpoint(checkpoint, backend, **options)


def _files_at(name: str, path: Path) -> ModelFiles:
    """Return the files of a model of which one file or folder has all."""
    path = path.absolute()
    folder = path if path.is_dir() else path.parent
    return ModelFiles(name, folder, path, (path,), {}, None)


def _describe_checkpoint(
    format: str, checkpoint: Checkpoint, paths: tuple[Path, ...]
) -> StoredFacts:
    from gptx.conversions.registry import FORMATS

    tensors = checkpoint.stored.values()
    if all(path.is_file() for path in paths):
        n_bytes = sum(path.stat().st_size for path in paths)
    else:
        n_bytes = sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors)
    types = tuple(sorted({tensor.file_type or type_name(tensor) for tensor in tensors}))
    notes = _notes_of(checkpoint)
    return StoredFacts(FORMATS[format].title, types, n_bytes, checkpoint.config, notes)


def _load_checkpoint(checkpoint: Checkpoint, backend: Backend, **options: Any) -> LoadedWeights:
    loaded = weights.load_arrays(checkpoint.tensors, checkpoint.config, backend, **options)
    return replace(loaded, notes=_notes_of(checkpoint) + loaded.notes)


def _notes_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the notes, without that on the tokenizer: the use of a missing one is an error."""
    from gptx.conversions.checkpoint import NO_TOKENIZER_NOTE

    return tuple(note for note in checkpoint.notes if note != NO_TOKENIZER_NOTE)


def find_model(
    model: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | GPT2Config | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    ignore_unknown: bool = False,
    revision: str | None = None,
    offline: bool = False,
    token: str | None = None,
) -> FoundModel:
    """Find a model, and read its config; see `gptx.load` for the parameters and the errors.

    Weights on the Hub are not downloaded. A file of another format is opened, and its tensors are
    not read.
    """
    if isinstance(config, str | os.PathLike):
        config = GPT2Config.from_file(Path(config).expanduser())
    if not isinstance(config, GPT2Config | None):
        raise ParameterError(
            f"{argument('config')} is {config!r}, expected a GPT2Config or the path of a "
            "config.json: make one with GPT2Config.from_dict(...)"
        )
    if not isinstance(tokenizer, str | os.PathLike | None):
        raise ParameterError(
            f"{argument('tokenizer')} is {tokenizer!r}, expected a folder, or a model that has one"
        )
    if is_openai(model):
        return _OpenAIModel(
            os.fspath(model),
            offline,
            revision,
            config=config,
            tokenizer=tokenizer,
            ignore_unknown=ignore_unknown,
        )
    if not _needs_conversions(model):
        source = find_source(model, revision=revision, offline=offline, token=token)
        found = _FolderModel(source, config, ignore_unknown)
        if tokenizer is not None:
            from gptx.conversions.registry import read_tokenizer

            given = read_tokenizer(tokenizer, found.info.config, offline=offline, token=token)
            found.info = ModelInfo(found.info.files, found.info.config, given)
        return found
    from gptx.conversions.registry import find_path, read

    path = find_path(model, revision=revision, offline=offline)
    format, checkpoint = read(
        path, config=config, tokenizer=tokenizer, ignore_unknown=ignore_unknown, offline=offline
    )
    return _CheckpointModel(os.fspath(model), path, format, checkpoint)


def is_openai(model: object) -> bool:
    """Test for the name of one of OpenAI's own models: "openai:124M"."""
    return isinstance(model, str) and model.startswith(OPENAI)


def _needs_conversions(model: str | os.PathLike[str]) -> bool:
    """Test for a file, or a folder of another format than Hugging Face's."""
    path = local_path(model)
    if path is None or not path.is_dir():
        return path is not None
    if (path / CONFIG).is_file() and any((path / name).is_file() for name in WEIGHT_FILES):
        return False
    from gptx.conversions.registry import describe_unsupported, find_format

    return find_format(path) is not None or describe_unsupported(path) is not None
