"""`gptx convert`: a model's files in one format -> another; what is in them, and is it whole."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from gptx.cli.options import group_size_option, offline_option, revision_option
from gptx.config import GPT2Config
from gptx.conversions import CODES, FORMATS, convert, read
from gptx.conversions.containers.binary import DTYPES
from gptx.conversions.verify import check
from gptx.hub.resolve import importing_hub


@click.command("convert")
@click.argument("source", metavar="SRC", required=False)
@click.argument("destination", metavar="DST", required=False, type=click.Path(path_type=Path))
@click.option("--to", metavar="FORMAT", help="What to write; else the suffix of DST says it.")
@click.option("--dtype", metavar="NAME", help=f"{', '.join(DTYPES)}, what the format has of them.")
@click.option("--quantize", metavar="NAME", help=f"{' or '.join(CODES)}, if the format has them.")
@group_size_option
@click.option("--head", metavar="NAME", help="Of ONNX: logits (default) or argmax.")
@click.option("--config", metavar="FILE", help="A config.json, for formats that do not say it all.")
@click.option("--tokenizer", metavar="DIR", help="A folder with a tokenizer, where SRC has none.")
@click.option("--overwrite", is_flag=True, help="Replace DST if it is there.")
@click.option("--upload", metavar="REPO", help="Then upload DST to this repository on the Hub.")
@click.option("--private", is_flag=True, help="Make that repository private if it is new.")
@click.option("--list", "list_formats", is_flag=True, help="Show the formats, and do nothing else.")
@click.option(
    "--check", "check_source", metavar="FILE", help="Read all of FILE, and write nothing."
)
@revision_option
@offline_option
def convert_command(
    source: str | None,
    destination: Path | None,
    list_formats: bool,
    check_source: str | None,
    upload: str | None,
    private: bool,
    head: str | None,
    **options: Any,
) -> None:
    """Convert the model SRC to DST: tensor by tensor, whole or not at all.

    SRC is a file or a folder of any format (`--list`), which is found out from what is in it, or a
    name, or a Hub id, or openai:124M for OpenAI's own files. DST is a file or a folder.
    """
    if list_formats:
        click.echo(_table())
        return
    if check_source is not None:
        if source is not None:
            raise click.UsageError("--check FILE writes nothing: leave SRC and DST out")
        places = {name: options[name] for name in ("config", "tokenizer", "revision", "offline")}
        name, checkpoint = read(check_source, **places)
        _say_notes(checkpoint.notes)
        check(checkpoint)
        click.echo(f"{check_source}: {FORMATS[name].title}, whole: {_about(checkpoint.config)}")
        return
    if source is None or destination is None:
        raise click.UsageError("expected SRC and DST, or --list, or --check FILE")
    if private and upload is None:
        raise click.UsageError("--private is said of the repository that --upload names")
    if head is not None:
        options["head"] = head
    if upload is not None:
        with importing_hub():
            from gptx.hub import upload as hub_upload
        hub_upload.check_repository(upload)  # before the work is done
    with _progress() as progress:
        checkpoint = convert(source, destination, progress=progress, **options)
    _say_notes(checkpoint.notes)
    click.echo(f"{destination}: {_about(checkpoint.config)}", err=True)
    if upload is not None:
        click.echo(hub_upload.upload(destination, upload, private=private))


def _about(config: GPT2Config) -> str:
    return (
        f"{config.n_parameters:,} parameters, layers {config.n_layer}, heads {config.n_head}, "
        f"width {config.n_embd}, context {config.n_positions}, vocabulary {config.vocab_size}"
    )


def _say_notes(notes: tuple[str, ...]) -> None:
    for note in notes:
        click.echo(f"Note: {note}", err=True)


def _table() -> str:
    """The formats: name, read and write, what can be asked for, title."""
    rows = [("format", "read", "write", "as", "what it is")]
    for name, row in FORMATS.items():
        kinds = ", ".join((*row.dtypes, *row.quantize)) if row.writes else ""
        marks = ("yes" if row.reads else "-", "yes" if row.writes else "-")
        rows.append((name, *marks, kinds, row.title))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]])
        for row in rows
    )


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar on a terminal, and nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    with click.progressbar(length=1, file=sys.stderr, item_show_func=lambda name: name) as bar:

        def show(name: str, done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos, name)

        yield show
        bar.update((bar.length or 0) - bar.pos)
