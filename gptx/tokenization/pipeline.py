"""A tokenizer of any tokenizer.json, run by the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from gptx.errors import PromptError, TokenizerError
from gptx.tokenization.byte_level import END_OF_TEXT, byte_of_letter
from gptx.tokenization.files import FILES


class PipelineTokenizer:
    """GPT-2's byte-level BPE, run by the `tokenizers` library.

    Parameters
    ----------
    files
        Name -> path, of "tokenizer.json", or of "vocab.json" and "merges.txt".
    definition
        Contents of a tokenizer.json, in place of files.

    Raises
    ------
    TokenizerError
        A file is damaged or missing.
    """

    def __init__(self, files: Mapping[str, Path], *, definition: str | None = None) -> None:
        self._files = dict(files)
        self._definition = definition
        self._ordinary = self._read()
        # By default the library finds special tokens in any text.
        self._ordinary.encode_special_tokens = True

    @classmethod
    def of_folder(cls, folder: Path) -> PipelineTokenizer | None:
        """Read the tokenizer of a folder; None if the folder has none."""
        files = {name: folder / name for name in FILES if (folder / name).is_file()}
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
            Special token -> id.

        Raises
        ------
        TokenizerError
            A merge makes a token that is not in the vocabulary.
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
                f"{error} is missing: expected tokenizer.json, or vocab.json and merges.txt"
            ) from None
        except Exception as error:  # the library raises bare Exceptions
            read = ["tokenizer.json"] if "tokenizer.json" in self._files else self._files
            names = " and ".join(str(self._files[name]) for name in read) or "the vocabulary"
            raise TokenizerError(
                f"{names} cannot be read as a tokenizer ({error}): fetch the model again"
            ) from None

    @cached_property
    def _special(self) -> Any:
        """A second tokenizer, which finds special tokens."""
        return self._read()

    @property
    def vocab_size(self) -> int:
        return int(self._ordinary.get_vocab_size())

    @property
    def end_of_text_id(self) -> int | None:
        """Id of `<|endoftext|>`; None if the vocabulary lacks it."""
        return self._ordinary.token_to_id(END_OF_TEXT)

    def definition(self) -> dict[str, Any]:
        """Return the contents of its tokenizer.json."""
        return dict(json.loads(self._ordinary.to_str()))

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        try:
            text.encode()  # the library's own error for a lone surrogate is not clear
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the text is not valid Unicode: lone surrogate {text[error.start]!r} at character "
                f"{error.start}: remove it"
            ) from None
        tokenizer = self._special if allow_special else self._ordinary
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes(self, id: int) -> bytes:
        token = self._ordinary.id_to_token(id) if 0 <= id < 2**32 else None
        if token is None:  # no id, or one that only pads the vocabulary of the model
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
    """Make `<|endoftext|>` a special token, which some files do not.

    Without that, it is found in any text.
    """
    from tokenizers import AddedToken

    id = tokenizer.token_to_id(END_OF_TEXT)
    added = tokenizer.get_added_tokens_decoder().get(id)
    if id is not None and (added is None or not added.special):
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return tokenizer
