"""`gptx download`: models from the Hub and from OpenAI, for later use without a connection."""

from __future__ import annotations

import click

from gptx.cli.options import complete_model, revision_option


@click.command()
@click.argument(
    "models", nargs=-1, required=True, metavar="MODEL...", shell_complete=complete_model
)
@revision_option
def download(models: tuple[str, ...], revision: str | None) -> None:
    """Download models from the Hub, and verify downloaded ones.

    MODEL is a Hub id, or gpt2, gpt2-medium, gpt2-large or gpt2-xl; or openai:124M (355M, 774M,
    1558M), OpenAI's own files. Each file is compared with the SHA-256 that the Hub states; a
    damaged one is downloaded again. The command prints the folder of each model. Then the other
    commands find the model with --offline.

    \b
    Example:
      gptx download gpt2 gpt2-xl
    """
    from gptx.generation.found_model import find_model

    for model in models:
        click.echo(str(find_model(model, revision=revision, verify_cached=True).fetch()))
