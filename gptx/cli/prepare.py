"""`gptx prepare`: text files to token files for training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gptx.cli.formatting import progress_bar
from gptx.cli.options import complete_model, complete_names, offline_option

FORMATS = ("nanogpt", "llmc", "staticgrad")
PLACES = ("none", "files", "sections")
DATASETS = ("tinyshakespeare", "tinystories")


@click.command()
@click.argument("texts", metavar="TEXT...", nargs=-1, type=click.Path())
@click.option(
    "-o", "--output", metavar="DIR", required=True, type=click.Path(), help="Folder to write."
)
@click.option(
    "--tokenizer",
    metavar="NAME",
    default="characters",
    show_default=True,
    shell_complete=complete_model,
    help="characters, vowels, a folder with a tokenizer, or a model that has one, such as gpt2.",
)
@click.option(
    "--vocab-size",
    type=int,
    metavar="N",
    help="Most tokens of a vocabulary of vowels.  [default: 1024]",
)
@click.option(
    "--train-bpe", type=int, metavar="N", help="Train a byte-level BPE of N tokens on the text."
)
@click.option(
    "--format",
    type=click.Choice(FORMATS),
    default="nanogpt",
    show_default=True,
    help="Form of the token files.",
)
@click.option(
    "--validation",
    metavar="FILE",
    multiple=True,
    type=click.Path(),
    help="Text for validation, in place of a part of TEXT.",
)
@click.option(
    "--validation-fraction",
    type=float,
    metavar="X",
    help="Fraction of the text, at its end, for validation.  [default: 0.1 for nanogpt]",
)
@click.option(
    "--validation-tokens",
    type=int,
    metavar="N",
    help="Tokens, at the start of the text, for validation.  [default: 32768 for the others]",
)
@click.option(
    "--end-of-text",
    type=click.Choice(PLACES),
    help="Put <|endoftext|> before each file, or also after each empty line.  "
    "[default: none for nanogpt, sections for the others]",
)
@click.option("--allow-special", is_flag=True, help="Read <|endoftext|> in the text as the token.")
@click.option(
    "--shard-tokens", type=int, metavar="N", help="Write several files, of N tokens each."
)
@click.option("--max-bytes", type=int, metavar="N", help="Read the first N bytes of the text only.")
@click.option(
    "--dataset",
    metavar="NAME",
    shell_complete=complete_names(*DATASETS),
    help=f"Fetch a text from the Hub, in place of TEXT: {' or '.join(DATASETS)}.",
)
@click.option("--overwrite", is_flag=True, help="Replace prepared data in DIR.")
@offline_option
def prepare(texts: tuple[str, ...], dataset: str | None, output: str, **options: Any) -> None:
    """Convert text files to token files for training.

    TEXT is a file in UTF-8 of any size, or - for standard input; several files are joined. DIR gets
    the token files train.bin and val.bin, and the tokenizer. Any program that reads the format can
    train on them, and so can `gptx train DIR`. DIR is written atomically.

    \b
    Examples:
      gptx prepare corpus.txt -o data
      gptx prepare corpus.txt --tokenizer gpt2 --format llmc -o data
      gptx prepare --dataset tinyshakespeare --train-bpe 1024 -o data
    """
    if not texts and dataset is None:
        raise click.UsageError("missing TEXT: give a text file, or --dataset NAME")
    from gptx.training.data.prepare import prepare as prepare_data

    with progress_bar() as progress:
        done = prepare_data(texts, output, dataset=dataset, progress=progress, **options)
    click.echo(
        f"{Path(output)}: {done.train_tokens:,} tokens for training, {done.validation_tokens:,} "
        f"for validation, vocabulary {done.tokenizer.vocab_size:,}",
        err=True,
    )
