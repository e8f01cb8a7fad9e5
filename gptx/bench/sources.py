"""The models that are measured: what `gptx.load` finds, and random weights of a known size."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptx.config import SIZES, GPT2Config
from gptx.errors import ParameterError, StorageError
from gptx.hub.resolve import locate

RANDOM = "random:"


@dataclass(frozen=True)
class Source:
    """A model: its name in the table, the folder that it is loaded from, and its shape."""

    name: str
    folder: Path
    config: GPT2Config


@contextmanager
def sources(names: Sequence[str], *, offline: bool = False) -> Iterator[dict[str, Source]]:
    """Find models by name; they are downloaded now, so that no measurement waits for the network.

    A name is anything that `gptx.load` takes, or "random:124M" (or another of the four sizes), for
    speed depends on the shape and not on what was learned. The folders of random weights, which
    `write` fills, are there as long as this context.
    """
    with tempfile.TemporaryDirectory(prefix="gptx-bench-") as scratch:
        yield {name: _find(name, Path(scratch), offline) for name in names}


def _find(name: str, scratch: Path, offline: bool) -> Source:
    if not name.startswith(RANDOM):
        files = locate(name, offline=offline)
        return Source(name, files.folder, GPT2Config.from_file(files.config))
    size = name.removeprefix(RANDOM)
    if size not in SIZES:
        sizes = ", ".join(RANDOM + known for known in SIZES)
        raise ParameterError(f"model is {name!r}, expected one of {sizes}")
    return Source(name, scratch / f"random-{size}", GPT2Config.of_size(size))


def write(source: Source) -> None:
    """Write the weights of a random model, unless they are there or it is not one.

    They go to a file, float32 as GPT-2's own do, so that loading them is what a user's loading is.
    """
    if not source.name.startswith(RANDOM) or source.folder.exists():
        return
    needed = 4 * source.config.n_parameters
    free = shutil.disk_usage(source.folder.parent).free
    if free < 1.05 * needed:
        raise StorageError(
            f"{source.folder.parent} has {free / 1e9:.1f} GB left, the weights of {source.name} "
            f"take {needed / 1e9:.1f} GB: set TMPDIR to a folder on another disk"
        )
    source.folder.mkdir()
    config = json.dumps(source.config.to_dict())
    (source.folder / "config.json").write_text(config, encoding="utf-8")
    shapes = source.config.tensor_shapes()
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors lie at multiples of their size
    with (source.folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in _tensors(shapes):  # one at a time: the largest model has 6 GB
            file.write(tensor.data)


def _tensors(shapes: dict[str, tuple[int, ...]]) -> Iterator[np.ndarray]:
    """Tensors of the size that GPT-2's own have at the start of its training."""
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        if len(shape) == 1:
            yield np.full(shape, float(name.endswith("weight")), np.float32)  # a norm's, or a bias
            continue
        tensor = rng.random(shape, dtype=np.float32)
        tensor -= 0.5
        tensor *= 0.02 * 12**0.5  # a standard deviation of 0.02
        yield tensor
