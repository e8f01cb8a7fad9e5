"""What tests of the NumPy backend's kernels share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gptx.backends.numpy_groups import as_words, of_lanes
from gptx.quantization import Quantized


def as_kept(q: Quantized) -> Quantized:
    """With the scales that the kernels keep, so that what is compared is how they compute."""
    words = as_words(q.scales, q.biases, q.bits)
    assert words is not None
    scales, biases = of_lanes(words[..., None], np.zeros(len(words), int), q.bits)
    return replace(q, scales=scales, biases=biases)
