"""Text and statistics of a generation: printed token by token, by `generate` and its session."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from gptx.cli.formatting import format_size
from gptx.errors import Interrupted
from gptx.generation.results import Result
from gptx.generation.text_model import Chunks, Model


def print_chunks(chunks: Chunks, show: bool = True) -> Result:
    """Print the text of each chunk, if `show`; return the result.

    Raises
    ------
    Interrupted
        Ctrl-C; the text so far is printed.
    """
    shown: list[str] = []
    try:
        return _print_each(chunks, shown, show)
    except Interrupted as interrupt:
        if interrupt.results and show:
            rest = str(interrupt.results[0])[len("".join(shown)) :]  # held back for a stop string
            click.echo(rest, nl=False)
        raise


def _print_each(chunks: Chunks, shown: list[str], show: bool) -> Result:
    """Print chunks; append each printed piece of text to `shown`."""
    result = None
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


def print_statistics(result: Result) -> None:
    """Print the speed, the seed and the finish reason."""
    cached = f" ({result.cached_tokens} cached)" if result.cached_tokens else ""
    click.echo(
        f"[prompt: {result.prompt_tokens} tokens{cached}, "
        f"{result.prompt_tps:,.0f} tokens per second | "
        f"output: {len(result.tokens)} tokens, {result.generation_tps:,.0f} tokens per second, "
        f"first after {result.time_to_first_token:.3f} s | "
        f"peak memory: {format_size(result.peak_memory)} | seed: {result.seed} | "
        f"finish: {result.finish_reason}]",
        err=True,
    )


def print_logprobs(model: Model, result: Result) -> None:
    """Print a line for each token: its log-probability, its id, its text, and the most probable."""
    rows = token_rows(model, result.tokens_with_end, result.logprobs or [], result.top_logprobs)
    click.echo("\n".join(rows if result.prompt_logprobs is None else ["output:", *rows]), err=True)


def print_prompt_logprobs(model: Model, result: Result) -> None:
    """Print a line for each token of the prompt, as `print_logprobs` does."""
    logprobs = result.prompt_logprobs or []
    rows = token_rows(model, result.prompt_ids, logprobs, result.prompt_top_logprobs)
    click.echo("\n".join(["prompt:", *rows]), err=True)


def token_rows(
    model: Model,
    ids: Sequence[int],
    logprobs: Sequence[float | None],
    top: Sequence[dict[int, float] | None] | None,
) -> list[str]:
    """Return the lines of a table of tokens: log-probability, id, text, the most probable."""
    rows = [f"{'logprob':>9} {'id':>6}  token"]
    for i, (id, logprob) in enumerate(zip(ids, logprobs, strict=True)):
        number = "-" if logprob is None else f"{logprob:.4f}"
        others = (top and top[i]) or {}
        shown = ", ".join(f"{model.decode([other])!r} {x:.4f}" for other, x in others.items())
        rows.append(f"{number:>9} {id:>6}  {model.decode([id])!r}{shown and f'  ({shown})'}")
    return rows
