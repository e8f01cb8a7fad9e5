"""`/tokenize`, `/detokenize` and `/tokenizer_info`: the tokens of a text, and back."""

from __future__ import annotations

from typing import Any

from gptx.generation.model_info import ModelInfo
from gptx.server.api.chat import MAX_MESSAGES, MESSAGE, chat_prompt, chat_template
from gptx.server.api.fields import Field, Flag, Many, Record, Text, Whole
from gptx.server.api.parameters import MAX_COUNT, MAX_IDS, ignored_fields, model_field
from gptx.server.api.writing import token_name
from gptx.server.errors import ApiError
from gptx.tokenization.byte_level import END_OF_TEXT

TOKENIZE = Record(
    (
        model_field(),
        Field("prompt", Text(), "Text."),
        Field("content", Text(), "Synonym of prompt."),
        Field("messages", Many(MESSAGE, MAX_MESSAGES, 1), "Messages of a chat, in place of it."),
        Field("allow_special", Flag(), "Read <|endoftext|> in the text as that token.", True),
        Field("add_special_tokens", Flag(), "Accepted, and ignored: GPT-2 adds none."),
        Field("return_token_strs", Flag(), "Also return the text of each token."),
        *ignored_fields(),
    )
)
DETOKENIZE = Record(
    (
        model_field(),
        Field("tokens", Many(Whole(0, MAX_COUNT), MAX_IDS), "Token ids.", required=True),
        *ignored_fields(),
    )
)


def tokenize(info: ModelInfo, values: dict[str, Any]) -> dict[str, Any]:
    """Return the token ids of a text or of messages.

    Raises
    ------
    ApiError, GptxError
        There is no text, or the model has no tokenizer.
    """
    given = [name for name in ("prompt", "content", "messages") if name in values]
    if len(given) != 1:
        raise ApiError(
            400, "expected one of prompt, content and messages", param="prompt",
            code="missing_field" if not given else "invalid_value",
        )  # fmt: skip
    text = values[given[0]]
    if given == ["messages"]:
        text, _ = chat_prompt(info, text)
    if isinstance(text, str):
        special = values["allow_special"]
        ids = info.tokenizer.encode(text, allow_special=special) if text else []
    else:
        ids = text
    answer: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": info.config.n_positions,
        "tokens": ids,
    }
    if values.get("return_token_strs"):
        answer["token_strs"] = [token_name(info, id) for id in ids]
    return answer


def detokenize(info: ModelInfo, values: dict[str, Any]) -> dict[str, Any]:
    """Return the text of token ids.

    Raises
    ------
    ApiError, GptxError
        An id is outside of the vocabulary, or the model has no tokenizer.
    """
    ids, size = values["tokens"], info.config.vocab_size
    if unknown := [id for id in ids if id >= size]:
        raise ApiError(
            400, f"tokens has {unknown[0]}, expected 0 to {size - 1}", param="tokens",
            code="invalid_value",
        )  # fmt: skip
    text = info.tokenizer.decode(ids)
    return {"prompt": text, "content": text}


def tokenizer_info(info: ModelInfo) -> dict[str, Any]:
    """Return the special tokens and the sizes of a tokenizer."""
    ends = info.config.eos_token_ids
    eos = info.tokenizer.decode([ends[0]]) if ends else END_OF_TEXT
    first = info.config.bos_token_id
    return {
        "eos_token": eos,
        "bos_token": eos if first is None else info.tokenizer.decode([first]),
        "eos_token_id": ends[0] if ends else None,
        "bos_token_id": first,
        "pad_token": None,
        "vocab_size": info.config.vocab_size,
        "model_max_length": info.config.n_positions,
        "chat_template": chat_template(info),
    }
