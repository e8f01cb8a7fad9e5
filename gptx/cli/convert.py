"""`gptx convert`: a model from one file format to another; `--check` reads a model only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gptx.cli.formatting import progress_bar
from gptx.cli.options import (
    complete_model,
    complete_names,
    config_option,
    group_size_option,
    ignore_unknown_option,
    offline_option,
    revision_option,
    tokenizer_option,
)
from gptx.config import GPT2Config
from gptx.conversions import DTYPES, FORMATS, QUANTIZED_TYPES, read
from gptx.hub.resolve import importing_hub


@click.command()
@click.argument("source", metavar="SRC", required=False, shell_complete=complete_model)
@click.argument("destination", metavar="DST", required=False, type=click.Path(path_type=Path))
@click.option(
    "--to",
    metavar="FORMAT",
    shell_complete=complete_names(*(name for name, row in FORMATS.items() if row.writes)),
    help="Format to write, a name from --list.  [default: from the suffix of DST]",
)
@click.option(
    "--dtype",
    metavar="NAME",
    shell_complete=complete_names(*DTYPES),
    help=f"Type of the tensors in DST: {', '.join(DTYPES)} (see --list).  "
    "[default: as in SRC, or float32]",
)
@click.option(
    "--quantize",
    metavar="NAME",
    shell_complete=complete_names(*QUANTIZED_TYPES),
    help=f"Quantize the matrices: {' or '.join(QUANTIZED_TYPES)} (see --list).",
)
@group_size_option
@click.option(
    "--head",
    metavar="NAME",
    shell_complete=complete_names("logits", "argmax"),
    help="Output of an ONNX graph: logits, or argmax (only the next token id).  [default: logits]",
)
@config_option
@tokenizer_option
@ignore_unknown_option
@click.option("--overwrite", is_flag=True, help="Replace DST if it exists.")
@click.option(
    "--upload", metavar="OWNER/NAME", help="Upload DST to this repository on the Hub, at the end."
)
@click.option(
    "--private", is_flag=True, help="Make the repository of --upload private if it is new."
)
@click.option("--list", "list_formats", is_flag=True, help="List the formats and exit.")
@click.option(
    "--check",
    "check_source",
    metavar="SRC",
    shell_complete=complete_model,
    help="Check the tensors, numbers and checksums of SRC; write nothing.",
)
@revision_option
@offline_option
def convert(
    source: str | None,
    destination: Path | None,
    list_formats: bool,
    check_source: str | None,
    upload: str | None,
    private: bool,
    head: str | None,
    **options: Any,
) -> None:
    """Convert a model from one file format to another.

    SRC is a file or a folder of any format in --list, which gptx detects from the content; an
    embedded model (shakespeare); a Hub id; or openai:124M (355M, 774M, 1558M), which downloads
    OpenAI's own files.

    DST is the file or folder to write. It is written atomically: a failed conversion leaves it
    unchanged. Memory holds one tensor at a time.

    \b
    Examples:
      gptx convert gpt2 model.gguf
      gptx convert gpt2 folder --quantize int4
      gptx convert --check model.gguf
    """
    if list_formats:
        click.echo(_format_table())
        return
    if check_source is not None:
        if source is not None:
            raise click.UsageError("--check SRC takes no other arguments: leave out SRC and DST")
        from gptx.conversions.verify import check

        names = ("config", "tokenizer", "ignore_unknown", "revision", "offline")
        name, checkpoint = read(check_source, **{name: options[name] for name in names})
        _print_notes(checkpoint.notes)
        check(checkpoint)
        click.echo(f"{check_source}: {FORMATS[name].title}, valid: {_summary(checkpoint.config)}")
        return
    if source is None or destination is None:
        raise click.UsageError("missing SRC or DST: give both, or --list, or --check SRC")
    if private and upload is None:
        raise click.UsageError("--private applies to an upload only: add --upload OWNER/NAME")
    if head is not None:
        options["head"] = head
    if upload is not None:
        with importing_hub():
            from gptx.hub import upload as hub_upload
        hub_upload.check_repository(upload)  # before the conversion, which takes long
    from gptx.conversions import convert as convert_model

    with progress_bar() as progress:
        checkpoint = convert_model(source, destination, progress=progress, **options)
    _print_notes(checkpoint.notes)
    click.echo(f"{destination}: {_summary(checkpoint.config)}", err=True)
    if upload is not None:
        click.echo(hub_upload.upload(destination, upload, private=private))


def _summary(config: GPT2Config) -> str:
    return (
        f"{config.n_parameters:,} parameters, layers {config.n_layer}, heads {config.n_head}, "
        f"width {config.n_embd}, context {config.n_positions}, vocabulary {config.vocab_size}"
    )


def _print_notes(notes: tuple[str, ...]) -> None:
    for note in notes:
        click.echo(f"Note: {note}", err=True)


def _format_table() -> str:
    """Return the table of the formats: name, read, write, types that can be written, title."""
    rows = [("format", "read", "write", "types", "description")]
    for name, row in FORMATS.items():
        types = ", ".join((*row.dtypes, *row.quantize)) if row.writes else ""
        marks = ("yes" if row.reads else "-", "yes" if row.writes else "-")
        rows.append((name, *marks, types, row.title))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]])
        for row in rows
    )
