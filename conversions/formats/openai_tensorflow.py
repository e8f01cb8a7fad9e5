"""OpenAI's own GPT-2: a TensorFlow checkpoint, hparams.json, encoder.json and vocab.bpe.

OpenAI's download_model.py fetches such a folder; fine-tuning with TensorFlow 1 writes one. The
names are those of the variables in OpenAI's src/model.py. Its convolutions of width 1 keep a
dimension for the width, `[1, in, out]` (https://github.com/openai/gpt-2, src/model.py and
src/encoder.py). The format is read only.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gptx.config import GPT2Config
from gptx.conversions.checkpoint import (
    Array,
    Checkpoint,
    StoredTensor,
    end_of_text_ids,
    infer_config,
)
from gptx.conversions.containers.tensor_bundle import TensorBundle, is_bundle
from gptx.conversions.vocabularies.token_lists import CONTROL, NORMAL, tokenizer_from_lists
from gptx.errors import ConfigError, NotFoundError, StorageError, TokenizerError, WeightsError
from gptx.tensor_names import unknown_error, unknown_note
from gptx.tokenization.byte_level import END_OF_TEXT, byte_of_letter
from gptx.tokenization.pipeline import PipelineTokenizer

# hparams.json's names -> gptx's
SETTINGS = {
    "n_vocab": "vocab_size",
    "n_ctx": "n_positions",
    "n_embd": "n_embd",
    "n_layer": "n_layer",
    "n_head": "n_head",
}


def detect(path: Path) -> bool:
    """Test for a folder with such a checkpoint, or for its index."""
    return bool(_indexes(path))


def read(path: Path, config: GPT2Config | None = None, ignore_unknown: bool = False) -> Checkpoint:
    """Open a checkpoint.

    Parameters
    ----------
    path
        Its folder, or an index, `X.index`. If the folder has several checkpoints, its file
        `checkpoint` selects one.
    config
        Settings that replace those of hparams.json.

    Raises
    ------
    NotFoundError, StorageError
        A file is missing or cannot be read.
    WeightsError, ConfigError, TokenizerError
        A file is damaged, or the model is not a GPT-2 that gptx supports.
    """
    indexes = _indexes(path)
    if not indexes:
        raise NotFoundError(f"{path} has no checkpoint: expected X.index and X.data-*")
    if len(indexes) > 1:
        names = ", ".join(index.name for index in indexes[:3])
        raise WeightsError(f"{path} has {len(indexes)} checkpoints: give the path of one ({names})")
    index = indexes[0]
    bundle = TensorBundle(index)
    bundle.check_files()
    tokenizer = _tokenizer(index.parent)
    hparams = index.with_name("hparams.json")
    notes: tuple[str, ...] = ()
    if config is not None:
        config = replace(config, quantization=None)
    elif hparams.is_file():
        config = _config(hparams, tokenizer)
    else:
        config, notes = _infer_config(bundle)
    stored = _stored(bundle, config)
    if unknown := _unknown_variables(bundle, config):
        if not ignore_unknown:
            raise WeightsError(f"{index}: {unknown_error(unknown).message}")
        notes += (unknown_note(unknown),)
    return Checkpoint(config, stored, tokenizer, notes)


def read_settings(folder: Path) -> tuple[GPT2Config, PipelineTokenizer | None]:
    """Read config and tokenizer of a folder, which may have no tensors; see `read`."""
    tokenizer = _tokenizer(folder)
    return _config(folder / "hparams.json", tokenizer), tokenizer


def _indexes(path: Path) -> list[Path]:
    """Find the index; return several if the choice is ambiguous."""
    if not path.is_dir():
        return [path] if path.name.endswith(".index") and is_bundle(path) else []
    try:
        found = sorted(entry for entry in path.iterdir() if entry.name.endswith(".index"))
    except OSError:
        return []
    found = [index for index in found if is_bundle(index)]
    # TensorFlow stores the path of the newest checkpoint, perhaps one of another machine.
    try:
        with open(path / "checkpoint", "rb") as file:
            state = file.read(4096).decode(errors="replace")
    except OSError:
        return found
    latest = re.match(r'\s*model_checkpoint_path:\s*"(?:[^"\n]*/)?([^"/\n]+)"', state)
    named = [index for index in found if latest and index.name == f"{latest[1]}.index"]
    return named or found


# Tensors


def _variable_name(name: str) -> str:
    """Return `model/h0/attn/c_attn/w` for `h.0.attn.c_attn.weight`, `model/wte` for a table."""
    layer, _, kind = name.rpartition(".")
    path = "model/" + re.sub(r"^h\.", "h", layer).replace(".", "/")
    if layer in ("wte", "wpe"):
        return path
    weight = "g" if layer.rpartition(".")[2].startswith("ln_") else "w"
    return f"{path}/{'b' if kind == 'bias' else weight}"


def _stored(bundle: TensorBundle, config: GPT2Config) -> dict[str, StoredTensor]:
    variables = {name: _variable_name(name) for name in config.tensor_shapes()}
    stored = {}
    for name, variable in variables.items():
        if variable in bundle.entries:
            shape = _shape(bundle, variable)
            read_tensor = partial(_read, bundle, variable, shape)
            stored[name] = StoredTensor(shape, bundle.dtype(variable), read_tensor)
    return stored


def _unknown_variables(bundle: TensorBundle, config: GPT2Config) -> list[str]:
    """Return the variables of another model; those of an optimizer are not.

    An optimizer's variable is outside of `model/`, such as `beta1_power`, or below a variable of
    the model, such as `model/wte/Adam`.
    """
    known = {_variable_name(name) for name in config.tensor_shapes()}
    return [
        name
        for name in bundle.entries
        if name.startswith("model/") and name not in known and name.rpartition("/")[0] not in known
    ]


def _read(bundle: TensorBundle, name: str, shape: tuple[int, ...]) -> Array:
    return bundle.read(name).reshape(shape)


def _shape(bundle: TensorBundle, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor without the width of a convolution."""
    shape = bundle.entries[name].shape
    return shape[1:] if len(shape) == 3 and shape[0] == 1 else shape


# Config


def _config(path: Path, tokenizer: PipelineTokenizer | None) -> GPT2Config:
    found = _json(path, ConfigError)
    if missing := [name for name in SETTINGS if name not in found]:
        raise ConfigError(f"{path}: {missing[0]} is missing: fetch it again, or give a config.json")
    try:
        config = GPT2Config(**{setting: found[name] for name, setting in SETTINGS.items()})
        ends: dict[str, Any] = {**end_of_text_ids(config.vocab_size, tokenizer)}
        return replace(config, **ends)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _infer_config(bundle: TensorBundle) -> tuple[GPT2Config, tuple[str, ...]]:
    layers = {m[1] for name in bundle.entries if (m := re.match(r"model/h(\d+)/", name))}
    names = GPT2Config(n_layer=max(1, len(layers))).tensor_shapes()
    variables = {name: _variable_name(name) for name in names}
    shapes = {n: _shape(bundle, v) for n, v in variables.items() if v in bundle.entries}
    return infer_config(shapes)


def _json(path: Path, error: type[ConfigError | TokenizerError]) -> dict[str, Any]:
    try:
        found = json.loads(_text(path, error))
    except (ValueError, RecursionError) as reason:
        raise error(f"{path} is not valid JSON ({reason}): fetch it again") from None
    if not isinstance(found, dict):
        raise error(f"{path} is a JSON {type(found).__name__}, expected an object")
    return found


def _text(path: Path, error: type[ConfigError | TokenizerError]) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as reason:
        raise StorageError(f"{path} cannot be read ({reason.strerror or reason})") from reason
    except UnicodeDecodeError:
        raise error(f"{path} is not UTF-8: fetch it again") from None


# Tokenizer


def _tokenizer(folder: Path) -> PipelineTokenizer | None:
    """Make the tokenizer of encoder.json and vocab.bpe, a vocab.json and a merges.txt."""
    encoder, merges_file = folder / "encoder.json", folder / "vocab.bpe"
    if not encoder.is_file() and not merges_file.is_file():
        return None
    for path in (encoder, merges_file):
        if not path.is_file():
            raise TokenizerError(
                f"{path} is missing: the tokenizer needs encoder.json and vocab.bpe"
            )
    vocab = _json(encoder, TokenizerError)
    if set(map(type, vocab.values())) != {int} or sorted(vocab.values()) != list(range(len(vocab))):
        raise TokenizerError(f"{encoder} is invalid: expected the ids 0, 1, 2, ...: fetch it again")
    lines = _text(merges_file, TokenizerError).split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    # A file truncated after a line would make a tokenizer that splits differently.
    made = {merge.replace(" ", "") for merge in merges} | byte_of_letter().keys()
    for token in vocab:
        if token not in made and not re.fullmatch(r"<\|.*\|>", token):
            raise TokenizerError(
                f"{merges_file} is damaged or truncated: no line makes the token {token[:64]!r} of "
                f"{encoder.name}: fetch it again"
            )
    tokens = sorted(vocab, key=vocab.__getitem__)
    kinds = [CONTROL if token == END_OF_TEXT else NORMAL for token in tokens]
    return tokenizer_from_lists(tokens, merges, kinds, f"{encoder} with {merges_file.name}")
