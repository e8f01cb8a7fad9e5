"""A GPT-2 tokenizer as the bytes of its tokens alone, in the order of their ids.

Some programs keep no merges. They need none to decode, and the order of the ids has them: training
made the tokens one after the other, each of two that were there before, so a token's merge is what
the merges before it leave of its bytes
(https://github.com/karpathy/minbpe, minbpe/gpt4.py: `recover_merges`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from gptx.tokenization.bpe import END_OF_TEXT, BytePairTokenizer, byte_of_letter


def merges_of(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]] | None:
    """The merges of a byte-level BPE, in order.

    Parameters
    ----------
    tokens
        In the order of their ids; single bytes are no merges.

    Returns
    -------
    list or None
        None if some token is not the merge of two before it.
    """
    ranks: dict[tuple[bytes, bytes], int] = {}
    for token in tokens:
        if len(token) > 1:
            parts = _merged(token, ranks)
            if len(parts) != 2:
                return None
            ranks[parts[0], parts[1]] = len(ranks)
    return list(ranks)


def _merged(token: bytes, ranks: dict[tuple[bytes, bytes], int]) -> list[bytes]:
    """What the merges make of a token's bytes: again and again the first of those that fit."""
    parts = [bytes([byte]) for byte in token]
    while True:
        fitting = [ranks[pair] for pair in pairwise(parts) if pair in ranks]
        if not fitting:
            return parts
        first, merged, i = min(fitting), [], 0
        while i < len(parts):
            here = i + 1 < len(parts) and ranks.get((parts[i], parts[i + 1])) == first
            merged.append(parts[i] + parts[i + 1] if here else parts[i])
            i += 2 if here else 1
        parts = merged


def tokenizer_of_bytes(tokens: Sequence[bytes]) -> BytePairTokenizer | None:
    """The tokenizer whose tokens these are; empty ones are ids without a token.

    Returns
    -------
    BytePairTokenizer or None
        None if they are not all single bytes, their merges in order, and <|endoftext|>.
    """
    end = END_OF_TEXT.encode()
    found = [token for token in tokens if token]
    if len(set(found)) < len(found):
        return None
    ordinary = {token: id for id, token in enumerate(tokens) if token not in (b"", end)}
    merges = merges_of(list(ordinary))
    if merges is None or sum(len(token) == 1 for token in ordinary) < 256:
        return None
    letter_of = {byte: letter for letter, byte in byte_of_letter().items()}

    def letters(token: bytes) -> str:
        return "".join(letter_of[byte] for byte in token)

    vocab = {letters(token): id for token, id in ordinary.items()}
    special = {END_OF_TEXT: tokens.index(end)} if end in tokens else {}
    pairs = [(letters(a), letters(b)) for a, b in merges]
    return BytePairTokenizer.of_vocabulary(vocab | special, pairs, special)
