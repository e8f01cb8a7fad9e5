"""Text <-> token ids: the Tokenizer protocol, byte-level BPE, the incremental text decoder."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

from gptx.errors import PromptError, TokenizerError

END_OF_TEXT = "<|endoftext|>"
FILES = ("tokenizer.json", "vocab.json", "merges.txt")  # the first, or the other two


class Tokenizer(Protocol):
    """What gptx asks of a tokenizer."""

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of a text; special tokens in it are ordinary text unless allowed."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for; none for an id that is not in the vocabulary."""

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""


class BytePairTokenizer:
    """GPT-2's byte-level BPE, run by the `tokenizers` library.

    Parameters
    ----------
    files
        "tokenizer.json", or "vocab.json" and "merges.txt", each with its path.
    definition
        What a tokenizer.json says, in the place of files.

    Raises
    ------
    TokenizerError
        The files are damaged, or not enough of them are there.
    """

    def __init__(self, files: Mapping[str, Path], *, definition: str | None = None) -> None:
        self._files = dict(files)
        self._definition = definition
        self._ordinary = self._read()
        # Ordinary text is where this library finds special tokens unless it is told otherwise.
        self._ordinary.encode_special_tokens = True

    @classmethod
    def of_folder(cls, folder: Path) -> BytePairTokenizer | None:
        """The tokenizer whose files lie in a folder; None if there are none."""
        files = {name: folder / name for name in FILES if (folder / name).is_file()}
        return cls(files) if files else None

    @classmethod
    def of_vocabulary(
        cls,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        special: Mapping[str, int] | None = None,
    ) -> BytePairTokenizer:
        """GPT-2's tokenizer with this vocabulary, in the letters of its files, and these merges.

        Parameters
        ----------
        special
            Tokens that are found whole in a text where that is allowed, with their ids.

        Raises
        ------
        TokenizerError
            A merge makes no token of the vocabulary.
        """
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        byte_level["use_regex"] = True
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = [
            {"id": id, "content": token, **flags, "special": True}
            for token, id in (special or {}).items()
        ]
        model = {"type": "BPE", "vocab": dict(vocab), "merges": [list(pair) for pair in merges]}
        definition = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": model,
        }
        return cls({}, definition=json.dumps(definition))

    def _read(self) -> Any:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        try:
            path = self._files.get("tokenizer.json")
            if path or self._definition is not None:
                tokenizer = (
                    Tokenizer.from_file(str(path))
                    if self._definition is None
                    else Tokenizer.from_str(self._definition)
                )
                tokenizer.no_padding()
                tokenizer.no_truncation()
                return _with_special_end(tokenizer)
            vocab, merges = self._files["vocab.json"], self._files["merges.txt"]
            tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            return _with_special_end(tokenizer)
        except KeyError as error:
            raise TokenizerError(
                f"{error} is missing: a tokenizer is tokenizer.json, or vocab.json and merges.txt"
            ) from None
        except Exception as error:  # the library raises bare Exceptions
            read = ["tokenizer.json"] if "tokenizer.json" in self._files else self._files
            names = " and ".join(str(self._files[name]) for name in read) or "the vocabulary"
            raise TokenizerError(f"{names} cannot be read as a tokenizer ({error})") from None

    @cached_property
    def _special(self) -> Any:
        """The same tokenizer, minding special tokens."""
        return self._read()

    @property
    def vocab_size(self) -> int:
        return int(self._ordinary.get_vocab_size())

    @property
    def end_of_text_id(self) -> int | None:
        """The id of `<|endoftext|>`; None if there is no such token."""
        return self._ordinary.token_to_id(END_OF_TEXT)

    def definition(self) -> dict[str, Any]:
        """What its tokenizer.json says, or would say."""
        return dict(json.loads(self._ordinary.to_str()))

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        try:
            text.encode()  # the library's own error for a lone surrogate is not clear
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the text is not valid Unicode: lone surrogate {text[error.start]!r} at character "
                f"{error.start}"
            ) from None
        tokenizer = self._special if allow_special else self._ordinary
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes(self, id: int) -> bytes:
        token = self._ordinary.id_to_token(id) if 0 <= id < 2**32 else None
        if token is None:  # not an id, or one of a vocabulary padded beyond the tokenizer's
            return b""
        if id in self._added:
            return token.encode()
        try:
            return bytes(byte_of_letter()[letter] for letter in token)
        except KeyError:
            raise TokenizerError(f"token {id} is {token!r}, which is not byte-level BPE") from None

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._ordinary.get_added_tokens_decoder())


def _with_special_end(tokenizer: Any) -> Any:
    """Some files do not call the end of text special, and then it would be found in any text."""
    from tokenizers import AddedToken

    id = tokenizer.token_to_id(END_OF_TEXT)
    added = tokenizer.get_added_tokens_decoder().get(id)
    if id is not None and (added is None or not added.special):
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return tokenizer


@lru_cache(maxsize=1)
def byte_of_letter() -> dict[str, int]:
    """GPT-2 writes each byte as a printable letter in its vocabulary: this reads them back.

    Bytes that are printable in Latin-1 stand for themselves, the others for U+0100 and on, in order
    (https://github.com/openai/gpt-2, encoder.py).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class TextDecoder:
    """Tokens -> text as they come; a character is held back until all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, id: int) -> str:
        """The text that a token completes, possibly none."""
        return self._utf8.decode(self._tokenizer.token_bytes(id))

    def finish(self) -> str:
        """What is left: U+FFFD for a character that never got all its bytes, or nothing."""
        return self._utf8.decode(b"", final=True)
