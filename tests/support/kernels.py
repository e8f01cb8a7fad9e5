"""What tests of the NumPy backend's kernels share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gptx.backends.cpu.kernels.group_scales import as_words, of_lanes
from gptx.quantization import QuantizedTensor


def as_kept(q: QuantizedTensor) -> QuantizedTensor:
    """With the scales that the kernels keep, so that what is compared is how they compute."""
    words = as_words(q.scales, q.offsets, q.bits)
    assert words is not None
    scales, offsets = of_lanes(words[..., None], np.zeros(len(words), int), q.bits)
    return replace(q, scales=scales, offsets=offsets)


def in_16_bits(q: QuantizedTensor) -> QuantizedTensor:
    """With scales and offsets as files of 16 bits have them, which the kernels keep as floats."""
    scales, offsets = (x.astype(np.float16).astype(np.float32) for x in (q.scales, q.offsets))
    assert as_words(scales, offsets, q.bits) is None
    return replace(q, scales=scales, offsets=offsets)
