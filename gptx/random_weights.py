"""Random weights of any GPT-2, bit for bit the same on every platform.

This module imports NumPy and `gptx.config` only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from gptx.config import GPT2Config

LOGIT_STD = 3.0  # approximate standard deviation of the logits; trained GPT-2s have 2 to 5
EMBEDDING_STD = 0.4  # standard deviation of the tables of tokens and positions
CHUNK_DRAWS = 2**15  # float64 numbers drawn at a time: they stay in the cache of a core


def random_weights(config: GPT2Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw every tensor of a model, named as in `config.tensor_shapes()`, in float32.

    The numbers are uniform, not normal: they need bits, a subtraction and a multiplication only.
    No version of NumPy and no platform's math library can change them, so golden logits hold.

    The scales keep activations in a realistic range at any width and depth. The output of a layer
    is scaled by 1/sqrt(2L), as in GPT-2's own initialization, to about the size of the embeddings.
    The last layer norm gives the logits a standard deviation of about `LOGIT_STD`. Half of its
    weights are negative: otherwise the tied head favors the last token, and a greedy continuation
    repeats one token.
    """
    return dict(random_tensors(config, seed))


def random_tensors(config: GPT2Config, seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and tensor of `random_weights` one by one: the largest model has 6 GB."""
    rng = np.random.Generator(np.random.Philox(seed))
    chunk = np.empty(CHUNK_DRAWS)
    for name, shape in config.tensor_shapes().items():
        mean, std = _mean_std(name, shape, config)
        tensor = np.empty(shape, np.float32)
        flat = tensor.reshape(-1)
        means = np.broadcast_to(mean, flat.shape)
        for start in range(0, flat.size, CHUNK_DRAWS):
            stop = min(start + CHUNK_DRAWS, flat.size)
            draw = chunk[: stop - start]
            rng.random(out=draw)
            draw -= 0.5
            draw *= std * math.sqrt(12.0)
            draw += means[start:stop]
            flat[start:stop] = draw
        yield name, tensor


def _mean_std(
    name: str, shape: tuple[int, ...], config: GPT2Config
) -> tuple[float | np.ndarray, float]:
    if name in ("wte.weight", "wpe.weight", "lm_head.weight"):
        return 0.0, EMBEDDING_STD
    if name == "ln_f.weight":
        size = LOGIT_STD / (EMBEDDING_STD * math.sqrt(config.n_embd))
        return np.where(np.arange(config.n_embd) % 2, size, -size), 0.1 * size
    if name.endswith((".ln_1.weight", ".ln_2.weight")):
        return 1.0, 0.1
    if name.endswith(".bias"):
        return 0.0, 0.1
    # With a gain of 1.5 attention selects positions, and rounding errors of float32 do not grow
    # from layer to layer.
    gain = 1 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1.5
    return 0.0, gain / math.sqrt(shape[0])
