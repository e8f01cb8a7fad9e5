"""A request: prompts and options, checked against a model before its weights are loaded."""

from __future__ import annotations

from dataclasses import replace

from gptx.errors import ParameterError, PromptError, argument
from gptx.generation.model_info import ModelInfo
from gptx.generation.options import CheckedOptions, check_options
from gptx.generation.params import SamplingParams, check_vocabulary
from gptx.generation.prompts import Prompt, check_ids, check_not_empty
from gptx.generation.sequences import fit_prompt
from gptx.generation.suggested import with_suggested
from gptx.kv_cache import KVCache


class Request:
    """Prompts and options, checked against a model before its weights are loaded.

    Attributes
    ----------
    prompts
        Prompts as given.
    options
        Options, checked by `check_options`; after `check`, with those that the model suggests.
    params
        Sampling parameters; after `check`, with token ids in the place of texts.
    """

    def __init__(self, prompts: list[Prompt], options: CheckedOptions) -> None:
        check_not_empty(prompts)
        self.prompts = prompts
        self.options = options
        self.params = options.params
        self._ids: list[list[int]] | None = None

    def check(self, info: ModelInfo) -> list[list[int]]:
        """Check the prompts at the first call, which needs no weights; return their token ids.

        Raises
        ------
        PromptError
            A prompt is too long, or has an id outside of the vocabulary.
        ParameterError
            An option has such an id.
        TokenizerError
            A prompt, a stop string or another option is text, and the model has no tokenizer.
        NotFoundError, ConfigError
            `generation_config` is True, and the model has no such file or an invalid one.
        """
        if self._ids is None:
            self._ids = self._encode(info)
        return self._ids

    def _encode(self, info: ModelInfo) -> list[list[int]]:
        self.take_suggested(info)
        options = self.options
        if options.stop:
            _ = info.tokenizer  # raises the error of a model without one
        ids = [encode_prompt(info, prompt, options.allow_special) for prompt in self.prompts]
        self.params = _with_ids(options.params, info)
        vocab_size = info.config.vocab_size
        self.params.check_bias(vocab_size)
        check_vocabulary("stop_token_ids", options.stop_token_ids, vocab_size)
        check_top("logprobs", options.top_logprobs, vocab_size)
        check_top("prompt_logprobs", options.prompt_logprobs or 0, vocab_size)
        for prompt in ids:
            fit_prompt(
                prompt,
                info.config.n_positions,
                max_tokens=options.max_tokens,
                overflow=options.overflow,
            )
        return ids

    def take_suggested(self, info: ModelInfo) -> None:
        """Add the options that the model suggests, if the request has `generation_config`.

        Raises
        ------
        NotFoundError, ConfigError
            The model has no generation_config.json or an invalid one.
        ParameterError
            An option contradicts one of the file.
        """
        if self.options.generation_config:
            given = with_suggested(self.options.given, info.files)
            self.options = check_options({**given, "generation_config": False})

    def with_cache(self, cache: KVCache) -> Request:
        """Return the same request with a KV cache of an earlier prompt."""
        request = Request(self.prompts, replace(self.options, cache=cache))
        request._ids, request.params = self._ids, self.params
        return request


def _with_ids(params: SamplingParams, info: ModelInfo) -> SamplingParams:
    """Encode the texts of sampling parameters; see `SamplingParams.with_ids`."""
    default_breakers = params.dry_multiplier and params.dry_sequence_breakers is None
    if not params.has_texts and not default_breakers:
        return params
    if params.has_texts:
        _ = info.tokenizer  # raises the error of a model without one

    def encode(text: str) -> list[int]:
        return check_ids(info.tokenizer.encode(text), info.config.vocab_size)

    return params.with_ids(encode, info.tokens_with)


def check_top(name: str, n: int, vocab_size: int) -> None:
    """Raise ParameterError for more most probable tokens than a vocabulary of V has."""
    if n > vocab_size:
        raise ParameterError(
            f"{argument(name)} is {n}, expected at most {vocab_size} (the vocabulary)"
        )


def split_choices(
    info: ModelInfo, context: Prompt, choices: list[Prompt], allow_special: bool
) -> tuple[list[int], list[list[int]]]:
    """Return the tokens that a context shares with all texts of it and a choice, and the rest."""
    for one in choices:
        if isinstance(one, str) != isinstance(context, str):
            raise PromptError(
                "the context is a text and a choice is a list of token ids, or the reverse: give "
                "texts only, or token ids only"
            )
    check_not_empty(choices)
    ids = encode_prompt(info, context, allow_special)
    rest = [
        encode_prompt(info, context + one, allow_special)
        if isinstance(context, str) and isinstance(one, str)
        else ids + encode_prompt(info, one, allow_special)
        for one in choices
    ]
    n = min(map(len, rest)) - 1
    n = next(
        (i for i in range(min(n, len(ids))) if any(one[i] != ids[i] for one in rest)),
        min(n, len(ids)),
    )
    if n == 0:
        raise PromptError(
            "the context and a choice share no token: give a longer context, or start it with "
            f"'<|endoftext|>' and {argument('allow_special', True)}"
        )
    return ids[:n], [one[n:] for one in rest]


def encode_prompt(info: ModelInfo, prompt: Prompt, allow_special: bool) -> list[int]:
    """Return the token ids of a prompt."""
    if not isinstance(prompt, str):
        return check_ids(prompt, info.config.vocab_size)
    check_not_empty([prompt])
    # A tokenizer of another model may have more tokens than this vocabulary.
    ids = info.tokenizer.encode(prompt, allow_special=allow_special)
    return check_ids(ids, info.config.vocab_size)
