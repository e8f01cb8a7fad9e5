"""Options and formatting that several commands share."""

from __future__ import annotations

import click

from gptx.backends import TABLE
from gptx.quantization import GROUP_SIZE

revision_option = click.option("--revision", help="Branch, tag or commit on the Hub.")
offline_option = click.option("--offline", is_flag=True, help="Make no connection.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


class _Backend(click.ParamType[str]):
    """A backend's name; the library itself says what is wrong with an unknown one."""

    name = "name"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        return [click.shell_completion.CompletionItem(n) for n in TABLE if n.startswith(incomplete)]


backend_option = click.option(
    "-b",
    "--backend",
    type=_Backend(),
    default="numpy",
    show_default=True,
    help=", ".join(TABLE) + ".",
)
dtype_option = click.option(
    "--dtype", metavar="NAME", help="float32 (default), float16 or bfloat16, if the backend can."
)
cache_dtype_option = click.option(
    "--cache-dtype", metavar="NAME", help="float16: keep keys and values in half of the memory."
)
threads_option = click.option(
    "-t", "--threads", type=int, help="Threads of the numpy backend: BLAS's and the kernels'."
)
quantize_option = click.option(
    "--quantize", metavar="NAME", help="int8 or int4: quantize the weights when they are loaded."
)
group_size_option = click.option(
    "--group-size",
    type=int,
    default=GROUP_SIZE,
    show_default=True,
    help="Weights that share a scale: 32, 64 or 128.",
)


def format_size(n_bytes: float) -> str:
    """Bytes for people: 497.8 MB."""
    if n_bytes < 1000:
        return f"{n_bytes:.0f} bytes"
    for unit in ("kB", "MB"):
        n_bytes /= 1000
        if n_bytes < 1000:
            return f"{n_bytes:.1f} {unit}"
    return f"{n_bytes / 1000:.1f} GB"
