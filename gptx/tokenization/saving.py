"""The files of a tokenizer, under the names that transformers and mlx-lm expect.

Files of the source are carried over. The others are derived from the tokenizer, so that versions 4
and 5 of transformers give the same ids.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptx.errors import StorageError
from gptx.files import atomic_file
from gptx.tokenization.byte_level import END_OF_TEXT
from gptx.tokenization.files import (
    ADDED_TOKENS,
    MERGES,
    SETTINGS,
    SPECIAL_TOKENS,
    TOKENIZER,
    VOCAB,
    WORDS,
    read_object,
)
from gptx.tokenization.finding import SENTENCEPIECE
from gptx.tokenization.pipeline import PipelineTokenizer
from gptx.tokenization.protocol import Tokenizer
from gptx.tokenization.settings import GPT2, read_settings

TEMPLATE = "chat_template.jinja"
TEMPLATES = (TEMPLATE, "chat_template.json")

UNREAD_FILES = (*SENTENCEPIECE, WORDS, SETTINGS, ADDED_TOKENS, SPECIAL_TOKENS, *TEMPLATES)

# The class that reads a tokenizer.json as it is, in both versions; version 5 has a new name for it.
ANY_CLASS, NEW_ANY_CLASS = "PreTrainedTokenizerFast", "TokenizersBackend"
# Settings that name other files, other places or code.
_ELSEWHERE = (
    *("auto_map", "custom_pipelines", "init_inputs", "name_or_path", "_commit_hash"),
    *("tokenizer_file", "vocab_file", "merges_file", "added_tokens_file"),
    *("special_tokens_map_file", "chat_template_file"),
)


def save_tokenizer(
    tokenizer: Tokenizer,
    folder: Path,
    *,
    context: int | None = None,
    bos_id: int | None = None,
    eos_ids: Sequence[int] = (),
) -> None:
    """Write the files of a tokenizer: those it was read from, tokenizer.json and its settings.

    Each file is written atomically. vocab.json and merges.txt are written only if GPT2Tokenizer
    gives the same ids with them. A tokenizer of the caller writes itself with its method
    `save(folder)`, if it has one.

    Parameters
    ----------
    folder
        A folder that exists.
    context
        Context of the model in tokens, for settings that lack it.
    bos_id, eos_ids
        Ids of special tokens in the model's config, for settings that do not name them.

    Raises
    ------
    StorageError
        A file cannot be read or written.
    """
    if not isinstance(tokenizer, PipelineTokenizer):
        if callable(save := getattr(tokenizer, "save", None)):
            save(folder)
        return
    definition = tokenizer.definition()
    carried = dict(tokenizer.files)
    for name in (*TEMPLATES, *SENTENCEPIECE):  # slow tokenizers need the latter
        if (path := tokenizer.folder and tokenizer.folder / name) and path.is_file():
            carried[name] = path
    options = read_object(carried, SETTINGS)
    if options:
        options = _adapted(options, tokenizer, definition)
    else:
        options = _derived_options(tokenizer, definition, context, bos_id, eos_ids)
    if TEMPLATE in carried:  # version 4 reads it from the settings only
        template = carried[TEMPLATE].read_text(encoding="utf-8", errors="replace")
        options.setdefault("chat_template", template)
    carried.pop(SETTINGS, None)
    _write_settings(folder, options)
    if tokenizer.settings.cls == GPT2 and options["tokenizer_class"] == ANY_CLASS:
        carried.pop(TOKENIZER, None)  # GPT2Tokenizer sets the prefix space, this class does not
    for name, path in carried.items():
        copy_file(path, folder / name)
    if TOKENIZER not in carried:
        _write_json(folder / TOKENIZER, definition)
    if not carried.keys() & {VOCAB, MERGES} and is_gpt2(definition):
        model = definition["model"]
        _write_json(folder / VOCAB, model["vocab"])
        merges = "".join(" ".join(pair) + "\n" for pair in model["merges"])
        with atomic_file(folder / MERGES) as file:
            file.write(f"#version: 0.2\n{merges}".encode())


def is_gpt2(definition: Mapping[str, Any]) -> bool:
    """Test for a tokenizer.json that GPT2Tokenizer represents: byte-level BPE and GPT-2's split.

    That class makes everything but the vocabulary, the merges and the added tokens itself.
    """
    model, split = definition["model"], definition["pre_tokenizer"] or {}
    plain = ("unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    flags = ("fuse_unk", "byte_fallback", "ignore_merges")
    return (
        model["type"] == "BPE"
        and not any(model.get(name) for name in (*plain, *flags))
        and definition["normalizer"] is None
        and split.get("type") == "ByteLevel"
        and split["use_regex"]
        and (definition["decoder"] or {}).get("type") == "ByteLevel"
    )


def _class_of(tokenizer: PipelineTokenizer, definition: Mapping[str, Any]) -> str:
    """Return the class for a tokenizer whose settings do not name one."""
    cls = tokenizer.settings.cls
    return ANY_CLASS if cls == GPT2 and not is_gpt2(definition) else cls


def _adapted(
    options: dict[str, Any], tokenizer: PipelineTokenizer, definition: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings of the source without code and paths, for both versions."""
    has_code = "auto_map" in options
    options = _without_places(options)
    cls = options.get("tokenizer_class")
    if cls == NEW_ANY_CLASS or has_code:
        options["tokenizer_class"] = ANY_CLASS
    elif cls is None:
        options["tokenizer_class"] = _class_of(tokenizer, definition)
    if isinstance(options.get("extra_special_tokens"), list):  # version 4 expects an object
        options.setdefault("additional_special_tokens", options.pop("extra_special_tokens"))
    return options


def _without_places(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in _ELSEWHERE}


def _derived_options(
    tokenizer: PipelineTokenizer,
    definition: Mapping[str, Any],
    context: int | None,
    bos_id: int | None,
    eos_ids: Sequence[int],
) -> dict[str, Any]:
    """Return settings for a source that has none."""
    tokens = {token["id"]: token["content"] for token in definition["added_tokens"]}
    end = END_OF_TEXT if tokenizer.end_of_text_id is not None else None
    names = {
        "bos_token": tokens.get(bos_id, end),
        "eos_token": next((tokens[id] for id in eos_ids if id in tokens), end),
        "unk_token": end,
    }
    cls = _class_of(tokenizer, definition)
    if cls != GPT2:  # whose own names are those of GPT-2
        names = {name: token for name, token in names.items() if token is not None}
    split = definition["pre_tokenizer"] or {}
    if "add_prefix_space" in split:
        names["add_prefix_space"] = split["add_prefix_space"]
    options: dict[str, Any] = {"tokenizer_class": cls}
    if context is not None:
        options["model_max_length"] = context
    options |= names
    if cls == ANY_CLASS:  # version 4 would leave out spaces before punctuation
        options["clean_up_tokenization_spaces"] = False
    return options | dict(tokenizer.settings.options)


def write_unread_tokenizer(files: Mapping[str, Path], folder: Path) -> None:
    """Copy the files of a tokenizer that gptx does not read.

    Parameters
    ----------
    files
        Name -> path, of those in `UNREAD_FILES` that exist.
    """
    if not any(name in files for name in (*SENTENCEPIECE, WORDS)):
        return
    settings = read_settings(files)
    options = _without_places(read_object(files, SETTINGS))
    _write_settings(folder, {"tokenizer_class": settings.cls, **options})
    for name in UNREAD_FILES:
        if name in files and name != SETTINGS:
            copy_file(files[name], folder / name)


def copy_file(source: Path, destination: Path) -> None:
    """Copy the contents of a file.

    Raises
    ------
    StorageError
        The source cannot be read.
    """
    try:
        with open(source, "rb") as data, atomic_file(destination) as file:
            shutil.copyfileobj(data, file)
    except OSError as error:
        if str(error.filename) == str(source):
            raise StorageError(f"{source} cannot be read ({error.strerror or error})") from error
        raise


def _write_settings(folder: Path, options: dict[str, Any]) -> None:
    with atomic_file(folder / SETTINGS) as file:  # ASCII: a source may have lone surrogates
        file.write((json.dumps(options, indent=2) + "\n").encode())


def _write_json(path: Path, data: Any) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(data, ensure_ascii=False).encode())
