"""`gptx upload`: a model to the store of a server, in pieces that continue where they ended."""

from __future__ import annotations

from pathlib import Path

import click

from gptx.cli.formatting import format_size, progress_bar


@click.command()
@click.argument("path", metavar="MODEL", type=click.Path(path_type=Path))
@click.argument("url", metavar="URL")
@click.option(
    "--api-key",
    metavar="KEY",
    envvar="GPTX_API_KEY",
    help="Key of the server.  [default: the variable GPTX_API_KEY]",
)
@click.option(
    "--offset",
    metavar="N",
    type=int,
    help="Begin at byte N of all files in their order.  [default: where the last upload ended]",
)
@click.option("--overwrite", is_flag=True, help="Replace a model of this name with other files.")
@click.option("--setup", is_flag=True, help="Load the model on the server at the end.")
def upload(
    path: Path, url: str, api_key: str | None, offset: int | None, overwrite: bool, setup: bool
) -> None:
    """Upload a model to a server that runs gptx serve --store.

    MODEL is a file or folder of any format in gptx convert --list. URL is the address of the
    server, or of the model on it: http://HOST:PORT/models/NAME. Without a name, the model has that
    of its file or folder.

    The same command continues an interrupted upload. The server compares the SHA-256 of each file,
    checks the model as gptx convert --check does, and only then lists it.

    \b
    Example:
      gptx upload models/gpt2 http://127.0.0.1:8000
    """
    from gptx.server.uploads.client import Upload, find_files, model_address, read_files

    address = model_address(url, path)
    files = find_files(path)
    with progress_bar() as progress:
        read = read_files(files, progress)
    with progress_bar() as progress:
        upload = Upload(address, read, api_key=api_key, progress=progress)
        if overwrite:
            upload.drop()
        upload.run(offset)
    if setup:
        upload.setup()
    count = f"{len(files)} file{'s' if len(files) > 1 else ''}"
    click.echo(f"{address}: {count}, {format_size(upload.length)}", err=True)
