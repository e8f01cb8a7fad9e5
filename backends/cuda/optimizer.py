"""Launch the kernels of `kernels/training_optimizer.cu`: each covers all tensors of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from gptx.backends.cuda.compiler import ROW_BLOCK, KernelVariant, kernel

Array = Any

CHUNK = 16384  # elements of a block, as in the kernels
SUM_BLOCK = (1024,)  # threads of the block that adds the sums of the others
FILE = "training_optimizer.cu"


class TensorTable:
    """Tensors for one launch, as the kernels read them.

    Parameters
    ----------
    tensors
        For each tensor: weight, gradient, m and v, all in the same order of memory; or only its
        gradient.

    Attributes
    ----------
    blocks
        Number of blocks of the launch.
    arguments
        The table on the device and its number of rows.
    """

    def __init__(self, tensors: Sequence[tuple[Array, ...]]) -> None:
        table = np.zeros((len(tensors), 6), np.int64)
        self.blocks = 0
        for row, arrays in zip(table, tensors, strict=True):
            addresses = [x.data.ptr for x in arrays]
            if len(addresses) == 1:
                addresses = [0, *addresses, 0, 0]
            row[:] = self.blocks, arrays[0].size, *addresses
            self.blocks += -(-arrays[0].size // CHUNK)
        self.arguments = cupy.asarray(table), np.int32(len(tensors))


def adamw(
    weights: Sequence[Array],
    gradients: Sequence[Array],
    m: Sequence[Array],
    v: Sequence[Array],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decays: Sequence[float],
    step: int,
    grad_scale: float,
    variant: KernelVariant,
) -> tuple[list[Array], list[Array], list[Array]]:
    """Update float32 weights, m and v in place; see `gptx.training.optimizers.adamw_update`.

    An array whose memory has another order than its weight's is copied first.
    """
    results: tuple[list[Array], list[Array], list[Array]] = list(weights), [], []
    gradients = [_in_order_of(g, w) for g, w in zip(gradients, weights, strict=True)]
    for total, moments in zip(results[1:], (m, v), strict=True):
        total += [_in_order_of(x, w) for x, w in zip(moments, weights, strict=True)]
    tensors = list(zip(results[0], gradients, *results[1:], strict=True))
    numbers = lr, beta1, 1 - beta1, beta2, 1 - beta2, eps, 1 - beta1**step, 1 - beta2**step
    for is_float32 in (True, False):
        chosen = [i for i, g in enumerate(gradients) if (g.dtype == cupy.float32) is is_float32]
        if not chosen:
            continue
        table = TensorTable([tensors[i] for i in chosen])
        of_tensors = cupy.asarray(np.array([decays[i] for i in chosen], np.float32))
        kernel(FILE, "adamw", variant)(
            (table.blocks,),
            ROW_BLOCK,
            table.arguments[0],
            of_tensors,
            table.arguments[1],
            np.int32(is_float32),
            *map(np.float32, (*numbers, grad_scale)),
        )
    return results


def squared_norm(gradients: Sequence[Array], variant: KernelVariant) -> Array:
    """Return the sum of the squares of all elements, a float32 scalar; its order is fixed."""
    partial = []
    for is_float32 in (True, False):
        chosen = [(_contiguous(g),) for g in gradients if (g.dtype == cupy.float32) is is_float32]
        if not chosen:
            continue
        table = TensorTable(chosen)
        partial.append(cupy.empty(table.blocks, cupy.float32))
        args = *table.arguments, np.int32(is_float32), partial[-1]
        kernel(FILE, "sum_squares", variant)((table.blocks,), ROW_BLOCK, *args)
    sums = cupy.concatenate(partial) if len(partial) > 1 else partial[0]
    out = cupy.empty((), cupy.float32)
    kernel(FILE, "sum_all", variant)((1,), SUM_BLOCK, sums, out, np.int32(sums.size))
    return out


def _in_order_of(x: Array, like: Array) -> Array:
    """Return x, or a copy whose memory has the order of `like`."""
    if x.strides == tuple(n // like.itemsize * x.itemsize for n in like.strides):
        return x
    new = cupy.empty_like(like, dtype=x.dtype)
    new[...] = x
    return new


def _contiguous(x: Array) -> Array:
    return x if x.flags.c_contiguous or x.flags.f_contiguous else cupy.ascontiguousarray(x)
