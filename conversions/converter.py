"""`convert`: write a model of any format in another one, tensor by tensor, atomically."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptx.config import GPT2Config
from gptx.conversions.checkpoint import Array, Checkpoint, StoredTensor
from gptx.conversions.reading import read
from gptx.conversions.registry import FORMATS, Format
from gptx.errors import ParameterError, StorageError, argument
from gptx.files import atomic_path, check_replaceable
from gptx.quantization import GROUP_SIZE, Quantization, QuantizedTensor

Progress = Callable[[str, int, int], None]


def convert(
    source: str | Path,
    destination: str | Path,
    to: str | None = None,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    group_size: int = GROUP_SIZE,
    config: str | Path | GPT2Config | None = None,
    tokenizer: str | Path | None = None,
    ignore_unknown: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Checkpoint:
    """Write a model of any format in another one.

    Parameters
    ----------
    source, config, tokenizer, ignore_unknown, revision, offline
        See `gptx.conversions.reading.read`.
    destination
        The file or folder to write. It is written atomically: after a failure it is unchanged.
    to
        A name in `FORMATS`. None: the format of the suffix of `destination`; without a suffix a
        folder of safetensors, or of MLX if `quantize` is given.
    dtype
        "float32", "float16" or "bfloat16", if the format supports it. None: the type of the source
        if the format supports it, else float32.
    quantize
        "int8" or "int4", if the format supports it.
    group_size
        Number of weights that share a scale, for MLX only.
    overwrite
        Replace `destination` if it exists.
    progress
        Function that is called before each tensor is read, with the tensor's name, the number of
        parameters read so far, and their total.
    **options
        Further options of one format, see `Format.options`.

    Returns
    -------
    Checkpoint
        The source; its notes also say what the format cannot represent.

    Raises
    ------
    ParameterError
        The format does not support an option, or `destination` exists.
    ConfigError, WeightsError, TokenizerError
        The source is damaged, or the format cannot represent the model.
    NotFoundError, StorageError
        A file is missing, or cannot be read or written.
    """
    destination = Path(os.path.expanduser(destination))
    name = _target_format(to, destination, quantize)
    row = FORMATS[name]
    _check_options(name, row, dtype, quantize, options)
    quantization = Quantization.named(quantize, group_size)
    _check_destination(destination, row, overwrite)
    _, checkpoint = read(
        source,
        config=config,
        tokenizer=tokenizer,
        ignore_unknown=ignore_unknown,
        revision=revision,
        offline=offline,
    )
    model = checkpoint
    if name != "mlx":  # other formats quantize in their own way
        model = model.as_floats()
    elif quantization == checkpoint.config.quantization:
        quantization = None
    elif quantization is not None and checkpoint.config.quantization is not None:
        raise ParameterError(
            f"the weights are already {checkpoint.config.quantization}, expected floats to make "
            f"{quantization} of: leave out {argument('quantize')}, or convert the model's float "
            "weights"
        )
    if progress is not None:
        model = with_progress(model, progress)
    writer_options: dict[str, Any] = dict(options)
    if len(row.dtypes) > 1:
        writer_options["dtype"] = dtype
    if row.quantize:
        writer_options["quantization"] = quantization
    with atomic_path(destination) as path:
        if row.suffix == "/":
            path.mkdir()
        notes = row.load_module().write(model, path, **writer_options) or ()
    return replace(checkpoint, notes=(*checkpoint.notes, *notes))


def _target_format(to: str | None, destination: Path, quantize: str | None) -> str:
    writers = {name: row for name, row in FORMATS.items() if row.writes}
    if to is not None:
        if to not in writers:
            raise ParameterError(
                f"{argument('to')} is {to!r}, expected one of {', '.join(writers)}"
            )
        return to
    if destination.is_dir() or not destination.suffix or destination.suffix[1:].isdigit():
        return "mlx" if quantize else "safetensors"
    for name, row in writers.items():
        if row.by_suffix and row.suffix == destination.suffix:
            return name
    raise ParameterError(
        f"{destination} has an unknown suffix: select the format by {argument('to')}, one of "
        f"{', '.join(writers)}"
    )


def _check_options(
    name: str, row: Format, dtype: str | None, quantize: str | None, options: dict[str, Any]
) -> None:
    for option, value, supported in (
        ("dtype", dtype, row.dtypes),
        ("quantize", quantize, row.quantize),
    ):
        if value is not None and value not in supported:
            raise ParameterError(
                f"{argument(option)} is {value!r}, but the format {name} supports "
                f"{', '.join(supported) or 'none'}"
            )
    if unknown := [option for option in options if option not in row.options]:
        raise ParameterError(
            f"the format {name} has no option {argument(unknown[0])}: leave it out"
        )


def _check_destination(destination: Path, row: Format, overwrite: bool) -> None:
    """Raise an error if writing the destination would lose other files, or is not possible."""
    check_replaceable(destination)
    if not destination.absolute().parent.is_dir():
        raise StorageError(f"{destination} cannot be written (its folder does not exist)")
    if destination.is_dir():
        if row.suffix != "/":
            raise ParameterError(f"{destination} is a folder, expected the name of a file")
        entries = sorted(destination.iterdir())
        for entry in entries:
            if entry.is_dir() or not any(entry.match(pattern) for pattern in row.files):
                raise ParameterError(
                    f"folder {destination} contains {entry.name}, which is not of this format and "
                    "would be lost: give another folder"
                )
        if not entries:
            return
    elif not destination.exists():
        return
    elif row.suffix == "/":
        raise ParameterError(f"{destination} is a file, expected the name of a folder")
    if not overwrite:
        raise ParameterError(
            f"{destination} already exists: give another name, or {argument('overwrite', True)}"
        )


def with_progress(checkpoint: Checkpoint, progress: Progress) -> Checkpoint:
    """Return the same model; reading a tensor of it calls `progress` first, see `convert`."""
    total = checkpoint.config.n_parameters
    done = 0

    def reporting(name: str, tensor: StoredTensor) -> StoredTensor:
        def read() -> Array | QuantizedTensor:
            nonlocal done
            progress(name, done, total)
            done += math.prod(tensor.shape)
            return tensor.read()

        return replace(tensor, read=read)

    stored = {name: reporting(name, tensor) for name, tensor in checkpoint.stored.items()}
    return replace(checkpoint, stored=stored)
