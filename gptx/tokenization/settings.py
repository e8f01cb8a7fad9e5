"""Settings beside a vocabulary that decide the token ids: class, options, added tokens.

The rules are those of transformers (tokenization_utils_base.py, `_from_pretrained`), where its
versions 4 and 5 agree: on the prefix space of byte-level BPE, BERT's normalizer and added tokens.
Otherwise version 5 ignores parts of a tokenizer.json, and gptx follows version 4.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptx.errors import TokenizerError
from gptx.tokenization.files import ADDED_TOKENS, SETTINGS, SPECIAL_TOKENS, read_object

GPT2, BERT = "GPT2Tokenizer", "BertTokenizer"  # classes of transformers
# Classes of byte-level BPE that set the prefix space of a tokenizer.json; others take it as it is.
PREFIX_CLASSES = (
    *(GPT2, "RobertaTokenizer", "BartTokenizer", "LongformerTokenizer", "LEDTokenizer"),
    *("CodeGenTokenizer", "GPTNeoXTokenizer", "DebertaTokenizer", "WhisperTokenizer"),
)
MAX_IDS = 2**31
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Lists of tokens, or objects of a name and a token.
_GROUPS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before the text is split.

    Attributes
    ----------
    content
        The token.
    special
        True if it is plain text unless special tokens are allowed.
    single_word, lstrip, rstrip, normalized
        Flags of the `tokenizers` library.
    """

    content: str
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True


def special_token(content: str) -> AddedToken:
    """Make a special token without other flags."""
    return AddedToken(content, special=True, normalized=False)


@dataclass(frozen=True)
class TokenizerSettings:
    """The settings of a tokenizer.

    Attributes
    ----------
    cls
        Class of transformers, without the suffix Fast; that of GPT-2 if no file names one.
    options
        Arguments of that class: the contents of tokenizer_config.json and, if it does not list
        the added tokens, of special_tokens_map.json.
    added
        Id -> added token.
    """

    cls: str
    options: Mapping[str, Any]
    added: Mapping[int, AddedToken]

    @property
    def add_prefix_space(self) -> bool:
        """True if a class of `PREFIX_CLASSES` puts a space before a text."""
        return self.options.get("add_prefix_space") is True

    def named_tokens(self) -> dict[str, str]:
        """Return "bos_token" and the like -> token."""
        found = {f"{name}_token": _content(self.options.get(f"{name}_token")) for name in _NAMES}
        return {key: token for key, token in found.items() if token}

    def special_tokens(self) -> Iterator[AddedToken]:
        """Yield the special tokens that the options name."""
        for name in _NAMES:
            if token := _token(self.options.get(f"{name}_token"), special=True):
                yield token
        for key in _GROUPS:
            group = self.options.get(key)
            items = list(group.values()) if isinstance(group, dict) else group
            for item in items if isinstance(items, list) else ():
                if token := _token(item, special=True):
                    yield token


def read_settings(files: Mapping[str, Path]) -> TokenizerSettings:
    """Read the settings beside a vocabulary.

    Parameters
    ----------
    files
        Name -> path, of the files of the tokenizer. A config.json in their folder names the class
        if tokenizer_config.json does not.

    Raises
    ------
    TokenizerError
        A file is damaged.
    StorageError
        A file cannot be read.
    """
    options = read_object(files, SETTINGS)
    cls = options.get("tokenizer_class")
    if cls is None and files:
        config = next(iter(files.values())).with_name("config.json")
        cls = read_object({"config": config} if config.is_file() else {}, "config").get(
            "tokenizer_class"
        )
    listed = options.get("added_tokens_decoder")
    if listed is not None:
        added = _listed_tokens(listed, files[SETTINGS])
    else:
        options |= read_object(files, SPECIAL_TOKENS)
        added = _older_tokens(files, options)
    return TokenizerSettings(
        cls.removesuffix("Fast") if isinstance(cls, str) else GPT2, options, added
    )


def _listed_tokens(listed: object, path: Path) -> dict[int, AddedToken]:
    """Read `added_tokens_decoder` of tokenizer_config.json."""
    added = {}
    for key, data in listed.items() if isinstance(listed, dict) else [("", None)]:
        token = _token(data, isinstance(data, dict) and data.get("special") is True)
        is_id = re.fullmatch("[0-9]{1,10}", key) is not None and int(key) < MAX_IDS
        if token is None or not is_id:
            raise TokenizerError(
                f'{path}: "added_tokens_decoder" has {key[:64]!r}: {str(data)[:64]}, expected '
                "token ids and their tokens: fetch the model again"
            )
        added[int(key)] = token
    return added


def _older_tokens(files: Mapping[str, Path], options: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Read added_tokens.json, which has ids only; the tokens that `options` name are special."""
    named = {token.content for token in TokenizerSettings("", options, {}).special_tokens()}
    added = {}
    for content, id in read_object(files, ADDED_TOKENS).items():
        if not content or type(id) is not int or not 0 <= id < MAX_IDS:
            raise TokenizerError(
                f"{files[ADDED_TOKENS]} has {content[:64]!r}: {str(id)[:64]}, expected a token and "
                "its id: fetch the model again"
            )
        special = content in named
        added[id] = AddedToken(content, special, normalized=not special)
    return added


def _content(value: object) -> str | None:
    """Return the token of a setting: a string, or an object with `content`."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) and content else None


def _token(value: object, special: bool) -> AddedToken | None:
    content = _content(value)
    if content is None:
        return None
    given = value if isinstance(value, dict) else {}
    flags = {name: given[name] for name in _FLAGS if isinstance(given.get(name), bool)}
    return AddedToken(content, special, **{"normalized": not special, **flags})
