"""A GPT-2 tokenizer as two lists: the tokens in the order of their ids, the merges in theirs.

So it lies in files of single-purpose programs, which know how GPT-2 splits a text. A vocabulary
that is smaller than the model's is filled with tokens named [PAD1024], as llama.cpp's converter
does it (https://github.com/ggml-org/llama.cpp, `get_vocab_base`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gptx.errors import TokenizerError
from gptx.tokenization.bpe import BytePairTokenizer, byte_of_letter

# Kinds of tokens, with llama.cpp's numbers (llama.h, `enum llama_token_type`).
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def lists_of(
    tokenizer: BytePairTokenizer, vocab_size: int, program: str
) -> tuple[list[str], list[int], list[str]]:
    """The tokens, their kinds, and the merges ("a b") of a tokenizer.

    Parameters
    ----------
    vocab_size
        The model's; so many tokens are returned.
    program
        What errors call whoever reads the lists.

    Raises
    ------
    TokenizerError
        It splits text in another way than GPT-2's, or has tokens that the model has not.
    """
    definition = tokenizer.definition()
    found = entries_of(definition, vocab_size)
    model, split = definition["model"], definition["pre_tokenizer"] or {}
    as_gpt2 = (
        not model.get("ignore_merges")
        and definition["normalizer"] is None
        and split.get("type") == "ByteLevel"
        and split.get("use_regex", True)
        and not split.get("add_prefix_space")
    )
    if not as_gpt2:
        raise TokenizerError(f"the tokenizer splits text otherwise than GPT-2's, {program}'s alone")
    entries = [found.get(id, (_pad(id), UNUSED)) for id in range(vocab_size)]
    merges = [" ".join(pair) for pair in model["merges"]]
    return [token for token, _ in entries], [kind for _, kind in entries], merges


def entries_of(definition: dict[str, Any], vocab_size: int) -> dict[int, tuple[str, int]]:
    """The tokens of a BPE tokenizer and their kinds by id.

    Parameters
    ----------
    definition
        The tokenizer's.
    vocab_size
        The model's.

    Raises
    ------
    TokenizerError
        It is no BPE, or has an id that the model has not.
    """
    model = definition["model"]
    if model["type"] != "BPE":
        raise TokenizerError(f"the tokenizer is of the type {model['type']}, expected BPE")
    found = {id: (token, NORMAL) for token, id in model["vocab"].items()}
    for added in definition["added_tokens"]:
        kind = CONTROL if added["special"] else USER_DEFINED
        found[added["id"]] = (added["content"], kind)
    if (largest := max(found, default=-1)) >= vocab_size:
        raise TokenizerError(
            f"the tokenizer has token {largest}, the model {vocab_size} tokens: give the "
            "tokenizer of this model"
        )
    return found


def tokenizer_of(
    tokens: Sequence[str], merges: Sequence[str], kinds: Sequence[int], what: str
) -> BytePairTokenizer:
    """The tokenizer that such lists are; fillers are left out.

    Parameters
    ----------
    kinds
        Of the tokens; empty if nothing is known of them.
    what
        What errors call the lists, a path for example.

    Raises
    ------
    TokenizerError
        They are none of a byte-level BPE.
    """
    if kinds and len(kinds) != len(tokens):
        raise TokenizerError(f"{what} has {len(tokens)} tokens, but the kinds of {len(kinds)}")
    ids = [
        id
        for id, token in enumerate(tokens)
        if token != _pad(id) or (kinds and kinds[id] != UNUSED)
    ]
    vocab = {tokens[id]: id for id in ids}
    if len(vocab) < len(ids):
        raise TokenizerError(f"{what} has a token twice: it is damaged")
    letters = byte_of_letter().keys()
    added = {t: id for t, id in vocab.items() if kinds and kinds[id] in (CONTROL, USER_DEFINED)}
    for token, id in vocab.items():
        if not token or not (token in added or letters >= set(token)):
            raise TokenizerError(f"{what}: token {id} is {token[:64]!r}, not byte-level BPE")
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not (left in vocab and right in vocab and left + right in vocab):
            raise TokenizerError(f"{what}: the merge {merge[:64]!r} makes no token: it is damaged")
        pairs.append((left, right))
    tokenizer = BytePairTokenizer.of_vocabulary(vocab, pairs, added)
    ordinary = {token for token, id in added.items() if kinds[id] == USER_DEFINED}
    if not ordinary:
        return tokenizer
    definition = tokenizer.definition()
    for entry in definition["added_tokens"]:
        entry["special"] = entry["content"] not in ordinary
    return BytePairTokenizer({}, definition=json.dumps(definition))


def _pad(id: int) -> str:
    return f"[PAD{id}]"
