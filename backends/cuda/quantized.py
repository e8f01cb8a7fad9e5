"""CuPy's quantized matrices, and products with them one by one.

The compiled pass (`cupy_step.py`) hands their parts to its kernels; the methods here are what the
ops do without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from gptx.backends.cuda.compiler import ROW, Kinds, kernel
from gptx.quantization import QuantizedTensor

Array = Any


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A quantized matrix [O, I] on the device, in the layout of `gptx.quantization.QuantizedTensor`.

    Attributes
    ----------
    weight
        QuantizedWeight, uint32 [O, I * bits / 32].
    scales, offsets
        float32 [O, I / group]: w = scale * code + offset.
    shape
        (O, I).
    kinds
        What kernels that read it are compiled for.
    """

    weight: Array
    scales: Array
    offsets: Array
    shape: tuple[int, int]
    kinds: Kinds

    @classmethod
    def of(cls, q: QuantizedTensor, kinds: Kinds) -> QuantizedWeight:
        """Bring a matrix to the current device."""
        return cls(
            cupy.asarray(q.weight),
            cupy.asarray(q.scales, dtype=cupy.float32),
            cupy.asarray(q.offsets, dtype=cupy.float32),
            q.shape,
            kinds._replace(bits=q.bits, group=q.group_size),
        )

    def rows(self, ids: Array) -> QuantizedWeight:
        """Some of the rows, integers [N] -> [N, I]."""
        weight, scales, offsets = (
            cupy.take(x, ids, axis=0) for x in (self.weight, self.scales, self.offsets)
        )
        return QuantizedWeight(weight, scales, offsets, (ids.size, self.shape[1]), self.kinds)

    def floats(self) -> Array:
        """All of it as numbers of the backend's dtype [O, I]."""
        out = cupy.empty(self.shape, self.kinds.real)
        n_rows, n_in = self.shape
        expand = kernel("rows.cu", "expand", self.kinds)
        expand((n_rows,), ROW, self.weight, self.scales, self.offsets, out, np.int32(n_in))
        return out
