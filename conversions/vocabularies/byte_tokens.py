"""A GPT-2 tokenizer from the bytes of its tokens, in the order of their ids.

Some programs store no merges: decoding needs none. The order of the ids implies them, because
training merges two existing tokens into each new one. The merge of a token is the pair that remains
after the earlier merges are applied to its bytes
(https://github.com/karpathy/minbpe, minbpe/gpt4.py: `recover_merges`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from gptx.tokenization.byte_level import END_OF_TEXT, byte_of_letter
from gptx.tokenization.pipeline import PipelineTokenizer


def recover_merges(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]] | None:
    """Recover the merges of a byte-level BPE.

    Parameters
    ----------
    tokens
        Bytes of the tokens in the order of their ids; single bytes need no merge.

    Returns
    -------
    list or None
        The merges in order; None if a token is not the merge of two tokens before it.
    """
    ranks: dict[tuple[bytes, bytes], int] = {}
    for token in tokens:
        if len(token) > 1:
            parts = _apply_merges(token, ranks)
            if len(parts) != 2:
                return None
            ranks[parts[0], parts[1]] = len(ranks)
    return list(ranks)


def _apply_merges(token: bytes, ranks: dict[tuple[bytes, bytes], int]) -> list[bytes]:
    """Apply the merges to the bytes of a token, the one of the lowest rank first."""
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


def tokenizer_from_bytes(tokens: Sequence[bytes]) -> PipelineTokenizer | None:
    """Make the tokenizer of these tokens.

    Parameters
    ----------
    tokens
        Bytes of the tokens in the order of their ids; empty for an id without a token.

    Returns
    -------
    PipelineTokenizer or None
        None if the tokens are something else than the 256 bytes, merges in order, and optionally
        <|endoftext|>.
    """
    end = END_OF_TEXT.encode()
    found = [token for token in tokens if token]
    if len(set(found)) < len(found):
        return None
    ordinary = {token: id for id, token in enumerate(tokens) if token not in (b"", end)}
    merges = recover_merges(list(ordinary))
    if merges is None or sum(len(token) == 1 for token in ordinary) < 256:
        return None
    letter_of = {byte: letter for letter, byte in byte_of_letter().items()}

    def letters(token: bytes) -> str:
        return "".join(letter_of[byte] for byte in token)

    vocab = {letters(token): id for token, id in ordinary.items()}
    special = {END_OF_TEXT: tokens.index(end)} if end in tokens else {}
    pairs = [(letters(a), letters(b)) for a, b in merges]
    return PipelineTokenizer.of_vocabulary(vocab, pairs, special)
