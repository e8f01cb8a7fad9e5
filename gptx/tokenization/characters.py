"""A vocabulary of characters, as in nanoGPT's recipe for Shakespeare."""

from __future__ import annotations

from collections.abc import Iterable

from gptx.tokenization.byte_level import END_OF_TEXT
from gptx.tokenization.pipeline import PipelineTokenizer


def character_tokenizer(
    characters: Iterable[str], *, end_of_text: bool = False
) -> PipelineTokenizer:
    """Make a tokenizer whose tokens are characters, in the order of Unicode.

    The ids are those of nanoGPT's `data/shakespeare_char/prepare.py`. A character without a token
    is a PromptError.

    Parameters
    ----------
    characters
        Characters of a text, in any order; duplicates do not matter.
    end_of_text
        Also add `<|endoftext|>`, as the last token.
    """
    return PipelineTokenizer.of_pieces(
        sorted(set(characters)), special=[END_OF_TEXT] if end_of_text else []
    )
