"""Tokenizers of the `tokenizers` library, made of files as transformers makes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gptx.errors import TokenizerError
from gptx.tokenization.files import MERGES, TOKENIZER, VOCAB, WORDS
from gptx.tokenization.settings import BERT, GPT2, AddedToken, TokenizerSettings


def library_tokenizer(files: Mapping[str, Path], settings: TokenizerSettings) -> Any:
    """Make a tokenizer of its files.

    Raises
    ------
    TokenizerError
        A file is missing, or its form does not fit to the class.
    Exception
        The library refuses a file.
    """
    from tokenizers import Tokenizer

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
    vocab, merges = models.BPE.read_file(str(files[VOCAB]), str(files[MERGES]))
    added = {
        token.content: id for id, token in settings.added.items() if token.content not in vocab
    }
    if sorted(added.values()) != list(range(len(vocab), len(vocab) + len(added))):
        # The library numbers added tokens without gaps, unless the vocabulary has them.
        vocab |= added
    if len(set(vocab.values())) < len(vocab):
        raise TokenizerError(
            f"{files[VOCAB]} is damaged: some tokens, added ones included, have the same id: fetch "
            "the model again"
        )
    tokenizer = Tokenizer(models.BPE(vocab, merges))
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

    if settings.cls == GPT2:
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
        marks = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")
        named = {
            token: AddedToken(token, special=True, normalized=False) for token in marks
        } | named
    for _, token in sorted(settings.added.items()):
        special = token.special or token.content in named
        entry = _library_token(token, special)
        if entry not in found:
            tokenizer.add_tokens([entry])
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token in named.values():
        if token.content not in added and tokenizer.token_to_id(token.content) is not None:
            tokenizer.add_tokens([_library_token(token, special=True)])


def mark_special(tokenizer: Any, content: str) -> None:
    """Make a token of the vocabulary a special one, which some files do not.

    Without that, it is found in any text.
    """
    id = tokenizer.token_to_id(content)
    added = tokenizer.get_added_tokens_decoder().get(id)
    if id is not None and (added is None or not added.special):
        token = AddedToken(content, special=True, normalized=False)
        tokenizer.add_special_tokens([_library_token(token, special=True)])


def hide_special(tokenizer: Any) -> Any:
    """Return a tokenizer with the same ids, for which special tokens are plain text."""
    from tokenizers import Tokenizer, models

    tokenizer.encode_special_tokens = True  # by default they are found in any text
    if isinstance(tokenizer.model, models.BPE):
        return tokenizer
    # The other models find them in their vocabulary too, where they get unlikely names.
    definition = json.loads(tokenizer.to_str())
    model = definition["model"]
    special = {token["content"] for token in definition["added_tokens"] if token["special"]}
    special.discard(model.get("unk_token"))
    if model["type"] == "Unigram":
        special -= {model["vocab"][model["unk_id"]][0]} if model["unk_id"] is not None else set()
        model["vocab"] = [[_hidden(token, special), score] for token, score in model["vocab"]]
    else:
        model["vocab"] = {_hidden(token, special): id for token, id in model["vocab"].items()}
    kept = [token for token in definition["added_tokens"] if token["content"] not in special]
    definition["added_tokens"] = kept
    hidden = Tokenizer.from_str(json.dumps(definition))
    hidden.encode_special_tokens = True
    return hidden


def _hidden(token: str, special: set[str]) -> str:
    return f"\uffff \uffff{token}" if token in special else token


def is_library_error(error: BaseException) -> bool:
    """Test for an error of the library: a bare Exception, or a panic, which is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _library_token(token: AddedToken, special: bool) -> Any:
    from tokenizers import AddedToken as LibraryToken

    return LibraryToken(**(asdict(token) | {"special": special}))


def component(part: Any) -> dict[str, Any]:
    """Return the definition of a normalizer, pre-tokenizer or decoder; empty for None."""
    return {} if part is None else dict(json.loads(part.__getstate__()))
