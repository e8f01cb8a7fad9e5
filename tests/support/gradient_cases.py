"""Models and batches of the golden gradients, one for each switch of the config.

Imports NumPy and `gptx.config` only, as `random_models` does: the environment of the reference
(`golden/make_gradients.py`) makes the same models.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from gptx.config import GPT2Config
from tests.support.random_models import random_ids

_BASE = GPT2Config(
    vocab_size=31,
    n_positions=9,
    n_embd=12,
    n_layer=2,
    n_head=3,
    bos_token_id=None,
    eos_token_id=None,
)

CASES: dict[str, GPT2Config] = {
    "gelu_new": _BASE,
    "gelu": replace(_BASE, activation_function="gelu"),
    "relu": replace(_BASE, activation_function="relu"),
    "untied": replace(_BASE, tie_word_embeddings=False),
    "unscaled": replace(_BASE, scale_attn_weights=False),
    "layer-scaled": replace(_BASE, scale_attn_by_inverse_layer_idx=True),
    "n-inner": replace(_BASE, n_inner=20),
    "masked": replace(_BASE, layer_norm_epsilon=1e-2),
    "dropout": _BASE,
}
DROPOUT = {"embd": 0.1, "attn": 0.25, "resid": 0.2, "seed": 7}  # in the case "dropout"
STEP, FIRST_SEQUENCE = 5, 2  # the counters of its random numbers


class Example(NamedTuple):
    """Token ids, the tokens after them, and the weight of each prediction: [B, T] each."""

    ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def example(case: str) -> Example:
    """Draw the batch of a case: three sequences, shorter than the context.

    In the case "masked" some predictions do not count: those of a prompt, and a padded end.
    """
    tokens = random_ids(CASES[case], 3, 8)
    weights = np.ones((3, 7), np.float32)
    if case == "masked":
        weights[0, :3] = 0
        weights[1, 4:] = 0
        weights[2, :] = 0
        weights[2, 5] = 1
    return Example(tokens[:, :-1], tokens[:, 1:], weights)
