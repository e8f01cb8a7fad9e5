"""`gptx page`: a static site that runs a model in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gptx.cli.formatting import format_size, progress_bar
from gptx.cli.options import (
    complete_model,
    complete_names,
    config_option,
    ignore_unknown_option,
    offline_option,
    revision_option,
    tokenizer_option,
)
from gptx.server.sites.onnx_runtime_web import PACKAGE, VERSION
from gptx.server.sites.writer import DTYPES, make_site


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "-m",
    "--model",
    metavar="MODEL",
    shell_complete=complete_model,
    default="gpt2",
    show_default=True,
    help="shakespeare, gpt2, a Hub id, or a file or folder of any format (see gptx convert "
    "--list).",
)
@click.option(
    "--dtype",
    metavar="NAME",
    shell_complete=complete_names(*DTYPES),
    help="Type of the tensors in DIR: float32, or float16 for half of the download. The browser "
    "computes in float32.  [default: as in MODEL, or float32]",
)
@click.option(
    "--ort",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help=f"Folder of the npm package {PACKAGE} {VERSION}.  [default: npm fetches it]",
)
@click.option("--overwrite", is_flag=True, help="Replace DIR if it is a site of this command.")
@config_option
@tokenizer_option
@ignore_unknown_option
@revision_option
@offline_option
def page(model: str, folder: Path, **options: Any) -> None:
    """Write a static site that runs a model in the browser.

    The site is the page of gptx serve, without a server: GPT-2 runs in WebAssembly, by
    onnxruntime-web. Any web server can serve DIR, such as `python -m http.server`. The browser uses
    threads if the server sends the headers of DIR/_headers.

    \b
    Example:
      gptx page -m shakespeare site
      python -m http.server --directory site
    """
    with progress_bar() as progress:
        checkpoint = make_site(model, folder, progress=progress, **options)
    for note in checkpoint.notes:
        click.echo(f"Note: {note}", err=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    click.echo(f"{folder}: {format_size(size)}; serve it over HTTP and open it", err=True)
