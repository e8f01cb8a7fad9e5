"""`gptx generate`: the continuation of a prompt, printed token by token."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any, cast, get_args

import click

from gptx.backends import TABLE
from gptx.cli.formatting import format_size
from gptx.cli.options import group_size_option, json_option, offline_option, revision_option
from gptx.errors import Interrupted, PromptError
from gptx.generation.api import load_once
from gptx.generation.options import MAX_TOKENS, CheckedOptions, Options, Overflow, check_options
from gptx.generation.results import Result
from gptx.generation.sampling import SamplingParams
from gptx.generation.text_model import Model, stream_checked

DEFAULT = SamplingParams()


class _BackendName(click.ParamType[str]):
    """The name of a backend, for completion; `get_backend` reports an unknown one."""

    name = "name"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        return [click.shell_completion.CompletionItem(n) for n in TABLE if n.startswith(incomplete)]


@click.command()
@click.argument("prompt", required=False)
@click.option(
    "-p", "--prompt", "prompt_option", metavar="TEXT", help="Use TEXT in place of PROMPT."
)
@click.option(
    "-m",
    "--model",
    metavar="MODEL",
    default="gpt2",
    show_default=True,
    help="shakespeare, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder, or a Hub id.",
)
@click.option(
    "-b",
    "--backend",
    type=_BackendName(),
    default="numpy",
    show_default=True,
    help=f"Array library that runs the model: {', '.join(TABLE)} (see gptx backends).",
)
@click.option(
    "--dtype",
    metavar="NAME",
    help="Type to compute in: float32, float64 (numpy, cupy), float16 or bfloat16 (cupy, mlx).  "
    "[default: float32]",
)
@click.option(
    "--cache-dtype",
    metavar="NAME",
    help="Type of the KV cache: float16 takes half of the memory of float32.  "
    "[default: as --dtype]",
)
@click.option(
    "-t",
    "--threads",
    type=int,
    metavar="N",
    help="CPU threads of the numpy backend.  [default: one for each core]",
)
@click.option(
    "--quantize", metavar="NAME", help="Quantize the weights while loading: int8 or int4."
)
@group_size_option
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
    "--repetition-penalty",
    type=float,
    metavar="X",
    default=DEFAULT.repetition_penalty,
    show_default=True,
    help="Penalize tokens that the text already has by the factor X; 1 is off.",
)
@click.option(
    "-s",
    "--seed",
    type=int,
    metavar="N",
    help="Seed of the sampling: the same seed gives the same text.  [default: random]",
)
@click.option(
    "--stop",
    multiple=True,
    metavar="TEXT",
    help="End the output before TEXT (repeatable); $'\\n' is a newline.",
)
@click.option("--ignore-eos", is_flag=True, help="Continue after the end-of-text token.")
@click.option(
    "--overflow",
    type=click.Choice(get_args(Overflow)),
    metavar="NAME",
    default="error",
    show_default=True,
    help="If the text exceeds the context: error; truncate (drop the start of the prompt); "
    "slide (drop the older half, repeatedly).",
)
@revision_option
@offline_option
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Print no statistics.")
def generate(
    *,
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
    **options: Any,
) -> None:
    """Continue a prompt and print the text token by token.

    PROMPT is text, or - to read it from standard input. The new text goes to standard output,
    without the prompt; statistics go to standard error.

    \b
    Examples:
      gptx generate -m shakespeare "ROMEO:"
      gptx generate -m gpt2-xl -n 50 --temperature 0.8 --top-p 0.95 "The moon is"
      echo "ROMEO:" | gptx generate -m shakespeare --json -
    """
    text = _prompt_text(prompt, prompt_option)
    checked = check_options(cast("Options", options))  # before the download of a large model
    loaded = load_once(
        model,
        checked.max_tokens,
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
        result = _stream(loaded, text, checked, shown, show=not as_json)
    except Interrupted as interrupt:
        if interrupt.results:
            rest = str(interrupt.results[0])[len("".join(shown)) :]  # held back for a stop string
            if not as_json:
                click.echo(rest, nl=False)
            _finish(loaded, interrupt.results[0], as_json, quiet)
        raise
    _finish(loaded, result, as_json, quiet)


def _prompt_text(argument: str | None, option: str | None) -> str:
    """Return the prompt from the argument, the option or standard input."""
    if (argument is None) == (option is None):
        problem = "missing prompt" if argument is None else "duplicate prompt"
        raise click.UsageError(f"{problem}: give PROMPT, or --prompt TEXT, or - for standard input")
    if option is not None:
        return option
    assert argument is not None
    return _standard_input() if argument == "-" else argument


def _standard_input() -> str:
    data = sys.stdin.buffer.read()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise PromptError(
            f"standard input has byte 0x{data[error.start]:02x} at position {error.start}, "
            "expected text in UTF-8: convert it, for example with iconv -t UTF-8"
        ) from None
    return text.removesuffix("\n")  # `echo` and editors end a text with it


def _stream(
    loaded: Model, text: str, options: CheckedOptions, shown: list[str], show: bool
) -> Result:
    """Generate; append each printed piece of text to `shown`."""
    result = None
    chunks = stream_checked(loaded, [text], options)
    try:
        for chunk in chunks:
            if show and chunk.text:
                shown.append(chunk.text)
                click.echo(chunk.text, nl=False)
                sys.stdout.flush()
            result = chunk.result
    except Interrupted:
        raise
    except KeyboardInterrupt as interrupt:  # between two chunks; the generator has the results
        chunks.throw(interrupt)
    assert result is not None
    return result


def _finish(loaded: Model, result: Result, as_json: bool, quiet: bool) -> None:
    """Print the JSON object, or the newline that ends the text; then the statistics."""
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
