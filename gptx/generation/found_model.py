"""A model that is found and not loaded: its config and tokenizer are read, its weights are not.

So a request is checked before a download of gigabytes. A Hugging Face folder, an embedded model and
a repository of the Hub are read here; `gptx.conversions` reads every other format.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptx.config import GPT2Config
from gptx.errors import ParameterError, TokenizerError, argument
from gptx.generation.model_info import ModelInfo
from gptx.hub.resolve import find_source, importing_hub, is_openai, local_path
from gptx.model_files import (
    CONFIG,
    WEIGHT_FILES,
    WEIGHTS,
    ModelFiles,
    Source,
    find_files,
    find_weights,
)
from gptx.safetensors_weights import open_weights
from gptx.stored_weights import DescribedTensor, Tensor, type_name
from gptx.tokenization.protocol import Tokenizer

if TYPE_CHECKING:
    from gptx.conversions.checkpoint import Checkpoint


@dataclass(frozen=True)
class OpenedWeights:
    """The weights of a model in its files, of which only the headers are read.

    Attributes
    ----------
    format
        Title of the format.
    files
        Files of the weights, or the folder of another format.
    config
        Config that fits the tensors.
    tensors
        Name -> description, for all of `config.tensor_shapes()`.
    arrays
        Name -> tensor; each access maps or reads it, for `gptx.weights.load`.
    notes
        See `gptx.generation.text_model.Model.notes`.
    """

    format: str
    files: tuple[Path, ...]
    config: GPT2Config
    tensors: Mapping[str, DescribedTensor]
    arrays: Mapping[str, Tensor]
    notes: tuple[str, ...]

    @property
    def types(self) -> list[str]:
        """Types of the tensors: "float32", "int4", "Q6_K"."""
        return sorted({tensor.file_type or type_name(tensor) for tensor in self.tensors.values()})

    @property
    def n_bytes(self) -> int:
        """Size of the files, or of the tensors in a folder of another format."""
        if all(path.is_file() for path in self.files):
            return sum(path.stat().st_size for path in self.files)
        return sum(math.prod(t.shape) * t.dtype.itemsize for t in self.tensors.values())


class FoundModel(ABC):
    """A model whose weights are not loaded.

    Attributes
    ----------
    info
        Files, config and tokenizer.
    is_local
        True if the weights are in a file or folder of the caller; False if `fetch` may download.
    """

    info: ModelInfo
    is_local: bool

    @abstractmethod
    def fetch(self) -> Path:
        """Download the weights if necessary; return a path that `find_model` takes.

        Raises
        ------
        NotFoundError, HubUnavailableError, AuthorizationError, IntegrityError, StorageError
            There are no weights, or they cannot be downloaded.
        """

    @abstractmethod
    def open(self) -> OpenedWeights:
        """Read the headers of the weights, after a download if necessary.

        Raises the errors of `fetch`.

        Raises
        ------
        WeightsError, ConfigError
            A file is damaged, or its tensors do not fit the config.
        """


class _FolderModel(FoundModel):
    """config.json, weights and tokenizer in a folder, or in a repository of the Hub."""

    def __init__(self, source: Source, config: GPT2Config | None, ignore_unknown: bool) -> None:
        files = find_files(source, weights=False)
        self.info = ModelInfo(files, config or GPT2Config.from_file(files.config))
        self.is_local = source.revision is None
        self._source = source
        self._given_config = config
        self._ignore_unknown = ignore_unknown
        if self.is_local:
            self.fetch()  # missing files of a folder are the first error
        else:
            source.write_ref()  # `gptx info` needs no weights, and can be offline after that

    def fetch(self) -> Path:
        paths = find_weights(self._source)
        self._source.write_ref()
        self.info.files = replace(self.info.files, weights=paths)
        return self.info.files.folder

    def open(self) -> OpenedWeights:
        self.fetch()
        files, config = self.info.files, self.info.config
        options: dict[str, Any] = {"ignore_unknown": self._ignore_unknown}
        if files.weights[0].suffix != Path(WEIGHTS).suffix:
            from gptx.conversions.reading import read

            return _opened(*read(files.folder, config=self._given_config, **options), files.weights)
        stored = open_weights(files.weights, config, **options)
        return OpenedWeights(
            "safetensors",
            files.weights,
            stored.config or config,
            stored.tensors,
            stored.map(),
            stored.notes,
        )


class _CheckpointModel(FoundModel):
    """A model that `gptx.conversions` has opened."""

    is_local = True

    def __init__(self, name: str, path: Path, format: str, checkpoint: Checkpoint) -> None:
        files = _files_at(name, path)
        if checkpoint.tokenizer is not None:
            files = replace(files, tokenizer=checkpoint.tokenizer.files)
        self.info = ModelInfo(files, checkpoint.config, checkpoint.tokenizer)
        self._format = format
        self._checkpoint = checkpoint

    def fetch(self) -> Path:
        return self.info.files.config

    def open(self) -> OpenedWeights:
        return _opened(self._format, self._checkpoint, self.info.files.weights)


class _OpenAIModel(FoundModel):
    """One of OpenAI's own models, whose tensors may have to be downloaded."""

    is_local = False

    def __init__(self, name: str, offline: bool, revision: str | None, **given: Any) -> None:
        from gptx.conversions.reading import read_tokenizer

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

    def open(self) -> OpenedWeights:
        from gptx.conversions.reading import read

        path = self.fetch()
        return _opened(*read(path, offline=self._offline, **self._given), (path,))


def _files_at(name: str, path: Path) -> ModelFiles:
    """Return the files of a model of which one file or folder has all."""
    path = path.absolute()
    folder = path if path.is_dir() else path.parent
    return ModelFiles(name, folder, path, (path,), {}, None)


def _opened(format: str, checkpoint: Checkpoint, files: tuple[Path, ...]) -> OpenedWeights:
    """Describe the weights of another format, without the note on a missing tokenizer.

    The use of a missing tokenizer is an error.
    """
    from gptx.conversions.checkpoint import NO_TOKENIZER_NOTE
    from gptx.conversions.registry import FORMATS

    return OpenedWeights(
        FORMATS[format].title,
        files,
        checkpoint.config,
        checkpoint.stored,
        checkpoint.tensors,
        tuple(note for note in checkpoint.notes if note != NO_TOKENIZER_NOTE),
    )


def find_model(
    model: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | GPT2Config | None = None,
    tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
    ignore_unknown: bool = False,
    revision: str | None = None,
    offline: bool = False,
    token: str | None = None,
    verify_cached: bool = False,
) -> FoundModel:
    """Find a model, and read its config; see `gptx.load` for the parameters and the errors.

    Weights on the Hub are not downloaded. A file of another format is opened, and its tensors are
    not read.

    Parameters
    ----------
    verify_cached
        Also hash files that are in the cache, and download damaged ones again.
    """
    if isinstance(config, str | os.PathLike):
        config = GPT2Config.from_file(Path(config).expanduser())
    if not isinstance(config, GPT2Config | None):
        raise ParameterError(
            f"{argument('config')} is {config!r}, expected a GPT2Config or the path of a "
            "config.json: make one with GPT2Config.from_dict(...)"
        )
    if isinstance(tokenizer, Tokenizer):
        found = find_model(
            model, config=config, ignore_unknown=ignore_unknown, revision=revision,
            offline=offline, token=token, verify_cached=verify_cached,
        )  # fmt: skip
        found.info = _with_tokenizer(found.info, tokenizer)
        return found
    if not isinstance(tokenizer, str | os.PathLike | None):
        raise ParameterError(
            f"{argument('tokenizer')} is {repr(tokenizer)[:60]}, expected a folder, a model that "
            "has one, or an object of the protocol gptx.Tokenizer"
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
        source = find_source(
            model, revision=revision, offline=offline, token=token, verify_cached=verify_cached
        )
        found = _FolderModel(source, config, ignore_unknown)
        if tokenizer is not None:
            from gptx.conversions.reading import read_tokenizer

            given = read_tokenizer(tokenizer, found.info.config, offline=offline, token=token)
            found.info = ModelInfo(found.info.files, found.info.config, given)
        return found
    from gptx.conversions.reading import find_path, read

    path = find_path(model, revision=revision, offline=offline)
    format, checkpoint = read(
        path, config=config, tokenizer=tokenizer, ignore_unknown=ignore_unknown, offline=offline
    )
    return _CheckpointModel(os.fspath(model), path, format, checkpoint)


def _with_tokenizer(info: ModelInfo, tokenizer: Tokenizer) -> ModelInfo:
    """Replace the tokenizer of a model."""
    size, vocab_size = tokenizer.vocab_size, info.config.vocab_size
    if size > vocab_size:
        raise TokenizerError(
            f"{argument('tokenizer')} has {size} tokens, the model {vocab_size}: give the "
            "tokenizer of this model"
        )
    return ModelInfo(info.files, info.config, tokenizer)


def _needs_conversions(model: str | os.PathLike[str]) -> bool:
    """Test for a file, or a folder of another format than Hugging Face's."""
    path = local_path(model)
    if path is None or not path.is_dir():
        return path is not None
    if (path / CONFIG).is_file() and any((path / name).is_file() for name in WEIGHT_FILES):
        return False
    from gptx.conversions.registry import describe_unsupported, find_format

    return find_format(path) is not None or describe_unsupported(path) is not None
