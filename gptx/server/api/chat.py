"""`POST /v1/chat/completions`: the answer to messages, written as one prompt.

The prompt is that of the tokenizer's chat template, if it has one. For DialoGPT it is each message
and an end-of-text token. For any other model it is a transcript:

    The text of a system message.

    User: Hello!
    Assistant: Hi.
    User: How are you?
    Assistant:

which ends where the model begins another turn ("\\nUser:"). GPT-2 itself was trained on no dialogs.
"""

from __future__ import annotations

from typing import Any

from gptx.generation.model_info import ModelInfo
from gptx.server.api.calls import Call, Format
from gptx.server.api.completions import make_call
from gptx.server.api.fields import Choice, Either, Field, Flag, Many, Record, Text, Whole
from gptx.server.api.parameters import (
    MAX_COUNT,
    model_field,
    read_max_tokens,
    sampling_fields,
    to_options,
)
from gptx.server.api.writing import Delta, chat_logprobs
from gptx.server.errors import ApiError
from gptx.server.scheduler import Scheduler
from gptx.server.settings import Settings
from gptx.tokenization.byte_level import END_OF_TEXT
from gptx.tokenization.pipeline import PipelineTokenizer

ROLES = ("system", "developer", "user", "assistant")
SPEAKERS = {"user": "User", "assistant": "Assistant"}
ENDS = [f"\n{speaker}:" for speaker in SPEAKERS.values()]
MAX_MESSAGES = 1024
MAX_PARTS = 64  # of the content of a message
TEMPLATE_FILE = "chat_template.jinja"

PART = Record(
    (
        Field("type", Choice(("text",)), "Kind of the part.", required=True),
        Field("text", Text(), "Text of the part.", required=True),
    )
)
MESSAGE = Record(
    (
        Field("role", Choice(ROLES), "Speaker.", required=True),
        Field("content", Either((Text(), Many(PART, MAX_PARTS))), "Text.", required=True),
        Field("name", Text(), "Accepted, and ignored."),
    )
)


def chat_fields(settings: Settings) -> Record:
    """Return the fields of a request."""
    limit = settings.max_tokens or MAX_COUNT
    return Record(
        (
            model_field(),
            Field("messages", Many(MESSAGE, MAX_MESSAGES, 1), "Messages of a dialog."),
            Field(
                "max_tokens", Whole(1, limit), "Limit of new tokens. Default: all of the context."
            ),
            Field("max_completion_tokens", Whole(1, limit), "Synonym of max_tokens."),
            Field("logprobs", Flag(), "Return the log-probabilities of the tokens."),
            Field(
                "top_logprobs",
                Whole(0, settings.max_logprobs),
                "With logprobs: number of most probable tokens in the place of each.",
            ),
            *sampling_fields(settings),
        )
    )


class ChatFormat:
    """The JSON form of chat completions."""

    prefix = "chatcmpl"
    object = "chat.completion"
    stream_object = "chat.completion.chunk"

    def choice(self, call: Call, delta: Delta) -> dict[str, Any]:
        """Return a whole answer."""
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return self._item(call, delta, "message", message)

    def stream_choice(self, call: Call, delta: Delta) -> dict[str, Any]:
        """Return a part of an answer."""
        content = {"content": delta.text} if delta.text or not delta.finish_reason else {}
        return self._item(call, delta, "delta", content)

    def first_choices(self, call: Call) -> list[dict[str, Any]]:
        """Return the role of each answer."""
        return [
            {
                "index": writer.index,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
            for writer in call.writers
        ]

    def _item(self, call: Call, delta: Delta, name: str, content: Any) -> dict[str, Any]:
        info = call.scheduler.model.info
        has_logprobs = call.logprobs is not None and (delta.rows or name == "message")
        choice: dict[str, Any] = {
            "index": delta.index,
            name: content,
            "logprobs": chat_logprobs(info, delta.rows) if has_logprobs else None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stopped_by,
        }
        return choice | call.ids(delta)


CHAT: Format = ChatFormat()


def chat_call(scheduler: Scheduler, name: str, values: dict[str, Any], settings: Settings) -> Call:
    """Return the call of a request's fields.

    Raises
    ------
    ApiError, GptxError
        A field contradicts another one, or the messages do not fit the model.
    """
    if "messages" not in values:
        raise ApiError(400, "messages is missing", param="messages", code="missing_field")
    logprobs = values.get("top_logprobs", 0) if values.get("logprobs") else None
    if values.get("top_logprobs") and logprobs is None:
        raise ApiError(
            400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value"
        )
    options = to_options(values, read_max_tokens(values) or settings.max_tokens)
    if logprobs is not None:
        options["logprobs"] = logprobs
    info = scheduler.model.info
    prompt, is_transcript = chat_prompt(info, values["messages"])
    if is_transcript:
        given = options.get("stop") or []
        options["stop"] = [*([given] if isinstance(given, str) else given), *ENDS]
    return make_call(
        CHAT,
        scheduler,
        name,
        [prompt],
        options,
        settings,
        logprobs=logprobs,
        may_shorten=True,
        has_ids=values.get("return_token_ids", False),
        skip_space=is_transcript,
    )


def chat_prompt(info: ModelInfo, given: list[dict[str, Any]]) -> tuple[str | list[int], bool]:
    """Return the prompt of messages, and True if it is a transcript.

    Raises
    ------
    ApiError
        The template refuses the messages or exceeds a limit, or jinja2 is missing.
    """
    messages = [{"role": one["role"], "content": _text(one["content"])} for one in given]
    template = chat_template(info)
    if template is not None:
        text = _render(template, info, messages)
        return info.tokenizer.encode(text, allow_special=True), False
    if is_dialogpt(info):
        end = info.config.eos_token_ids[0]
        ids = [[*info.tokenizer.encode(one["content"]), end] for one in messages]
        return [id for one in ids for id in one], False
    return transcript(messages), True


def _text(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def is_dialogpt(info: ModelInfo) -> bool:
    """Test for a DialoGPT, which only its name tells from a GPT-2."""
    return "dialogpt" in info.name.lower()


def transcript(messages: list[dict[str, str]]) -> str:
    """Return messages as a transcript, which ends where the assistant answers."""
    lines = [
        f"{SPEAKERS[one['role']]}: {one['content']}\n"
        if one["role"] in SPEAKERS
        else f"{one['content']}\n\n"
        for one in messages
    ]
    return f"{''.join(lines)}{SPEAKERS['assistant']}:"


def chat_template(info: ModelInfo) -> str | None:
    """Return the chat template of the tokenizer's settings, or in the file beside them."""
    tokenizer = info.tokenizer
    if not isinstance(tokenizer, PipelineTokenizer):
        return None
    template = tokenizer.settings.options.get("chat_template")
    if isinstance(template, str):
        return template
    path = tokenizer.folder and tokenizer.folder / TEMPLATE_FILE
    return path.read_text("utf-8", errors="replace") if path and path.is_file() else None


def _render(template: str, info: ModelInfo, messages: list[dict[str, str]]) -> str:
    """Return the text of a template, which runs in a sandbox as in transformers."""
    try:
        from gptx.server.api.templates import render
    except ImportError:
        raise ApiError(
            501,
            "the chat template of this model needs jinja2: run `pip install jinja2` on the server, "
            "or use /v1/completions",
            code="not_supported",
        ) from None

    tokenizer = info.tokenizer
    assert isinstance(tokenizer, PipelineTokenizer)
    values = {
        "messages": messages,
        "add_generation_prompt": True,
        "eos_token": END_OF_TEXT,
        "bos_token": END_OF_TEXT,
        **tokenizer.settings.named_tokens(),
    }
    try:
        return render(template, values)
    except Exception as error:  # a template is a program
        raise ApiError(
            400, f"the chat template of this model refuses the messages: {error}", param="messages"
        ) from None
