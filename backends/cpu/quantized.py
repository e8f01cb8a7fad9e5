"""Quantized matrices in the layout of the kernels."""

from __future__ import annotations

import numpy as np

from gptx.backends.cpu.interface.group_words import decode_lanes, encode_words
from gptx.backends.cpu.interface.sizes import LANES, PANEL_OUTPUTS
from gptx.backends.cpu.memory import Pool, allocate_aligned
from gptx.backends.cpu.program import Program, Shape, padded_rows, round_up
from gptx.backends.cpu.workers import WORKERS
from gptx.backends.fusion import FusedOp
from gptx.process import count_cores
from gptx.quantization import QuantizedTensor

Array = np.ndarray

BLOCK_OUTPUTS = 512  # that a thread packs at a time; whole strips
BLOCK_GROUPS = 2**16  # that are encoded at a time: they stay in the cache of a core


class QuantizedWeight:
    """A quantized matrix [O, I], packed into strips of 16 outputs, input by input.

    O is padded with zeros to whole panels of 64 outputs. A weight is scale * value + offset.

    Attributes
    ----------
    shape
        (O, I).
    bits, group_size
        Bits to a quantized value (4 or 8), inputs to a group.
    words
        Quantized values, uint32 [O / 16, I * bits / 32, 16]: a word holds those of eight or four
        inputs of one output.
    groups
        Scales and offsets, uint32 [O / 16, I / group_size, 16 or 32], see
        `interface/group_words.py`.
    offset_bits
        Bits of a word of `groups` for the offset; 0 if `groups` holds floats.
    """

    def __init__(
        self, q: QuantizedTensor, pool: Pool | None = None, threads: int | None = None
    ) -> None:
        """Pack a matrix on threads (None for one to each core), in memory of a pool."""
        pool = pool or Pool()
        threads = threads or count_cores()
        self.shape = q.shape
        self.bits = q.bits
        self.group_size = q.group_size
        self.words = _pack_strips(pool, threads, q.weight)
        encoded = _encode_groups(q)
        self.offset_bits = 0 if encoded is None else q.bits
        parts = (q.scales, q.offsets) if encoded is None else (encoded,)
        self.groups = _pack_strips(pool, threads, *(x.view(np.uint32) for x in parts))

    def multiply(self, x: Array, bias: Array | None, threads: int | None) -> Array:
        """Return x·Wᵀ + bias, [..., O], for x [..., I] and a bias [O] or None."""
        rows = x.reshape(-1, x.shape[-1])
        n_rows, n_in = rows.shape
        if n_rows == 0:
            return np.empty((*x.shape[:-1], self.shape[0]), np.float32)
        op = FusedOp("linear", source=0, target=1, weight=self, bias=bias)
        program = Program([op], inputs=[n_in])
        source, target = (
            allocate_aligned((padded_rows(n_rows), width), np.float32) for width in program.widths
        )
        source[:n_rows, :n_in] = rows
        program.run({0: source, 1: target}, Shape(n_rows), threads)
        return target[:n_rows, : self.shape[0]].reshape(*x.shape[:-1], -1)

    def take_rows(self, ids: Array) -> Array:
        """Return the rows `ids` [...] of the matrix, dequantized, float32 [..., I]."""
        strip, lane = np.divmod(ids.reshape(-1), LANES)
        words = self.words[strip, :, lane]
        shifts = np.arange(0, 32, self.bits, dtype=np.uint32)
        values = words[..., None] >> shifts & np.uint32(2**self.bits - 1)
        values = values.reshape(len(strip), -1, self.group_size).astype(np.float32)
        scales, offsets = decode_lanes(self.groups[strip], lane, self.offset_bits)
        rows = scales[..., None] * values + offsets[..., None]
        return rows.reshape(*ids.shape, -1)


def _pack_strips(pool: Pool, threads: int, *parts: Array) -> Array:
    """Pack parts [O, N] to [O / 16, N, 16 to a part], O padded with zeros to whole panels."""
    n_out, n = parts[0].shape
    n_strips, whole = round_up(n_out, PANEL_OUTPUTS) // LANES, n_out // LANES
    strips = pool.allocate((n_strips, n, len(parts) * LANES), parts[0].dtype)
    strips[whole:] = 0

    def pack(number: int) -> None:
        block = slice(number * BLOCK_OUTPUTS, (number + 1) * BLOCK_OUTPUTS)
        for i, x in enumerate(parts):
            target = strips[block.start // LANES :, :, i * LANES : (i + 1) * LANES]
            rows = x[block]
            in_strips, rest = np.split(rows, [len(rows) // LANES * LANES])
            target[: len(in_strips) // LANES] = in_strips.reshape(-1, LANES, n).swapaxes(1, 2)
            if len(rest):
                target[len(in_strips) // LANES, :, : len(rest)] = rest.T

    WORKERS.run(pack, -(-n_out // BLOCK_OUTPUTS), threads)
    return strips


def _encode_groups(q: QuantizedTensor) -> Array | None:
    """Return scales and offsets as words [O, G]; None if a word cannot represent one of them.

    One thread computes them: several would wait for the interpreter between the calls of NumPy.
    """
    scales, offsets = q.scales.reshape(-1), q.offsets.reshape(-1)
    words: Array = np.empty(scales.shape, np.uint32)
    for first in range(0, words.size, BLOCK_GROUPS):
        block = slice(first, first + BLOCK_GROUPS)
        encoded = encode_words(scales[block], offsets[block], q.bits)
        if encoded is None:
            return None
        words[block] = encoded
    return words.reshape(q.scales.shape)
