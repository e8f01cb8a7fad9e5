"""Weights: safetensors files -> arrays on a backend, checked by key, shape and dtype.

Names are the Hub's without the `transformer.` prefix (`h.0.attn.c_attn.weight`), layouts are the
Hub's Conv1D `[in, out]`, and a tied head is not stored twice.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from gptx.backends import Backend
from gptx.config import GPT2Config
from gptx.errors import WeightsError
from gptx.files import BFLOAT16, read_safetensors, widened

# The causal mask, which some files store as if it were a weight.
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")


def read_weights(paths: Iterable[Path], config: GPT2Config) -> dict[str, np.ndarray]:
    """The tensors that `config` asks for, from one safetensors file or several shards.

    Raises
    ------
    WeightsError
        A file is damaged, or a tensor is missing, unknown, there twice or misshapen.
    """
    found: dict[str, np.ndarray] = {}
    for path in paths:
        for stored, array in read_safetensors(path)[0].items():
            name = stored.removeprefix("transformer.")
            if BUFFERS.fullmatch(name) or (name == "lm_head.weight" and config.tie_word_embeddings):
                continue
            if name in found:
                raise WeightsError(f"{path}: tensor {name} is there twice")
            found[name] = array
    check_weights(found, config)
    return found


def check_weights(found: dict[str, np.ndarray], config: GPT2Config) -> None:
    """Raise WeightsError unless `found` is what `config` asks for, no more and no less."""
    expected = config.tensor_shapes()
    if missing := [name for name in expected if name not in found]:
        raise WeightsError(f"{_names(missing)} missing: the weights do not fit the config")
    if unknown := [name for name in found if name not in expected]:
        raise WeightsError(f"{_names(unknown)} unknown: the weights do not fit the config")
    for name, shape in expected.items():
        array = found[name]
        if array.shape != shape:
            raise WeightsError(
                f"tensor {name} has shape {list(array.shape)}, the config asks for {list(shape)}"
            )
        if array.dtype.kind != "f" and array.dtype != BFLOAT16:
            raise WeightsError(f"tensor {name} is of type {array.dtype}, expected a float type")


def fingerprint(found: dict[str, np.ndarray]) -> str:
    """A checksum that tells models of one shape apart: of biases, norms and a row of each matrix.

    Not of everything, since that would read the whole file.
    """
    crc = 0
    for name in sorted(found):
        sample = found[name] if found[name].ndim == 1 else found[name][0]
        crc = zlib.crc32(widened(sample).astype(np.float32).tobytes(), crc)
    return f"{crc:08x}"


def _names(names: list[str]) -> str:
    if len(names) == 1:
        return f"tensor {names[0]} is"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensors {', '.join(names[:3])}{more} are"


def to_backend(found: dict[str, np.ndarray], backend: Backend) -> SimpleNamespace:
    """Bring the tensors to the backend, as a tree: `h.0.attn.c_attn.weight` becomes
    `tree.h[0].attn.c_attn.weight`."""
    tree: dict[str, Any] = {}
    for name, array in found.items():
        *branches, leaf = name.split(".")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[leaf] = backend.asarray(widened(array))
    blocks = tree.pop("h")
    tree["h"] = [blocks[str(layer)] for layer in range(len(blocks))]
    return _attributes(tree)


def _attributes(node: Any) -> Any:
    if isinstance(node, dict):
        return SimpleNamespace(**{name: _attributes(child) for name, child in node.items()})
    if isinstance(node, list):
        return [_attributes(child) for child in node]
    return node
