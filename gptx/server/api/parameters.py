"""Fields that completions and chat share: sampling, ends, copies, streams, budgets."""

from __future__ import annotations

from typing import Any

from gptx.generation.options import Options
from gptx.generation.params import RANGES
from gptx.server.api.fields import (
    Anything,
    Biases,
    Choice,
    Either,
    Field,
    Flag,
    Kind,
    Many,
    Number,
    Record,
    Text,
    Whole,
)
from gptx.server.errors import ApiError
from gptx.server.settings import Settings

MAX_COUNT = 2**31 - 1
MAX_SEED = 2**64 - 1
MAX_IDS = 2**20  # token ids in a list; the limit of the body is smaller
MAX_STOPS = 16
MAX_WORDS = 64  # of `ban` and the like
MAX_BIAS = 100.0  # as in OpenAI's API
MAX_BUDGET_SECONDS = 3600.0
STREAM_OPTIONS = (
    Field("include_usage", Flag(), "Send the usage in a chunk of its own before the end."),
)
IGNORED = ("user", "store", "metadata", "service_tier")
# Fields of the API -> options of `Model.generate` of the same name and meaning.
SAME = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "logit_bias", "ban", "no_repeat_ngram_size",
    "dry_multiplier", "dry_base", "dry_allowed_length", "dry_range", "dry_sequence_breakers",
    "min_tokens", "best_of", "stop", "stop_token_ids", "ignore_eos", "overflow",
)  # fmt: skip
# Fields that a call with a state may have.
WITH_STATE = ("model", "state", "budget", "stream", "stream_options", *IGNORED)


def model_field() -> Field:
    """Return the field of the model's name."""
    return Field("model", Text(), "Name of a served model; the default is the first one.")


def ignored_fields() -> list[Field]:
    """Return the fields that clients send and that change nothing."""
    return [Field(name, Anything(), "Accepted, and ignored.") for name in IGNORED]


def sampling_fields(settings: Settings) -> list[Field]:
    """Return the fields that completions and chat share."""

    def number(name: str, about: str, default: float | None = None) -> Field:
        return Field(name, Number(*RANGES[name]), about, default)

    def count(name: str, about: str, low: int = 0) -> Field:
        return Field(name, Whole(low, MAX_COUNT), about)

    words: Kind = Many(Text(1), MAX_WORDS)
    limit = settings.max_tokens or MAX_COUNT
    return [
        number("temperature", "Divisor of the logits; 0 takes the most probable token.", 1.0),
        number("top_p", "Sum of the probabilities of the tokens that are kept.", 1.0),
        count("top_k", "Number of most probable tokens that are kept; 0 or -1 keeps all.", -1),
        number("min_p", "Least probability of a token that is kept, relative to the largest."),
        number("typical_p", "Sum of the probabilities of the typical tokens that are kept."),
        number("repetition_penalty", "Divisor of the logits of tokens so far; 1 is off."),
        number("presence_penalty", "Subtracted from the logits of tokens in the output."),
        number("frequency_penalty", "The same, for each time that they occur."),
        Field("logit_bias", Biases(MAX_BIAS), "Token id -> number added to its logit."),
        Field("ban", Either((Text(1), words)), "Texts that are never completed."),
        count("no_repeat_ngram_size", "Length of token sequences that appear once only."),
        number("dry_multiplier", "Factor of the DRY penalty; 0 is off."),
        number("dry_base", "Growth of the DRY penalty for each token."),
        count("dry_allowed_length", "Length of repetitions from which DRY acts.", 1),
        count("dry_range", "Number of newest tokens in which DRY looks; 0 is all."),
        Field("dry_sequence_breakers", words, "Texts at which a repetition ends for DRY."),
        Field(
            "seed",
            Whole(-(2**63), MAX_SEED),
            "Seed of the random numbers: the same one gives the same tokens.",
        ),
        Field("n", Whole(1, settings.max_n), "Number of continuations of each prompt.", 1),
        Field(
            "stop",
            Either((Text(1), Many(Text(1), MAX_STOPS))),
            "Strings at which the text ends; it does not contain them.",
        ),
        Field(
            "stop_token_ids", Many(Whole(0, MAX_COUNT), MAX_STOPS), "Token ids that end the text."
        ),
        Field("ignore_eos", Flag(), "Continue after the end-of-text token."),
        Field("min_tokens", Whole(0, limit), "Number of tokens before which no end token occurs."),
        Field(
            "overflow",
            Choice(("error", "truncate", "slide")),
            "Action if prompt and output exceed the context.",
        ),
        Field("allow_special", Flag(), "Read <|endoftext|> in texts as that token."),
        Field("stream", Flag(), "Send the text as server-sent events while it grows."),
        Field("stream_options", Record(STREAM_OPTIONS), "Options of a stream."),
        Field("return_token_ids", Flag(), "Also return the token ids."),
        Field(
            "budget",
            Number(0, MAX_BUDGET_SECONDS, exclusive=True),
            "Seconds after which the call returns what it has, and a state that continues it.",
        ),
        Field("state", Text(1), "State of an earlier call, which this one continues."),
        *ignored_fields(),
    ]


def check_state(values: dict[str, Any]) -> None:
    """Raise ApiError if a call with a state has options of its own."""
    for name in values:
        if name not in WITH_STATE:
            raise ApiError(
                400,
                f"{name} is not allowed beside state: a state keeps the options of its first call",
                param=name,
                code="invalid_value",
            )


def least(*budgets: float | None) -> float | None:
    """Return the smallest budget; None if there is none."""
    return min((x for x in budgets if x is not None), default=None)


def to_options(values: dict[str, Any], max_tokens: int | None) -> Options:
    """Return the options of `Model.generate` of a request's fields."""
    options: dict[str, Any] = {name: values[name] for name in SAME if name in values}
    if options.get("top_k") == -1:
        options["top_k"] = 0
    if "seed" in values:
        options["seed"] = values["seed"] % (MAX_SEED + 1)
    options["n"] = values["n"]
    options["max_tokens"] = max_tokens
    options["allow_special"] = values.get("allow_special", False)
    return Options(**options)  # type: ignore[typeddict-item]


def read_max_tokens(values: dict[str, Any]) -> int | None:
    """Return the limit of new tokens, None if it is absent.

    Raises
    ------
    ApiError
        Its two names have different values.
    """
    limit, synonym = values.get("max_tokens"), values.get("max_completion_tokens")
    if limit is not None and synonym is not None and limit != synonym:
        raise ApiError(
            400,
            f"max_completion_tokens is {synonym}, max_tokens is {limit}: give one of them",
            param="max_completion_tokens",
            code="invalid_value",
        )
    return synonym if limit is None else limit
