"""Options of more than one command."""

from __future__ import annotations

from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Any)

revision_option = click.option(
    "--revision", metavar="NAME", help="Branch, tag or commit hash of a Hub model."
)
offline_option = click.option(
    "--offline", is_flag=True, help="Use downloaded files only; open no connection."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
config_option = click.option(
    "--config",
    metavar="FILE",
    help="A config.json, for formats that store only part of the configuration.",
)


def group_size_option(command: Command) -> Command:
    """Add `--group-size`; a function, so that only the commands with this option import NumPy."""
    from gptx.quantization import GROUP_SIZE

    return click.option(
        "--group-size",
        type=int,
        metavar="N",
        default=GROUP_SIZE,
        show_default=True,
        help="Weights that share a quantization scale: 32, 64 or 128.",
    )(command)
