"""`gptx compile`: the kernels of the NumPy backend, compiled before they are needed."""

from __future__ import annotations

import importlib.util
import time

import click

from gptx.errors import BackendError

INSTALL = "pip install '.[fast]'"
FORMATS = ("float32", "int8", "int4")


@click.command()
@click.argument("formats", nargs=-1, type=click.Choice(FORMATS), metavar="[float32|int8|int4]...")
@click.option(
    "--cache-dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Type of the keys and values, as of gptx generate.",
)
def compile(formats: tuple[str, ...], cache_dtype: str) -> None:
    """Compile the kernels of the numpy backend for this processor, once.

    Otherwise the first model with such weights does so. The default is all formats of weights.
    """
    if importlib.util.find_spec("numba") is None:
        raise BackendError(f"the kernels need Numba, run {INSTALL} in a checkout of gptx")
    from gptx.backends.cpu import machine_code
    from gptx.backends.cpu.interface.variant import FLOAT16_CACHE

    for name in formats or FORMATS:
        variant = f"{name},{FLOAT16_CACHE}" if cache_dtype == "float16" else name
        was_compiled, start = machine_code.is_compiled(variant), time.perf_counter()
        machine_code.load(variant)
        state = "is there" if was_compiled else f"compiled in {time.perf_counter() - start:.0f} s"
        click.echo(f"{variant.replace(',', ', ')}: {state}")
