"""Models as files of every format, for the tests of all formats."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptx.config import GPT2Config
from gptx.conversions import FORMATS, convert, read
from gptx.conversions.checkpoint import Checkpoint, StoredTensor
from gptx.conversions.formats import mlx_lm
from gptx.embedded import EMBEDDED
from gptx.quantization import Quantization, QuantizedTensor
from gptx.random_weights import random_weights
from gptx.safetensors_file import widen_bfloat16
from tests.support.random_models import CASES, write_model

WRITTEN = [name for name, row in FORMATS.items() if row.writes]
BOTH_WAYS = [name for name in WRITTEN if FORMATS[name].reads]


def save(folder: Path, config: GPT2Config, weights: Mapping[str, Any]) -> None:
    """Write weights in memory, quantized or not, as an MLX folder."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {}
    for name, shape in config.tensor_shapes().items():
        tensor = weights[name]
        quantization = None
        if isinstance(tensor, QuantizedTensor):
            quantization = Quantization(tensor.group_size, tensor.bits)
        stored[name] = StoredTensor(shape, np.dtype(np.float32), lambda t=tensor: t, quantization)
    mlx_lm.write(Checkpoint(config, stored), folder)


def source_of(model: str, tmp_path: Path) -> Path:
    """Write a folder with a float32 model: the embedded one, or one of CASES."""
    folder = tmp_path / f"source-{model}"
    if model == "shakespeare":
        convert(EMBEDDED[model], folder, "safetensors", dtype="float32")
        return folder
    return write_model(folder, CASES[model], random_weights(CASES[model]))


def file_name(format: str) -> str:
    """Return a name for an output of this format."""
    suffix = FORMATS[format].suffix
    return "converted" if suffix == "/" else f"converted{suffix}"


def to_format(format: str, source: Path, tmp_path: Path, **options: Any) -> Path:
    """Convert a folder; return the path of the output."""
    destination = tmp_path / file_name(format)
    convert(source, destination, format, **options)
    return destination


def opened(path: Path, source: Path) -> Checkpoint:
    """Open an output with the config of its source, which some formats lack."""
    return read(path, config=source / "config.json")[1]


def numbers(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Return all tensors, with bfloat16 as float32."""
    found = {}
    for name, tensor in checkpoint.tensors.items():
        assert not isinstance(tensor, QuantizedTensor)
        found[name] = widen_bfloat16(tensor)
    return found


def read_all(path: Path, **options: Any) -> Callable[[], None]:
    """Return a function that reads every number of a model."""

    def use() -> None:
        for tensor in read(path, **options)[1].tensors.values():
            assert tensor is not None

    return use


def contents(path: Path) -> dict[str, bytes]:
    """Read every file of an output: name -> bytes."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


class Failing:
    """A replacement of `gptx.files.create` that calls `fail` at the n-th write."""

    def __init__(self, create: Any, at: int, fail: Callable[[], None]) -> None:
        self.create, self.left, self.fail = create, at, fail

    def __call__(self, path: Any) -> Any:
        file = self.create(path)
        return _File(file, self)

    def count(self) -> None:
        """Count one write."""
        if self.left == 0:
            self.fail()
        self.left -= 1


class _File:
    def __init__(self, file: Any, counter: Failing) -> None:
        self.file, self.counter = file, counter

    def write(self, data: Any) -> Any:
        self.counter.count()
        return self.file.write(data)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def in_a_child(use: Callable[[], None]) -> int:
    """Run `use` in a forked process; return its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            use()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def with_header(header: bytes, data: bytes) -> bytes:
    """Assemble a safetensors file."""
    return struct.pack("<Q", len(header)) + header + data
