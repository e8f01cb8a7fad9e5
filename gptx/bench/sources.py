"""The measured models: those that `gptx.load` takes, and random weights of a known size."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptx.config import SIZES, GPT2Config
from gptx.errors import ParameterError, StorageError, argument
from gptx.generation.found_model import find_model
from gptx.random_weights import random_tensors

RANDOM = "random:"


@dataclass(frozen=True)
class Source:
    """A model: its name in the table, the path that `gptx.load` takes, and its config."""

    name: str
    path: Path
    config: GPT2Config


@contextmanager
def open_sources(names: Sequence[str], *, offline: bool = False) -> Iterator[dict[str, Source]]:
    """Find models by name; models on the Hub are downloaded before any measurement.

    A name is anything that `gptx.load` takes, or "random:124M" (or another of the four sizes):
    speed depends on the shape, not on what was learned. `write_source` writes random weights to a
    folder that is deleted when the context ends.
    """
    with tempfile.TemporaryDirectory(prefix="gptx-bench-") as scratch:
        yield {name: find_source(name, Path(scratch), offline=offline) for name in names}


def find_source(name: str, scratch: Path, *, offline: bool = False) -> Source:
    """Find one model; the folder of random weights is in `scratch`."""
    if not name.startswith(RANDOM):
        found = find_model(name, offline=offline)
        return Source(name, found.fetch(), found.info.config)
    size = name.removeprefix(RANDOM)
    if size not in SIZES:
        sizes = ", ".join(RANDOM + known for known in SIZES)
        raise ParameterError(f"{argument('model')} is {name!r}, expected one of {sizes}")
    return Source(name, scratch / f"random-{size}", GPT2Config.of_size(size))


def write_source(source: Source) -> None:
    """Write the weights of a random model, unless its folder exists or the model is not random.

    They go to a file, in float32 as GPT-2's own, so that loading them is a user's loading.
    """
    if not source.name.startswith(RANDOM) or source.path.exists():
        return
    needed = 4 * source.config.n_parameters
    free = shutil.disk_usage(source.path.parent).free
    if free < 1.05 * needed:
        raise StorageError(
            f"{source.path.parent} has {free / 1e9:.1f} GB left, the weights of {source.name} "
            f"take {needed / 1e9:.1f} GB: set TMPDIR to a folder on another disk"
        )
    write_random_model(source.path, source.config)


def write_random_model(folder: Path, config: GPT2Config) -> Path:
    """Write a folder as on the Hub with `random_weights`, and return it.

    The folder gets its name when it is complete: what a killed process leaves is not taken for it.
    """
    from gptx.conversions.formats.hugging_face import write_folder

    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    write_folder(part, config, random_tensors(config))
    return part.rename(folder)


def random_ids(config: GPT2Config, batch: int, length: int, seed: int = 0) -> list[list[int]]:
    """Draw prompts: token ids [B, T] of the whole vocabulary."""
    random = np.random.default_rng(seed)
    ids: list[list[int]] = random.integers(0, config.vocab_size, (batch, length)).tolist()
    return ids
