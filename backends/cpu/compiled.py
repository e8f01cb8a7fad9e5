"""The NumPy backend's forward pass as one compiled call: what `fusion.py` recorded, as a program for
`numpy_kernels.run`, and the arrays that it runs on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np

from gptx.backends.cpu.kernels import instructions as columns
from gptx.backends.cpu.kernels import interpreter as kernels
from gptx.backends.cpu.kernels.amx import attention as amx_attend
from gptx.backends.cpu.kernels.amx import linear as amx_linear
from gptx.backends.cpu.kernels.amx import quantized_linear as amx_codes
from gptx.backends.cpu.kernels.amx import tile_unit as amx
from gptx.backends.cpu.kernels.cpu_features import HALF
from gptx.backends.cpu.kernels.gemm import BLOCK, TILE
from gptx.backends.cpu.kernels.group_scales import as_words, of_lanes
from gptx.backends.cpu.kernels.linear import DEPTH, FEW
from gptx.backends.cpu.kernels.simd import LANES
from gptx.backends.cpu.memory import PIECE, Pool, aligned
from gptx.backends.fusion import ACTIVATIONS, FusedOp, trace_fused
from gptx.backends.graph import UnsupportedOp
from gptx.backends.positions import Positions
from gptx.quantization import QuantizedTensor

Array = np.ndarray

# One at a time: the kernels use every thread there is, and some of Numba's threading layers end
# the process if they are entered twice.
LOCK = threading.Lock()

NOTHING = np.zeros(0, np.int64)
FORMATS = {4: columns.INT4, 8: columns.INT8}


class QuantizedWeight:
    """A quantized matrix [O, I] as the kernels read it: tiles of 16 outputs, input by input.

    Attributes
    ----------
    shape
        (O, I).
    weight
        uint32 [O / 16, I * bits / 32, 16]: codes of four or eight inputs of an output to a word.
    scales
        uint32 [O / 16, I / group, n]: scales and offsets of 16 outputs; a weight is
        scale * code + offset.
    steps
        Bits of a word of those that count an offset's scales; 0 if they are floats (see
        `numpy_groups.py`).
    """

    def __init__(self, q: QuantizedTensor, pool: Pool | None = None) -> None:
        pool = pool or Pool()
        self.shape = q.shape
        self.bits = q.bits
        self.format = FORMATS[q.bits]
        self.group = q.group_size
        self.weight = _tiled(pool, q.weight)
        words = as_words(q.scales, q.offsets, q.bits)
        self.steps = 0 if words is None else q.bits
        numbers = (q.scales, q.offsets) if words is None else (words,)
        self.scales = _tiled(pool, *(x.view(np.uint32) for x in numbers))

    def product(self, x: Array, bias: Array | None, threads: int | None) -> Array:
        """x [..., I] times the matrix, plus a bias [O], if any: [..., O]."""
        rows = x.reshape(-1, x.shape[-1])
        n_rows, n_in = rows.shape
        if n_rows == 0:
            return np.empty((*x.shape[:-1], self.shape[0]), np.float32)
        instruction = FusedOp("linear", source=0, target=1, weight=self, bias=bias)
        program = Program([instruction], inputs=[n_in])
        padded, y = (
            aligned((_round(n_rows, amx.ROWS), width), np.float32) for width in program.widths
        )
        padded[:n_rows, :n_in] = rows
        program.run({0: padded, 1: y}, (1, n_rows, 0, 0, 0), threads)
        return y[:n_rows, : self.shape[0]].reshape(*x.shape[:-1], -1)

    def rows(self, ids: Array) -> Array:
        """Rows of the matrix for `ids` [...], as floats [..., I]."""
        tile, lane = np.divmod(ids.reshape(-1), LANES)
        codes = self.weight[tile, :, lane]
        shifts = np.arange(0, 32, self.bits, dtype=np.uint32)
        codes = codes[..., None] >> shifts & np.uint32(2**self.bits - 1)
        codes = codes.reshape(len(tile), -1, self.group).astype(np.float32)
        scales, offsets = of_lanes(self.scales[tile], lane, self.steps)
        rows = scales[..., None] * codes + offsets[..., None]
        return rows.reshape(*ids.shape, -1)


def _tiled(pool: Pool, *parts: Array) -> Array:
    """Parts [O, N] -> [O / 16, N, 16 to a part], with zeros past the last output, up to 64."""
    n_out, n = parts[0].shape
    tiles = pool.array((_round(n_out, TILE) // LANES, n, len(parts) * LANES), parts[0].dtype)
    for i, x in enumerate(parts):
        if n_out % TILE:
            x = np.concatenate([x, np.zeros((-n_out % TILE, n), x.dtype)])
        tiles[..., i * LANES : (i + 1) * LANES] = x.reshape(-1, LANES, n).swapaxes(1, 2)
    return tiles


class CompiledForward:
    """The forward pass of one model, compiled; called as `gptx.model.forward` without the model.

    Raises
    ------
    gptx.backends.graph.UnsupportedOp
        The model does something that the kernels do not.
    """

    def __init__(self, forward: Callable[..., Array], model: Any, threads: int | None) -> None:
        if model.backend.cache_dtype == "float16" and not HALF:
            raise UnsupportedOp("this processor does not convert float16")
        self.threads = threads
        self.programs = [Program(trace_fused(forward, model, last_only=x)) for x in (False, True)]

    def __call__(
        self, ids: Array, positions: Positions, cache: Any, *, last_only: bool = False
    ) -> Array:
        """Logits [B, T, V] or [B, 1, V], as `gptx.model.forward` returns them."""
        B, T = ids.shape
        H, room, D = cache.keys[0].shape[1:]
        last_only = last_only and T > 1  # else there is but one
        program = self.programs[last_only]
        n_logits = B if last_only else B * T
        logits = aligned((_round(n_logits, amx.ROWS), program.widths[-1]), np.float32)
        # The caller keeps the logits, which are the last buffer.
        given = {len(program.widths) - 1: logits}
        program.run(given, (B, T, H, D, room), self.threads, ids, positions.index, cache)
        V = int(program.table[-1, columns.N_OUT])
        return logits[:n_logits, :V].reshape(B, -1, V)


class Program:
    """A table of instructions for `kernels.run`.

    Attributes
    ----------
    table
        The instructions, int64 [n, FIELDS]; see `numpy_program.py`.
    widths
        How many numbers a row has in each buffer, at most.
    """

    def __init__(self, instructions: list[FusedOp], inputs: Sequence[int] = ()) -> None:
        self._kept: list[Array] = []  # what the addresses in the table point to
        self._n_out = dict(enumerate(inputs))  # numbers to a row that a buffer holds now
        self.widths = [_round(n, TILE) for n in inputs]
        self.widths += [0] * (1 + max(i.target for i in instructions) - len(inputs))
        self.table = np.zeros((len(instructions), columns.FIELDS), np.int64)
        self._room_for: Any = None
        self._room: list[Array] = []
        for op, instruction in zip(self.table, instructions, strict=True):
            self._encode(op, instruction)

    def run(
        self,
        given: dict[int, Array],
        shape: tuple[int, int, int, int, int],
        threads: int | None,
        ids: Array = NOTHING,
        index: Array = NOTHING,
        cache: Any = None,
    ) -> None:
        """Run on `given` buffers, made for whole tiles of rows, and on others of its own.

        `shape` is (B, T, H, D, room in the cache).
        """
        most = numba.config.NUMBA_NUM_THREADS
        threads = min(threads or most, most)
        keys, values = ([], []) if cache is None else (cache.keys, cache.values)
        with LOCK:
            *buffers, normed, work = self._own(shape, threads, given)
            for number, buffer in given.items():
                buffers[number] = buffer
            numba.set_num_threads(threads)
            kernels.run(
                self.table,
                _addresses(buffers),
                np.ascontiguousarray(ids, np.int64).reshape(-1),
                np.ascontiguousarray(index, np.int64).reshape(-1),
                _addresses(keys),
                _addresses(values),
                shape,
                normed,
                work,
                amx.allowed(),
                cache is not None and cache.keys[0].dtype == np.float16,
                threads,
            )

    def _own(
        self, shape: tuple[int, int, int, int, int], threads: int, given: dict[int, Array]
    ) -> list[Array]:
        """Buffers but for those given, and room to work in; for the next call, too, if small."""
        if self._room_for == (shape, threads):
            return self._room
        B, T, _, D, room = shape
        rows = _round(B * T, amx.ROWS)
        arrays = [
            aligned((0 if n in given else rows, width), np.float32)
            for n, width in enumerate(self.widths)
        ]
        # All rows; or for each thread the only one and, behind it, what `prepare_one` adds: with
        # groups of at least 32, no more than another row.
        n_in = int(self.table[:, columns.N_IN].max())
        normed = max(rows, 2 * threads) * n_in
        size = max(self._parts(B * T) + DEPTH * TILE, BLOCK * (2 * D + room) + 2 * LANES)
        if B * T > 1 and amx.allowed():
            normed = max(normed, amx_linear.size_of_rows(rows, n_in))
            heads = amx_attend.room_for(D, room)
            size = max(size, amx_linear.ROOM, amx_codes.ROOM, heads)
        arrays.append(aligned((normed,), np.float32))
        arrays.append(aligned((threads, _round(size, LANES)), np.float32))
        if sum(x.nbytes for x in arrays) <= PIECE:
            self._room_for, self._room = (shape, threads), arrays
        return arrays

    def _parts(self, rows: int) -> int:
        """Numbers that a thread makes of its share of a float matrix's inputs, for few rows."""
        matrices = self.table[:, columns.FORMAT] == columns.MATRIX
        width = int(self.table[matrices, columns.TARGET_WIDTH].max(initial=0))
        return _round(min(rows, FEW), BLOCK) * width

    def _encode(self, op: Any, instruction: FusedOp) -> None:
        op[columns.KIND] = ("embed", "linear", "attention").index(instruction.kind)
        op[columns.SOURCE] = instruction.source or 0
        op[columns.TARGET] = instruction.target
        op[columns.RESIDUAL] = -1 if instruction.residual is None else instruction.residual
        op[columns.LAST] = instruction.last
        op[columns.LAYER] = instruction.layer
        op.view(np.float64)[columns.SCALE] = instruction.scale
        n_source = self._n_out.get(instruction.source or 0, 0)
        if instruction.kind == "attention":
            n_out = n_source // 3
        else:
            n_out = self._encode_weight(op, instruction)
        if instruction.norm is not None:
            weight, bias, epsilon = instruction.norm
            op.view(np.float64)[columns.EPSILON] = epsilon
            op[columns.NORM_WEIGHT], op[columns.NORM_BIAS] = (
                self._address(weight),
                self._address(bias),
            )
        if instruction.bias is not None:
            bias = np.zeros(_round(n_out, TILE), np.float32)
            bias[:n_out] = instruction.bias
            op[columns.BIAS] = self._address(bias)
        if instruction.table is not None:
            op[columns.POSITIONS] = self._address(instruction.table)
        if instruction.activation is not None:
            op[columns.ACTIVATION] = 1 + ACTIVATIONS.index(instruction.activation)
        op[columns.WORK] = n_source * n_out
        self._n_out[instruction.target] = n_out
        width = _round(n_out, TILE)
        op[columns.SOURCE_WIDTH], op[columns.TARGET_WIDTH] = _round(n_source, TILE), width
        self.widths[instruction.target] = max(self.widths[instruction.target], width)

    def _encode_weight(self, op: Any, instruction: FusedOp) -> int:
        weight = instruction.weight
        if isinstance(weight, QuantizedWeight):
            op[columns.FORMAT], op[columns.GROUP] = weight.format, weight.group
            op[columns.N_OUT], op[columns.N_IN] = weight.shape
            op[columns.SCALES] = self._address(weight.scales)
            op[columns.STEPS] = weight.steps
            op[columns.WEIGHT] = self._address(weight.weight)
        else:
            is_table = instruction.is_head or instruction.kind == "embed"
            op[columns.FORMAT] = columns.TABLE if is_table else columns.MATRIX
            op[columns.N_IN], op[columns.N_OUT] = weight.shape[::-1] if is_table else weight.shape
            op[columns.WEIGHT] = self._address(weight)
        return int(op[columns.N_IN] if instruction.kind == "embed" else op[columns.N_OUT])

    def _address(self, x: Array) -> int:
        self._kept.append(np.ascontiguousarray(x, None if x.dtype.kind == "u" else np.float32))
        return self._kept[-1].ctypes.data


def _addresses(arrays: Sequence[Array]) -> Array:
    return np.array([x.__array_interface__["data"][0] for x in arrays], np.int64)


def _round(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
