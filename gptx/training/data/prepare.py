"""Text to token files: `prepare`, the work of `gptx prepare`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from gptx.errors import ModelWarning, ParameterError, StorageError, TokenizerError, argument
from gptx.files import atomic_path
from gptx.generation.checks import check_count
from gptx.tokenization.pipeline import PipelineTokenizer
from gptx.tokenization.protocol import Tokenizer
from gptx.training.data.datasets import fetch, find_dataset
from gptx.training.data.encoding import Encoder, characters_of, special_of
from gptx.training.data.nanogpt_meta import META, write_meta
from gptx.training.data.plan import NANOGPT, NONE, Plan, check_output, make_plan
from gptx.training.data.splits import write_splits
from gptx.training.data.texts import CHUNK_BYTES, Paths, Progress, TextFile, as_list, scan
from gptx.training.data.token_files import MAX_VOCABULARY
from gptx.training.data.vocabularies import (
    CHARACTERS,
    TokenizerSource,
    check_source,
    make_tokenizer,
)

STANDARD_INPUT = "-"
JSON_LINES = ".jsonl"
NOT_EXACT_NOTE = (
    "the text is encoded in chunks, and this tokenizer has no known position to split a text: some "
    f"ids can differ from those of the whole text, every {CHUNK_BYTES} bytes or so"
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
        A name in `gptx.training.data.datasets`, whose text the Hub has, in place of `texts`.
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
        Number of tokens, at the start of the text, for validation: 32,768 by default in the formats
        of llm.c and staticgrad.
    end_of_text
        Places of `<|endoftext|>`: "none"; "files": before each file; "sections": also after each
        empty line, as in llm.c. "none" by default in nanoGPT's format, else "sections".
    allow_special
        Read `<|endoftext|>` in the text as the token, not as ordinary text.
    shard_tokens
        Write files of this number of tokens: train_000000.bin and so on.
    max_bytes
        Read this number of bytes at the start of the joined texts only; None for all.
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
    texts, validation = as_list(texts), as_list(validation)
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
        # A part for validation takes a second pass over the text.
        encoded = [*files, *(others or (files if plan.validation_fraction else []))]
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            counts = write_splits(
                temporary,
                plan,
                encoder,
                files,
                others,
                scanned.n_characters,
                track.begin("encode", encoded),
            )
            _write_tokenizer(temporary, encoder.tokenizer, plan)
    if not encoder.is_exact and scanned.n_characters > CHUNK_BYTES:
        warnings.warn(NOT_EXACT_NOTE, ModelWarning, stacklevel=2)
    return Prepared(folder, encoder.tokenizer, *counts)


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


def _text_files(names: Sequence[str | os.PathLike[str]], stack: ExitStack) -> list[TextFile]:
    """Return the files of names; a pipe is copied to a file, as the text is read twice."""
    found = []
    for name in names:
        path = Path(os.path.expanduser(name))
        if path.suffix.lower() == JSON_LINES:
            raise ParameterError(
                f"{path} has examples, expected a text: train on it with `gptx train {path}`"
            )
        if path.is_dir():
            raise ParameterError(f"{path} is a folder, expected text files: give {path}/*.txt")
        if str(name) == STANDARD_INPUT:
            found.append(_copy(sys.stdin.buffer, "standard input", stack))
        elif path.exists() and not path.is_file():
            with open(path, "rb") as pipe:
                found.append(_copy(pipe, str(name), stack))
        else:
            found.append(TextFile(path, str(name)))
    return found


def _copy(source: BinaryIO, name: str, stack: ExitStack) -> TextFile:
    """Copy a stream to a file that the stack deletes."""
    try:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "text"
        with open(path, "wb") as copy:
            shutil.copyfileobj(source, copy)
    except OSError as error:
        raise StorageError(f"{name} cannot be copied ({error.strerror or error})") from error
    return TextFile(path, name)


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
