"""The tokenizer in the metadata of a GGUF: lists of tokens, ids of special tokens.

The keys are those of llama.cpp's converter (https://github.com/ggml-org/llama.cpp,
gguf-py/gguf/vocab.py). llama.cpp reads them in src/llama-vocab.cpp (`llama_vocab::impl::load`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from gptx.config import GPT2Config
from gptx.conversions.containers.gguf import GgufFile, describe_value
from gptx.conversions.vocabularies.token_lists import (
    CONTROL,
    UNUSED,
    USER_DEFINED,
    flags_of_added_tokens,
    token_lists,
    tokenizer_from_lists,
)
from gptx.errors import TokenizerError
from gptx.tokenization.byte_level import END_OF_TEXT
from gptx.tokenization.pipeline import PipelineTokenizer
from gptx.tokenization.saving import TEMPLATE

# llama.cpp ends each text at this token (a comma in OpenAI's vocabulary) if a BPE tokenizer has no
# valid end of text.
DEFAULT_EOS = 11
SPLITS = ("gpt-2", "phi-2")  # names of GPT-2's pattern in `tokenizer.ggml.pre`
NO_TOKENIZER = ("none", "no_vocab")
ENDS = ("eos", "eot", "eom")  # of a text, a turn, a message: llama.cpp ends a text at each
# Kind in GGUF -> kind in tokenizer_config.json.
NAMED_TOKENS = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}


def read_tokenizer(file: GgufFile, V: int) -> PipelineTokenizer | None:
    """Make the tokenizer of a file; None if the file has none.

    Parameters
    ----------
    V
        Vocabulary of the model.

    Raises
    ------
    TokenizerError, WeightsError
        The tokenizer is not GPT-2's byte-level BPE, or is damaged.
    """
    path, metadata = file.file.path, file.metadata
    model, split = (file.scalar(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if model is None or model in NO_TOKENIZER:
        return None
    if model != "gpt2" or split not in (None, *SPLITS):
        raise TokenizerError(
            f"{path} has the tokenizer {describe_value(model)}, {describe_value(split)}, expected "
            "'gpt2', 'gpt-2'"
        )
    tokens, merges = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "merges"))
    kinds = metadata.get("tokenizer.ggml.token_type", np.empty(0, np.int32))
    if not (
        isinstance(tokens, list) and isinstance(merges, list) and isinstance(kinds, np.ndarray)
    ):
        raise TokenizerError(f"{path} has a tokenizer without lists of tokens and merges")
    if len(tokens) != V:
        raise TokenizerError(f"{path} has {len(tokens)} tokens, expected {V} by its embedding")
    tokenizer = tokenizer_from_lists(tokens, merges, kinds.tolist(), str(path))
    tokenizer.settings = replace(tokenizer.settings, options=_options(metadata, tokens, kinds))
    return tokenizer


def _options(metadata: Mapping[str, Any], tokens: list[str], kinds: np.ndarray) -> dict[str, str]:
    """Return the special tokens and the chat template, named as in tokenizer_config.json.

    An ordinary token is not named: transformers would then find it in any text, as a special one.
    """
    options = {}
    for kind, name in NAMED_TOKENS.items():
        id = metadata.get(f"tokenizer.ggml.{kind}_token_id")
        if isinstance(id, int) and 0 <= id < len(kinds) and kinds[id] in (CONTROL, USER_DEFINED):
            options[f"{name}_token"] = tokens[id]
    template = metadata.get("tokenizer.chat_template")
    return options | ({"chat_template": template} if isinstance(template, str) else {})


def end_of_text_ids(metadata: Mapping[str, Any], V: int) -> dict[str, Any]:
    """Return `bos_token_id` and `eos_token_id`, without fillers and ids beyond the vocabulary."""
    kinds = metadata.get("tokenizer.ggml.token_type")

    def ids(*names: str) -> tuple[int, ...]:
        found = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names]
        valid = [id for id in found if isinstance(id, int) and 0 <= id < V]
        if isinstance(kinds, np.ndarray) and len(kinds) == V:
            valid = [id for id in valid if kinds[id] != UNUSED]
        return tuple(valid)

    return {"bos_token_id": next(iter(ids("bos")), None), "eos_token_id": ids(*ENDS)}


def tokenizer_metadata(
    config: GPT2Config, tokenizer: PipelineTokenizer | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the metadata of a tokenizer, and notes on what llama.cpp does differently.

    Raises
    ------
    TokenizerError
        llama.cpp would split text differently.
    """
    V = config.vocab_size
    ids, notes = _config_ids(config)
    metadata: dict[str, Any] = {"tokenizer.ggml.model": "none"}  # for token ids only
    if tokenizer is not None:
        tokens, kinds, merges = token_lists(tokenizer, V, "llama.cpp")
        metadata = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": SPLITS[0],
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.merges": merges,
        }
        if template := _chat_template(tokenizer):
            metadata["tokenizer.chat_template"] = template
        ids = _named_ids(tokenizer, tokens) | ids
        if "eos" not in ids and V > DEFAULT_EOS:
            if UNUSED in kinds:
                ids["eos"] = kinds.index(UNUSED)
            else:
                notes.append(
                    "the model has no end of text: llama.cpp ends each text at token "
                    f"{DEFAULT_EOS}, {tokens[DEFAULT_EOS]!r}"
                )
        notes += _flag_notes(tokenizer)
    metadata |= {f"tokenizer.ggml.{kind}_token_id": id for kind, id in ids.items()}
    return metadata, tuple(notes)


def _config_ids(config: GPT2Config) -> tuple[dict[str, int], list[str]]:
    """Return the ids that a config names, by their kinds, and notes on those left out."""
    V, notes = config.vocab_size, []
    starts = () if config.bos_token_id is None else (config.bos_token_id,)
    ids: dict[str, int] = {}
    for kinds, given in ((("bos",), starts), (ENDS, config.eos_token_ids)):
        for id in given:
            if not 0 <= id < V:
                notes.append(f"{kinds[0]}_token_id {id} is no id of the {V} tokens: it is left out")
        valid = [id for id in given if 0 <= id < V]
        ids |= zip(kinds, valid, strict=False)
        for id in valid[len(kinds) :]:
            notes.append(f"GGUF has no place for {len(valid)} ends of text: {id} is left out")
    return ids, notes


def _named_ids(tokenizer: PipelineTokenizer, tokens: list[str]) -> dict[str, int]:
    """Return the ids of the special tokens that the tokenizer names.

    llama.cpp ends texts at <|endoftext|> anyway.
    """
    named = {"eos_token": END_OF_TEXT} | tokenizer.settings.named_tokens()
    found = {kind: named.get(f"{name}_token") for kind, name in NAMED_TOKENS.items()}
    return {kind: tokens.index(token) for kind, token in found.items() if token in tokens}


def _chat_template(tokenizer: PipelineTokenizer) -> str | None:
    """Return the chat template of the tokenizer's settings, or in the file beside them."""
    template = tokenizer.settings.options.get("chat_template")
    if isinstance(template, str):
        return template
    path = tokenizer.folder and tokenizer.folder / TEMPLATE
    return path.read_text("utf-8", errors="replace") if path and path.is_file() else None


def _flag_notes(tokenizer: PipelineTokenizer) -> Iterator[str]:
    """Yield a note for each added token with flags that GGUF does not have."""
    for token, flags in flags_of_added_tokens(tokenizer).items():
        yield (
            f"llama.cpp ignores {' and '.join(flags)} of the added token {token!r}: it splits some "
            "texts with it differently"
        )
