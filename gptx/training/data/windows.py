"""Batches of windows of a corpus, in an order that the seed and the step decide.

A window has T + 1 tokens: T inputs, and T targets one token later. The windows of an epoch stand
side by side, and each is used once. `batch(step)` needs no step before it, so that a resumed run
gets the batches that it would have got.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from gptx.backends.backward import Batch
from gptx.config import GPT2Config
from gptx.errors import DataError, ParameterError, argument
from gptx.generation.checks import check_count
from gptx.tokenization.pipeline import PipelineTokenizer
from gptx.tokenization.protocol import Tokenizer
from gptx.training.data.token_files import TokenFiles

Array = np.ndarray

ORDER_STREAM = 1  # the second word of the key of Philox; dropout has 0, initialization 2


class TrainingData(Protocol):
    """Batches for training, and batches for validation.

    Attributes
    ----------
    tokenizer
        Tokenizer of the ids; None if the files name none.
    context
        T, maximum number of tokens of a sequence.
    batch_size
        B, number of sequences of a batch.
    """

    tokenizer: Tokenizer | None
    context: int
    batch_size: int

    @property
    def sequences_per_epoch(self) -> int:
        """Number of sequences of an epoch."""

    @property
    def has_validation(self) -> bool:
        """True if there are batches for validation."""

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0; it depends on the seed and the step only."""

    def validation_batches(self, n: int | None = None) -> Iterator[Batch]:
        """Yield all batches for validation, or `n` that are spread evenly over the split.

        They are always the same. The last batch of the split can have fewer sequences.
        """

    def describe(self) -> dict[str, Any]:
        """Return numbers that tell these data from others, as JSON has them, without paths."""

    def check(self, config: GPT2Config, tokenizer: Tokenizer | None = None) -> None:
        """Check the context, the vocabulary and the ids before the first step.

        Parameters
        ----------
        config
            Config of the model.
        tokenizer
            Tokenizer of the model; None for that of the data.

        Raises
        ------
        ParameterError
            The context is longer than that of the model.
        DataError
            The data have an id that the model lacks, or another tokenizer.
        """


class EpochOrder:
    """The order of `n` sequences in each epoch, without replacement.

    The numbers are those of `np.random.Philox`, so that they are the same on every machine.

    Parameters
    ----------
    n
        Number of sequences.
    n_offsets
        Number of offsets, of which each epoch has one.
    seed
        At least 0, below 2^64.
    """

    def __init__(self, n: int, seed: int, n_offsets: int = 1) -> None:
        self.n = n
        self.seed = check_seed(seed)
        self._n_offsets = n_offsets
        self._epochs: dict[int, tuple[int, Array]] = {}

    def batch(self, step: int, size: int) -> list[tuple[int, int]]:
        """Return the sequences of a step: their numbers, and the offsets of their epochs.

        A batch can begin in one epoch and end in the next: no sequence is left out.
        """
        first = step * size
        chosen = []
        for position in range(first, first + size):
            offset, order = self.epoch(position // self.n)
            chosen.append((int(order[position % self.n]), offset))
        return chosen

    def epoch(self, epoch: int) -> tuple[int, Array]:
        """Return the offset of an epoch, and its order: a permutation [n] of 0 to n - 1."""
        if epoch not in self._epochs:
            counter, key = [0, epoch, 0, 0], [self.seed, ORDER_STREAM]
            words = np.random.Philox(counter=counter, key=key).random_raw(self.n + 1)
            order = np.argsort(words[1:], kind="stable").astype(np.uint32)
            recent = {key: value for key, value in self._epochs.items() if key == epoch - 1}
            self._epochs = recent | {epoch: (int(words[0] % np.uint64(self._n_offsets)), order)}
        return self._epochs[epoch]


class TokenData:
    """The windows of a corpus of token files.

    An epoch has (n - T) // T windows of n tokens, at least one. Its first window begins at an
    offset below T or so, another one in each epoch. So each token is a target once an epoch, except
    for fewer than 2 T tokens at the two ends. These are others in the next epoch.

    Parameters
    ----------
    train, validation
        Token files of the two splits; None for no validation.
    context
        T, number of tokens of a sequence.
    batch_size
        B, number of sequences of a batch.
    seed
        Key of the order, at least 0, below 2^64.
    tokenizer
        Tokenizer of the ids; None if it is unknown.

    Attributes
    ----------
    train, validation, context, batch_size, tokenizer
        The parameters.

    Raises
    ------
    ParameterError
        A number is out of range.
    DataError
        A split is shorter than a window.
    """

    def __init__(
        self,
        train: TokenFiles,
        validation: TokenFiles | None = None,
        *,
        context: int,
        batch_size: int,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.context = check_count("context", context)
        self.batch_size = check_count("batch_size", batch_size)
        self.train, self.validation = train, validation
        self.tokenizer = tokenizer
        if train.n_tokens < context + 1:
            raise DataError(
                f"{train.name} has {train.n_tokens} tokens, expected at least {context + 1}, one "
                f"more than the context: lower {argument('context')}, or give a longer text"
            )
        if validation is not None and validation.n_tokens < 2:
            raise DataError(
                f"{validation.name} has {validation.n_tokens} tokens, expected at least 2 for the "
                "validation: give a longer text"
            )
        n_windows = max(1, (train.n_tokens - context) // context)
        slack = train.n_tokens - 1 - n_windows * context
        self._order = EpochOrder(n_windows, seed, n_offsets=slack + 1)

    @property
    def sequences_per_epoch(self) -> int:
        return self._order.n

    @property
    def has_validation(self) -> bool:
        return self.validation is not None

    def batch(self, step: int) -> Batch:
        T = self.context
        chosen = self._order.batch(step, self.batch_size)
        firsts = [offset + number * T for number, offset in chosen]
        windows = self.train.windows(firsts, T + 1).astype(np.int64)
        weights = np.ones((self.batch_size, T), np.float32)
        return Batch(windows[:, :-1], windows[:, 1:], weights)

    def validation_batches(self, n: int | None = None) -> Iterator[Batch]:
        """Yield all batches for validation, or `n` that are spread evenly over the split.

        The windows cover the split from its start, without overlap; the last one is padded. Each
        token but the first is a target once. The last batch can have fewer sequences.
        """
        if self.validation is None:
            return
        B, T = self.batch_size, self.context
        n_targets = self.validation.n_tokens - 1
        for index in spread(n, -(-n_targets // (B * T))):
            first = index * B * T
            count = min(B * T, n_targets - first)
            tokens = self.validation.read(first, count + 1).astype(np.int64)
            shape = (-(-count // T), T)
            yield Batch(
                _in_rows(tokens[:-1], shape),
                _in_rows(tokens[1:], shape),
                _in_rows(np.ones(count, np.float32), shape),
            )

    def check(self, config: GPT2Config, tokenizer: Tokenizer | None = None) -> None:
        check_context(self.context, config)
        check_tokenizers(self.tokenizer, tokenizer)
        for files in (self.train, self.validation):
            if files is not None:
                files.check_ids(config.vocab_size)

    def describe(self) -> dict[str, Any]:
        splits = {"train": self.train, "validation": self.validation}
        return {
            "kind": "tokens",
            "context": self.context,
            "sequences": self.batch_size,
            "seed": self._order.seed,
            **{f"{name} tokens": files.n_tokens if files else 0 for name, files in splits.items()},
            **{
                f"{name} checksum": files.checksum() if files else 0
                for name, files in splits.items()
            },
        }


def spread(n: int | None, total: int) -> Iterator[int]:
    """Yield `n` numbers that are spread evenly over those below `total`; all if `n` is None."""
    n = total if n is None else min(n, total)
    return (index * total // n for index in range(n))


def _in_rows(values: Array, shape: tuple[int, int]) -> Array:
    """Return values [n] as rows of a shape, with zeros after the last one."""
    rows = np.zeros(shape, values.dtype)
    rows.reshape(-1)[: len(values)] = values
    return rows


def check_seed(value: int) -> int:
    """Return a seed; raise ParameterError if it is negative or has more than 64 bits."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 2**64:
        raise ParameterError(
            f"{argument('seed')} is {value!r}, expected a whole number from 0 to 2^64 - 1"
        )
    return number


def check_context(context: int, config: GPT2Config) -> None:
    """Raise ParameterError if a context is longer than that of the model."""
    if context > config.n_positions:
        raise ParameterError(
            f"{argument('context')} is {context}, and the model has {config.n_positions} "
            f"positions: lower {argument('context')}"
        )


def check_tokenizers(data: Tokenizer | None, model: Tokenizer | None) -> None:
    """Raise DataError if the data and the model have tokens of different ids.

    The tokens of an object of the caller are not known.
    """
    if not (isinstance(data, PipelineTokenizer) and isinstance(model, PipelineTokenizer)):
        return
    if data is model:
        return
    ids, expected = tokens_of(data), tokens_of(model)
    different = [token for token, id in ids.items() if expected.get(token) != id]
    if different:
        token = different[0]
        raise DataError(
            f"the data have the id {ids[token]} for {token!r}, and the tokenizer of the model has "
            f"{expected.get(token, 'none')}: prepare the text with that tokenizer"
        )


def tokens_of(tokenizer: PipelineTokenizer) -> dict[str, int]:
    """Return the vocabulary of a tokenizer with its added tokens: token -> id."""
    definition = tokenizer.definition()
    vocabulary = definition["model"]["vocab"]
    if isinstance(vocabulary, list):  # of a Unigram: pairs of a token and its score
        vocabulary = {token: id for id, (token, _) in enumerate(vocabulary)}
    return vocabulary | {token["content"]: token["id"] for token in definition["added_tokens"]}
