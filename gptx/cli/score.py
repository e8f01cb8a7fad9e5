"""`gptx score`: the probability of each token of a text."""

from __future__ import annotations

import math
import os
import sys
import unicodedata
from typing import Any, cast

import click

from gptx.cli.formatting import print_json
from gptx.cli.options import Sections, json_option, load_options
from gptx.cli.prompts import read_prompt
from gptx.cli.streaming import token_rows
from gptx.generation.api import load_once
from gptx.generation.options import LoadOptions
from gptx.generation.results import Score
from gptx.generation.text_model import Model

SOURCES = "give TEXT, --file FILE, or - for standard input"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # of a control character
LINE_END = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
# Least probability -> color of the background, of the 256 of a terminal; None is its own.
COLORS: tuple[tuple[float, int | None], ...] = (
    (0.5, None),
    (0.2, 229),
    (0.05, 222),
    (0.01, 215),
    (0.001, 209),
    (0.0, 203),
)
BLACK = 16  # of the letters on a color


@click.command(
    cls=Sections,
    context_settings={"allow_extra_args": True},  # which have an error of their own
    sections={"Text": "file", "Model": "model", "Score": "stride", "Output": "as_json"},
)
@click.argument("text", required=False)
@click.option(
    "-f",
    "--file",
    metavar="FILE",
    type=click.Path(),
    help="Read the text from FILE (UTF-8); - is standard input.",
)
@click.option(
    "--allow-special",
    is_flag=True,
    help="Read <|endoftext|> in the text as that token, not as text.",
)
@load_options
@click.option(
    "--stride",
    type=int,
    metavar="N",
    help="Start the windows of a text longer than the context N tokens apart.  "
    "[default: one context]",
)
@click.option(
    "--top-logprobs",
    type=int,
    metavar="N",
    default=0,
    show_default=True,
    help="Also print the N most probable tokens in the place of each token.",
)
@json_option
@click.option("--table", is_flag=True, help="Print a line for each token on a terminal, too.")
@click.option("-q", "--quiet", is_flag=True, help="Print no summary and no legend.")
def score(
    *,
    text: str | None,
    file: str | None,
    allow_special: bool,
    stride: int | None,
    top_logprobs: int,
    as_json: bool,
    table: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Show how probable a text is, token by token.

    On a terminal, the background of each token shows its probability, given the tokens before it:
    the stronger the color, the less probable the token. Elsewhere, with --table, --top-logprobs or
    the variable NO_COLOR, each token has a line: its log-probability in nats, its id and its text.
    The first token has none. The summary goes to standard error.

    \b
    Examples:
      gptx score -m shakespeare "To be, or not to be: that is the question."
      gptx score -m gpt2 --file page.txt --json
    """
    if extra := click.get_current_context().args:
        raise click.UsageError(
            f"extra arguments ({' '.join(extra)}): put a text of several words in quotes"
        )
    if text is not None and file is not None:
        raise click.UsageError(f"duplicate text: {SOURCES}")
    given = read_prompt(text, None, file)
    if given is None:
        raise click.UsageError(f"missing text: {SOURCES}")
    model = load_once(
        options.pop("model"),
        len(given),  # at least as many as tokens
        lambda info: info.tokenizer,
        **cast("LoadOptions", options),
    )
    found = model.score(
        given, stride=stride, allow_special=allow_special, top_logprobs=top_logprobs
    )
    if as_json:
        print_json(_described(model, found))
    elif _has_colors() and not table and not top_logprobs:
        if not quiet:
            click.echo(legend(), err=True)
        click.echo(colored(model, found))
    else:
        click.echo("\n".join(token_rows(model, found.tokens, found.logprobs, found.top_logprobs)))
    if not quiet:
        click.echo(
            f"[{len(found.tokens)} tokens, {found.n_scored} scored | "
            f"{found.loss:.4f} nats per token | perplexity {found.perplexity:,.4g}]",
            err=True,
        )


def _described(model: Model, found: Score) -> dict[str, Any]:
    """Return the JSON object of a score."""
    tops = found.top_logprobs or [None] * len(found.tokens)
    rows = zip(found.tokens, found.logprobs, tops, strict=True)
    return {
        "model": model.name,
        "backend": model.backend.name,
        "dtype": model.backend.dtype,
        "tokens": [
            {
                "id": id,
                "text": model.decode([id]),
                "logprob": logprob,
                "top_logprobs": top
                and [{"id": i, "text": model.decode([i]), "logprob": x} for i, x in top.items()],
            }
            for id, logprob, top in rows
        ],
        "scored": found.n_scored,
        "total": found.total,
        "loss": found.loss,
        "perplexity": found.perplexity,
    }


def _has_colors() -> bool:
    """Return True if standard output is a terminal with colors, see https://no-color.org."""
    return _is_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def colored(model: Model, found: Score) -> str:
    """Return the text of a score, each token on the color of its probability."""
    decoder = model.tokenizer.decoder([])
    parts = [
        _painted(decoder.feed(id), logprob)
        for id, logprob in zip(found.tokens, found.logprobs, strict=True)
    ]
    return "".join([*parts, _painted(decoder.finish(), None)])


def legend() -> str:
    """Return the colors with their probabilities."""
    shown = [
        _style(f" {'below 0.1' if low == 0 else f'{100 * low:g}'}% ", color)
        for low, color in COLORS
    ]
    return f"probability of a token, at least: {''.join(shown)}"


def _painted(text: str, logprob: float | None) -> str:
    """Return the text of a token on the color of its probability; a line end is an arrow, too."""
    color = None
    if logprob is not None:
        # A log-probability of 0 may round to a number above it.
        color = next(color for low, color in COLORS if math.exp(logprob) >= low)
    shown = "".join(
        REPLACEMENT if unicodedata.category(x) == "Cc" and x not in "\n\t" else x for x in text
    )
    # A color across the end of a line fills the rest of it on some terminals.
    lines = [_style(line, color) for line in shown.split("\n")]
    return f"{_style(LINE_END, color)}\n".join(lines)


def _style(text: str, color: int | None) -> str:
    if color is None or not text:
        return text
    return str(click.style(text, fg=BLACK, bg=color))
