"""How the kernels of `cuda/attention_decode.cu` and `cuda/attention_prefill.cu` are launched.

Shapes: B sequences, T new tokens, S positions in the cache, H heads, D head width, C = H·D.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gptx.backends.cuda.program import Attention, Memory

Array = Any

STEP_BLOCK = (256,)  # threads of a block of `attend_step`
MOST_SPLITS = 32  # one lane for each when they are put together
SHARE = 64  # positions that are worth a block of their own, as in the kernel
TILE = 64  # queries, and positions, that such a block has at a time
WRITE_BLOCK = (256,)


def splits(B: int, H: int, S: int, multiprocessors: int) -> int:
    """Among how many blocks `attend_step` shares out the positions of a head.

    Each multiprocessor gets a block; and while there are fewer than two for each, a head has two,
    so that they need not wait for the few that have one more. Short contexts use fewer than this.
    """
    pairs = B * H
    wanted = -(-multiprocessors // pairs)
    if pairs < 2 * multiprocessors:
        wanted = max(wanted, 2)
    return min(wanted, MOST_SPLITS, -(-S // SHARE))


def scratch(B: int, H: int, n_splits: int, D: int) -> tuple[Array, Array]:
    """`partial`, float32 [B, H, n_splits, D + 2], and `arrived`, uint32 [B, H], of `attend_step`.

    Launches that follow each other on one stream may share them.
    """
    import cupy

    partial = cupy.empty((B, H, n_splits, D + 2), cupy.float32)
    return partial, cupy.zeros((B, H), cupy.uint32)


def prompt_block(D: int, dtype: str, cache_dtype: str) -> tuple[int, int]:
    """Threads of a block of `attend_prompt`, and its bytes of dynamic shared memory."""
    if dtype == cache_dtype != "float32":  # the matrix unit: two tiles of keys, two of values
        groups = 2 if D <= 128 else 1
        return 128 * groups, 4 * groups * TILE * (-(-D // 16) * 16 + 8) * 2
    return 128, TILE * (2 * (D + 4) + TILE + 4) * 4  # queries, keys or values, weights


def launch(op: Attention, memory: Memory, qkv: Array, out: Array) -> None:
    """Put the keys and values of qkv [B·T, 3C] into the cache, and attend: out [B·T, C]."""
    program, B, T = memory.program, memory.B, memory.T
    kinds, H = program.kinds, program.n_head
    cache = memory.caches, np.int32(op.layer), np.int32(program.n_layer), memory.index
    scale, shape = np.float32(op.scale), (np.int32(T), np.int32(H))
    if T == 1:
        step = (qkv, *cache, scale, memory.partial, memory.arrived, out, np.int32(H))
        grid = (memory.splits, H, B)
        memory.launch("attention_decode.cu", "attend_step", kinds, grid, STEP_BLOCK, *step)
        return
    write = (qkv, *cache, *shape)
    memory.launch("attention_prefill.cu", "write_cache", kinds, (B * T,), WRITE_BLOCK, *write)
    threads, shared_bytes = prompt_block(kinds.head, kinds.dtype, kinds.cache_dtype)
    memory.launch(
        "attention_prefill.cu",
        "attend_prompt",
        kinds,
        (H, -(-T // TILE), B),
        (threads,),
        *(qkv, *cache, scale, out, *shape),
        shared_bytes=shared_bytes,
    )
