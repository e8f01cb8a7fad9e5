"""The two splits of a text, written as token files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from gptx.errors import DataError, argument
from gptx.training.data.encoding import Encoder
from gptx.training.data.plan import LLM_C, NONE, SECTIONS, TRAIN, VALIDATION, Plan
from gptx.training.data.texts import (
    Begin,
    Progress,
    TextFile,
    read_range,
    split_sections,
    without_marks,
)
from gptx.training.data.token_files import TokenWriter


def write_splits(
    folder: Path,
    plan: Plan,
    encoder: Encoder,
    files: Sequence[TextFile],
    others: Sequence[TextFile],
    n_characters: int,
    progress: Progress | None = None,
) -> tuple[int, int]:
    """Write the token files of a text.

    Parameters
    ----------
    folder
        An empty folder.
    files, others
        The text, and the text for validation; without the latter, the plan says which part of the
        text is for validation.
    n_characters
        Number of characters of `files`.

    Returns
    -------
    train_tokens, validation_tokens
        Number of tokens of the two splits.

    Raises
    ------
    DataError
        A split is empty.
    """
    n_train = int(n_characters * (1 - plan.validation_fraction))
    held_out: Iterator[str | Begin] = iter(())
    if others:
        held_out = read_range(others, progress=progress)
    elif plan.validation_fraction:
        held_out = read_range(files, n_train, progress=progress)
    has_validation = bool(others or plan.validation_fraction or plan.validation_tokens)

    def writer(name: str) -> TokenWriter:
        return TokenWriter(
            folder, name, header=plan.format == LLM_C, shard_tokens=plan.shard_tokens
        )

    with writer(TRAIN) as train, writer(VALIDATION) as validation:
        text = read_range(files, 0, n_train, progress=progress)
        for ids in encoder.ids(_marked(text, plan.end_of_text)):
            missing = max(plan.validation_tokens - validation.n_tokens, 0)
            validation.write(ids[:missing])
            train.write(ids[missing:])
        for ids in encoder.ids(_marked(held_out, plan.end_of_text)):
            validation.write(ids)
    if train.n_tokens == 0 or (has_validation and validation.n_tokens == 0):
        n_tokens = train.n_tokens + validation.n_tokens
        share = "validation_tokens" if plan.validation_tokens else "validation_fraction"
        raise DataError(
            f"the text has {n_tokens} tokens, too few for training and validation: give a longer "
            f"text, or another {argument(share)}"
        )
    return train.n_tokens, validation.n_tokens


def _marked(items: Iterator[str | Begin], places: str) -> Iterator[str | Begin]:
    """Return texts with a mark at each place of the end-of-text token."""
    if places == NONE:
        return without_marks(items)
    return split_sections(items) if places == SECTIONS else items
