"""The tokenizer of a corpus: one that exists, or one that is made of the text."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from gptx.config import MAX_SIZE, GPT2Config
from gptx.errors import ParameterError, argument
from gptx.tokenization import training
from gptx.tokenization.characters import character_tokenizer
from gptx.tokenization.pipeline import PipelineTokenizer
from gptx.tokenization.protocol import Tokenizer
from gptx.tokenization.vowels import count_vowel_pieces, vowel_tokenizer
from gptx.training.data.chunks import last_space, split_into_chunks
from gptx.training.data.texts import Progress, TextFile, read_range, without_marks

CHARACTERS, VOWELS = "characters", "vowels"
VOWEL_TOKENS = 1024  # of a vocabulary of vowel pieces
PART_CHARACTERS = 2**12  # given to the library at a time, which keeps 256 parts in memory
MAX_PIECES = 2**20  # that are counted; of more, the most frequent half is kept

TokenizerSource = str | os.PathLike[str] | Tokenizer


def check_source(source: TokenizerSource, vocab_size: int | None, train_bpe: int | None) -> None:
    """Check the options of `make_tokenizer` before any text is read."""
    if vocab_size is not None and source != VOWELS:
        raise ParameterError(
            f"{argument('vocab_size')} is for {argument('tokenizer', VOWELS)} only: leave it out, "
            f"or give {argument('train_bpe', vocab_size)} for a vocabulary of this size"
        )
    if train_bpe is not None and train_bpe < training.MIN_VOCABULARY:
        raise ParameterError(
            f"{argument('train_bpe')} is {train_bpe}, expected a number of tokens of at least "
            f"{training.MIN_VOCABULARY}: all bytes, and the end of a text"
        )
    if train_bpe is not None and source != CHARACTERS:
        raise ParameterError(
            f"{argument('train_bpe')} makes a tokenizer, and {argument('tokenizer')} names "
            "another one: give one of them"
        )


def make_tokenizer(
    source: TokenizerSource,
    files: Sequence[TextFile],
    characters: Iterable[str],
    *,
    vocab_size: int | None = None,
    train_bpe: int | None = None,
    end_of_text: bool = False,
    offline: bool = False,
    progress: Progress | None = None,
) -> Tokenizer:
    """Return a tokenizer that exists, or make one of the text.

    Parameters
    ----------
    source, vocab_size, train_bpe, offline
        See `gptx.training.data.prepare.prepare`.
    files, characters
        The text, and its characters.
    end_of_text
        Add `<|endoftext|>` to a vocabulary of characters or vowel pieces.
    """
    if train_bpe is not None:
        texts = _chunks(files, progress)
        return training.train_bpe(texts, train_bpe)
    if source == CHARACTERS:
        return character_tokenizer(characters, end_of_text=end_of_text)
    if source == VOWELS:
        pieces = count_pieces(_chunks(files, progress))
        size = VOWEL_TOKENS if vocab_size is None else vocab_size
        return vowel_tokenizer(pieces, characters, size, end_of_text=end_of_text)
    if isinstance(source, str | os.PathLike):
        return read_tokenizer(source, offline=offline)
    return source


def read_tokenizer(source: str | os.PathLike[str], *, offline: bool = False) -> PipelineTokenizer:
    """Read the tokenizer of a folder or of a model.

    Raises
    ------
    NotFoundError
        The source does not exist, or has no tokenizer.
    TokenizerError
        The tokenizer is damaged.
    """
    from gptx.conversions.reading import read_tokenizer

    any_size = GPT2Config(vocab_size=MAX_SIZE)
    return read_tokenizer(source, any_size, offline=offline)


def count_pieces(texts: Iterator[str]) -> Counter[str]:
    """Count the vowel pieces of a text, in limited memory.

    The counts are exact up to `MAX_PIECES` different pieces.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(count_vowel_pieces(text))
        if len(counts) > MAX_PIECES:
            counts = Counter(dict(counts.most_common(MAX_PIECES // 2)))
    return counts


def _chunks(files: Sequence[TextFile], progress: Progress | None) -> Iterator[str]:
    """Yield the text in small chunks that end before white space."""
    parts = (
        text[first : first + PART_CHARACTERS]
        for text in without_marks(read_range(files, progress=progress))
        for first in range(0, len(text), PART_CHARACTERS)
    )
    return without_marks(split_into_chunks(parts, last_space))
