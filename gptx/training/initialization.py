"""The first weights of a model that is trained from scratch, the same on every backend."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from gptx.config import GPT2Config

STD = 0.02  # of all matrices, as in OpenAI's own code
STREAM = 2  # second half of the key; the order of the data and the masks of dropout have others


def initial_weights(config: GPT2Config, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and tensor of each weight, float32, one at a time.

    Matrices are normal with a standard deviation of 0.02; those that add to the residual stream
    have 0.02 / sqrt(2L) (Radford et al. 2019, section 2.3). Biases are 0, weights of norms are 1.
    Each tensor has its own counter, so it does not depend on the others.
    """
    for number, (name, shape) in enumerate(config.tensor_shapes().items()):
        if len(shape) < 2:
            yield name, np.full(shape, float(name.endswith("weight")), np.float32)
            continue
        std = STD / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else STD
        philox = np.random.Philox(key=[seed, STREAM], counter=[0, 0, 0, number])
        tensor = np.random.Generator(philox).standard_normal(shape, np.float32)
        tensor *= np.float32(std)
        yield name, tensor
