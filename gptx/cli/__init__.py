"""The `gptx` command line: one file per command, and here how each of them ends.

Standard output carries the text alone; diagnostics go to standard error, one line each.
"""
# ruff: noqa: E402

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from gptx._version import __version__
from gptx.cli.blas import choose_kernels

choose_kernels()  # before the imports that follow bring NumPy along

from gptx.cli.backends import backends
from gptx.cli.bench import bench
from gptx.cli.convert import convert_command
from gptx.cli.download import download
from gptx.cli.generate import generate
from gptx.cli.info import info
from gptx.cli.verify import verify
from gptx.errors import DeviceOutOfMemory, GptxError, Interrupted, StorageError

BROKEN_PIPE = 141  # what a shell reports for a process that SIGPIPE ended


class _Group(click.Group):
    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        try:  # --help and --version are written here
            return super().make_context(*args, **extra)
        except BrokenPipeError as error:
            _drop_output(error)
            raise click.exceptions.Exit(BROKEN_PIPE) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:  # for which click would exit with 1
            _drop_output(error)
            ctx.exit(BROKEN_PIPE)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gptx")
def gptx() -> None:
    """GPT-2 on NumPy, CuPy or MLX.

    Exit codes: 2 usage or parameter, 65 bad file, model or prompt, 66 not found, 69 Hub
    unavailable, 70 non-finite numbers, 71 device out of memory, 74 storage, 77 authorization,
    130 interrupted, 141 broken pipe.
    """


for command in (generate, info, backends, bench, download, convert_command, verify):
    gptx.add_command(command)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed by whoever started the process
            setattr(sys, name, open(os.devnull, "r" if fd == 0 else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a letter is no error
    sys.exit(_run(args))


def _run(args: Sequence[str] | None) -> int:
    try:
        try:
            code = gptx.main(args, prog_name="gptx", standalone_mode=False)
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
        except OSError as error:
            if isinstance(error, GptxError | BrokenPipeError):
                raise
            what = error.filename or "standard output"
            raise StorageError(f"{what}: {error.strerror or error}") from error
    except click.ClickException as error:
        if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
            error.show()  # the help: there was nothing wrong to speak of
            return error.exit_code
        command = getattr(getattr(error, "ctx", None), "command_path", "gptx")
        _say(f"Error: {error.format_message()} (see {command} --help)")
        return error.exit_code
    except GptxError as error:
        _say(f"Error: {error}")
        _drop_output(error)
        return error.exit_code
    except MemoryError as error:
        _say(f"Error: memory ran out ({error}): use a smaller model")
        return DeviceOutOfMemory.exit_code
    except (KeyboardInterrupt, click.Abort):
        _say("Interrupted")
        return Interrupted.exit_code
    except BrokenPipeError as error:
        _drop_output(error)
        return BROKEN_PIPE


def _say(message: str) -> None:
    with contextlib.suppress(OSError):
        click.echo(" ".join(message.split()), err=True)


def _drop_output(error: BaseException) -> None:
    """What standard output still holds cannot be written: keep Python from trying again at exit."""
    cause = error.__cause__ or error
    if isinstance(cause, OSError) and cause.errno in (errno.EPIPE, errno.ENOSPC, errno.EIO):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
