"""Tokenizers of the `tokenizers` library, made of files as transformers makes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gptx.errors import TokenizerError
from gptx.tokenization.files import MERGES, TOKENIZER, VOCAB, WORDS, check_vocabularies
from gptx.tokenization.settings import (
    BERT,
    PREFIX_CLASSES,
    AddedToken,
    TokenizerSettings,
    special_token,
)


def library_tokenizer(files: Mapping[str, Path], settings: TokenizerSettings) -> Any:
    """Make a tokenizer of its files.

    Raises
    ------
    TokenizerError
        A file is missing or too large, or its form does not fit to the class.
    Exception
        The library refuses a file.
    """
    from tokenizers import Tokenizer

    check_vocabularies(files)
    if path := files.get(TOKENIZER):
        tokenizer = Tokenizer.from_file(str(path))
        _apply_class(tokenizer, settings)
    elif WORDS in files and VOCAB not in files:
        tokenizer = _bert_tokenizer(files[WORDS], settings)
    else:
        tokenizer = _gpt2_tokenizer(files, settings)
    _add_tokens(tokenizer, settings)
    return tokenizer


def _gpt2_tokenizer(files: Mapping[str, Path], settings: TokenizerSettings) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if missing := [name for name in (VOCAB, MERGES) if name not in files]:
        raise TokenizerError(
            f"{missing[0]!r} is missing: expected {TOKENIZER}, or {VOCAB} and {MERGES}"
        )
    paths = str(files[VOCAB]), str(files[MERGES])
    tokenizer = Tokenizer(models.BPE.from_file(*paths))
    added = {token.content: id for id, token in settings.added.items()}
    added = {token: id for token, id in added.items() if tokenizer.token_to_id(token) is None}
    if added:  # the library keeps their ids only if the vocabulary has them
        vocab, merges = models.BPE.read_file(*paths)
        ids = set(vocab.values())
        if taken := [token for token, id in added.items() if id in ids]:
            raise TokenizerError(
                f"{files[VOCAB].parent} is damaged: the added token {taken[0]!r} has the id "
                f"{added[taken[0]]} of another token: fetch the model again"
            )
        tokenizer = Tokenizer(models.BPE(vocab | added, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(settings.add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _bert_tokenizer(path: Path, settings: TokenizerSettings) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if settings.cls != BERT:
        raise TokenizerError(
            f"{path} is the vocabulary of a {settings.cls}, expected that of a {BERT}, or "
            f"{TOKENIZER}: name the class in tokenizer_config.json"
        )
    unknown = settings.named_tokens().get("unk_token", "[UNK]")
    tokenizer = Tokenizer(models.WordPiece.from_file(str(path), unk_token=unknown))
    tokenizer.normalizer = _bert_normalizer(settings)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _bert_normalizer(settings: TokenizerSettings) -> Any:
    from tokenizers import normalizers

    strip_accents = settings.options.get("strip_accents")
    return normalizers.BertNormalizer(
        handle_chinese_chars=settings.options.get("tokenize_chinese_chars") is not False,
        strip_accents=strip_accents if isinstance(strip_accents, bool) else None,
        lowercase=settings.options.get("do_lower_case") is not False,
    )


def _apply_class(tokenizer: Any, settings: TokenizerSettings) -> None:
    """Set the parts of a tokenizer.json that its class takes from the settings."""
    from tokenizers import pre_tokenizers

    if settings.cls in PREFIX_CLASSES:
        state = component(tokenizer.pre_tokenizer)
        if state.pop("type", None) == "ByteLevel":
            state["add_prefix_space"] = settings.add_prefix_space
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**state)
    elif settings.cls == BERT and component(tokenizer.normalizer).get("type") == "BertNormalizer":
        clean_text = component(tokenizer.normalizer)["clean_text"]
        tokenizer.normalizer = _bert_normalizer(settings)
        tokenizer.normalizer.clean_text = clean_text


def _add_tokens(tokenizer: Any, settings: TokenizerSettings) -> None:
    """Add the tokens that the settings list with ids, and mark those that they name as special."""
    found = set(tokenizer.get_added_tokens_decoder().values())
    named = {token.content: token for token in settings.special_tokens()}
    if settings.cls == BERT:
        for mark in ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"):
            named.setdefault(mark, special_token(mark))
    listed = [
        _library_token(replace(token, special=token.special or token.content in named))
        for _, token in sorted(settings.added.items())
    ]
    tokenizer.add_tokens([token for token in listed if token not in found])
    mark_special(tokenizer, named.values())


def disable_dropout(tokenizer: Any) -> None:
    """Set the dropout of a BPE to none: it is for training, and makes the ids random."""
    from tokenizers import models

    if isinstance(tokenizer.model, models.BPE):
        tokenizer.model.dropout = None


def mark_special(tokenizer: Any, tokens: Iterable[AddedToken]) -> None:
    """Make tokens special that are in the vocabulary; added tokens keep their other flags."""
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    marked = []
    for token in tokens:
        if token.content in added:
            added[token.content].special = True
            marked.append(added[token.content])
        elif tokenizer.token_to_id(token.content) is not None:
            marked.append(_library_token(token))
    tokenizer.add_tokens(marked)


def hide_special(tokenizer: Any) -> Any:
    """Return a tokenizer with the same ids, for which special tokens are plain text."""
    from tokenizers import Tokenizer, models

    tokenizer.encode_special_tokens = True  # by default they are found in any text
    if isinstance(tokenizer.model, models.BPE):
        return tokenizer
    # The other models find them in their vocabulary too: there they get a name that no text has.
    definition = json.loads(tokenizer.to_str())
    model, added = definition["model"], definition["added_tokens"]
    special = [token["content"] for token in added if token["special"]]
    hidden = {content: f"\uffff \uffff{content}" for content in special}
    hidden.pop(model.get("unk_token"), None)  # the model finds it by its name
    if model["type"] == "Unigram":
        model["vocab"] = [[hidden.get(token, token), score] for token, score in model["vocab"]]
    else:
        model["vocab"] = {hidden.get(token, token): id for token, id in model["vocab"].items()}
    for token in added:
        token["content"] = hidden.get(token["content"], token["content"])
    plain = Tokenizer.from_str(json.dumps(definition))
    plain.encode_special_tokens = True
    return plain


def is_library_error(error: BaseException) -> bool:
    """Test for an error of the library: a bare Exception, or a panic, which is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _library_token(token: AddedToken) -> Any:
    from tokenizers import AddedToken as LibraryToken

    return LibraryToken(**asdict(token))


def component(part: Any) -> dict[str, Any]:
    """Return the definition of a normalizer, pre-tokenizer or decoder; empty for None."""
    return {} if part is None else dict(json.loads(part.__getstate__()))
