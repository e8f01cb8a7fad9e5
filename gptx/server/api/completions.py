"""`POST /v1/completions`: the continuation of prompts."""

from __future__ import annotations

from typing import Any

from gptx.generation.options import Options, check_options
from gptx.generation.request import Request
from gptx.generation.sequences import fit_prompt
from gptx.server.api.calls import Call, Format
from gptx.server.api.fields import Field, Flag, Prompts, Record, Whole
from gptx.server.api.parameters import (
    MAX_COUNT,
    model_field,
    read_max_tokens,
    sampling_fields,
    to_options,
)
from gptx.server.api.writing import Delta, Writer, text_logprobs
from gptx.server.errors import ApiError
from gptx.server.scheduler import Scheduler
from gptx.server.settings import Settings

DEFAULT_MAX_TOKENS = 16  # OpenAI's


def completion_fields(settings: Settings) -> Record:
    """Return the fields of a request."""
    limit = settings.max_tokens or MAX_COUNT
    return Record(
        (
            model_field(),
            Field(
                "prompt",
                Prompts(settings.max_prompts),
                "Text, list of token ids, or list of those.",
            ),
            Field(
                "max_tokens",
                Whole(0, limit),
                "Limit of new tokens; 0 with echo scores the prompt. Default: 16.",
            ),
            Field("max_completion_tokens", Whole(0, limit), "Synonym of max_tokens."),
            Field(
                "best_of",
                Whole(1, settings.max_n),
                "Number of continuations of which the n most probable ones are returned.",
            ),
            Field("echo", Flag(), "Repeat the prompt before the new text."),
            Field(
                "logprobs",
                Whole(0, settings.max_logprobs),
                "Return log-probabilities, also of this number of most probable tokens.",
            ),
            Field(
                "return_tokens_as_token_ids",
                Flag(),
                'Name the tokens of log-probabilities "token_id:5", in place of their text.',
            ),
            *sampling_fields(settings),
        )
    )


class TextFormat:
    """The JSON form of completions."""

    prefix = "cmpl"
    object = stream_object = "text_completion"

    def choice(self, call: Call, delta: Delta) -> dict[str, Any]:
        """Return a continuation, or a part of one."""
        info = call.scheduler.model.info
        choice: dict[str, Any] = {
            "index": delta.index,
            "text": delta.text,
            "logprobs": None
            if call.logprobs is None
            else text_logprobs(info, delta.rows, by_id=call.names_by_id),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stopped_by,
        }
        return choice | call.ids(delta)

    stream_choice = choice

    def first_choices(self, call: Call) -> list[dict[str, Any]]:
        """Return nothing: a stream begins with its first token."""
        return []


TEXT: Format = TextFormat()


def completion_call(
    scheduler: Scheduler, name: str, values: dict[str, Any], settings: Settings
) -> Call:
    """Return the call of a request's fields; the prompts are encoded here.

    Raises
    ------
    ApiError, GptxError
        A field contradicts another one, or does not fit the model.
    """
    if "prompt" not in values:
        raise ApiError(400, "prompt is missing", param="prompt", code="missing_field")
    max_tokens = read_max_tokens(values)
    only_prompt = max_tokens == 0
    options = to_options(values, 1 if only_prompt else max_tokens or DEFAULT_MAX_TOKENS)
    echo, logprobs = values.get("echo", False), values.get("logprobs")
    if logprobs is not None:
        options["logprobs"] = logprobs
        if echo:
            options["prompt_logprobs"] = logprobs
    return make_call(
        TEXT,
        scheduler,
        name,
        values["prompt"],
        options,
        settings,
        echo=echo,
        logprobs=logprobs,
        only_prompt=only_prompt,
        may_shorten=max_tokens is None,
        has_ids=values.get("return_token_ids", False),
        names_by_id=values.get("return_tokens_as_token_ids", False),
    )


def make_call(
    format: Format,
    scheduler: Scheduler,
    name: str,
    prompts: list[str | list[int]],
    options: Options,
    settings: Settings,
    *,
    echo: bool = False,
    logprobs: int | None = None,
    only_prompt: bool = False,
    may_shorten: bool = False,
    has_ids: bool = False,
    names_by_id: bool = False,
    skip_space: bool = False,
) -> Call:
    """Return the call of prompts and options, checked against the model.

    Parameters
    ----------
    may_shorten
        True to lower `max_tokens` to the space that the longest prompt leaves in the context.
    skip_space
        True to leave out white space at the start of an answer.

    Raises
    ------
    ApiError, GptxError
        A field contradicts another one, or does not fit the model.
    """
    info = scheduler.model.info
    n_positions = info.config.n_positions
    if may_shorten:
        options = _shortened(scheduler, prompts, options)
    checked = check_options(options)
    copies = checked.best_of
    if len(prompts) * copies > settings.max_choices:
        raise ApiError(
            400,
            f"{len(prompts)} prompts with {copies} continuations each were given, expected at "
            f"most {settings.max_choices} continuations",
            param="n",
            code="invalid_value",
        )
    request = Request(list(prompts), checked)
    writers, prompt_tokens = [], 0
    for i, (prompt, ids) in enumerate(zip(prompts, request.check(info), strict=True)):
        used = fit_prompt(
            ids, n_positions, max_tokens=checked.max_tokens, overflow=checked.overflow
        )
        if isinstance(prompt, str) and used == ids:
            text = prompt
        else:
            text = info.tokenizer.decode(used) if info.has_tokenizer else ""
        prompt_tokens += len(used)
        writers += [
            Writer(
                i * copies + copy,
                info,
                text,
                used,
                echo=echo,
                has_logprobs=logprobs is not None,
                only_prompt=only_prompt,
                skip_space=skip_space,
            )
            for copy in range(copies)
        ]
    return Call(
        format,
        name,
        scheduler,
        request,
        writers,
        prompt_tokens,
        n=checked.n or 1,
        copies=copies,
        logprobs=logprobs,
        has_ids=has_ids,
        names_by_id=names_by_id,
    )


def _shortened(scheduler: Scheduler, prompts: list[str | list[int]], options: Options) -> Options:
    """Lower `max_tokens` to the space that the longest prompt leaves in the context."""
    info, wanted = scheduler.model.info, options["max_tokens"]
    if wanted is None or options.get("overflow", "error") != "error":
        return options
    if all(len(prompt) + wanted <= info.config.n_positions for prompt in prompts):
        return options  # a token is at least one byte
    ids = Request(list(prompts), check_options({**options, "max_tokens": 1})).check(info)
    fits = info.config.n_positions - max(map(len, ids)) + 1
    return {**options, "max_tokens": min(wanted, fits)}
