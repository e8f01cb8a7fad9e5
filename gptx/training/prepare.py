"""Text to token files: `prepare`, the work of `gptx prepare`."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gptx.errors import (
    DataError,
    ModelWarning,
    ParameterError,
    StorageError,
    TokenizerError,
    argument,
)
from gptx.files import atomic_path, check_replaceable
from gptx.tokenization.files import FILES
from gptx.tokenization.pipeline import PipelineTokenizer
from gptx.tokenization.protocol import Tokenizer
from gptx.training.data import check_count
from gptx.training.datasets import fetch, find_dataset
from gptx.training.encoding import Encoder, characters_of, special_of
from gptx.training.nanogpt_meta import META, write_meta
from gptx.training.texts import (
    CHUNK_BYTES,
    Begin,
    Progress,
    Scan,
    TextFile,
    read_range,
    scan,
    split_sections,
    without_marks,
)
from gptx.training.token_files import MAX_VOCABULARY, TokenWriter
from gptx.training.vocabularies import CHARACTERS, TokenizerSource, check_source, make_tokenizer

FORMATS = NANOGPT, LLM_C, STATICGRAD = ("nanogpt", "llmc", "staticgrad")
NONE, SECTIONS = "none", "sections"
PLACES = (NONE, "files", SECTIONS)  # of the end-of-text token
VALIDATION_FRACTION = 0.1  # as in nanoGPT
VALIDATION_TOKENS = 32_768  # the first ones, as in llm.c

TRAIN, VALIDATION = "train", "val"  # names of the files
_WRITTEN = re.compile(rf"({TRAIN}|{VALIDATION})(_\d{{6,}})?\.bin")

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
STANDARD_INPUT = "-"
JSON_LINES = ".jsonl"
NOT_EXACT_NOTE = (
    "this tokenizer has no known place where a text can be cut: some ids can differ from those of "
    f"the text in one piece, every {CHUNK_BYTES} bytes or so"
)

# Called with the name of a pass over the text, the bytes that it has read, and their total.
PassProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Prepared:
    """The result of `prepare`.

    Attributes
    ----------
    folder
        Folder of the token files and of the tokenizer.
    tokenizer
        Tokenizer of the ids.
    train_tokens, validation_tokens
        Number of tokens of the two splits.
    """

    folder: Path
    tokenizer: Tokenizer
    train_tokens: int
    validation_tokens: int


def prepare(
    texts: Paths,
    output: str | os.PathLike[str],
    *,
    dataset: str | None = None,
    tokenizer: TokenizerSource = CHARACTERS,
    vocab_size: int | None = None,
    train_bpe: int | None = None,
    format: str = "nanogpt",
    validation: Paths = (),
    validation_fraction: float | None = None,
    validation_tokens: int | None = None,
    end_of_text: str | None = None,
    allow_special: bool = False,
    shard_tokens: int | None = None,
    max_bytes: int | None = None,
    overwrite: bool = False,
    offline: bool = False,
    progress: PassProgress | None = None,
) -> Prepared:
    """Convert text files of any size to token files for training and validation.

    The text is read in chunks: once to check and count it, then to make a vocabulary if that needs
    it, then to encode it. The memory does not grow with the text. The folder is written atomically.

    Parameters
    ----------
    texts
        Text files in UTF-8, joined in this order; "-" is standard input.
    output
        Folder to write: token files, the tokenizer, and for characters nanoGPT's meta.pkl.
    dataset
        A name in `gptx.training.datasets.DATASETS`, whose text the Hub has, in place of `texts`.
    tokenizer
        "characters" or "vowels", which make a vocabulary of the text; a folder with a tokenizer; a
        model that has one, such as "gpt2"; or an object with `encode`, `decode` and `vocab_size`.
    vocab_size
        Most tokens of a vocabulary of vowel pieces; 1,024 by default.
    train_bpe
        Train a byte-level BPE with this number of tokens on the text, in place of `tokenizer`.
    format
        "nanogpt" or "staticgrad": ids of 16 bits without a header; "llmc": with llm.c's header.
    validation
        Text files for validation, in place of a part of `texts`.
    validation_fraction
        Fraction of the characters, at the end of the text, for validation: 0.1 by default in
        nanoGPT's format. 0: no validation.
    validation_tokens
        Number of tokens, at the begin of the text, for validation: 32,768 by default in the formats
        of llm.c and staticgrad.
    end_of_text
        Places of `<|endoftext|>`: "none"; "files": before each file; "sections": also after each
        empty line, as in llm.c. "none" by default in nanoGPT's format, else "sections".
    allow_special
        Read `<|endoftext|>` in the text as the token, not as ordinary text.
    shard_tokens
        Write files of this number of tokens: train_000000.bin and so on.
    max_bytes
        Read this number of bytes at the begin of the joined texts only; None for all.
    overwrite
        Replace the folder, if it has only files that `prepare` writes.
    offline
        Take files of the Hub from the cache.
    progress
        Function that is called with the name of a pass, the bytes read, and their total.

    Returns
    -------
    Prepared
        The tokenizer, and the numbers of tokens.

    Raises
    ------
    ParameterError
        A parameter is invalid, two contradict each other, or the folder exists.
    DataError
        The text is empty, too short, not in UTF-8, or has a character without a token.
    TokenizerError
        The tokenizer is damaged, or has more than 65,536 tokens.
    NotFoundError, StorageError
        A file is missing, or cannot be read or written.
    """
    folder = Path(os.path.expanduser(output))
    texts, validation = _as_list(texts), _as_list(validation)
    check_source(tokenizer, vocab_size, train_bpe)
    has_own_validation = False
    if dataset is not None:
        if texts:
            raise ParameterError(
                f"{argument('dataset')} and {argument('texts')} exclude each other: give one"
            )
        known = find_dataset(dataset)
        options = validation or None, validation_fraction, validation_tokens
        has_own_validation = bool(known.validation) and options == (None, None, None)
        allow_special = allow_special or known.has_special
        end_of_text = NONE if end_of_text is None and known.has_special else end_of_text
    elif not texts:
        raise ParameterError(f"{argument('texts')} is empty, expected a text file")
    plan = make_plan(
        format,
        has_validation_text=bool(validation) or has_own_validation,
        validation_fraction=validation_fraction,
        validation_tokens=validation_tokens,
        end_of_text=end_of_text,
        shard_tokens=shard_tokens,
    )
    if max_bytes is not None:
        check_count("max_bytes", max_bytes)
    check_output(folder, overwrite=overwrite)
    if dataset is not None:
        fetched = fetch(dataset, offline=offline)
        texts = fetched.train
        validation = fetched.validation if has_own_validation else validation
    with ExitStack() as stack:
        files = _first_bytes(_text_files(texts, stack), max_bytes)
        others = _text_files(validation, stack)
        track = _Tracker(progress)
        scanned = scan(files, track.begin("check", files))
        characters = set(scanned.counts)
        if others:
            characters |= set(scan(others).counts)
        encoder = Encoder(
            make_tokenizer(
                tokenizer,
                files,
                characters,
                vocab_size=vocab_size,
                train_bpe=train_bpe,
                end_of_text=allow_special or plan.end_of_text != NONE,
                offline=offline,
                progress=track.begin("vocabulary", files),
            ),
            allow_special=allow_special,
        )
        _check_vocabulary(encoder, plan)
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            counts = _write_splits(temporary, plan, encoder, files, others, scanned, track)
            _write_tokenizer(temporary, encoder.tokenizer, plan)
    if not encoder.is_exact and scanned.n_characters > CHUNK_BYTES:
        warnings.warn(NOT_EXACT_NOTE, ModelWarning, stacklevel=2)
    return Prepared(folder, encoder.tokenizer, *counts)


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


def _write_splits(
    folder: Path,
    plan: Plan,
    encoder: Encoder,
    files: Sequence[TextFile],
    others: Sequence[TextFile],
    scanned: Scan,
    track: _Tracker,
) -> tuple[int, int]:
    """Write the token files; return the numbers of tokens for training and for validation."""
    n_train = int(scanned.n_characters * (1 - plan.validation_fraction))
    held_out = others or (files if plan.validation_fraction else [])
    first = 0 if others else n_train

    def ids(files: Sequence[TextFile], name: str, *ends: int | None) -> Iterator[np.ndarray]:
        items = read_range(files, *ends, progress=track.begin(name, files))
        return encoder.ids(_with_marks(items, plan.end_of_text))

    def writer(name: str) -> TokenWriter:
        return TokenWriter(
            folder, name, header=plan.format == LLM_C, shard_tokens=plan.shard_tokens
        )

    with writer(TRAIN) as train, writer(VALIDATION) as validation:
        for part in ids(files, "training", 0, n_train if not others else None):
            missing = max(plan.validation_tokens - validation.n_tokens, 0)
            validation.write(part[:missing])
            train.write(part[missing:])
        if held_out:
            for part in ids(held_out, "validation", first, None):
                validation.write(part)
    wanted = bool(held_out or plan.validation_tokens)
    if train.n_tokens == 0 or (wanted and validation.n_tokens == 0):
        n_tokens = train.n_tokens + validation.n_tokens
        raise DataError(
            f"the text has {n_tokens} tokens, too few for training and validation: give a longer "
            f"text, or another {argument('validation_fraction')}"
        )
    return train.n_tokens, validation.n_tokens


def _with_marks(items: Iterator[str | Begin], places: str) -> Iterator[str | Begin]:
    if places == NONE:
        return without_marks(items)
    return split_sections(items) if places == SECTIONS else items


def _check_vocabulary(encoder: Encoder, plan: Plan) -> None:
    """Raise an error if the ids do not fit into 16 bits, or the end of a text is missing."""
    size = encoder.tokenizer.vocab_size
    if size > MAX_VOCABULARY:
        raise TokenizerError(
            f"the tokenizer has {size} tokens, and token files have ids of 16 bits: give a "
            f"tokenizer of at most {MAX_VOCABULARY} tokens, as that of GPT-2"
        )
    if plan.end_of_text != NONE:
        encoder.end_of_text_id()


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, plan: Plan) -> None:
    save = getattr(tokenizer, "save", None)  # a tokenizer of the caller may have none
    if save is not None:
        save(folder)
    if plan.format == NANOGPT and isinstance(tokenizer, PipelineTokenizer):
        definition = tokenizer.definition()
        if characters := characters_of(definition):
            write_meta(folder / META, characters | special_of(definition))


class _Tracker:
    """The progress of passes over files.

    Parameters
    ----------
    progress
        See `prepare`; None for no report.
    """

    def __init__(self, progress: PassProgress | None) -> None:
        self._progress = progress

    def begin(self, name: str, files: Sequence[TextFile]) -> Progress | None:
        """Return the function that counts the bytes of a pass."""
        if self._progress is None:
            return None
        report, total, done = self._progress, sum(file.size for file in files), 0

        def count(n_bytes: int) -> None:
            nonlocal done
            done += n_bytes
            report(name, done, total)

        return count


def _as_list(paths: Paths) -> list[str | os.PathLike[str]]:
    return [paths] if isinstance(paths, str | os.PathLike) else list(paths)


def _text_files(names: Sequence[str | os.PathLike[str]], stack: ExitStack) -> list[TextFile]:
    """Return the files of names; standard input is copied to a file, as it is read twice."""
    found = []
    for name in names:
        if str(name) == STANDARD_INPUT:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            path = Path(folder) / "text"
            with open(path, "wb") as copy:
                shutil.copyfileobj(sys.stdin.buffer, copy)
            found.append(TextFile(path, "standard input"))
            continue
        path = Path(os.path.expanduser(name))
        if path.suffix.lower() == JSON_LINES:
            raise ParameterError(
                f"{path} has examples, expected a text: train on it with `gptx train {path}`"
            )
        if path.is_dir():
            raise ParameterError(f"{path} is a folder, expected text files: give {path}/*.txt")
        found.append(TextFile(path, str(name)))
    return found


def _first_bytes(files: list[TextFile], n_bytes: int | None) -> list[TextFile]:
    """Return the files without what follows the first `n_bytes` bytes."""
    if n_bytes is None:
        return files
    found = []
    for file in files:
        if n_bytes > 0:
            found.append(replace(file, max_bytes=n_bytes))
            n_bytes -= file.size
    return found
