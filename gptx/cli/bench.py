"""`gptx bench`: measure the speed of models on this machine."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence, Set
from contextlib import closing
from typing import Any

import click
from click.shell_completion import CompletionItem

from gptx.backends import TABLE
from gptx.bench import FORMATS, PRESETS
from gptx.cli.options import known_models, offline_option
from gptx.config import SIZES
from gptx.quantization import BITS

CLEAR_LINE = "\r\x1b[K"


class _List(click.ParamType):  # type: ignore[type-arg]  # click before 8.4 has no argument
    """Values separated by commas."""

    name = "list"

    def __init__(self, minimum: int | None) -> None:
        self.minimum = minimum  # of numbers; None for names

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        items = [item.strip() for item in value.split(",")]
        if self.minimum is None:
            if not all(items):
                self.fail(f"{value!r} has an empty name, expected a list such as a,b", param, ctx)
            return tuple(items)
        if not all(_is_count(item) and int(item) >= self.minimum for item in items):
            expected = f"whole numbers of at least {self.minimum}, such as 1,2"
            self.fail(f"{value!r} is not a list of {expected}", param, ctx)
        return tuple(map(int, items))

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Complete the last item of a list of names."""
        before, comma, start = incomplete.rpartition(",")
        names = _NAMES.get(param.name or "", tuple)()
        return [CompletionItem(before + comma + name) for name in names if name.startswith(start)]


# Names that complete an item of a list.
_NAMES: dict[str, Callable[[], Sequence[str]]] = {
    "models": lambda: [*known_models(), *(f"random:{size}" for size in SIZES)],
    "backends": lambda: tuple(TABLE),
    "dtypes": lambda: ("float32", "float16", "bfloat16", "float64", *BITS),
}


def _is_count(item: str) -> bool:
    return item.isdecimal() and len(item) < 19  # Python does not parse thousands of digits


def _join_lists(ctx: click.Context, param: click.Parameter, value: Any) -> tuple[Any, ...] | None:
    """Join the lists of a repeated option without duplicates; None if it is not given."""
    return tuple(dict.fromkeys(item for items in value for item in items)) or None


def _list(*names: str, help: str, minimum: int | None = None) -> Callable[[Any], Any]:
    return click.option(*names, type=_List(minimum), multiple=True, callback=_join_lists, help=help)


@click.command()
@_list(
    "-m",
    "--model",
    "models",
    help="Model names, files, folders, Hub ids, or random:124M (random weights of that size).  "
    "[default: shakespeare]",
)
@_list("-b", "--backend", "backends", help="Array libraries: numpy, cupy, mlx.  [default: numpy]")
@_list(
    "--dtype",
    "dtypes",
    help=f"float32, float16, bfloat16, float64; {', '.join(BITS)} for quantized weights; or both, "
    "such as int4/bfloat16.  [default: float32]",
)
@_list("-t", "--threads", minimum=1, help="CPU threads.  [default: one for each core]")
@_list("--batch", "batches", minimum=1, help="Sequences in a batch.  [default: 1]")
@_list(
    "-p",
    "--n-prompt",
    "prompts",
    minimum=0,
    help="Prompt tokens to read; 0 skips this test.  [default: 512, or the context if shorter]",
)
@_list(
    "-n",
    "--n-gen",
    "outputs",
    minimum=0,
    help="Tokens to generate; 0 skips this test.  [default: 128, or the context if shorter]",
)
@_list(
    "-d", "--depth", "depths", minimum=0, help="Tokens in the cache before a test.  [default: 0]"
)
@click.option(
    "-r",
    "--repetitions",
    metavar="N",
    type=click.IntRange(min=1),
    help="Measured runs of each test, after a warm-up.  [default: 5]",
)
@click.option("--generic", is_flag=True, default=None, help="Run without the backend's own ops.")
@click.option(
    "--preset",
    metavar="NAME",
    type=click.Choice(PRESETS),
    help=f"Another table instead of the grid: {', '.join(PRESETS[:-1])} or {PRESETS[-1]}.",
)
@click.option(
    "--budget",
    metavar="SECONDS",
    type=float,
    help="Time of a call, for --preset budget.  [default: 1]",
)
@click.option(
    "-o",
    "--output",
    "output_format",
    metavar="FORMAT",
    type=click.Choice(FORMATS),
    default="md",
    show_default=True,
    help=f"Format of the output: {', '.join(FORMATS[:-1])} or {FORMATS[-1]}.",
)
@click.option("--wide", is_flag=True, help="Print all columns of the table, in any width.")
@click.option(
    "--plot",
    metavar="DIR",
    type=click.Path(),
    help="Also draw plots: PNG and SVG files in this folder.",
)
@offline_option
def bench(
    preset: str | None,
    output_format: str,
    wide: bool,
    plot: str | None,
    offline: bool,
    **chosen: Any,
) -> None:
    """Measure the speed of reading (pp) and of generating text (tg).

    A LIST has values separated by commas; all combinations make a grid. Each setup runs in a
    fresh process.

    \b
    Presets:
      ablation  gain of each result that a step reuses, such as keys and values
      threads   the grid over 1, 2, 4 ... threads, up to the number of cores
      budget    tokens that fit --budget seconds, with and without a cache
      total     a complete process: import, load, first token, other tokens

    \b
    Examples:
      gptx bench -m random:124M -t 1,2 --dtype float32,int8,int4 -d 0,900
      gptx bench -b numpy,mlx -p 19 -n 20 -o json
      gptx bench -b cupy --dtype bfloat16,int4/bfloat16 --batch 1,128
      gptx bench -m gpt2 --preset threads --plot plots
    """
    # Imported here: `gptx bench --help` starts faster without.
    from gptx.bench.plots import draw, prepare_folder
    from gptx.bench.presets import GRID, TABLE
    from gptx.bench.setups import Settings
    from gptx.bench.tables import NARROW, render

    if wide and output_format != "md":
        raise click.UsageError(f"--wide does not apply to -o {output_format}: leave it out")
    width = None if wide else shutil.get_terminal_size((NARROW, 0)).columns
    row = TABLE[preset] if preset else GRID
    given = {name: value for name, value in chosen.items() if value is not None}
    _check_options(set(given) | ({"plot"} if plot else set()), row.takes, preset)
    folder = prepare_folder(plot) if plot else None
    records: list[dict[str, Any]] = []
    try:
        with closing(row.run(Settings(offline=offline, **given))) as events:
            for event in events:
                if "progress" in event:
                    _progress(event["progress"])
                    continue
                records.append(event)
                if output_format == "jsonl":  # lines are independent
                    _progress("")
                    click.echo(render([event], (), "jsonl"))
    finally:  # also after an error or Ctrl-C
        _progress("")
        if records and output_format != "jsonl":
            click.echo(render(records, row.columns(records), output_format, width=width))
    if folder is not None:
        written, omitted = draw(records, folder)
        for line in (*(f"wrote {path}" for path in written), *omitted):
            click.echo(line, err=True)


def _check_options(given: set[str], taken: Set[str], preset: str | None) -> None:
    """Raise an error for an option that would be ignored."""
    for option in bench.params:
        if option.name in given - taken:
            what = f"--preset {preset}" if preset else "the grid"
            name = max(option.opts, key=len)
            raise click.UsageError(f"{name} does not apply to {what}: leave it out")


def _progress(text: str) -> None:
    """Show progress on a terminal, on a line that the next text overwrites."""
    if sys.stderr.isatty():
        shown = text[: shutil.get_terminal_size().columns - 1]
        click.echo(f"{CLEAR_LINE}{shown}", nl=False, err=True)
