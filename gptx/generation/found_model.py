"""A model that is found and not loaded: its config and tokenizer are read, its weights are not.

So a request is checked before a download of gigabytes. A Hugging Face folder, an embedded model and
a repository of the Hub are read here; `gptx.conversions` reads every other format.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptx import weights
from gptx.backends import Backend
from gptx.config import GPT2Config
from gptx.errors import TokenizerError, argument
from gptx.hub.resolve import find_source, local_path
from gptx.model_files import CONFIG, INDEX, WEIGHTS, ModelFiles, Source, find_files, find_weights
from gptx.quantization import Quantization
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
            raise TokenizerError(
                f"{self.name} has no tokenizer: give {argument('tokenizer')}, a folder or a model "
                "that has one (such as gpt2), or put tokenizer.json (or vocab.json and merges.txt) "
                f"into {self.files.folder}, or give token ids instead of text"
            )
        return PipelineTokenizer(self.files.tokenizer)


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

    def __init__(self, source: Source, config: GPT2Config | None) -> None:
        files = find_files(source, weights=False)
        self.info = ModelInfo(files, config or GPT2Config.from_file(files.config))
        self._source = source
        self._given_config = config

    def fetch(self) -> Path:
        paths = find_weights(self._source)
        self._source.write_ref()
        self.info.files = replace(self.info.files, weights=paths)
        return self.info.files.folder

    def load_weights(self, backend: Backend, **options: Any) -> LoadedWeights:
        folder = self.fetch()
        paths = self.info.files.weights
        if paths[0].suffix == ".safetensors":
            return weights.load(paths, self.info.config, backend, **options)
        from gptx.conversions.registry import read

        return _load_checkpoint(read(folder, config=self._given_config)[1], backend, **options)


class _CheckpointModel(FoundModel):
    """A model that `gptx.conversions` has opened."""

    def __init__(self, name: str, path: Path, checkpoint: Checkpoint) -> None:
        path = path.absolute()
        folder = path if path.is_dir() else path.parent
        files = ModelFiles(name, folder, path, (path,), {}, None)
        self.info = ModelInfo(files, checkpoint.config, checkpoint.tokenizer)
        self.checkpoint = checkpoint

    def fetch(self) -> Path:
        return self.info.files.config

    def load_weights(self, backend: Backend, **options: Any) -> LoadedWeights:
        return _load_checkpoint(self.checkpoint, backend, **options)


def _load_checkpoint(checkpoint: Checkpoint, backend: Backend, **options: Any) -> LoadedWeights:
    from gptx.conversions.checkpoint import NO_TOKENIZER_NOTE

    loaded = weights.load_arrays(checkpoint.tensors, checkpoint.config, backend, **options)
    # A use of the missing tokenizer is an error; token ids need none.
    notes = tuple(note for note in checkpoint.notes if note != NO_TOKENIZER_NOTE)
    return replace(loaded, notes=notes)


def find_model(
    model: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | GPT2Config | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    offline: bool = False,
    token: str | None = None,
) -> FoundModel:
    """Find a model, and read its config; see `gptx.load` for the parameters and the errors.

    Weights on the Hub are not downloaded. A file of another format is opened, and its tensors are
    not read.
    """
    if config is not None and not isinstance(config, GPT2Config):
        config = GPT2Config.from_file(config)
    if not _needs_conversions(model):
        source = find_source(model, revision=revision, offline=offline, token=token)
        found = _FolderModel(source, config)
        if tokenizer is not None:
            from gptx.conversions.registry import find_tokenizer

            given = find_tokenizer(tokenizer, found.info.config, offline=offline, token=token)
            found.info = ModelInfo(found.info.files, found.info.config, given)
        return found
    from gptx.conversions.registry import find_path, read

    path = find_path(model, revision=revision, offline=offline)
    _, checkpoint = read(path, config=config, tokenizer=tokenizer, offline=offline)
    return _CheckpointModel(os.fspath(model), path, checkpoint)


def _needs_conversions(model: str | os.PathLike[str]) -> bool:
    """Test for a model that is neither embedded nor a Hugging Face folder nor on the Hub."""
    if str(model).startswith(OPENAI):
        return True
    path = local_path(model)
    if path is None or not path.is_dir():
        return path is not None
    if (path / CONFIG).is_file() and any((path / name).is_file() for name in (WEIGHTS, INDEX)):
        return False
    from gptx.conversions.registry import find_format

    return find_format(path) is not None
