"""`gptx generate`: continue a prompt, writing the text as it comes."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any, cast, get_args

import click

from gptx.cli.options import (
    backend_option,
    cache_dtype_option,
    dtype_option,
    format_size,
    group_size_option,
    json_option,
    offline_option,
    quantize_option,
    revision_option,
    threads_option,
)
from gptx.errors import Interrupted, PromptError
from gptx.generation.api import Model, load_once
from gptx.generation.engine import MAX_TOKENS, Overflow
from gptx.generation.options import Options, check_options
from gptx.generation.results import Result
from gptx.generation.sampling import SamplingParams

DEFAULT = SamplingParams()


@click.command()
@click.argument("prompt", required=False)
@click.option("-p", "--prompt", "prompt_option", metavar="TEXT", help="The prompt, as an option.")
@click.option("-m", "--model", default="gpt2", show_default=True, help="Name, folder or Hub id.")
@backend_option
@dtype_option
@cache_dtype_option
@threads_option
@quantize_option
@group_size_option
@click.option(
    "-n",
    "--max-tokens",
    type=int,
    default=MAX_TOKENS,
    show_default=True,
    help="New tokens at most.",
)
@click.option(
    "--temperature", type=float, default=DEFAULT.temperature, show_default=True, help="0 is greedy."
)
@click.option("--top-k", type=int, default=DEFAULT.top_k, show_default=True, help="0 is off.")
@click.option("--top-p", type=float, default=DEFAULT.top_p, show_default=True, help="1 is off.")
@click.option("--min-p", type=float, default=DEFAULT.min_p, show_default=True, help="0 is off.")
@click.option(
    "--repetition-penalty",
    type=float,
    default=DEFAULT.repetition_penalty,
    show_default=True,
    help="1 is off.",
)
@click.option("-s", "--seed", type=int, help="The same seed gives the same text.")
@click.option(
    "--stop",
    multiple=True,
    metavar="TEXT",
    help="End before this text (repeatable; a line end is $'\\n').",
)
@click.option("--ignore-eos", is_flag=True, help="Go on past the end of a text.")
@click.option(
    "--overflow",
    type=click.Choice(get_args(Overflow)),
    default="error",
    show_default=True,
    help="What to do past the context.",
)
@revision_option
@offline_option
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No statistics on standard error.")
def generate(
    prompt: str | None,
    prompt_option: str | None,
    model: str,
    backend: str,
    dtype: str | None,
    cache_dtype: str | None,
    threads: int | None,
    quantize: str | None,
    group_size: int,
    revision: str | None,
    offline: bool,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> None:
    """Continue PROMPT ("-" reads it from standard input) and print the new text as it comes.

    \b
    gptx generate -m shakespeare "ROMEO:"
    gptx generate -m gpt2-xl -n 50 --temperature 0.8 --top-p 0.95 "The moon is"
    """
    if (prompt is None) == (prompt_option is None):
        problem = "there is no prompt" if prompt is None else "the prompt is given twice"
        raise click.UsageError(f"{problem}: give PROMPT, or --prompt TEXT, or - for standard input")
    text = prompt if prompt_option is None else prompt_option
    assert text is not None
    if prompt == "-":
        text = _standard_input()
    check_options(cast("Options", choices))  # before something large is downloaded
    loaded = load_once(
        model,
        choices["max_tokens"],
        backend=backend,
        dtype=dtype,
        cache_dtype=cache_dtype,
        threads=threads,
        quantize=quantize,
        group_size=group_size,
        revision=revision,
        offline=offline,
    )
    shown: list[str] = []
    try:
        result = _stream(loaded, text, choices, shown, show=not as_json)
    except Interrupted as interrupt:
        if interrupt.results:
            rest = str(interrupt.results[0])[len("".join(shown)) :]  # what was held back
            if not as_json:
                click.echo(rest, nl=False)
            _finish(loaded, interrupt.results[0], as_json, quiet)
        raise
    _finish(loaded, result, as_json, quiet)


def _standard_input() -> str:
    data = sys.stdin.buffer.read()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise PromptError(
            f"standard input is not UTF-8: byte 0x{data[error.start]:02x} at position {error.start}"
        ) from None
    return text.removesuffix("\n")  # which `echo` and editors put at the end


def _stream(
    loaded: Model, text: str, choices: dict[str, Any], shown: list[str], show: bool
) -> Result:
    result = None
    chunks = loaded.stream(text, **choices)
    try:
        for chunk in chunks:
            if show and chunk.text:
                shown.append(chunk.text)
                click.echo(chunk.text, nl=False)
                sys.stdout.flush()
            result = chunk.result
    except Interrupted:
        raise
    except KeyboardInterrupt as interrupt:  # between two chunks: what is there, it knows
        chunks.throw(interrupt)
    assert result is not None
    return result


def _finish(loaded: Model, result: Result, as_json: bool, quiet: bool) -> None:
    if as_json:
        about = {
            "model": loaded.name,
            "backend": loaded.backend.name,
            "dtype": loaded.backend.dtype,
        }
        click.echo(json.dumps(about | asdict(result), ensure_ascii=False))
    elif not str(result).endswith("\n"):
        click.echo()
    if not quiet:
        click.echo(
            f"[prompt: {result.prompt_tokens} tokens, {result.prompt_tps:,.0f} tokens per second | "
            f"output: {len(result.tokens)} tokens, {result.generation_tps:,.0f} tokens per second, "
            f"first after {result.time_to_first_token:.3f} s | "
            f"peak memory: {format_size(result.peak_memory)} | seed: {result.seed} | "
            f"finish: {result.finish_reason}]",
            err=True,
        )
