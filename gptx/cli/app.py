"""The group of commands, and the exit code of each ending.

Standard output carries the text only; diagnostics go to standard error, one line each.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import click

from gptx._version import __version__
from gptx.cli import signals
from gptx.cli.openblas import select_kernels
from gptx.errors import DeviceOutOfMemory, GptxError, Interrupted, ModelWarning, StorageError

REPLACE = "gptx.cli.replace"  # the name of the handler of characters that cannot be encoded
BROKEN_PIPE = 141  # the code that a shell reports for a process that SIGPIPE ended

# Each command is the function of this name in the file of this name.
COMMANDS = {
    "backends": "Show which backends work on this machine, and how to install more.",
    "batch": "Answer a file of requests, and continue where a run has ended.",
    "bench": "Measure the speed of reading (pp) and of generating text (tg).",
    "compile": "Compile the kernels of the numpy backend for this processor, once.",
    "convert": "Convert a model from one file format to another.",
    "download": "Download models from the Hub, and verify downloaded ones.",
    "generate": "Continue a prompt and print the text token by token.",
    "info": "Show the configuration, the tensors and the memory of a model.",
    "prepare": "Convert text files to token files for training.",
    "score": "Show how probable a text is, token by token.",
    "serve": "Serve a model over HTTP, with the API of OpenAI.",
    "tokenize": "Show the tokens of a text: ids and pieces.",
    "train": "Train a GPT-2 on text, from scratch or from a model.",
    "verify": "Compare two models: configuration, tokenizer, tensors and logits.",
}


class LazyGroup(click.Group):
    """A group that imports a command's file when the command is called.

    Its `commands` hold the name and the summary only: `--help` and shell completion read no more.
    """

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and command.name is not None:
            command = load_command(command.name)
        signals.raise_exceptions()
        return name, command, rest

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        try:  # --help and --version write here
            return super().make_context(*args, **extra)
        except BrokenPipeError as error:
            _discard_output(error)
            raise click.exceptions.Exit(BROKEN_PIPE) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _notes():
                return super().invoke(ctx)
        except BrokenPipeError as error:  # click would exit with 1
            _discard_output(error)
            ctx.exit(BROKEN_PIPE)
        except click.UsageError as error:
            name = ctx.invoked_subcommand
            if error.ctx is None and name is not None:  # an error of click's parser
                error.ctx = click.Context(load_command(name), parent=ctx, info_name=name)
            raise
        except GptxError as error:
            command = ctx.invoked_subcommand and load_command(ctx.invoked_subcommand)
            _print_error(f"Error: {error.text(flags_of(command)) if command else error}")
            _discard_output(error.__cause__ or error)
            ctx.exit(error.exit_code)


def flags_of(command: click.Command) -> Callable[[str, list[str]], str]:
    """Return a function that names an option of a command, for `GptxError.text`.

    "max_tokens" is "-n/--max-tokens", "overflow" with the value 'truncate' is "--overflow
    truncate". An argument has the name that its usage line shows, or the value: "model" of
    `gptx info` is "MODEL", "model" with the value 'gpt2' is "gpt2".
    """
    options: dict[str, list[str]] = {}
    arguments: dict[str, str] = {}
    for param in command.params:
        if isinstance(param, click.Argument):
            arguments[str(param.name)] = param.human_readable_name
            continue
        flag = max(param.opts, key=len)
        # A list such as `models` is also the option of one of its items.
        options[str(param.name)] = options[flag.lstrip("-").replace("-", "_")] = param.opts

    def show(name: str, values: list[str]) -> str:
        shown = " or ".join(value.strip("'") for value in values if value != "True")
        if name not in options:
            return shown or arguments.get(name, name)
        if not values:
            return "/".join(options[name])
        return f"{max(options[name], key=len)} {shown}".rstrip()

    return show


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """Print the warnings about a model as notes on standard error."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", ModelWarning)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, ModelWarning):
                click.echo(f"Note: {message}", err=True)
            else:
                others(message, category, *place, **more)

        warnings.showwarning = show  # `catch_warnings` restores it
        yield


def load_command(name: str) -> click.Command:
    """Import a command of `COMMANDS`."""
    command: click.Command = getattr(importlib.import_module(f"gptx.cli.{name}"), name)
    return command


EXIT_CODES = """\b
Exit codes:
    2  invalid option, parameter or backend
   65  invalid file, model or prompt
   66  model, file or revision not found
   69  Hub unavailable
   70  NaN or infinity in the model's output
   71  out of memory
   74  read or write error, such as a full disk
   77  not authorized by the Hub
  129  the terminal was closed (SIGHUP)
  130  interrupted (Ctrl-C)
  141  broken pipe: the reader of standard output has ended
  143  terminated (SIGTERM)
"""


@click.group(
    cls=LazyGroup,
    commands=[click.Command(name, short_help=summary) for name, summary in COMMANDS.items()],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXIT_CODES,
)
@click.version_option(__version__, prog_name="gptx")
def gptx() -> None:
    """Run GPT-2 models: generate text, measure speed, convert files.

    \b
    The model "shakespeare" is part of gptx and needs no download:
      gptx generate -m shakespeare "ROMEO:"

    gptx COMMAND --help lists the options of a command.
    """


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line in this process and return its exit code.

    The default arguments are those of the process.
    """
    select_kernels()  # before a command imports NumPy
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # the parent process has closed it
            setattr(sys, name, open(os.devnull, "r" if fd == 0 else "w"))  # noqa: SIM115
    replaced: list[str] = []
    codecs.register_error(REPLACE, partial(_replace, replaced))
    for stream, errors in ((sys.stdout, REPLACE), (sys.stderr, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    try:
        return _run(args)
    finally:
        signals.exit_at_once()
        if replaced:
            _print_error(
                f"Note: standard output is in {sys.stdout.encoding}, without some characters of "
                "the text, which are printed as ?: use --json, or set PYTHONUTF8=1"
            )


def _replace(replaced: list[str], error: UnicodeError) -> tuple[str, int]:
    """Encode "?" for characters that the encoding lacks, and append them to a list."""
    assert isinstance(error, UnicodeEncodeError)
    replaced.append(error.object[error.start : error.end])
    return "?" * (error.end - error.start), error.end


def _run(args: Sequence[str] | None) -> int:
    """Run a command and return the exit code; print its error, if it raises one."""
    try:
        code = gptx.main(args, prog_name="gptx", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
            error.show()  # the help of `gptx` without a command
            return error.exit_code
        command = getattr(getattr(error, "ctx", None), "command_path", "gptx")
        _print_error(f"Error: {error.format_message().rstrip('.')} (see {command} --help)")
        return error.exit_code
    except MemoryError as error:
        return _end_without_memory(error)
    except (KeyboardInterrupt, click.Abort):
        _print_error("Interrupted")
        return Interrupted.exit_code
    except BrokenPipeError as error:
        _discard_output(error)
        return BROKEN_PIPE
    except OSError as error:
        if error.errno == errno.ENOMEM:  # of mmap, for example
            return _end_without_memory(error)
        place = error.filename or ("standard output" if _is_failed_write(error) else "")
        _print_error(f"Error: {place}{': ' if place else ''}{error.strerror or error}")
        _discard_output(error)
        return StorageError.exit_code


def _end_without_memory(error: BaseException) -> int:
    _print_error(f"Error: out of memory ({error}): use a smaller model")
    return DeviceOutOfMemory.exit_code


def _print_error(message: str) -> None:
    with contextlib.suppress(OSError):
        click.echo(" ".join(message.split()), err=True)


def _discard_output(error: BaseException) -> None:
    """Redirect standard output to the null device if `error` is a failed write.

    Otherwise Python writes the rest of its buffer again at exit, and fails again.
    """
    if _is_failed_write(error):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_failed_write(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC, errno.EIO)
