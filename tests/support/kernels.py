"""Quantized tensors as the NumPy backend's kernels encode them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gptx.backends.cpu.kernels.group_scales import decode_lanes, encode_words
from gptx.quantization import QuantizedTensor


def with_encoded_scales(q: QuantizedTensor) -> QuantizedTensor:
    """Return q with the rounded scales of the kernels, to exclude that rounding from errors."""
    words = encode_words(q.scales, q.offsets, q.bits)
    assert words is not None
    scales, offsets = decode_lanes(words[..., None], np.zeros(len(words), int), q.bits)
    return replace(q, scales=scales, offsets=offsets)


def with_float16_scales(q: QuantizedTensor) -> QuantizedTensor:
    """Return q with scales and offsets rounded to float16, which the kernels keep as floats."""
    scales, offsets = (x.astype(np.float16).astype(np.float32) for x in (q.scales, q.offsets))
    assert encode_words(scales, offsets, q.bits) is None
    return replace(q, scales=scales, offsets=offsets)
