"""Small GPT-2 configs, random token ids, and a writer of model folders.

Imports NumPy and `gptx.config` only: the environments of the reference implementations
(`golden/make_golden.py`) make the same models without gptx's other dependencies.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from gptx.config import GPT2Config


def _small(n_head: int, n_embd: int, n_layer: int, vocab_size: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=64,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        bos_token_id=vocab_size - 1,  # the last token, as in GPT-2
        eos_token_id=vocab_size - 1,
    )


_BASE = _small(n_head=4, n_embd=32, n_layer=3, vocab_size=97)

CASES: dict[str, GPT2Config] = {
    # The four sizes, shrunk. The number of heads stays, so no width is a power of two.
    "124M": _small(n_head=12, n_embd=96, n_layer=4, vocab_size=211),
    "355M": _small(n_head=16, n_embd=64, n_layer=5, vocab_size=128),
    "774M": _small(n_head=20, n_embd=80, n_layer=4, vocab_size=157),
    "1558M": _small(n_head=25, n_embd=200, n_layer=3, vocab_size=181),
    # One other setting each.
    "gelu-erf": replace(_BASE, activation_function="gelu"),
    "relu": replace(_BASE, activation_function="relu"),
    "unscaled": replace(_BASE, scale_attn_weights=False),
    "layer-scaled": replace(_BASE, scale_attn_by_inverse_layer_idx=True),
    "n-inner": replace(_BASE, n_inner=72),
    "untied": replace(_BASE, tie_word_embeddings=False),
    "epsilon": replace(_BASE, layer_norm_epsilon=1e-3),
    "tiny": replace(
        _small(n_head=1, n_embd=8, n_layer=1, vocab_size=101), bos_token_id=None, eos_token_id=None
    ),
}


def random_ids(config: GPT2Config, batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Draw token ids [batch, length], int64, each id from the whole vocabulary."""
    raw = np.random.Generator(np.random.Philox(seed)).random((batch, length))
    return (raw * config.vocab_size).astype(np.int64)


def checksum(weights: dict[str, np.ndarray]) -> int:
    """Return the CRC-32 of all tensors in order."""
    crc = 0
    for tensor in weights.values():
        crc = zlib.crc32(tensor.tobytes(), crc)
    return crc


def write_model(
    folder: str | Path,
    config: GPT2Config,
    weights: dict[str, np.ndarray],
    *,
    dtype: str = "float32",
    prefix: str = "",
    shards: int = 1,
) -> Path:
    """Write a model in the form of the Hub: config.json and model.safetensors; return the folder.

    Parameters
    ----------
    folder
        Created if it does not exist.
    dtype
        "float32", "float16" or "bfloat16", in config.json as `torch_dtype`.
    prefix
        Prefix of every name but the head's, "transformer." for example.
    shards
        Number of files that the tensors are split into, in order; over 1 with an index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {**config.to_dict(), "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
    names = {name if name.startswith("lm_head") else prefix + name: name for name in weights}
    if shards == 1:
        _write_safetensors(folder / "model.safetensors", names, weights, dtype)
        return folder
    weight_map: dict[str, str] = {}
    for i, part in enumerate(np.array_split(list(names), shards), start=1):
        file = f"model-{i:05d}-of-{shards:05d}.safetensors"
        chosen = {str(stored): names[str(stored)] for stored in part}
        _write_safetensors(folder / file, chosen, weights, dtype)
        weight_map |= dict.fromkeys(chosen, file)
    size = sum(w.size for w in weights.values()) * _ITEMSIZE[dtype]
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


_STORED_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


def _write_safetensors(
    path: Path, names: dict[str, str], weights: dict[str, np.ndarray], dtype: str
) -> None:
    """Write a safetensors file, tensor by tensor; `names` is stored name -> name in `weights`.

    The safetensors package has no public function that writes bfloat16 from NumPy.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for stored, name in names.items():
        start, end = end, end + weights[name].size * _ITEMSIZE[dtype]
        shape = list(weights[name].shape)
        header[stored] = {
            "dtype": _STORED_TYPES[dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(_as_bytes(weights[name], dtype) for name in names.values())


def _as_bytes(tensor: np.ndarray, dtype: str) -> bytes:
    if dtype == "bfloat16":
        return to_bfloat16(tensor).astype("<u2").tobytes()
    return tensor.astype({"float32": "<f4", "float16": "<f2"}[dtype]).tobytes()


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round finite float32 numbers to bfloat16, ties to even; return the bits as uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
