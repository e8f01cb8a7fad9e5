"""`gptx download`: models from the Hub, for later use without a connection."""

from __future__ import annotations

import click

from gptx.cli.options import revision_option
from gptx.hub.resolve import locate


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@revision_option
def download(models: tuple[str, ...], revision: str | None) -> None:
    """Download models from the Hub, and verify downloaded ones.

    MODEL is a Hub id, or gpt2, gpt2-medium, gpt2-large or gpt2-xl. Each file is compared with the
    SHA-256 that the Hub states; a damaged one is downloaded again. The command prints the folder of
    each model. Then the other commands find the model with --offline.

    \b
    Example:
      gptx download gpt2 gpt2-xl
    """
    for model in models:
        files = locate(model, revision=revision, verify_cached=True)
        click.echo(str(files.folder))
