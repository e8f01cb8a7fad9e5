"""The check of an uploaded model: its format, its tensors, its numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gptx.errors import DataError, GptxError, NotFoundError, WeightsError
from gptx.process import environment


def check_apart(path: Path) -> None:
    """Run `gptx convert --check` on a model in a process of its own.

    A file that exhausts the memory, or crashes a reader, does not end the server; and the check
    takes no turns from its threads.

    Raises
    ------
    WeightsError
        The model is invalid.
    GptxError
        The check did not end.
    """
    command = [sys.executable, "-m", "gptx", "convert", "--offline", "--check", str(path)]
    done = subprocess.run(
        command, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        *_, message = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        message = message.removeprefix("Error: ")
        if done.returncode in (DataError.exit_code, NotFoundError.exit_code):
            raise WeightsError(message)
        raise GptxError(f"the check of the model did not end: {message}: try again later")


def find_model(folder: Path) -> str:
    """Find the model in a folder of files: "." for the folder, or the name of one file.

    Raises
    ------
    WeightsError
        There is none, or more than one.
    """
    from gptx.conversions.registry import FORMATS, find_format

    if find_format(folder) is not None:
        return "."
    files = [path.name for path in regular_files(folder) if find_format(path) is not None]
    if len(files) == 1:
        return files[0]
    formats = ", ".join(name for name, row in FORMATS.items() if row.reads)
    raise WeightsError(
        f"{folder} has the models: {', '.join(files) or 'none'}, expected one model of a format in "
        f"gptx convert --list ({formats})"
    )


def regular_files(folder: Path) -> list[Path]:
    """Return the files of a folder that are not hidden, sorted by name."""
    return sorted(x for x in folder.iterdir() if x.is_file() and not x.name.startswith("."))
