"""`gptx backends`: the backends that work on this machine."""

from __future__ import annotations

from dataclasses import asdict

import click

from gptx.backends import available
from gptx.cli.formatting import print_json
from gptx.cli.options import json_option


@click.command()
@json_option
def backends(as_json: bool) -> None:
    """Show which backends work on this machine, and how to install more.

    Each line has the name for --backend, yes or no, the hardware, and the version or the reason.
    """
    statuses = available()
    if as_json:
        print_json([asdict(status) for status in statuses])
        return
    for status in statuses:
        mark = "yes" if status.available else "no"
        click.echo(f"{status.name:<6} {mark:<4} {status.runs_on:<24} {status.detail}")
