"""Examples for fine-tuning: one JSON object a line, padded to one length in each batch.

An object has "text", or "prompt" and "completion". The loss counts every token of a text, and the
completion only of a prompt and its completion. An end-of-text token is appended and counted, so
that the model learns to end. Prompt and completion are encoded separately, as a prompt is at
generation.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptx.backends.backward import Batch
from gptx.config import GPT2Config
from gptx.errors import (
    DataError,
    ModelWarning,
    NotFoundError,
    ParameterError,
    PromptError,
    StorageError,
    argument,
)
from gptx.generation.checks import check_count
from gptx.tokenization.byte_level import END_OF_TEXT
from gptx.tokenization.protocol import Tokenizer
from gptx.training.data.windows import (
    EpochOrder,
    check_context,
    check_tokenizers,
    spread,
)

Array = np.ndarray

PADDED_LENGTHS = 32  # lengths of batches are multiples of it: few shapes, little padding
EXPECTED = 'expected {"text": ...}, or {"prompt": ..., "completion": ...}'


@dataclass(frozen=True)
class ExampleSet:
    """Encoded examples, one after the other.

    Attributes
    ----------
    ids
        Token ids of all examples [tokens], int32.
    starts
        Position of the first token of each example, and the end of the last: [examples + 1].
    first_targets
        Index in its example of the first token that the loss counts, at least 1: [examples].
    """

    ids: Array
    starts: Array
    first_targets: Array

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.first_targets)

    def part(self, first: int, last: int) -> ExampleSet:
        """Return the examples [first, last)."""
        begin, end = self.starts[first], self.starts[last]
        starts = self.starts[first : last + 1] - begin
        return ExampleSet(self.ids[begin:end], starts, self.first_targets[first:last])

    def batch(self, numbers: Sequence[int], context: int) -> Batch:
        """Return some examples as a batch, padded at the right."""
        lengths = [int(self.starts[n + 1] - self.starts[n]) - 1 for n in numbers]
        T = min(-(-max(lengths) // PADDED_LENGTHS) * PADDED_LENGTHS, context)
        ids, targets = (np.zeros((len(numbers), T), np.int64) for _ in range(2))
        weights = np.zeros((len(numbers), T), np.float32)
        for row, (number, length) in enumerate(zip(numbers, lengths, strict=True)):
            example = self.ids[self.starts[number] : self.starts[number + 1]]
            ids[row, :length], targets[row, :length] = example[:-1], example[1:]
            weights[row, self.first_targets[number] - 1 : length] = 1
        return Batch(ids, targets, weights)


class Examples:
    """Batches of examples; see `gptx.training.data.windows.TrainingData`.

    Each example is used once an epoch, in an order that the seed decides. They are not sorted by
    length.

    Parameters
    ----------
    train, validation
        Examples of the two splits; None for no validation.
    context
        T, maximum number of tokens of a sequence.
    batch_size
        B, number of sequences of a batch.
    seed
        Key of the order, at least 0, below 2^64.
    tokenizer
        Tokenizer of the ids.
    """

    def __init__(
        self,
        train: ExampleSet,
        validation: ExampleSet | None = None,
        *,
        context: int,
        batch_size: int,
        seed: int = 0,
        tokenizer: Tokenizer,
    ) -> None:
        self.context = check_count("context", context)
        self.batch_size = check_count("batch_size", batch_size)
        self.train, self.validation = train, validation
        self.tokenizer: Tokenizer | None = tokenizer
        self._order = EpochOrder(train.n, seed)

    @property
    def sequences_per_epoch(self) -> int:
        return self.train.n

    @property
    def has_validation(self) -> bool:
        return self.validation is not None

    def batch(self, step: int) -> Batch:
        chosen = self._order.batch(step, self.batch_size)
        return self.train.batch([number for number, _ in chosen], self.context)

    def validation_batches(self, n: int | None = None) -> Iterator[Batch]:
        if self.validation is None:
            return
        n_batches = -(-self.validation.n // self.batch_size)
        for index in spread(n, n_batches):
            first = index * self.batch_size
            numbers = range(first, min(first + self.batch_size, self.validation.n))
            yield self.validation.batch(numbers, self.context)

    def check(self, config: GPT2Config, tokenizer: Tokenizer | None = None) -> None:
        check_context(self.context, config)
        check_tokenizers(self.tokenizer, tokenizer)
        for examples in (self.train, self.validation):
            if examples is not None and examples.ids.max() >= config.vocab_size:
                raise DataError(
                    f"the examples have the token id {examples.ids.max()}, and the model has "
                    f"{config.vocab_size} tokens: use the tokenizer of the model"
                )

    def describe(self) -> dict[str, Any]:
        parts = {"train": self.train, "validation": self.validation}
        return {
            "kind": "examples",
            "context": self.context,
            "sequences": self.batch_size,
            "seed": self._order.seed,
            **{f"{name} examples": part.n if part else 0 for name, part in parts.items()},
            **{
                f"{name} checksum": zlib.crc32(part.ids.tobytes()) if part else 0
                for name, part in parts.items()
            },
        }


def read_examples(paths: Sequence[Path], tokenizer: Tokenizer, *, context: int) -> ExampleSet:
    """Read and encode the examples of files.

    An example of more than `context` + 1 tokens is truncated, and one without a token for the
    loss is left out; a note has their numbers.

    Raises
    ------
    DataError
        A line is no example; the message has the file and the number of the line.
    NotFoundError, StorageError
        A file does not exist, or cannot be read.
    """
    end = getattr(tokenizer, "end_of_text_id", None)
    ids: list[Array] = []
    first_targets: list[int] = []
    n_truncated = n_empty = 0
    for path in paths:
        for place, prompt, completion in _read_lines(path):
            try:
                parts = [tokenizer.encode(prompt), tokenizer.encode(completion)]
            except PromptError as error:
                raise DataError(f"{place}: {error.message}") from None
            example = [*parts[0], *parts[1], *([] if end is None else [end])]
            n_truncated += len(example) > context + 1
            example = example[: context + 1]
            first_target = max(len(parts[0]), 1)
            if first_target >= len(example):
                n_empty += 1
                continue
            ids.append(np.array(example, np.int32))
            first_targets.append(first_target)
    if not ids:
        names = " and ".join(map(str, paths))
        raise DataError(f"{names}: there is no example with a token to learn, {EXPECTED}")
    _warn(n_truncated, n_empty, context, has_end=end is not None)
    starts = np.cumsum([0, *map(len, ids)])
    return ExampleSet(np.concatenate(ids), starts, np.array(first_targets))


def _warn(n_truncated: int, n_empty: int, context: int, *, has_end: bool) -> None:
    notes = []
    if n_truncated:
        notes.append(
            f"{n_truncated:,} examples are longer than the context of {context} and are truncated"
        )
    if n_empty:
        notes.append(f"{n_empty:,} examples without a token for the loss are left out")
    if not has_end:
        notes.append(f"the tokenizer has no {END_OF_TEXT}: the examples have no end")
    for note in notes:
        warnings.warn(note, ModelWarning, stacklevel=3)


def _read_lines(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield place, prompt and completion of each line; the prompt of a text is empty."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    place = f"{path}, line {number}"
                    yield place, *_parse(line, place)
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist, expected a file of examples") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror or error})") from error


def _parse(line: bytes, place: str) -> tuple[str, str]:
    """Return the prompt and the completion of a line."""
    try:
        data = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not in UTF-8 (byte {error.start}), {EXPECTED}") from None
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        raise DataError(f"{place} is no JSON object ({reason}), {EXPECTED}") from None
    if not isinstance(data, dict):
        raise DataError(f"{place} is no JSON object, {EXPECTED}")
    if "messages" in data:
        raise DataError(
            f'{place} has "messages", and a GPT-2 has no form for them: write them as "prompt" '
            'and "completion"'
        )
    keys = [key for key in ("text", "prompt", "completion") if key in data]
    if keys not in (["text"], ["prompt", "completion"]):
        has = " and ".join(f'"{key}"' for key in keys) or "none of these keys"
        raise DataError(f"{place} has {has}, {EXPECTED}")
    for key in keys:
        if not isinstance(data[key], str):
            raise DataError(f'{place} has no string as "{key}", {EXPECTED}')
    return data.get("prompt", ""), data[keys[-1]]


def split_examples(examples: ExampleSet, fraction: float) -> tuple[ExampleSet, ExampleSet | None]:
    """Split off the last examples for validation: a fraction of them, at least one.

    Raises
    ------
    ParameterError
        The fraction is out of range.
    DataError
        There is one example only.
    """
    check_fraction(fraction)
    if fraction == 0:
        return examples, None
    if examples.n < 2:
        raise DataError(
            "there is one example, too few for training and validation: give more, or "
            f"{argument('validation', 0.0)}"
        )
    n_train = min(max(int(examples.n * (1 - fraction)), 1), examples.n - 1)
    return examples.part(0, n_train), examples.part(n_train, examples.n)


def check_fraction(fraction: float) -> None:
    """Raise ParameterError for a fraction for validation that is out of range."""
    if not 0 <= fraction < 1:  # NaN too
        raise ParameterError(
            f"{argument('validation')} is {fraction!r}, expected at least 0 and less than 1"
        )
