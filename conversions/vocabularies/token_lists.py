"""A GPT-2 tokenizer as two lists: tokens in the order of their ids, and merges in order.

Programs that support only GPT-2's way to split a text store these lists. Ids of the model without
a token get filler tokens named [PAD1024], as in llama.cpp's converter
(https://github.com/ggml-org/llama.cpp, `get_vocab_base`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from gptx.errors import TokenizerError
from gptx.tokenization.byte_level import byte_of_letter
from gptx.tokenization.pipeline import PipelineTokenizer

# llama.cpp's numbers of the kinds of tokens (llama.h, `enum llama_token_type`).
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def token_lists(
    tokenizer: PipelineTokenizer, vocab_size: int, program: str
) -> tuple[list[str], list[int], list[str]]:
    """Return the tokens of a tokenizer, their kinds, and its merges ("a b").

    Parameters
    ----------
    vocab_size
        Vocabulary of the model: the number of tokens to return.
    program
        Name of the program that reads the lists, for error messages.

    Raises
    ------
    TokenizerError
        The tokenizer splits text differently from GPT-2's, or has an id beyond the vocabulary.
    """
    definition = tokenizer.definition()
    found = tokens_by_id(definition, vocab_size)
    if difference := _difference_from_gpt2(definition):
        raise TokenizerError(
            f"the tokenizer has {difference}, {program} supports only GPT-2's byte-level BPE: "
            "convert to a folder of safetensors"
        )
    names = {token for token, _ in found.values()}
    entries = [found.get(id) or (_filler(id, names), UNUSED) for id in range(vocab_size)]
    merges = [" ".join(pair) for pair in definition["model"]["merges"]]
    return [token for token, _ in entries], [kind for _, kind in entries], merges


def _difference_from_gpt2(definition: dict[str, Any]) -> str | None:
    """Name a part of a BPE tokenizer that splits text differently from GPT-2's."""
    model, split = definition["model"], definition["pre_tokenizer"] or {}
    if (normalizer := definition["normalizer"]) is not None:
        return f"a normalizer ({normalizer['type']})"
    if split.get("type") != "ByteLevel":
        return f"the pre-tokenizer {split.get('type', 'none')}"
    if not split["use_regex"]:
        return "a pre-tokenizer without GPT-2's pattern (use_regex: false)"
    if split.get("add_prefix_space"):
        return "add_prefix_space: true"
    for name in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            return f"{name}: {json.dumps(model[name])}"
    return None


def flags_of_added_tokens(tokenizer: PipelineTokenizer) -> dict[str, list[str]]:
    """Return added token -> its flags that token lists cannot represent, and that change ids.

    The flag `normalized` changes nothing: GPT-2's tokenizer has no normalizer.
    """
    flags = ("lstrip", "rstrip", "single_word")
    found = {
        token["content"]: [flag for flag in flags if token[flag]]
        for token in tokenizer.definition()["added_tokens"]
    }
    return {token: names for token, names in found.items() if names}


def tokens_by_id(definition: dict[str, Any], vocab_size: int) -> dict[int, tuple[str, int]]:
    """Return id -> token and kind, for a BPE tokenizer.

    Parameters
    ----------
    definition
        Content of its tokenizer.json.
    vocab_size
        Vocabulary of the model.

    Raises
    ------
    TokenizerError
        The tokenizer is not a BPE, or has an id beyond the vocabulary.
    """
    model = definition["model"]
    if model["type"] != "BPE":
        raise TokenizerError(
            f"the tokenizer is of the type {model['type']}, expected a byte-level BPE: convert to "
            "a folder of safetensors"
        )
    found = {id: (token, NORMAL) for token, id in model["vocab"].items()}
    for added in definition["added_tokens"]:
        kind = CONTROL if added["special"] else USER_DEFINED
        found[added["id"]] = (added["content"], kind)
    if (largest := max(found, default=-1)) >= vocab_size:
        raise TokenizerError(
            f"the tokenizer has the token id {largest}, the model {vocab_size} tokens: give the "
            "tokenizer of this model"
        )
    return found


def tokenizer_from_lists(
    tokens: Sequence[str], merges: Sequence[str], kinds: Sequence[int], source: str
) -> PipelineTokenizer:
    """Make a tokenizer of token lists, without the fillers.

    Parameters
    ----------
    kinds
        Kinds of the tokens; empty if they are unknown.
    source
        Name of the lists in error messages, a path for example.

    Raises
    ------
    TokenizerError
        The lists are not those of a byte-level BPE.
    """
    if kinds and len(kinds) != len(tokens):
        raise TokenizerError(f"{source} has {len(tokens)} tokens, but {len(kinds)} token types")
    ids = [
        id
        for id, token in enumerate(tokens)
        if token.rstrip("_") != _pad(id) or (kinds and kinds[id] != UNUSED)
    ]
    vocab = {tokens[id]: id for id in ids}
    if len(vocab) < len(ids):
        raise TokenizerError(f"{source} is damaged: it has a duplicate token")
    letters = byte_of_letter().keys()
    added = {t: id for t, id in vocab.items() if kinds and kinds[id] in (CONTROL, USER_DEFINED)}
    for token, id in vocab.items():
        if not token or not (token in added or letters >= set(token)):
            raise TokenizerError(f"{source}: token {id} is {token[:64]!r}, not byte-level BPE")
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not (left in vocab and right in vocab and left + right in vocab):
            raise TokenizerError(f"{source} is damaged: the merge {merge[:64]!r} makes no token")
        pairs.append((left, right))
    tokenizer = PipelineTokenizer.of_vocabulary(vocab, pairs, added)
    ordinary = {token for token, id in added.items() if kinds[id] == USER_DEFINED}
    if not ordinary:
        return tokenizer
    definition = tokenizer.definition()
    for entry in definition["added_tokens"]:
        entry["special"] = entry["content"] not in ordinary
    return PipelineTokenizer({}, definition=json.dumps(definition))


def _filler(id: int, tokens: Collection[str]) -> str:
    """Return the filler of an id without a token; none of the tokens has its name."""
    name = _pad(id)
    while name in tokens:
        name += "_"
    return name


def _pad(id: int) -> str:
    return f"[PAD{id}]"
