"""`gptx bench`: how fast is it here?"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Set
from contextlib import closing
from typing import Any

import click

from gptx.bench import FORMATS, PRESETS
from gptx.cli.options import offline_option
from gptx.quantization import BITS

CLEAR_LINE = "\r\x1b[K"


class _List(click.ParamType[tuple[Any, ...]]):
    """Values separated by commas."""

    name = "list"

    def __init__(self, least: int | None) -> None:
        self.least = least  # of numbers; None for names

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        items = [item.strip() for item in value.split(",")]
        if self.least is None:
            if not all(items):
                self.fail(f"{value!r} has an empty name, expected a list such as a,b", param, ctx)
            return tuple(items)
        if not all(_is_count(item) and int(item) >= self.least for item in items):
            expected = f"whole numbers of at least {self.least}, such as 1,2"
            self.fail(f"{value!r} is not a list of {expected}", param, ctx)
        return tuple(map(int, items))


def _is_count(item: str) -> bool:
    return item.isdecimal() and len(item) < 19  # Python refuses to read thousands of digits


def _joined(ctx: click.Context, param: click.Parameter, value: Any) -> tuple[Any, ...] | None:
    """The lists of an option that may be repeated as one, with each value once; None of none."""
    return tuple(dict.fromkeys(item for items in value for item in items)) or None


def _list(*names: str, help: str, least: int | None = None) -> Callable[[Any], Any]:
    return click.option(*names, type=_List(least), multiple=True, callback=_joined, help=help)


@click.command()
@_list(
    "-m",
    "--model",
    "models",
    help="Names, folders, Hub ids, or random:124M (that size, with random weights).  "
    "[default: shakespeare]",
)
@_list("-b", "--backend", "backends", help="[default: numpy]")
@_list(
    "--dtype",
    "dtypes",
    help=f"float32, float16, bfloat16, float64; or, of the weights alone, {', '.join(BITS)}; or "
    "both, int4/bfloat16.  [default: float32]",
)
@_list("-t", "--threads", least=1, help="CPU threads.  [default: one for each core]")
@_list("--batch", "batches", least=1, help="Sequences at once.  [default: 1]")
@_list(
    "-p",
    "--n-prompt",
    "prompts",
    least=0,
    help="Tokens to read, 0 for none.  [default: 512, or what the context holds]",
)
@_list(
    "-n",
    "--n-gen",
    "outputs",
    least=0,
    help="Tokens to generate, 0 for none.  [default: 128, or what the context holds]",
)
@_list("-d", "--depth", "depths", least=0, help="Tokens in the cache before.  [default: 0]")
@click.option(
    "-r",
    "--repetitions",
    type=click.IntRange(min=1),
    help="Of each test, after a warm-up.  [default: 5]",
)
@click.option("--generic", is_flag=True, default=None, help="Without the backend's own ops.")
@click.option("--preset", type=click.Choice(PRESETS), help="A table instead of the grid.")
@click.option("--budget", type=float, help="Seconds for a call, for its preset.  [default: 1]")
@click.option(
    "-o",
    "--output",
    "output_format",
    type=click.Choice(FORMATS),
    default="md",
    show_default=True,
    help="Of what is printed.",
)
@click.option("--plot", metavar="DIR", help="Draw it, too: PNG and SVG files into this folder.")
@offline_option
def bench(
    preset: str | None, output_format: str, plot: str | None, offline: bool, **chosen: Any
) -> None:
    """Measure the speed of models: reading a prompt (pp) and generating (tg).

    What is a list in the options below is separated by commas; the lists make a grid. Each setup
    runs in a process of its own.

    \b
    gptx bench -m random:124M -t 1,2 --dtype float32,int8,int4 -d 0,900
    gptx bench -b numpy,mlx -p 19 -n 20 -o json
    gptx bench -b cupy --dtype bfloat16,int4/bfloat16 --batch 1,128
    gptx bench --preset ablation        what each thing that is reused saves
    gptx bench --preset threads         1, 2, 4 ... threads
    gptx bench --preset budget          how much fits a second, with what
    gptx bench --preset total           a whole process, import and load included
    """
    # Imported when it is used, since the other commands start faster without.
    from gptx.bench.plan import Settings
    from gptx.bench.plots import draw, plotting_into
    from gptx.bench.presets import GRID, TABLE
    from gptx.bench.report import render

    running = TABLE[preset] if preset else GRID
    given = {name: value for name, value in chosen.items() if value is not None}
    _refuse(set(given) | ({"plot"} if plot else set()), running.takes, preset)
    folder = plotting_into(plot) if plot else None
    records: list[dict[str, Any]] = []
    try:
        with closing(running.run(Settings(offline=offline, **given))) as events:
            for event in events:
                if "progress" in event:
                    _progress(event["progress"])
                    continue
                records.append(event)
                if output_format == "jsonl":  # a line needs nothing of the others
                    _progress("")
                    click.echo(render([event], (), "jsonl"))
    finally:  # also of a run that was interrupted or failed
        _progress("")
        if records and output_format != "jsonl":
            click.echo(render(records, running.columns(records), output_format))
    if folder is not None:
        for path in draw(records, folder):
            click.echo(f"wrote {path}", err=True)


def _refuse(given: set[str], taken: Set[str], preset: str | None) -> None:
    """An option that would be ignored is an error."""
    for option in bench.params:
        if option.name in given - taken:
            what = f"--preset {preset}" if preset else "the grid"
            name = max(option.opts, key=len)
            raise click.UsageError(f"{name} means nothing to {what}: leave it out")


def _progress(what: str) -> None:
    """What is being done, on a line that the next one overwrites; on a terminal alone."""
    if sys.stderr.isatty():
        shown = what[: shutil.get_terminal_size().columns - 1]
        click.echo(f"{CLEAR_LINE}{shown}", nl=False, err=True)
