"""Open a model of any format: find its files, read its headers, add its tokenizer."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gptx.conversions.registry import FORMATS, detect, find_format
from gptx.errors import (
    DataError,
    NotFoundError,
    ParameterError,
    TokenizerError,
    WeightsError,
    argument,
)
from gptx.lfs_pointer import check_named_files

if TYPE_CHECKING:
    from gptx.config import GPT2Config
    from gptx.conversions.checkpoint import Checkpoint
    from gptx.tokenization.pipeline import PipelineTokenizer

_SHARD = re.compile(r".+-\d+-of-\d+\.(safetensors|bin)")


def read(
    source: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | GPT2Config | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    ignore_unknown: bool = False,
    revision: str | None = None,
    offline: bool = False,
) -> tuple[str, Checkpoint]:
    """Open a model of any format.

    Parameters
    ----------
    source
        A file or folder, an embedded name, an alias, a Hub id, or `openai:124M` and the like.
    config
        A config.json, for a format without a complete configuration.
    tokenizer
        A folder with the tokenizer's files, or a model that has a tokenizer, for a format without
        one: see `read_tokenizer`. None: that of the model, or the files beside it.
    ignore_unknown
        Leave out tensors that a GPT-2 does not have, with a note. Otherwise they are an error.
    revision, offline
        Options for a Hub model, see `gptx.hub.resolve.locate`.

    Returns
    -------
    format, checkpoint
        A name in `FORMATS`, and the model.

    Raises
    ------
    NotFoundError, StorageError
        A file is missing or cannot be read.
    WeightsError, ConfigError, TokenizerError
        The files are damaged, or contain no GPT-2 that gptx supports.
    """
    from gptx.config import GPT2Config
    from gptx.conversions.checkpoint import find_companions
    from gptx.tokenization import finding

    path = find_path(source, revision=revision, offline=offline)
    if config is not None and not isinstance(config, GPT2Config):
        config = GPT2Config.from_file(Path(config).expanduser())
    name = detect(path)
    try:
        checkpoint: Checkpoint = FORMATS[name].load_module().read(path, config, ignore_unknown)
    except DataError as error:
        if path.is_dir():
            check_named_files(path, str(error))
        elif _SHARD.fullmatch(path.name):
            raise WeightsError(
                f"{path} is one shard of a model: give the folder with all, {path.parent}"
            ) from error
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error.message}") from None
    if tokenizer is not None:
        found = read_tokenizer(tokenizer, checkpoint.config, offline=offline)
        checkpoint = _with_tokenizer(checkpoint, found)
    elif checkpoint.tokenizer is None and not path.is_dir():
        checkpoint = _with_files_beside(checkpoint, path)
    if path.is_dir():
        notes = checkpoint.notes
        if checkpoint.tokenizer is None and (fault := finding.describe_unreadable(path)):
            notes += (f"the model has no tokenizer that gptx reads: {fault}",)
        checkpoint = replace(checkpoint, companions=find_companions(path), notes=notes)
    return name, checkpoint


def find_path(
    source: str | os.PathLike[str], *, revision: str | None = None, offline: bool = False
) -> Path:
    """Return the path of a model's files; download them if necessary. See `read`."""
    from gptx.conversions.checkpoint import CARRIED_FILES
    from gptx.hub.resolve import find_source, importing_hub, is_openai, local_path
    from gptx.model_files import find_files

    if is_openai(source):
        with importing_hub():
            from gptx.conversions.formats.openai_download import fetch
        return fetch(str(source), revision=revision, offline=offline)
    path = local_path(source)
    if path is None:
        found = find_source(source, revision=revision, offline=offline)
        folder = find_files(found).folder
        for name in CARRIED_FILES:
            found.find(name)
        found.write_ref()
        return folder
    if revision is not None:
        raise ParameterError(
            f"{argument('revision')} is {revision!r}, but {str(source)!r} is not from the Hub"
        )
    return path


def read_tokenizer(
    source: str | os.PathLike[str],
    config: GPT2Config | None = None,
    *,
    offline: bool = False,
    token: str | None = None,
) -> PipelineTokenizer:
    """Read a tokenizer, for a text or for a model that comes without one.

    Parameters
    ----------
    source
        A folder with the tokenizer's files, or one of them; or a model that has a tokenizer: an
        embedded name, a file of any format, an alias or a Hub id. Weights are not downloaded.
    config
        Config of the model; None without one.

    Raises
    ------
    NotFoundError
        The source does not exist, or has no tokenizer.
    TokenizerError
        The tokenizer is damaged, or has more tokens than the model.
    """
    from gptx.hub.resolve import local_path, locate
    from gptx.tokenization import finding
    from gptx.tokenization.files import FILES
    from gptx.tokenization.pipeline import PipelineTokenizer

    if not str(source).strip():
        raise ParameterError(
            f"{argument('tokenizer')} is {source!r}, expected a folder, or a model that has one"
        )
    path = local_path(source)
    if path is None:
        try:
            files = locate(source, offline=offline, token=token, weights=False).tokenizer
        except NotFoundError as error:
            raise NotFoundError(f"{argument('tokenizer')}: {error}") from None
        found = PipelineTokenizer(files) if files else None
    else:
        path = path.parent if path.name in FILES else path  # such as tokenizer.json
        found = PipelineTokenizer.of_folder(path) if path.is_dir() else None
        if found is None and find_format(path) is not None:
            found = read(path)[1].tokenizer
    if found is None:
        unread = finding.describe_unreadable(path) if path is not None else None
        expected = "expected tokenizer.json, or vocab.json and merges.txt"
        raise NotFoundError(f"{source} has no tokenizer: {unread or expected}")
    if config is not None and found.vocab_size > config.vocab_size:
        raise TokenizerError(
            f"the tokenizer of {source} has {found.vocab_size} tokens, the model "
            f"{config.vocab_size}: give the tokenizer of this model"
        )
    return found


def _with_files_beside(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """Add the tokenizer in the folder of a file, unless it is that of a larger model."""
    from gptx.tokenization.pipeline import PipelineTokenizer

    tokenizer = PipelineTokenizer.of_folder(path.absolute().parent)
    if tokenizer is None or tokenizer.vocab_size > checkpoint.config.vocab_size:
        return checkpoint
    notes = checkpoint.notes
    if not path.with_name("config.json").is_file():  # else the folder is that of the model
        notes += (f"the tokenizer in the folder of {path.name} is used",)
    return _with_tokenizer(replace(checkpoint, notes=notes), tokenizer)


def _with_tokenizer(checkpoint: Checkpoint, tokenizer: PipelineTokenizer) -> Checkpoint:
    """Replace the tokenizer, and add its end of text if the model has none."""
    from gptx.conversions.checkpoint import NO_TOKENIZER_NOTE, end_of_text_ids

    config = checkpoint.config
    if config.eos_token_id is None:
        config = replace(config, **end_of_text_ids(config.vocab_size, tokenizer))
    notes = tuple(note for note in checkpoint.notes if note != NO_TOKENIZER_NOTE)
    return replace(checkpoint, config=config, tokenizer=tokenizer, notes=notes)
