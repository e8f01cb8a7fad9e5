"""The `gptx` command line; `main` is the entry point of `gptx` and `python -m gptx`.

This file imports little: before `main` runs, Ctrl-C ends in a traceback.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line of this process and exit with its code."""
    from gptx.cli import signals

    signals.install()
    from gptx.cli.app import run

    sys.exit(run())
