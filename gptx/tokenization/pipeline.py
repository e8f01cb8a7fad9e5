"""A tokenizer of any tokenizer.json, run by the `tokenizers` library."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from gptx.errors import PromptError, TokenizerError
from gptx.tokenization.byte_level import END_OF_TEXT, byte_of_letter
from gptx.tokenization.decoder import Step, Utf8Decoder, WindowDecoder, is_local, steps_of
from gptx.tokenization.files import TOKENIZER
from gptx.tokenization.finding import find_tokenizer
from gptx.tokenization.library import (
    component,
    disable_dropout,
    hide_special,
    is_library_error,
    library_tokenizer,
    mark_special,
)
from gptx.tokenization.protocol import TextDecoder
from gptx.tokenization.settings import read_settings, special_token


class PipelineTokenizer:
    """A tokenizer of normalizer, pre-tokenizer, vocabulary and decoder, as in a tokenizer.json.

    The ids are those that transformers gives for the same files, without the tokens that a
    post-processor adds. A token that only tokenizer_config.json names gets no new id.

    Parameters
    ----------
    files
        Name -> path, of the files in `gptx.tokenization.files.FILES`.
    definition
        Contents of a tokenizer.json, in place of files.

    Attributes
    ----------
    files
        Files that it was read from; empty for a definition.
    settings
        Settings beside the vocabulary.

    Raises
    ------
    TokenizerError
        A file is damaged or missing.
    """

    def __init__(self, files: Mapping[str, Path], *, definition: str | None = None) -> None:
        self.files = dict(files)
        self._definition = definition
        self.settings = read_settings(self.files)
        self._library = self._read()

    @classmethod
    def of_folder(cls, folder: Path) -> PipelineTokenizer | None:
        """Read the tokenizer of a folder; None if the folder has none."""
        files = find_tokenizer(lambda name: path if (path := folder / name).is_file() else None)
        return cls(files) if files else None

    @classmethod
    def of_vocabulary(
        cls,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        special: Mapping[str, int] | None = None,
    ) -> PipelineTokenizer:
        """Make GPT-2's tokenizer of a vocabulary and its merges.

        Parameters
        ----------
        vocab
            Token -> id; tokens in the letters of the files, see `byte_of_letter`.
        merges
            Pairs of tokens, the first merge first.
        special
            Special token -> id, which may be outside the vocabulary.

        Raises
        ------
        TokenizerError
            A merge makes a token that is not in the vocabulary.
        """
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        byte_level["use_regex"] = True
        # The library keeps the ids of added tokens only if the vocabulary has them.
        tokens = {**vocab, **(special or {})}
        model = {"type": "BPE", "vocab": tokens, "merges": [list(pair) for pair in merges]}
        return cls({}, definition=_definition(model, byte_level, byte_level, special or {}))

    @classmethod
    def of_pieces(
        cls,
        tokens: Sequence[str],
        *,
        split: str | None = None,
        unknown: str | None = None,
        special: Sequence[str] = (),
    ) -> PipelineTokenizer:
        """Make a tokenizer whose tokens are pieces of text: a BPE without merges.

        A piece that is no token falls apart into its characters.

        Parameters
        ----------
        tokens
            All tokens, in the order of their ids.
        split
            Regular expression that matches each piece of a text; None: a piece is a character.
        unknown
            Token of characters that are no tokens. None: they are an error.
        special
            Special tokens, whose ids follow the others.
        """
        vocab = {token: id for id, token in enumerate([*tokens, *special])}
        model: dict[str, Any] = {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": unknown}
        model["ignore_merges"] = split is not None  # a piece in the vocabulary is one token
        splitter: dict[str, Any] | None = None
        if split is not None:
            splitter = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated"}
            splitter["invert"] = False
        added = {token: vocab[token] for token in special}
        return cls({}, definition=_definition(model, splitter, {"type": "Fuse"}, added))

    def _read(self) -> Any:
        from tokenizers import Tokenizer

        try:
            if self._definition is None:
                tokenizer = library_tokenizer(self.files, self.settings)
            else:
                tokenizer = Tokenizer.from_str(self._definition)
            tokenizer.no_padding()
            tokenizer.no_truncation()
            disable_dropout(tokenizer)
            mark_special(tokenizer, [special_token(END_OF_TEXT)])
            return tokenizer
        except TokenizerError:
            raise
        except BaseException as error:
            if not is_library_error(error):
                raise
            read = [TOKENIZER] if TOKENIZER in self.files else self.files
            names = " and ".join(str(self.files[name]) for name in read) or "the vocabulary"
            raise TokenizerError(
                f"{names} cannot be read as a tokenizer ({error}): fetch the model again"
            ) from None

    @cached_property
    def _ordinary(self) -> Any:
        """A tokenizer for which special tokens are plain text."""
        return hide_special(self._library)

    @cached_property
    def _special(self) -> Any:
        """A second tokenizer, which finds special tokens."""
        return self._read()

    @property
    def folder(self) -> Path | None:
        """Folder of its files; None for a definition."""
        return next((path.parent for path in self.files.values()), None)

    @property
    def vocab_size(self) -> int:
        return int(self._library.get_vocab_size())

    @property
    def end_of_text_id(self) -> int | None:
        """Id of `<|endoftext|>`; None if the vocabulary lacks it."""
        return self.token_id(END_OF_TEXT)

    def token_id(self, token: str) -> int | None:
        """Return the id of a token; None if the vocabulary lacks it."""
        return self._library.token_to_id(token)

    def definition(self) -> dict[str, Any]:
        """Return the contents of its tokenizer.json."""
        return dict(json.loads(self._library.to_str()))

    def save(self, folder: str | os.PathLike[str], *, context: int | None = None) -> None:
        """Write its files into a folder that exists, each atomically, for gptx and transformers.

        Parameters
        ----------
        context
            Context of the model in tokens, for the settings.

        Raises
        ------
        StorageError
            A file cannot be written.
        """
        from gptx.tokenization.saving import save_tokenizer

        save_tokenizer(self, Path(folder), context=context)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Return the token ids of a text; special tokens in it are ordinary text unless allowed.

        Raises
        ------
        PromptError
            The text has a lone surrogate, or a character that a vocabulary of characters lacks.
        TokenizerError
            The library refuses the text.
        """
        try:
            text.encode()  # the library's own error for a lone surrogate is not clear
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the text is not valid Unicode: lone surrogate {text[error.start]!r} at character "
                f"{error.start}: remove it"
            ) from None
        tokenizer = self._special if allow_special else self._ordinary
        with _named_errors("the text"):
            encoding = tokenizer.encode(text, add_special_tokens=False)
        if self._alphabet is not None and not self._alphabet.issuperset(text):
            self._check_complete(text, encoding.tokens)
        return list(encoding.ids)

    @cached_property
    def _alphabet(self) -> frozenset[str] | None:
        """Tokens, if the library would leave out characters that are not among them; else None."""
        from tokenizers import models

        model = self._library.model
        if self.has_bytes or not isinstance(model, models.BPE) or model.unk_token is not None:
            return None
        definition = self.definition()
        data = definition["model"]
        if data["merges"] or data["byte_fallback"] or definition["normalizer"]:
            return None
        return frozenset(data["vocab"])

    def _check_complete(self, text: str, tokens: Sequence[str]) -> None:
        """Raise an error for the first character of a text that its tokens lack."""
        end = 0
        for token in tokens:
            if not text.startswith(token, end):
                break
            end += len(token)
        if end < len(text):
            raise PromptError(
                f"the text has {text[end]!r} at character {end}, which is not among the "
                f"{self.vocab_size} tokens of this vocabulary: remove it, or make a vocabulary of "
                "a text that has it"
            )

    def decode(self, ids: Sequence[int]) -> str:
        if self.has_bytes:
            return b"".join(map(self.token_bytes, ids)).decode(errors="replace")
        known = [id for id in ids if 0 <= id < 2**32]
        with _named_errors("the tokens"):
            return str(self._library.decode(known, skip_special_tokens=False))

    def decoder(self, prompt: Sequence[int] = ()) -> TextDecoder:
        if self.has_bytes:
            return Utf8Decoder(self.token_bytes)
        if is_local(self._decoder_steps):
            return WindowDecoder(self.decode, self._is_open, prompt)
        return WindowDecoder(self.decode, lambda ids: True)  # text at the end only

    @cached_property
    def has_bytes(self) -> bool:
        """True if the tokens are bytes, and a text is their sequence in UTF-8."""
        if steps := self._decoder_steps:
            return [step["type"] for step in steps] == ["ByteLevel"]
        return component(self._library.pre_tokenizer).get("type") == "ByteLevel"

    @cached_property
    def _decoder_steps(self) -> list[Step]:
        return steps_of(component(self._library.decoder))

    def _token(self, id: int) -> str | None:
        """Return a token; None for no id, or one that only pads the vocabulary of the model."""
        return self._library.id_to_token(id) if 0 <= id < 2**32 else None

    def _is_open(self, ids: Sequence[int]) -> bool:
        """Test for a last byte of ByteFallback, or id without a token, which may be among bytes."""
        token = self._token(ids[-1])
        return token is None or (len(token) == 6 and token.startswith("<0x"))

    def piece(self, id: int) -> str | bytes:
        """Return the text of a token; bytes if they are an incomplete character.

        The tokens of a kind without bytes are as the vocabulary has them, such as "##ing".
        """
        if not self.has_bytes:
            return self._token(id) or ""
        data = self.token_bytes(id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return data

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of a token; none for an id that is not in the vocabulary.

        Raises
        ------
        TokenizerError
            The tokens of this tokenizer are not bytes: their text depends on those beside them.
        """
        token = self._token(id)
        if not self.has_bytes:
            raise TokenizerError(
                f"token {id} is {token!r}, which has no bytes of its own: expected a byte-level "
                "BPE, as that of GPT-2"
            )
        if token is None:
            return b""
        if id in self._added:
            return token.encode()
        try:
            return bytes(byte_of_letter()[letter] for letter in token)
        except KeyError:  # as in the library
            return token.encode()

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._library.get_added_tokens_decoder())


def _definition(
    model: Mapping[str, Any],
    pre_tokenizer: Mapping[str, Any] | None,
    decoder: Mapping[str, Any],
    special: Mapping[str, int],
) -> str:
    """Return the contents of a tokenizer.json; `special` is special token -> id."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": id, "content": token, **flags, "special": True}
                for token, id in special.items()
            ],
            "normalizer": None,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": None,
            "decoder": decoder,
            "model": model,
        }
    )


@contextmanager
def _named_errors(subject: str) -> Iterator[None]:
    """Raise an error of the library as one that names its subject."""
    try:
        yield
    except BaseException as error:
        if not is_library_error(error):
            raise
        raise TokenizerError(
            f"{subject} cannot be converted by this tokenizer ({error}): check its definition"
        ) from None
