"""A byte-level BPE, trained on a text by the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Iterable

from gptx.errors import ParameterError, argument
from gptx.tokenization.byte_level import END_OF_TEXT
from gptx.tokenization.pipeline import PipelineTokenizer

MIN_VOCABULARY = 257  # the bytes, and <|endoftext|>
MIN_FREQUENCY = 2  # a pair that occurs once repeats nothing of the text


def train_bpe(texts: Iterable[str], vocab_size: int) -> PipelineTokenizer:
    """Train a byte-level BPE with GPT-2's split of a text, the same for the same texts.

    Parameters
    ----------
    texts
        Parts of the text. A part should not end within a word or within white space: no pair is
        counted across parts. `<|endoftext|>` separates parts.
    vocab_size
        Number of tokens: bytes, merges in their order, `<|endoftext|>` as the last. A short text
        gives fewer.

    Raises
    ------
    ParameterError
        The vocabulary is too small for the bytes.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    if vocab_size < MIN_VOCABULARY:
        raise ParameterError(
            f"{argument('vocab_size')} is {vocab_size}, expected at least {MIN_VOCABULARY}: all "
            f"bytes, and {END_OF_TEXT}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=MIN_FREQUENCY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    parts = (part for text in texts for part in text.split(END_OF_TEXT))
    tokenizer.train_from_iterator(parts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [(left, right) for left, right in model["merges"]]
    special = {END_OF_TEXT: len(model["vocab"])}
    return PipelineTokenizer.of_vocabulary(model["vocab"], merges, special)
