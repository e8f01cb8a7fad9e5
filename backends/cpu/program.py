"""A program for `kernels.interpreter`: its instruction table, its buffers and its workspace."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from gptx.backends.cpu import machine_code
from gptx.backends.cpu.interface import instructions as columns
from gptx.backends.cpu.interface import run_words, sizes
from gptx.backends.cpu.interface.cpu_features import amx_is_allowed
from gptx.backends.cpu.interface.run_words import MAX_THREADS, is_serial
from gptx.backends.cpu.interface.sizes import LANES, PANEL_OUTPUTS
from gptx.backends.cpu.interface.variant import variant_name
from gptx.backends.cpu.memory import allocate_aligned
from gptx.backends.cpu.thread_pool import POOL
from gptx.backends.fusion import ACTIVATIONS, FusedOp
from gptx.errors import BackendError
from gptx.process import count_cores

Array = np.ndarray

MAX_KEPT_BYTES = 2**26  # of buffers and workspace that a program keeps for the next call

_NO_INDICES = np.zeros(0, np.int64)
_INTEGER_WORDS = (
    run_words.TOKENS,
    run_words.POSITIONS,
    run_words.FIRST_ROWS,
    run_words.CACHE_SLOTS,
)


class PackedWeight(Protocol):
    """A quantized matrix [O, I] in the kernels' layout (see `quantized.py`)."""

    shape: tuple[int, int]
    bits: int
    group_size: int
    words: Array
    groups: Array
    offset_bits: int


class Shape(NamedTuple):
    """The sizes of one run.

    Attributes
    ----------
    rows, B
        New tokens of all sequences, and sequences.
    H, D, capacity
        Heads, head width and positions of the cache; 0 without a cache.
    """

    rows: int
    B: int = 1
    H: int = 0
    D: int = 0
    capacity: int = 0


class _Memory(NamedTuple):
    """The memory of a run.

    Attributes
    ----------
    shape, threads
        The run; one with fewer rows has room in it, too.
    words
        The words of the run for the mailbox (see `kernels/mailbox.py`).
    addresses
        Address of each buffer, int64.
    arrays
        The arrays that `words` and `addresses` refer to.
    """

    shape: Shape
    threads: int
    words: Array
    addresses: Array
    arrays: list[Array]

    def has_room(self, shape: Shape, threads: int) -> bool:
        """Test for enough memory for another run."""
        same = self.threads == threads and self.shape[2:] == shape[2:]
        return same and shape.rows <= self.shape.rows


class _CacheAddresses:
    """The addresses of the newest KV cache: asking its arrays again takes 30 µs in each step.

    Weak references do not keep the memory of a cache that is dropped.
    """

    def __init__(self) -> None:
        self._arrays: list[weakref.ref[Array]] = []
        self._addresses = _addresses([])

    def find(self, cache: Any) -> Array:
        """Return the addresses of all keys and then of all values, int64 [2 L]."""
        arrays = [*cache.keys, *cache.values]
        known = self._arrays
        if len(known) != len(arrays) or any(
            a() is not b for a, b in zip(known, arrays, strict=True)
        ):
            self._arrays = [weakref.ref(x) for x in arrays]
            self._addresses = _addresses(arrays)
        return self._addresses


class Program:
    """An instruction table and the arrays that it refers to.

    Attributes
    ----------
    table
        The instructions, int64 [n, N_COLUMNS]; see `interface/instructions.py`.
    widths
        Greatest number of floats to a row of each buffer.
    """

    def __init__(self, ops: list[FusedOp], inputs: Sequence[int] = ()) -> None:
        """Encode fused operations; `inputs` are the widths of the buffers that the caller fills."""
        self._referenced: list[Array] = []  # the table holds their addresses
        self._n_out = dict(enumerate(inputs))  # current numbers to a row of each buffer
        self.widths = [round_up(n, PANEL_OUTPUTS) for n in inputs]
        self.widths += [0] * (1 + max(op.target for op in ops) - len(inputs))
        self.table = np.zeros((len(ops), columns.N_COLUMNS), np.int64)
        self._most_threads = min(default_threads(), MAX_THREADS)
        self._kept: _Memory | None = None
        self._cache = _CacheAddresses()
        self._code: dict[bool, machine_code.Code] = {}  # for a float16 cache or not
        for row, op in zip(self.table, ops, strict=True):
            self._encode(row, op)
        work = self.table[:, columns.WORK]
        self._work, self._most_work = int(work.sum()), int(work.max())

    def run(
        self,
        buffers: dict[int, Array],
        shape: Shape,
        threads: int | None,
        ids: Array = _NO_INDICES,
        positions: Array = _NO_INDICES,
        cache: Any = None,
        slots: Array | None = None,
        first_rows: Array | None = None,
    ) -> None:
        """Run the program.

        Parameters
        ----------
        buffers
            The caller's buffers by number, float32, with rows padded to `padded_rows`. The program
            allocates the others.
        threads
            Number of threads; None for all.
        ids, positions
            Token ids and positions of the rows.
        cache
            The KV cache, for ATTENTION.
        slots
            Slot of each sequence in the cache, [B]; None if sequence b has slot b.
        first_rows
            Row of the first new token of each sequence, and the number of rows, [B + 1]; None if
            all sequences have the same number of new tokens.
        """
        threads = min(threads or self._most_threads, self._most_threads)
        code = self._load_code(cache)
        with POOL.lock:
            memory = self._allocate(shape, threads, buffers)
            words = memory.words
            words[run_words.ROWS], words[run_words.B] = shape.rows, shape.B
            words[run_words.WORK] = shape.rows * self._work
            is_alone = is_serial(shape.rows * self._most_work, threads)
            words[run_words.WORKERS] = 0 if is_alone else threads - 1
            for n, x in buffers.items():
                memory.addresses[n] = _address(x)
            if first_rows is None:
                first_rows = _equal_shares(shape.rows, shape.B)
            if slots is None:
                slots = _equal_shares(shape.B, shape.B)
            integers = [
                np.ascontiguousarray(x, np.int64) for x in (ids, positions, first_rows, slots)
            ]
            for word, x in zip(_INTEGER_WORDS, integers, strict=True):
                words[word] = _address(x)
            if cache is not None:
                n_layers, addresses = len(cache.keys), self._cache.find(cache)
                words[run_words.KEYS] = addresses.ctypes.data
                words[run_words.VALUES] = addresses.ctypes.data + n_layers * addresses.itemsize
                words[run_words.N_LAYERS] = n_layers
            POOL.run(words, code)

    def _load_code(self, cache: Any) -> machine_code.Code:
        """Return the machine code for the formats of the matrices and the cache."""
        float16 = cache is not None and cache.keys[0].dtype == np.float16
        if float16 not in self._code:
            has_matrix = self.table[:, columns.INSTRUCTION] != columns.ATTENTION
            formats = set(self.table[has_matrix, columns.FORMAT].tolist())
            self._code[float16] = machine_code.load(variant_name(formats, float16))
        return self._code[float16]

    def _allocate(self, shape: Shape, threads: int, given: dict[int, Array]) -> _Memory:
        """Return the memory of a run; small memory is kept for the next runs with few rows."""
        if self._kept is not None and self._kept.has_room(shape, threads):
            return self._kept
        rows = padded_rows(shape.rows)
        prepared_size, workspace_size = self._workspace_sizes(shape, threads)
        *buffers, prepared, workspace = arrays = [
            *(
                allocate_aligned((0 if n in given else rows, width), np.float32)
                for n, width in enumerate(self.widths)
            ),
            allocate_aligned((prepared_size,), np.float32),
            allocate_aligned((threads, round_up(workspace_size, LANES)), np.float32),
        ]
        addresses = _addresses(buffers)
        words = np.zeros(run_words.N_WORDS, np.int64)
        words[run_words.PROGRAM] = _address(self.table)
        words[run_words.N_INSTRUCTIONS] = len(self.table)
        words[run_words.BUFFERS] = _address(addresses)
        words[run_words.N_BUFFERS] = len(addresses)
        words[run_words.PREPARED] = _address(prepared)
        words[run_words.PREPARED_SIZE] = prepared.size
        words[run_words.WORKSPACE] = _address(workspace)
        words[run_words.WORKSPACE_WIDTH] = workspace.shape[1]
        words[[run_words.H, run_words.D, run_words.CAPACITY]] = shape[2:]
        words[run_words.AMX] = amx_is_allowed()
        words[run_words.THREADS] = threads
        memory = _Memory(shape, threads, words, addresses, arrays)
        if sum(x.nbytes for x in arrays) <= MAX_KEPT_BYTES:
            self._kept = memory
        return memory

    def _workspace_sizes(self, shape: Shape, threads: int) -> tuple[int, int]:
        """Return the floats that prepared rows need, and those that each thread needs."""
        rows = shape.rows
        # A GEMV needs two rows for each thread: the row, and less than another one of sums and
        # digits.
        n_in = int(self.table[:, columns.N_IN].max())
        prepared_size = max(padded_rows(rows), 2 * threads) * sizes.prepared_row_size(n_in)
        matrices = self.table[:, columns.FORMAT] == columns.FLOAT32
        width = int(self.table[matrices, columns.TARGET_WIDTH].max(initial=0))
        workspace_size = max(
            sizes.linear_workspace_size(width),
            sizes.byte_rows_workspace_size(n_in),
            sizes.attention_workspace_size(shape.D, shape.capacity),
        )
        if rows > 1 and amx_is_allowed():
            prepared_size = max(prepared_size, sizes.amx_prepared_size(rows, n_in))
            amx_size = sizes.amx_workspace_size(shape.D, shape.capacity)
            workspace_size = max(workspace_size, amx_size)
        return prepared_size, workspace_size

    def _encode(self, row: Array, op: FusedOp) -> None:
        """Fill a row of the table."""
        row[columns.INSTRUCTION] = ("embed", "linear", "attention").index(op.kind)
        row[columns.SOURCE] = op.source or 0
        row[columns.TARGET] = op.target
        row[columns.RESIDUAL] = -1 if op.residual is None else op.residual
        row[columns.LAST_ONLY] = op.last
        row[columns.LAYER] = op.layer
        row.view(np.float64)[columns.SCALE] = op.scale
        n_source = self._n_out.get(op.source or 0, 0)
        n_out = n_source // 3 if op.kind == "attention" else self._encode_weight(row, op)
        if op.norm is not None:
            weight, bias, epsilon = op.norm
            row[columns.NORM_WEIGHT] = self._address(weight)
            row[columns.NORM_BIAS] = self._address(bias)
            row.view(np.float64)[columns.EPSILON] = epsilon
        if op.bias is not None:
            bias = np.zeros(round_up(n_out, PANEL_OUTPUTS), np.float32)
            bias[:n_out] = op.bias
            row[columns.BIAS] = self._address(bias)
        if op.table is not None:
            row[columns.POSITION_TABLE] = self._address(op.table)
        if op.activation is not None:
            row[columns.ACTIVATION] = 1 + ACTIVATIONS.index(op.activation)
        row[columns.WORK] = n_source * n_out
        self._n_out[op.target] = n_out
        width = round_up(n_out, PANEL_OUTPUTS)
        row[columns.SOURCE_WIDTH] = round_up(n_source, PANEL_OUTPUTS)
        row[columns.TARGET_WIDTH] = width
        self.widths[op.target] = max(self.widths[op.target], width)

    def _encode_weight(self, row: Array, op: FusedOp) -> int:
        """Fill the columns of the matrix; return the outputs of the instruction."""
        is_table = op.is_head or op.kind == "embed"
        if isinstance(op.weight, np.ndarray):
            row[columns.FORMAT] = columns.FLOAT32_TRANSPOSED if is_table else columns.FLOAT32
            n_in, n_out = op.weight.shape[::-1] if is_table else op.weight.shape
            row[columns.WEIGHT] = self._address(op.weight)
        else:
            packed: PackedWeight = op.weight
            row[columns.FORMAT] = columns.INT4 if packed.bits == 4 else columns.INT8
            row[columns.GROUP_SIZE] = packed.group_size
            n_out, n_in = packed.shape
            row[columns.WEIGHT] = self._address(packed.words)
            row[columns.GROUPS] = self._address(packed.groups)
            row[columns.OFFSET_BITS] = packed.offset_bits
        row[columns.N_IN], row[columns.N_OUT] = n_in, n_out
        return int(n_in if op.kind == "embed" else n_out)

    def _address(self, x: Array) -> int:
        x = np.ascontiguousarray(x, None if x.dtype.kind == "u" else np.float32)
        self._referenced.append(x)
        return x.ctypes.data


def padded_rows(rows: int) -> int:
    """Return the rows of a buffer for `rows` rows: whole tiles of AMX, hence whole blocks."""
    return round_up(rows, sizes.TILE_ROWS)


def round_up(n: int, multiple: int) -> int:
    """Return the smallest multiple that is at least n."""
    return -(-n // multiple) * multiple


def default_threads() -> int:
    """Return the number of threads that serve all models: one for each core of the process.

    Raises
    ------
    BackendError
        `NUMBA_NUM_THREADS`, which sets another number, is not one.
    """
    if value := os.environ.get("NUMBA_NUM_THREADS"):
        if not value.isdecimal() or int(value) < 1:
            raise BackendError(f"NUMBA_NUM_THREADS is {value!r}, expected a positive integer")
        return int(value)
    return count_cores()


@lru_cache(maxsize=64)
def _equal_shares(n: int, parts: int) -> Array:
    """Return the beginnings of equal shares of range(n), and its end, [parts + 1]."""
    return np.arange(parts + 1) * (n // parts)


def _addresses(arrays: Sequence[Array]) -> Array:
    return np.array([_address(x) for x in arrays], np.int64)


def _address(x: Array) -> int:
    return int(x.__array_interface__["data"][0])
