"""The search for a tokenizer's files, in a folder or in a repository of the Hub."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from gptx.tokenization.files import (
    ADDED_TOKENS,
    MERGES,
    SETTINGS,
    SPECIAL_TOKENS,
    TOKENIZER,
    VOCAB,
    WORDS,
)
from gptx.tokenization.settings import BERT, read_settings

VOCABULARIES = ((TOKENIZER,), (VOCAB, MERGES), (WORDS,))
SENTENCEPIECE = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")


def find_tokenizer(
    find: Callable[[str], Path | None], *, all_forms: bool = True
) -> dict[str, Path]:
    """Find the files of a tokenizer that gptx reads.

    Parameters
    ----------
    find
        Function that returns the path of a file, None if it is missing.
    all_forms
        Also find vocabularies in other forms than the first that exists, which has the same tokens.

    Returns
    -------
    dict
        Name -> path, of vocabularies and of the settings beside them; empty without a vocabulary
        that gptx reads.
    """
    found: dict[str, Path] = {}

    def add(names: Iterable[str]) -> None:
        found.update((name, path) for name in names if (path := find(name)))

    for form in VOCABULARIES:
        if all_forms or not found:
            add(form)
    vocabularies = list(found)
    if found:
        add((SETTINGS, ADDED_TOKENS, SPECIAL_TOKENS))
    else:
        for name in SENTENCEPIECE:  # beside the others, so that `describe_unreadable` finds it
            find(name)
    if vocabularies == [WORDS] and read_settings(found).cls != BERT:
        return {}
    return found


def describe_unreadable(folder: Path) -> str | None:
    """Describe a tokenizer that gptx does not read, and say what to do; None without one."""
    for name in SENTENCEPIECE:
        if (folder / name).is_file():
            return (
                f"{folder / name} is a SentencePiece model, expected {TOKENIZER}: make one with "
                "transformers, AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
    if (folder / WORDS).is_file():
        return (
            f"{folder / WORDS} is a list of words, and no file says that it is for {BERT}: put "
            f'"tokenizer_class": "{BERT}" into {SETTINGS} if it is, or make {TOKENIZER}'
        )
    return None
