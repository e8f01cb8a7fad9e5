"""Token ids of a text of any size, encoded in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from gptx.errors import DataError, ParameterError, PromptError, argument
from gptx.tokenization.byte_level import END_OF_TEXT
from gptx.tokenization.pipeline import PipelineTokenizer
from gptx.tokenization.protocol import Tokenizer
from gptx.training.data.chunks import (
    FindSplit,
    end_of,
    is_exact,
    last_space,
    split_into_chunks,
    words_of,
)
from gptx.training.data.texts import Begin, code_points

Array = np.ndarray

N_CODE_POINTS = 0x110000
# Words repeat, and a look-up is ten times as fast as the library.
MAX_WORDS = 2**17  # whose ids are kept: 30 MB
MAX_WORD_LENGTH = 64  # characters


class Encoder:
    """A tokenizer that encodes a text in chunks.

    Parameters
    ----------
    tokenizer
        Any tokenizer.
    allow_special
        Read special tokens in the text as tokens, not as ordinary text.

    Attributes
    ----------
    tokenizer
        The tokenizer.
    is_exact
        True if the ids are those of the text in one piece, wherever a chunk ends.
    """

    def __init__(self, tokenizer: Tokenizer, *, allow_special: bool = False) -> None:
        self.tokenizer = tokenizer
        self._allow_special = allow_special
        self._table: Array | None = None  # code point -> id, of a tokenizer of characters
        self._words: dict[str, list[int]] = {}
        self._find_split: FindSplit = last_space
        self.is_exact = False
        if isinstance(tokenizer, PipelineTokenizer):
            definition = tokenizer.definition()
            self.is_exact = is_exact(definition)
            tokens = characters_of(definition)
            if tokens:
                self._table = np.full(N_CODE_POINTS, -1, np.int32)
                self._table[code_points("".join(tokens))] = list(tokens.values())
                self._find_split = last_space if allow_special else end_of
        elif allow_special:
            raise ParameterError(
                f"{argument('allow_special')} is True, and the tokenizer is not one of gptx: "
                "leave it out"
            )

    def end_of_text_id(self) -> int:
        """Return the id of `<|endoftext|>`.

        Raises
        ------
        ParameterError
            The vocabulary lacks it.
        """
        id = getattr(self.tokenizer, "end_of_text_id", None)
        if id is None:
            raise ParameterError(
                f"the tokenizer has no {END_OF_TEXT} to begin documents with: give "
                f"{argument('end_of_text', 'none')}"
            )
        return int(id)

    def ids(self, items: Iterator[str | Begin]) -> Iterator[Array]:
        """Yield the ids of texts in chunks [n], int32, with the end-of-text token at each mark.

        Raises
        ------
        DataError
            The text has a character that the vocabulary lacks.
        """
        for item in split_into_chunks(items, self._find_split):
            if isinstance(item, Begin):
                yield np.array([self.end_of_text_id()], np.int32)
            else:
                yield self.encode(item)

    def encode(self, text: str) -> Array:
        """Return the ids of a text: [n], int32."""
        if self._table is not None and not (self._allow_special and END_OF_TEXT in text):
            return self._encode_characters(text, self._table)
        try:
            if not self.is_exact:
                return np.array(self._encode(text), np.int32)
            ids: list[int] = []
            for word in words_of(text):
                found = self._words.get(word)
                if found is None:
                    found = self._encode(word)
                    if len(self._words) < MAX_WORDS and len(word) <= MAX_WORD_LENGTH:
                        self._words[word] = found
                ids += found
            return np.array(ids, np.int32)
        except PromptError as error:
            raise DataError(error.message) from None

    def _encode_characters(self, text: str, table: Array) -> Array:
        codes = code_points(text)
        ids = table[codes]
        if ids.min(initial=0) < 0:
            missing = chr(codes[np.argmax(ids < 0)])
            raise DataError(
                f"the text has {missing!r}, which is not among the {self.tokenizer.vocab_size} "
                "tokens of the vocabulary: remove it, or make a vocabulary of a text that has it"
            )
        return ids

    def _encode(self, text: str) -> list[int]:
        if isinstance(self.tokenizer, PipelineTokenizer):
            return self.tokenizer.encode(text, allow_special=self._allow_special)
        return list(self.tokenizer.encode(text))


def characters_of(definition: dict[str, Any]) -> dict[str, int]:
    """Return the tokens of a tokenizer of characters: character -> id; empty for any other kind.

    Parameters
    ----------
    definition
        Contents of its tokenizer.json.
    """
    model, added = definition["model"], definition["added_tokens"]
    steps = definition["normalizer"], definition["pre_tokenizer"]
    if model["type"] != "BPE" or model["merges"] or steps != (None, None):
        return {}
    if model["unk_token"] is not None:  # any character has an id
        return {}
    if not all(token["special"] for token in added):  # which are found in any text
        return {}
    special = {token["content"] for token in added}
    tokens = {token: id for token, id in model["vocab"].items() if token not in special}
    return tokens if all(len(token) == 1 for token in tokens) else {}


def special_of(definition: dict[str, Any]) -> dict[str, int]:
    """Return the special tokens of a tokenizer.json: token -> id."""
    return {token["content"]: token["id"] for token in definition["added_tokens"]}
