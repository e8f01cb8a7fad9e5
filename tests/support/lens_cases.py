"""Models and token ids of the golden activations, one model for each switch of the config.

Imports NumPy and `gptx.config` only, as `random_models` does: the environment of the reference
(`golden/make_lens.py`) makes the same models.
"""

from __future__ import annotations

import numpy as np

from gptx.config import GPT2Config
from tests.support import gradient_cases
from tests.support.random_models import CASES as RANDOM_CASES
from tests.support.random_models import random_ids

CASES: dict[str, GPT2Config] = {
    name: config for name, config in gradient_cases.CASES.items() if name != "dropout"
} | {"124M": RANDOM_CASES["124M"]}

N_TOKENS = 5
LAYER, HEAD, TOKEN = 0, 1, 2  # of the ablated head and the patched residual stream


def lens_ids(config: GPT2Config) -> np.ndarray:
    """Draw the token ids of a case, [1, N_TOKENS]."""
    return random_ids(config, 1, N_TOKENS, seed=11)
