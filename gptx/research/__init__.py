"""Research on a model: its activations, and what they do to its logits; see README.md.

Every function takes a `gptx.Model` and texts, or lists of token ids. Results are NumPy arrays.

    >>> from gptx import load, research
    >>> model = load("shakespeare")
    >>> research.attention_maps(model, "To be, or not to be").patterns.shape
    (6, 6, 7, 7)
"""

from gptx.research.activations import (
    Activations,
    AttentionMaps,
    activations,
    attention_maps,
    embeddings,
    hidden_states,
)
from gptx.research.attribution import Attribution, attribute
from gptx.research.differentiation import (
    Gradients,
    IntegratedGradients,
    gradients,
    integrated_gradients,
)
from gptx.research.interventions import ablate, steer, steering_vector
from gptx.research.lens import LogitLens, logit_lens
from gptx.research.patching import Patching, logit_difference, patch

__all__ = [
    "Activations",
    "AttentionMaps",
    "Attribution",
    "Gradients",
    "IntegratedGradients",
    "LogitLens",
    "Patching",
    "ablate",
    "activations",
    "attention_maps",
    "attribute",
    "embeddings",
    "gradients",
    "hidden_states",
    "integrated_gradients",
    "logit_difference",
    "logit_lens",
    "patch",
    "steer",
    "steering_vector",
]
