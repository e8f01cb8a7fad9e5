"""The models that `gpu.py` runs: random weights of any size, in a second or two, and the embedded
model. Nothing is downloaded."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace

import numpy as np

from gptx.config import GPT2Config
from gptx.hub.resolve import locate
from gptx.quantization import BITS, GROUP_SIZE, Quantization, QuantizedTensor
from gptx.stored_weights import Tensor, read_weights, should_quantize
from gptx.weights import quantize_weights

EMBEDDED = "shakespeare"
POOL = 2**24  # random numbers, of which every tensor takes what it needs, again and again
LOGIT_STD, EMBEDDING_STD = 3.0, 0.4  # as `random_models` of the tests has them


def model(size: str, quantize: str | None = None) -> tuple[GPT2Config, dict[str, Tensor]]:
    """A config and weights on the host: of one of OpenAI's sizes, or the embedded model.

    Parameters
    ----------
    quantize
        "int8" or "int4" for codes in groups of 64, None for floats.
    """
    how = Quantization(GROUP_SIZE, BITS[quantize]) if quantize else None
    if size == EMBEDDED:
        files = locate(EMBEDDED, offline=True)
        config = GPT2Config.from_file(files.config)
        return quantize_weights(read_weights(files.weights, config), config, how)[::-1]
    config = GPT2Config.of_size(size)
    return replace(config, quantization=how), random_weights(config, how)


def random_weights(config: GPT2Config, how: Quantization | None = None) -> dict[str, Tensor]:
    """Random tensors that give lively activations at any depth, and logits as GPT-2's own.

    Drawing a billion numbers would take longer than what they are drawn for: tensors are cut from
    one pool, each from a place of its own.
    """
    random = np.random.default_rng(0)
    pool = random.random(POOL, np.float32) - np.float32(0.5)
    words = random.integers(0, 2**32, POOL if how else 0, np.uint32)
    weights: dict[str, Tensor] = {}
    for name, shape in config.tensor_shapes().items():
        start = zlib.crc32(name.encode()) % (POOL // 2)
        mean, std = _mean_std(name, shape, config)
        if how is None or not should_quantize(name):
            weights[name] = _cut(pool, start, shape) * np.float32(std * math.sqrt(12))
            weights[name] += mean
            continue
        n_out, n_in = shape if name == "wte.weight" else shape[::-1]
        groups = (n_out, n_in // how.group_size)
        scale = np.float32(std * math.sqrt(12) / 2**how.bits)
        weights[name] = QuantizedTensor(
            _cut(words, start, (n_out, n_in * how.bits // 32)),
            np.full(groups, scale),
            np.full(groups, -scale * np.float32((2**how.bits - 1) / 2)),
            how.group_size,
            how.bits,
        )
    return weights


def _cut(pool: np.ndarray, start: int, shape: tuple[int, ...]) -> np.ndarray:
    n = math.prod(shape)
    cut = pool[start : start + n] if start + n <= len(pool) else np.resize(pool, n)
    return cut.reshape(shape)


def _mean_std(name: str, shape: tuple[int, ...], config: GPT2Config) -> tuple[np.ndarray, float]:
    mean = np.zeros((), np.float32)
    if name in ("wte.weight", "wpe.weight"):
        return mean, EMBEDDING_STD
    if name == "ln_f.weight":  # half of them negative: or the head would favor the token just read
        size = LOGIT_STD / (EMBEDDING_STD * math.sqrt(config.n_embd))
        signs = np.where(np.arange(config.n_embd) % 2, 1, -1)
        return (size * signs).astype(np.float32), 0.1 * size
    if len(shape) == 1:
        return mean + np.float32(name.endswith("weight")), 0.1
    gain = 1 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1.5
    return mean, gain / math.sqrt(shape[0])


def read_bytes(config: GPT2Config, itemsize: int) -> int:
    """Bytes of weights that a decode step reads: all of them but the positions.

    Codes come with a scale and an offset in float32 for each group.
    """
    how, n_bytes = config.quantization, 0.0
    for name, shape in config.tensor_shapes().items():
        if name == "wpe.weight":
            continue
        each = how.bits / 8 + 8 / how.group_size if how and should_quantize(name) else itemsize
        n_bytes += each * math.prod(shape)
    return int(n_bytes)


def cache_bytes(config: GPT2Config, itemsize: int) -> int:
    """Bytes of keys and values of one token."""
    return 2 * config.n_layer * config.n_embd * itemsize


def prompt_flops(config: GPT2Config, n: int) -> int:
    """Multiplications and additions to read one prompt of `n` tokens, logits of the last alone."""
    L, C, M = config.n_layer, config.n_embd, config.mlp_dim
    products = 2 * n * L * (4 * C * C + 2 * C * M)
    attention = 2 * 2 * L * C * n * (n + 1) // 2
    return products + attention + 2 * C * config.vocab_size
