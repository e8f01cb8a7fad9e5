"""Quantized weights on the device.

The compiled pass gives their arrays to its kernels. The methods dequantize for the ops that run
without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from gptx.backends.cuda.compiler import ROW_BLOCK, KernelVariant, kernel
from gptx.quantization import QuantizedTensor

Array = Any


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A quantized weight [O, I] on the device, in the layout of `QuantizedTensor`.

    Attributes
    ----------
    weight
        Packed quantized values, uint32 [O, I * bits / 32].
    scales, offsets
        float32 [O, I / group_size]: w = scale * value + offset.
    shape
        (O, I).
    variant
        Variant of the kernels that read it.
    """

    weight: Array
    scales: Array
    offsets: Array
    shape: tuple[int, int]
    variant: KernelVariant

    @classmethod
    def from_host(cls, q: QuantizedTensor, variant: KernelVariant) -> QuantizedWeight:
        """Copy a quantized tensor to the current device."""
        return cls(
            cupy.asarray(q.weight),
            cupy.asarray(q.scales, dtype=cupy.float32),
            cupy.asarray(q.offsets, dtype=cupy.float32),
            q.shape,
            variant._replace(bits=q.bits, group_size=q.group_size),
        )

    def take_rows(self, ids: Array) -> QuantizedWeight:
        """Return the rows `ids`, integers [N] -> [N, I]."""
        weight, scales, offsets = (
            cupy.take(x, ids, axis=0) for x in (self.weight, self.scales, self.offsets)
        )
        return QuantizedWeight(weight, scales, offsets, (ids.size, self.shape[1]), self.variant)

    def dequantize(self) -> Array:
        """Return the weight [O, I] in the backend's dtype."""
        out = cupy.empty(self.shape, self.variant.array_dtype)
        n_rows, n_in = self.shape
        launch = kernel("embedding.cu", "dequantize", self.variant)
        launch((n_rows,), ROW_BLOCK, self.weight, self.scales, self.offsets, out, np.int32(n_in))
        return out
