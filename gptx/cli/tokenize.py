"""`gptx tokenize`: the pieces and the token ids of a text."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import click

from gptx.cli.formatting import print_json
from gptx.cli.options import complete_model, json_option, offline_option
from gptx.cli.prompts import read_prompt
from gptx.errors import ParameterError, argument

WIDTH = 80  # columns of a line
SOURCES = "give TEXT, --file FILE, or - for standard input"


@click.command()
@click.argument("text", required=False)
@click.option(
    "-f",
    "--file",
    metavar="FILE",
    type=click.Path(),
    help="Read the text from FILE (UTF-8); - is standard input.",
)
@click.option(
    "--tokenizer",
    metavar="MODEL",
    default="gpt2",
    show_default=True,
    shell_complete=complete_model,
    help="Tokenizer of this model or folder, or a tokenizer.json.",
)
@click.option(
    "--allow-special", is_flag=True, help="Read <|endoftext|> and the like as special tokens."
)
@click.option("--count", is_flag=True, help="Print the number of tokens only.")
@offline_option
@json_option
def tokenize(
    text: str | None,
    file: str | None,
    tokenizer: str,
    allow_special: bool,
    count: bool,
    offline: bool,
    as_json: bool,
) -> None:
    """Show the tokens of a text: ids and pieces.

    MODEL is shakespeare, gpt2, a Hub id, a file or folder of a model, or a tokenizer.json. Weights
    are not downloaded. A piece that is no complete character is shown as bytes; in JSON, its bytes
    are escapes: "\\xc3".

    \b
    Examples:
      gptx tokenize "To be, or not to be" --tokenizer shakespeare
      gptx tokenize --file corpus.txt --count
    """
    if text is not None and file is not None:
        raise click.UsageError(f"duplicate text: {SOURCES}")
    given = read_prompt(text, None, file)
    if given is None:
        raise click.UsageError(f"missing text: {SOURCES}")
    from gptx.conversions.reading import read_tokenizer
    from gptx.training.data.vocabularies import CHARACTERS, VOWELS

    if tokenizer in (CHARACTERS, VOWELS) and not Path(tokenizer).exists():
        raise ParameterError(
            f"{argument('tokenizer', tokenizer)} makes a vocabulary of a text: give the folder of "
            "gptx prepare or gptx train that has it"
        )
    used = read_tokenizer(tokenizer, offline=offline)
    ids = used.encode(given, allow_special=allow_special)
    if count and not as_json:
        click.echo(len(ids))
    elif count:
        print_json({"count": len(ids)})
    else:
        pieces = [used.piece(id) for id in ids]
        if as_json:
            print_json({"count": len(ids), "ids": ids, "pieces": [_escaped(x) for x in pieces]})
        elif ids:
            n = len(str(max(ids)))
            cells = [f"{id:{n}} {_quoted(piece)}" for id, piece in zip(ids, pieces, strict=True)]
            click.echo("\n".join(_lines(cells)))


def _escaped(piece: str | bytes) -> str:
    """Return a piece as text; bytes become escapes such as \\xc3."""
    return piece if isinstance(piece, str) else piece.decode(errors="backslashreplace")


def _quoted(piece: str | bytes) -> str:
    """Return a piece in quotes, with escapes for what is not printable."""
    if isinstance(piece, bytes):
        return repr(piece)
    return json.dumps(piece, ensure_ascii=not piece.isprintable())


def _lines(cells: Sequence[str]) -> list[str]:
    """Return the lines of a table of at most `WIDTH` columns, filled line by line."""
    widths = [_width(cell) for cell in cells]
    column = min(max(widths), WIDTH) + 2
    n_columns = max((WIDTH + 2) // column, 1)
    padded = [cell + " " * (column - width) for cell, width in zip(cells, widths, strict=True)]
    rows = [padded[i : i + n_columns] for i in range(0, len(padded), n_columns)]
    return ["".join(row).rstrip() for row in rows]


def _width(text: str) -> int:
    """Return the columns of a text on a terminal: two for a wide character, none for a mark."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))
