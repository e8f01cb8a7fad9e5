"""`gptx download`: fetch models from the Hub, so that they are there when offline."""

from __future__ import annotations

import click

from gptx.cli.options import revision_option
from gptx.hub.resolve import locate


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@revision_option
def download(models: tuple[str, ...], revision: str | None) -> None:
    """Fetch each MODEL from the Hub and print the folder it lies in.

    What is in the cache already is checked against its SHA-256, and fetched again if it is wrong.
    """
    for model in models:
        files = locate(model, revision=revision, verify_cached=True)
        click.echo(str(files.folder))
