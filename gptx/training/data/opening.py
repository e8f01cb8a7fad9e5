"""Open the data of a training: token files of any of the three forms, or examples.

A corpus of text becomes token files first, see `gptx.training.data.prepare`.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptx.errors import DataError, NotFoundError, ParameterError, argument
from gptx.tokenization.pipeline import PipelineTokenizer
from gptx.tokenization.protocol import Tokenizer
from gptx.training.data.examples import Examples, check_fraction, read_examples, split_examples
from gptx.training.data.nanogpt_meta import META, read_meta
from gptx.training.data.plan import TRAIN, VALIDATION_FRACTION
from gptx.training.data.prepare import JSON_LINES
from gptx.training.data.texts import Paths, as_list
from gptx.training.data.token_files import TokenFiles, find_files
from gptx.training.data.windows import TokenData, TrainingData, check_tokenizers

TOKENS = ".bin"
VALIDATION_NAMES = ("val", "valid", "validation")
_SHARD_NUMBER = re.compile(r"_?\d+$")


def is_text(source: Paths) -> bool:
    """Test for text files, which `gptx.training.data.prepare` converts first.

    A folder, a name that ends in .bin or .jsonl, and a pattern of such names are no text.
    """
    return all(
        not Path(os.path.expanduser(name)).is_dir()
        and Path(name).suffix.lower() not in (TOKENS, JSON_LINES)
        for name in as_list(source)
    )


def open_data(
    source: Paths,
    *,
    context: int,
    batch_size: int,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    validation: float | Paths | None = None,
) -> TrainingData:
    """Open token files or examples.

    Parameters
    ----------
    source
        A folder of `gptx prepare`, nanoGPT or llm.c; a .bin file, several, or a pattern such as
        "data/train_*.bin"; .jsonl files, or a folder with train.jsonl and valid.jsonl.
    context
        T, number of tokens of a sequence.
    batch_size
        B, number of sequences of a batch.
    seed
        Key of the order.
    tokenizer
        Tokenizer of the ids, which examples need. None: the one in the folder.
    validation
        Files or a pattern for validation; or the fraction that is at the end of the data. None: the
        files of a folder, 0.1 of other data and of a folder of examples without such a file.

    Raises
    ------
    NotFoundError
        A file does not exist, or a folder has none of these files.
    ParameterError
        A folder has several corpora, or a number is out of range.
    DataError
        A file is damaged, is another one, is shorter than a window, or has ids of another
        tokenizer.
    """
    names = as_list(source)
    folder = Path(os.path.expanduser(names[0])) if len(names) == 1 else None
    if folder is not None and not folder.is_dir():
        folder = None
    kind = JSON_LINES if _has_examples(folder, names) else TOKENS
    if folder is None:
        train = [path for name in names for path in find_files(os.fspath(name))]
        held_out: list[Path] = []
    else:
        train = find_split(folder, (TRAIN,), kind)
        held_out = find_split(folder, VALIDATION_NAMES, kind)
        if not train:
            raise NotFoundError(
                f"{folder} has no train.bin and no train.jsonl, expected a folder of "
                "`gptx prepare`, nanoGPT or llm.c"
            )
    if isinstance(validation, float | int):
        held_out = []
    elif validation is not None:
        held_out = [path for name in as_list(validation) for path in find_files(os.fspath(name))]
    own = find_tokenizer(train[0].parent)
    if kind == TOKENS:
        check_tokenizers(own, tokenizer)
    tokenizer = tokenizer or own
    sizes: dict[str, Any] = {"context": context, "batch_size": batch_size, "seed": seed}
    fraction = validation if isinstance(validation, float | int) else None
    if fraction is None and not held_out and (folder is None or kind == JSON_LINES):
        fraction = VALIDATION_FRACTION
    if kind == TOKENS:
        tokens = TokenFiles.open(train)
        others = TokenFiles.open(held_out) if held_out else None
        if fraction is not None:
            tokens, others = split_tokens(tokens, fraction)
        return TokenData(tokens, others, tokenizer=tokenizer, **sizes)
    if tokenizer is None:
        raise ParameterError(
            f"{train[0]} has text, and there is no tokenizer: give {argument('tokenizer', 'gpt2')}"
        )
    examples = read_examples(train, tokenizer, context=context)
    rest = read_examples(held_out, tokenizer, context=context) if held_out else None
    if fraction is not None:
        examples, rest = split_examples(examples, fraction)
    return Examples(examples, rest, tokenizer=tokenizer, **sizes)


def split_tokens(files: TokenFiles, fraction: float) -> tuple[TokenFiles, TokenFiles | None]:
    """Split off the last tokens for validation: a fraction of them, at least two."""
    check_fraction(fraction)
    if fraction == 0:
        return files, None
    if files.n_tokens < 3:
        raise DataError(
            f"{files.name} has {files.n_tokens} tokens, too few for training and validation: give "
            f"more, or {argument('validation', 0.0)}"
        )
    return files.split(min(max(int(files.n_tokens * (1 - fraction)), 1), files.n_tokens - 2))


def _has_examples(folder: Path | None, names: Sequence[str | os.PathLike[str]]) -> bool:
    """Test for examples; refuse a mixture with token files."""
    if folder is not None:
        return (folder / f"{TRAIN}{JSON_LINES}").is_file()
    kinds = {Path(name).suffix.lower() for name in names}
    if JSON_LINES in kinds and len(kinds) > 1:
        raise ParameterError(
            f"{argument('data')} has {' and '.join(sorted(kinds))} files, expected one kind"
        )
    return JSON_LINES in kinds


def find_split(folder: Path, words: Sequence[str], suffix: str = TOKENS) -> list[Path]:
    """Find the files of one split in a folder.

    Files are of one corpus if their names are equal but for a number at the end, such as
    `fineweb_train_000001.bin`. `train.bin` beside others is taken for none of them.

    Raises
    ------
    ParameterError
        The folder has several corpora.
    """
    corpora: dict[str, list[Path]] = {}
    for path in sorted(folder.glob(f"*{suffix}")):
        name = _SHARD_NUMBER.sub("", path.stem)
        if name.split("_")[-1] in words:
            number = path.stem != name
            corpora.setdefault(f"{name} {number}", []).append(path)
    if len(corpora) > 1:
        named = " and ".join(str(paths[0]) for paths in corpora.values())
        raise ParameterError(
            f"{folder} has several corpora, {named}: give the files of one, such as "
            f"{glob.escape(str(folder))}/train_*{suffix}"
        )
    return next(iter(corpora.values()), [])


def find_tokenizer(folder: Path) -> PipelineTokenizer | None:
    """Return the tokenizer of a folder; of nanoGPT's meta.pkl if it has no other."""
    found = PipelineTokenizer.of_folder(folder)
    if found is None and (folder / META).is_file():
        return PipelineTokenizer.of_pieces(read_meta(folder / META))
    return found
