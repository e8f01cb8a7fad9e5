"""`gptx generate`: the continuation of a prompt, printed token by token."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast, get_args

import click
from click.core import ParameterSource

from gptx.cli.formatting import print_json
from gptx.cli.options import Sections, json_option, load_options
from gptx.cli.prompts import SOURCES, read_prompt
from gptx.cli.streaming import (
    print_chunks,
    print_logprobs,
    print_prompt_logprobs,
    print_statistics,
)
from gptx.errors import Interrupted
from gptx.files import check_writable
from gptx.generation.api import load_once
from gptx.generation.model_info import ModelInfo
from gptx.generation.options import (
    MAX_TOKENS,
    LoadOptions,
    Options,
    Overflow,
    check_options,
)
from gptx.generation.params import SamplingParams
from gptx.generation.request import Request
from gptx.generation.results import Result
from gptx.generation.suggested import SUGGESTIBLE
from gptx.generation.text_model import Model, generate_request, stream_request
from gptx.kv_cache import KVCache

DEFAULT = SamplingParams()


class _Bias(click.ParamType):  # type: ignore[type-arg]  # click before 8.4 has no argument
    """ID=X: a token id and a number."""

    name = "bias"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, float]:
        id, _, number = value.partition("=")
        try:
            return int(id), float(number)
        except ValueError:
            self.fail(f"{value!r} is not ID=X, such as 198=-inf or 50256=2.5", param, ctx)


class _TextBias(click.ParamType):  # type: ignore[type-arg]
    """TEXT=X: a text and a number."""

    name = "text bias"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, float]:
        text, _, number = value.rpartition("=")
        try:
            if text:
                return text, float(number)
        except ValueError:
            pass
        self.fail(f"{value!r} is not TEXT=X, such as ' my lord=-2.5'", param, ctx)


def _as_dict(
    ctx: click.Context, param: click.Parameter, pairs: tuple[tuple[Any, float], ...]
) -> dict[Any, float]:
    bias = dict(pairs)
    if len(bias) < len(pairs):
        what = "token id" if param.name == "logit_bias" else "text"
        raise click.BadParameter(f"a {what} is given twice: give it once", ctx, param)
    return bias


@click.command(
    cls=Sections,
    context_settings={"allow_extra_args": True},  # which have an error of their own
    sections={
        "Prompt": "prompt_option",
        "Model": "model",
        "Sampling": "temperature",
        "End of the text": "max_tokens",
        "Output": "as_json",
    },
)
@click.argument("prompt", required=False)
@click.option(
    "-p", "--prompt", "prompt_option", metavar="TEXT", help="Use TEXT in place of PROMPT."
)
@click.option(
    "-f",
    "--file",
    metavar="FILE",
    type=click.Path(),
    help="Read the prompt from a text file; - is standard input.",
)
@click.option(
    "--allow-special",
    is_flag=True,
    help="Read <|endoftext|> in the prompt as that token, not as text.",
)
@click.option(
    "--prompt-cache",
    metavar="FILE",
    type=click.Path(),
    help="Read the KV cache of earlier text from FILE if it exists, and write it at the end. Text "
    "that the prompt shares with it is not computed again.",
)
@load_options
@click.option(
    "--temperature",
    type=float,
    metavar="X",
    default=DEFAULT.temperature,
    show_default=True,
    help="Divide the logits by X, then sample; 0 takes the most probable token.",
)
@click.option(
    "--top-k",
    type=int,
    metavar="N",
    default=DEFAULT.top_k,
    show_default=True,
    help="Sample from the N most probable tokens; 0 is off.",
)
@click.option(
    "--top-p",
    type=float,
    metavar="X",
    default=DEFAULT.top_p,
    show_default=True,
    help="Sample from the fewest tokens whose probabilities sum to X; 1 is off.",
)
@click.option(
    "--min-p",
    type=float,
    metavar="X",
    default=DEFAULT.min_p,
    show_default=True,
    help="Sample from tokens at least X times as probable as the best one; 0 is off.",
)
@click.option(
    "--typical-p",
    type=float,
    metavar="X",
    default=DEFAULT.typical_p,
    show_default=True,
    help="Sample from the most typical tokens whose probabilities sum to X; 1 is off.",
)
@click.option(
    "--repetition-penalty",
    type=float,
    metavar="X",
    default=DEFAULT.repetition_penalty,
    show_default=True,
    help="Penalize tokens that the text already has by the factor X; 1 is off.",
)
@click.option(
    "--presence-penalty",
    type=float,
    metavar="X",
    default=DEFAULT.presence_penalty,
    show_default=True,
    help="Subtract X from the logits of tokens that the output already has.",
)
@click.option(
    "--frequency-penalty",
    type=float,
    metavar="X",
    default=DEFAULT.frequency_penalty,
    show_default=True,
    help="Subtract X from the logit of a token for each time that the output has it.",
)
@click.option(
    "--logit-bias",
    type=_Bias(),
    metavar="ID=X",
    multiple=True,
    callback=_as_dict,
    help="Add X to the logit of the token ID (repeatable); -inf bans the token.",
)
@click.option(
    "--sequence-bias",
    type=_TextBias(),
    metavar="TEXT=X",
    multiple=True,
    callback=_as_dict,
    help="Add X to the logit of the last token of TEXT after its other tokens (repeatable).",
)
@click.option(
    "--ban",
    multiple=True,
    metavar="TEXT",
    help="Never complete the tokens of TEXT, with or without a space before it (repeatable).",
)
@click.option(
    "--no-repeat-ngram-size",
    type=int,
    metavar="N",
    default=DEFAULT.no_repeat_ngram_size,
    show_default=True,
    help="Let no N tokens in a row appear twice; 0 is off.",
)
@click.option(
    "--dry-multiplier",
    type=float,
    metavar="X",
    default=DEFAULT.dry_multiplier,
    show_default=True,
    help="Penalize tokens that continue a repetition by X, and more if it is longer (DRY); 0 is "
    "off.",
)
@click.option(
    "--dry-base",
    type=float,
    metavar="X",
    default=DEFAULT.dry_base,
    show_default=True,
    help="Multiply the penalty of DRY by X for each more token of the repetition.",
)
@click.option(
    "--dry-allowed-length",
    type=int,
    metavar="N",
    default=DEFAULT.dry_allowed_length,
    show_default=True,
    help="Let DRY penalize repetitions of N tokens and more.",
)
@click.option(
    "--dry-range",
    type=int,
    metavar="N",
    default=DEFAULT.dry_range,
    show_default=True,
    help="Let DRY search the newest N tokens; 0 is all.",
)
@click.option(
    "--dry-sequence-breaker",
    "dry_sequence_breakers",
    multiple=True,
    metavar="TEXT",
    help="End a repetition of DRY at a token with TEXT (repeatable).  "
    "[default: newline, colon, quote, asterisk]",
)
@click.option(
    "-s",
    "--seed",
    type=int,
    metavar="N",
    help="Seed of the sampling: the same seed gives the same text.  [default: random]",
)
@click.option(
    "--n",
    type=int,
    metavar="N",
    default=1,
    show_default=True,
    help="Number of continuations; the prompt is read once.",
)
@click.option(
    "--best-of",
    type=int,
    metavar="N",
    help="Generate N continuations, and print those with the largest mean log-probability.  "
    "[default: --n]",
)
@click.option(
    "--generation-config",
    is_flag=True,
    help="Take the options that are not given from the model's generation_config.json.",
)
@click.option(
    "-n",
    "--max-tokens",
    type=int,
    metavar="N",
    default=MAX_TOKENS,
    show_default=True,
    help="Maximum number of tokens to generate.",
)
@click.option(
    "--min-tokens",
    type=int,
    metavar="N",
    default=DEFAULT.min_tokens,
    show_default=True,
    help="Number of tokens before which no end token is generated.",
)
@click.option(
    "--stop",
    multiple=True,
    metavar="TEXT",
    help="End the output before TEXT (repeatable); $'\\n' is a newline.",
)
@click.option(
    "--stop-token-id",
    "stop_token_ids",
    type=int,
    multiple=True,
    metavar="ID",
    help="End the output at the token ID, too (repeatable).",
)
@click.option("--ignore-eos", is_flag=True, help="Continue after the model's end-of-text tokens.")
@click.option(
    "--overflow",
    type=click.Choice(get_args(Overflow)),
    metavar="NAME",
    help="If the text exceeds the context: error; truncate (drop the start of the prompt); "
    "slide (drop the older half, repeatedly).  [default: slide in a session, or if only the "
    "default of -n does not fit; else error]",
)
@json_option
@click.option(
    "--logprobs",
    is_flag=True,
    help="Also print the log-probability of each token: on standard error, or in the JSON.",
)
@click.option(
    "--prompt-logprobs",
    is_flag=True,
    help="Also print those of the prompt's tokens.",
)
@click.option(
    "--top-logprobs",
    type=int,
    metavar="N",
    help="Also print the N most probable tokens in the place of each token.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print no statistics.")
def generate(
    *,
    prompt: str | None,
    prompt_option: str | None,
    file: str | None,
    prompt_cache: str | None,
    model: str,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Continue a prompt and print the text token by token.

    PROMPT is text, or - to read it from standard input. Files and standard input are text in UTF-8:
    a byte-order mark is dropped, CRLF is read as LF, and a line end at the end is dropped. The new
    text goes to standard output, without the prompt; statistics go to standard error.

    Without a prompt, on a terminal, a session starts: each line that you enter is added to the
    text, and the model continues it.

    \b
    Examples:
      gptx generate -m shakespeare "ROMEO:"
      gptx generate -m gpt2-xl -n 50 --temperature 0.8 --top-p 0.95 "The moon is"
      echo "ROMEO:" | gptx generate -m shakespeare --json -
      gptx generate -m shakespeare --temperature 0.8
    """
    if extra := click.get_current_context().args:
        raise click.UsageError(
            f"extra arguments ({' '.join(extra)}): put a prompt of several words in quotes"
        )
    loading = cast("LoadOptions", {x: options.pop(x) for x in _LOAD_OPTIONS if x in options})
    text = read_prompt(prompt, prompt_option, file)
    if text is None:
        _check_session(
            as_json=as_json,
            logprobs=options["logprobs"],
            prompt_logprobs=options["prompt_logprobs"],
            top_logprobs=options["top_logprobs"],
            prompt_cache=prompt_cache,
            n=options["n"] != 1,
            best_of=options["best_of"],
        )
    _set_logprobs(options)
    if not options["dry_sequence_breakers"]:
        options["dry_sequence_breakers"] = None
    if text is None:
        from gptx.cli.terminal import run_session

        suggestible = {name for name in SUGGESTIBLE if not _is_given(name)}
        run_session(model, loading, options, suggestible, quiet=quiet)
        return
    may_slide = options["overflow"] is None and not _is_given("max_tokens")
    options["overflow"] = options["overflow"] or "error"
    if options["generation_config"]:
        options = {k: x for k, x in options.items() if k not in SUGGESTIBLE or _is_given(k)}
    request = Request([text], check_options(cast("Options", options)))
    if prompt_cache is not None and request.options.best_of > 1:
        raise click.UsageError("--prompt-cache is for one continuation: omit --n and --best-of")

    def check(info: ModelInfo) -> None:
        nonlocal request
        request.take_suggested(info)
        if may_slide:
            request = _slide_if_needed(request, info)
        request.check(info)

    if prompt_cache is not None:
        check_writable(prompt_cache)
    loaded = load_once(
        model,
        request.options.max_tokens,
        check,
        **loading,
    )
    if request.options.best_of > 1:
        _generate_several(loaded, request, as_json=as_json, quiet=quiet)
    else:
        _generate(loaded, request, prompt_cache, as_json=as_json, quiet=quiet)


def _set_logprobs(options: dict[str, Any]) -> None:
    """Replace the flags for log-probabilities by the options of `Model.generate`."""
    top = options.pop("top_logprobs")
    if top is not None and not options["prompt_logprobs"]:
        options["logprobs"] = True
    for name in ("logprobs", "prompt_logprobs"):
        if options[name] and top is not None:
            options[name] = top


def _is_given(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source is not ParameterSource.DEFAULT


_LOAD_OPTIONS = LoadOptions.__annotations__


def _slide_if_needed(request: Request, info: ModelInfo) -> Request:
    """Return a request that slides if its prompt fits the context, and its output does not."""
    options, [text] = request.options, request.prompts
    assert isinstance(text, str)
    n_prompt = len(info.tokenizer.encode(text, allow_special=options.allow_special))
    room = info.config.n_positions - n_prompt
    if room < 0 or room >= (options.max_tokens or 0) - 1:
        return request
    return Request([text], replace(options, overflow="slide"))


def _on_a_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _check_session(**given: Any) -> None:
    """Raise an error unless a session can start: on a terminal, without these options."""
    if not _on_a_terminal():
        raise click.UsageError(f"missing prompt: {SOURCES}")
    for param in generate.params:
        if given.get(param.name or ""):
            raise click.UsageError(f"{param.opts[0]} needs a prompt: {SOURCES}")


def _generate(
    model: Model,
    request: Request,
    prompt_cache: str | None,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Continue a prompt; print the output, also that before an interrupt; write the cache."""
    caches: list[KVCache] = []
    if prompt_cache is not None and Path(prompt_cache).exists():
        request = request.with_cache(model.load_cache(prompt_cache))
    chunks = stream_request(model, request, None if prompt_cache is None else caches.append)
    interrupt = None
    try:
        result = print_chunks(chunks, show=not as_json)
    except Interrupted as error:
        if not error.results:
            raise
        interrupt, result = error, error.results[0]
    _print_end(model, result, as_json=as_json, logprobs=request.options.logprobs, quiet=quiet)
    if prompt_cache is not None and caches:  # an interrupt may leave none
        caches[0].save(prompt_cache)
    if interrupt is not None:
        raise interrupt


def _generate_several(model: Model, request: Request, *, as_json: bool, quiet: bool) -> None:
    """Print several continuations one after the other; in JSON, each is one line."""
    interrupt = None
    try:
        results = generate_request(model, request, single=False)
    except Interrupted as error:
        interrupt, results = error, error.results
    assert isinstance(results, list)
    for i, result in enumerate(results):
        if i and quiet and not as_json:
            click.echo()  # otherwise the statistics separate the texts
        if not as_json:
            click.echo(str(result), nl=False)
        _print_end(model, result, as_json=as_json, logprobs=request.options.logprobs, quiet=quiet)
    if interrupt is not None:
        raise interrupt


def _print_end(model: Model, result: Result, *, as_json: bool, logprobs: bool, quiet: bool) -> None:
    """Print the JSON object, or the newline that ends the text; then the statistics."""
    if as_json:
        about = {
            "model": model.name,
            "backend": model.backend.name,
            "dtype": model.backend.dtype,
        }
        print_json(about | asdict(result))
    elif not str(result).endswith("\n"):
        click.echo()
    if result.prompt_logprobs is not None and not as_json:
        print_prompt_logprobs(model, result)
    if logprobs and not as_json:
        print_logprobs(model, result)
    if not quiet:
        print_statistics(result)
