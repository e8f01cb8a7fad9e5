"""OpenAI's own GPT-2: a TensorFlow checkpoint, hparams.json, encoder.json and vocab.bpe.

The folder that OpenAI's download_model.py fetches, and those that fine-tuning with TensorFlow 1
left behind. It is read only. The names are those of the variables in OpenAI's src/model.py, and the
convolutions there of width 1 keep a dimension for it, `[1, in, out]`
(https://github.com/openai/gpt-2, src/model.py and src/encoder.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gptx.config import GPT2Config
from gptx.conversions.checkpoint import Array, Checkpoint, Stored, config_of_shapes, end_of_text
from gptx.conversions.containers.tensor_bundle import Bundle, is_bundle
from gptx.conversions.vocabularies.token_lists import CONTROL, NORMAL, tokenizer_of
from gptx.errors import ConfigError, NotFoundError, StorageError, TokenizerError, WeightsError
from gptx.tokenization.bpe import END_OF_TEXT, BytePairTokenizer, byte_of_letter

# hparams.json's names -> ours
SETTINGS = {
    "n_vocab": "vocab_size",
    "n_ctx": "n_positions",
    "n_embd": "n_embd",
    "n_layer": "n_layer",
    "n_head": "n_head",
}


def detect(path: Path) -> bool:
    """Whether this is a folder with such a checkpoint, or the index of one."""
    return bool(_indexes(path))


def read(path: Path, config: GPT2Config | None = None) -> Checkpoint:
    """Open a checkpoint.

    Parameters
    ----------
    path
        Its folder; of several checkpoints there the one that the file `checkpoint` names is taken.
        Or an index, `X.index`.
    config
        In the place of hparams.json.

    Raises
    ------
    NotFoundError, StorageError
        A file is missing, or cannot be read.
    WeightsError, ConfigError, TokenizerError
        The files are damaged, or no GPT-2 that gptx can run.
    """
    indexes = _indexes(path)
    if not indexes:
        raise NotFoundError(f"{path} has no checkpoint: expected X.index, and X.data-* beside it")
    if len(indexes) > 1:
        names = ", ".join(index.name for index in indexes[:3])
        raise WeightsError(f"{path} has {len(indexes)} checkpoints: give the path of one ({names})")
    index = indexes[0]
    bundle = Bundle(index)
    bundle.check_files()
    tokenizer = _tokenizer(index.parent)
    hparams = index.with_name("hparams.json")
    notes: tuple[str, ...] = ()
    if config is not None:
        config = replace(config, quantization=None)
    elif hparams.is_file():
        config = _config(hparams, tokenizer)
    else:
        config, notes = _config_of_shapes(bundle)
    return Checkpoint(config, _stored(bundle, config), tokenizer, notes)


def _indexes(path: Path) -> list[Path]:
    """The index that is meant; or several, if it is not clear which."""
    if not path.is_dir():
        return [path] if path.name.endswith(".index") and is_bundle(path) else []
    try:
        found = sorted(entry for entry in path.iterdir() if entry.name.endswith(".index"))
    except OSError:
        return []
    found = [index for index in found if is_bundle(index)]
    # TensorFlow's note of the newest one; a path there may be that of another machine.
    try:
        with open(path / "checkpoint", "rb") as file:
            note = file.read(4096).decode(errors="replace")
    except OSError:
        return found
    latest = re.match(r'\s*model_checkpoint_path:\s*"(?:[^"\n]*/)?([^"/\n]+)"', note)
    named = [index for index in found if latest and index.name == f"{latest[1]}.index"]
    return named or found


# Tensors


def _their_name(name: str) -> str:
    """`h.0.attn.c_attn.weight` -> `model/h0/attn/c_attn/w`; the tables are variables themselves."""
    layer, _, kind = name.rpartition(".")
    path = "model/" + re.sub(r"^h\.", "h", layer).replace(".", "/")
    if layer in ("wte", "wpe"):
        return path
    weight = "g" if layer.rpartition(".")[2].startswith("ln_") else "w"
    return f"{path}/{'b' if kind == 'bias' else weight}"


def _stored(bundle: Bundle, config: GPT2Config) -> dict[str, Stored]:
    names = {name: _their_name(name) for name in config.tensor_shapes()}
    _check_names(bundle, set(names.values()))
    stored = {}
    for ours, theirs in names.items():
        if theirs in bundle.entries:
            shape = _shape(bundle, theirs)
            stored[ours] = Stored(
                shape, bundle.dtype(theirs), partial(_read, bundle, theirs, shape)
            )
    return stored


def _check_names(bundle: Bundle, known: Collection[str]) -> None:
    """Raise for a variable of another model; what an optimizer keeps is passed over.

    That is its own, such as `beta1_power`, or goes with a variable, `model/wte/Adam`.
    """
    for name in bundle.entries:
        if name.startswith("model/") and name not in known and name.rpartition("/")[0] not in known:
            raise WeightsError(f"{bundle.index}: {name} is unknown: it does not fit the config")


def _read(bundle: Bundle, name: str, shape: tuple[int, ...]) -> Array:
    return bundle.read(name).reshape(shape)


def _shape(bundle: Bundle, name: str) -> tuple[int, ...]:
    """That of a tensor without the width of a convolution."""
    shape = bundle.entries[name].shape
    return shape[1:] if len(shape) == 3 and shape[0] == 1 else shape


# Config


def _config(path: Path, tokenizer: BytePairTokenizer | None) -> GPT2Config:
    found = _json(path, ConfigError)
    if missing := [name for name in SETTINGS if name not in found]:
        raise ConfigError(f"{path} has no {missing[0]}: fetch it again, or give a config.json")
    try:
        config = GPT2Config(**{ours: found[name] for name, ours in SETTINGS.items()})
        ends: dict[str, Any] = {**end_of_text(config.vocab_size, tokenizer)}
        return replace(config, **ends)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _config_of_shapes(bundle: Bundle) -> tuple[GPT2Config, tuple[str, ...]]:
    layers = {m[1] for name in bundle.entries if (m := re.match(r"model/h(\d+)/", name))}
    names = {n: _their_name(n) for n in GPT2Config(n_layer=max(1, len(layers))).tensor_shapes()}
    shapes = {ours: _shape(bundle, n) for ours, n in names.items() if n in bundle.entries}
    return config_of_shapes(shapes)


def _json(path: Path, error: type[ConfigError | TokenizerError]) -> dict[str, Any]:
    try:
        found = json.loads(_text(path, error))
    except (ValueError, RecursionError) as reason:
        raise error(f"{path} is not valid JSON ({reason}): fetch it again") from None
    if not isinstance(found, dict):
        raise error(f"{path} holds a {type(found).__name__}, expected a JSON object")
    return found


def _text(path: Path, error: type[ConfigError | TokenizerError]) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as reason:
        raise StorageError(f"{path} cannot be read ({reason.strerror or reason})") from reason
    except UnicodeDecodeError:
        raise error(f"{path} is not UTF-8: fetch it again") from None


# Tokenizer


def _tokenizer(folder: Path) -> BytePairTokenizer | None:
    """That of encoder.json and vocab.bpe: a vocab.json and a merges.txt."""
    encoder, merges_file = folder / "encoder.json", folder / "vocab.bpe"
    if not encoder.is_file() and not merges_file.is_file():
        return None
    for path in (encoder, merges_file):
        if not path.is_file():
            raise TokenizerError(f"{path} is missing, without which the other file is of no use")
    vocab = _json(encoder, TokenizerError)
    if set(map(type, vocab.values())) != {int} or sorted(vocab.values()) != list(range(len(vocab))):
        raise TokenizerError(f"{encoder} does not number its tokens from 0 on: fetch it again")
    lines = _text(merges_file, TokenizerError).split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    # A file that was cut at the end of a line would else be a tokenizer that splits differently.
    made = {merge.replace(" ", "") for merge in merges} | byte_of_letter().keys()
    for token in vocab:
        if token not in made and not re.fullmatch(r"<\|.*\|>", token):
            raise TokenizerError(
                f"{merges_file} has no line that makes the token {token[:64]!r} of {encoder.name}: "
                "perhaps it is truncated, fetch it again"
            )
    tokens = sorted(vocab, key=vocab.__getitem__)
    kinds = [CONTROL if token == END_OF_TEXT else NORMAL for token in tokens]
    return tokenizer_of(tokens, merges, kinds, f"{encoder} with {merges_file.name}")
