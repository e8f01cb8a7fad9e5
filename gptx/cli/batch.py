"""`gptx batch`: many requests from a file, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import click

from gptx.cli.formatting import progress_bar
from gptx.cli.options import Sections, load_options
from gptx.cluster.items import Item, parse_shard, read_lines
from gptx.cluster.results import ResultFile
from gptx.cluster.runner import IN_FLIGHT, Batch, Progress
from gptx.errors import BackendError, DataError, GptxError
from gptx.generation.api import load_once
from gptx.generation.options import LoadOptions
from gptx.generation.text_model import Model

LEAST_TOKENS = 16  # of a line, for the decision to compile: the API's default of max_tokens
CLEAR_LINE = "\r\x1b[K"  # of a terminal, where the bar is


@click.command(
    cls=Sections,
    sections={"Model": "model", "Batch": "seed", "Output": "quiet"},
)
@click.argument("source", metavar="IN", type=click.Path())
@click.argument("destination", metavar="OUT", type=click.Path())
@load_options
@click.option(
    "-s",
    "--seed",
    type=int,
    metavar="N",
    default=0,
    show_default=True,
    help="Key of the seeds of lines that give none: the same key gives the same texts.",
)
@click.option(
    "--in-flight",
    type=click.IntRange(min=1),
    metavar="N",
    default=IN_FLIGHT,
    show_default=True,
    help="Compute N lines at a time.",
)
@click.option(
    "--shard",
    metavar="I/N",
    default="1/1",
    show_default=True,
    help="Compute every N-th line from line I: the part of one of N machines.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print no statistics.")
def batch(
    *,
    source: str,
    destination: str,
    model: str,
    seed: int,
    in_flight: int,
    shard: str,
    quiet: bool,
    **options: Any,
) -> None:
    """Answer a file of requests, and continue where a run has ended.

    IN has a JSON object a line: a request in OpenAI's batch format (custom_id, method, url, body),
    or the fields of a body alone, such as "prompt" and "max_tokens". OUT gets a line for each
    result as it finishes. Lines that have a result in OUT are not computed again, so that the same
    command continues after Ctrl-C or a crash. A line that is no valid request has an error in OUT
    and on standard error; the other lines are computed.

    \b
    Examples:
      gptx batch -m shakespeare in.jsonl out.jsonl
      gptx batch -m gpt2 --shard 2/4 in.jsonl out-2.jsonl
    """
    part = parse_shard(shard)
    next(read_lines(source), None)  # the input is checked before the output is created
    with ResultFile(destination) as results:
        work = Batch(Path(source), results, seed, part)
        progress = work.begin()
        if progress.n_done < progress.n_lines:
            n_tokens = LEAST_TOKENS * (progress.n_lines - progress.n_done)
            with load_once(model, n_tokens, **cast("LoadOptions", options)) as loaded:
                _run(work, loaded, progress, in_flight)
        if not quiet:
            click.echo(_statistics(progress), err=True)
        if progress.unanswered:
            raise GptxError(
                f"{progress.unanswered} lines have no result, because the engine failed: run the "
                "command again"
            )
        if results.n_failed:
            raise DataError(
                f"{results.n_failed} of {progress.n_lines} lines are no valid requests: "
                f"{destination} has their errors"
            )


def _run(work: Batch, model: Model, progress: Progress, in_flight: int) -> None:
    """Compute the lines without a result, with a bar on a terminal."""
    try:
        from gptx.cluster.in_process import Server
    except ModuleNotFoundError as error:
        raise BackendError(
            f"gptx batch needs the package {error.name}, which is not installed: "
            "run `pip install '.[serve]'` in a checkout of gptx"
        ) from error

    fingerprints = work.results.fingerprints - {f"fp_{model.fingerprint}"}
    if fingerprints:
        raise DataError(
            f"{work.results.path} has results of other weights than those of {model.name}: give "
            "the same model, or another output"
        )

    with progress_bar() as show:

        def report(item: Item, error: str | None) -> None:
            if error is not None:
                start = CLEAR_LINE if show is not None else ""
                click.echo(f"{start}Line {item.line}: {error}", err=True)
            if show is not None:
                rate = f"{progress.tokens_per_second:,.0f} tokens per second"
                show(rate, progress.n_done, progress.n_lines)

        async def run() -> None:
            async with Server(model, in_flight) as server:
                await work.run(server.post, progress, report, in_flight)

        _run_in_thread(run())


def _run_in_thread(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine in a thread: a signal, which raises in this one, cancels it and waits."""
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = []

    async def run() -> None:
        task = asyncio.ensure_future(main)
        running.append((asyncio.get_running_loop(), task))
        await task

    with ThreadPoolExecutor(1) as thread:
        ended = thread.submit(asyncio.run, run())
        try:
            ended.result()
        except BaseException:
            if not ended.done():
                for loop, task in running:
                    loop.call_soon_threadsafe(task.cancel)
            raise


def _statistics(progress: Progress) -> str:
    earlier = progress.n_done - progress.completed - progress.failed
    counts = f"{progress.completed} completed, {progress.failed} failed, {earlier} done before"
    return (
        f"[lines: {progress.n_lines}, {counts} | prompt: {progress.prompt_tokens:,} tokens | "
        f"output: {progress.new_tokens:,} tokens, {progress.tokens_per_second:,.0f} tokens per "
        f"second | {progress.seconds:.1f} s]"
    )
