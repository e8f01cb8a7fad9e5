"""The options of `prepare`: their checks, their defaults, and the folder to write."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from gptx.errors import ParameterError, StorageError, argument
from gptx.files import check_replaceable
from gptx.generation.checks import check_count
from gptx.tokenization.files import FILES
from gptx.training.data.nanogpt_meta import META

FORMATS = NANOGPT, LLM_C, STATICGRAD = ("nanogpt", "llmc", "staticgrad")
NONE, SECTIONS = "none", "sections"
PLACES = (NONE, "files", SECTIONS)  # of the end-of-text token
VALIDATION_FRACTION = 0.1  # as in nanoGPT
VALIDATION_TOKENS = 32_768  # the first ones, as in llm.c

TRAIN, VALIDATION = "train", "val"  # names of the files
_WRITTEN = re.compile(rf"({TRAIN}|{VALIDATION})(_\d{{6,}})?\.bin")


@dataclass(frozen=True)
class Plan:
    """The options of `prepare` that decide the files, with their defaults.

    Attributes
    ----------
    format, end_of_text, shard_tokens
        See `prepare`.
    validation_fraction, validation_tokens
        See `prepare`; one of them is 0.
    """

    format: str
    end_of_text: str
    shard_tokens: int | None
    validation_fraction: float
    validation_tokens: int


def make_plan(
    format: str,
    *,
    has_validation_text: bool = False,
    validation_fraction: float | None = None,
    validation_tokens: int | None = None,
    end_of_text: str | None = None,
    shard_tokens: int | None = None,
) -> Plan:
    """Check the options of `prepare`, and add the defaults of the format."""
    if format not in FORMATS:
        raise ParameterError(f"{argument('format')} is {format!r}, expected {' or '.join(FORMATS)}")
    given = {
        "validation": has_validation_text or None,
        "validation_fraction": validation_fraction,
        "validation_tokens": validation_tokens,
    }
    names = [argument(name) for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ParameterError(f"{names[0]} and {names[1]} exclude each other: give one of them")
    if validation_fraction is not None and not 0 <= validation_fraction < 1:  # NaN too
        raise ParameterError(
            f"{argument('validation_fraction')} is {validation_fraction!r}, expected at least 0 "
            "and less than 1"
        )
    if validation_tokens is not None:
        check_count("validation_tokens", validation_tokens)
    if shard_tokens is not None:
        check_count("shard_tokens", shard_tokens)
    if end_of_text is None:
        end_of_text = NONE if format == NANOGPT else SECTIONS
    elif end_of_text not in PLACES:
        raise ParameterError(
            f"{argument('end_of_text')} is {end_of_text!r}, expected {', '.join(PLACES)}"
        )
    if not names and format == NANOGPT:
        validation_fraction = VALIDATION_FRACTION
    elif not names:
        validation_tokens = VALIDATION_TOKENS
    return Plan(
        format, end_of_text, shard_tokens, validation_fraction or 0.0, validation_tokens or 0
    )


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Raise an error if `prepare` may not write a folder.

    A folder with any other file is never replaced.
    """
    check_replaceable(folder)
    if folder.is_file():
        raise ParameterError(f"{folder} is a file, expected a folder to write: give another name")
    if not folder.is_dir():
        parent = Path(os.path.realpath(folder)).parent
        if not parent.is_dir():
            raise StorageError(f"{folder} cannot be written ({parent} does not exist)")
        return
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise StorageError(f"{folder} cannot be read ({error.strerror or error})") from error
    others = [name for name in names if not is_written(name)]
    if others:
        raise ParameterError(
            f"{folder} has {others[0]!r}, which is no file of prepared data: give another folder"
        )
    if names and not overwrite:
        raise ParameterError(
            f"{folder} already exists: give another name, or {argument('overwrite', True)}"
        )


def is_written(name: str) -> bool:
    """Test for the name of a file that `prepare` writes."""
    return bool(_WRITTEN.fullmatch(name)) or name in (META, *FILES)
