"""Options of more than one command, their types, and help in sections."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

Command = TypeVar("Command", bound=Any)
Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def complete_model(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete the name of a model: known names, and files."""
    names = [name for name in known_models() if name.startswith(incomplete)]
    return [CompletionItem(incomplete, type="file"), *map(CompletionItem, names)]


def complete_names(*names: str) -> Complete:
    """Return a function that completes one of these names."""
    return lambda ctx, param, incomplete: [
        CompletionItem(name) for name in names if name.startswith(incomplete)
    ]


def known_models() -> list[str]:
    """Return the embedded models, the short names of Hub models, and the GPT-2s in the cache."""
    from gptx.embedded import EMBEDDED
    from gptx.hub.resolve import ALIASES

    return [*EMBEDDED, *ALIASES, *_cached_models()]


def _cached_models() -> list[str]:
    """Return the ids of Hub models whose config is in the cache and is that of a GPT-2."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return []
    from pathlib import Path

    found = set()
    for config in Path(HF_HUB_CACHE).glob("models--*--*/snapshots/*/config.json"):
        try:
            is_gpt2 = '"gpt2"' in config.read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue
        if is_gpt2:
            found.add("/".join(config.parents[2].name.split("--")[1:]))
    return sorted(found)


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
    type=click.Path(),
    help="A config.json, for formats that store only part of the configuration.",
)
tokenizer_option = click.option(
    "--tokenizer",
    metavar="MODEL",
    shell_complete=complete_model,
    help="Use the tokenizer of this folder or model, for a model that has none.",
)
ignore_unknown_option = click.option(
    "--ignore-unknown", is_flag=True, help="Leave out tensors that a GPT-2 does not have."
)


DTYPES = ("float32", "float64", "float16", "bfloat16")


def load_options(command: Command) -> Command:
    """Add the options of the model and its backend, in the order of the help.

    A function, so that only the commands with these options import the table of backends.
    """
    from gptx.backends import TABLE
    from gptx.quantization import BITS

    options = (
        click.option(
            "-m",
            "--model",
            metavar="MODEL",
            shell_complete=complete_model,
            default="gpt2",
            show_default=True,
            help="shakespeare, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a Hub id, or a file or "
            "folder of any format (see gptx convert --list).",
        ),
        revision_option,
        offline_option,
        config_option,
        tokenizer_option,
        ignore_unknown_option,
        click.option(
            "-b",
            "--backend",
            metavar="NAME",
            type=click.Choice(tuple(TABLE)),
            default="numpy",
            show_default=True,
            help=f"Array library that runs the model: {', '.join(TABLE)} (see gptx backends).",
        ),
        click.option(
            "--dtype",
            metavar="NAME",
            type=click.Choice(DTYPES),
            help="Type to compute in: float32, float64 (numpy, cupy), float16 or bfloat16 (cupy, "
            "mlx).  [default: float32]",
        ),
        click.option(
            "--cache-dtype",
            metavar="NAME",
            type=click.Choice(DTYPES),
            help="Type of the KV cache: float16 takes half of the memory of float32.  "
            "[default: as --dtype]",
        ),
        click.option(
            "-t",
            "--threads",
            type=int,
            metavar="N",
            help="CPU threads of the numpy backend.  [default: one for each core]",
        ),
        click.option(
            "--quantize",
            metavar="NAME",
            type=click.Choice(tuple(BITS)),
            help="Quantize the weights while loading: int8 or int4.",
        ),
        group_size_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


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


def command_line(ctx: click.Context, *, without: Collection[str]) -> list[str]:
    """Return the options of a command that were given on its command line, as arguments.

    Parameters
    ----------
    without
        Names of parameters to leave out.
    """
    arguments = []
    for param in ctx.command.params:
        name = param.name or ""
        if ctx.get_parameter_source(name) is not ParameterSource.COMMANDLINE or name in without:
            continue
        value, flag = ctx.params[name], max(param.opts, key=len)
        if isinstance(value, bool):  # a flag without a value
            arguments.append(flag)
        else:
            values = value if isinstance(value, tuple) else [value]
            arguments += [f"{flag}={one}" for one in values]
    return arguments


class Sections(click.Command):
    """A command whose help lists its options in sections.

    Parameters
    ----------
    sections
        Title -> name of the first option of the section. A section has the options from there to
        the next one, in the order of the code.
    """

    def __init__(self, *args: Any, sections: Mapping[str, str], **options: Any) -> None:
        super().__init__(*args, **options)
        self.sections = {first: title for title, first in sections.items()}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows: dict[str, list[tuple[str, str]]] = {}
        title = "Options"
        for param in self.get_params(ctx):
            if isinstance(param, click.Argument):
                continue
            title = self.sections.get(param.name or "", title)
            record = param.get_help_record(ctx)
            if record is not None:
                rows.setdefault(title, []).append(record)
        for title, records in rows.items():
            with formatter.section(title):
                formatter.write_dl(records)
