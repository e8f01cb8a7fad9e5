"""Tuples of arguments that several kernels take.

Numba passes the fields of a tuple as separate arguments. Read an array field before a loop, not in
it: each read updates a reference count, which costs a GEMV a tenth of its speed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from gptx.backends.cpu.interface.instructions import (
    FORMAT,
    GROUP_SIZE,
    GROUPS,
    INT8,
    LAST_ONLY,
    N_IN,
    N_OUT,
    OFFSET_BITS,
    WEIGHT,
)
from gptx.backends.cpu.interface.sizes import PANEL_OUTPUTS
from gptx.backends.cpu.kernels.compilation import inlined, word_array


class Run(NamedTuple):
    """The arguments of a run of a program, which `mailbox.read_run` makes.

    Attributes
    ----------
    program
        The instructions, int64 [n, N_COLUMNS].
    buffers
        Addresses of the activations.
    tokens, positions
        Token ids and positions, int64 [rows].
    first_rows
        Row of the first new token of each sequence, and the number of rows, int64 [B + 1].
    slots
        Slot of each sequence in the cache, int64 [B].
    keys, values
        Addresses of each layer's cache [slots, H, capacity, D].
    prepared
        Workspace for the rows that LINEAR prepares for a product, float32.
    workspace
        Workspace of each thread, float32 [threads, ...].
    rows, B, H, D, capacity
        New tokens of all sequences, sequences, heads, head width, positions of the cache.
    amx
        True if the process may use AMX (see `amx/tile_unit.py`).
    threads
        Number of shares of each stage.
    """

    program: Any
    buffers: Any
    tokens: Any
    positions: Any
    first_rows: Any
    slots: Any
    keys: Any
    values: Any
    prepared: Any
    workspace: Any
    rows: int
    B: int
    H: int
    D: int
    capacity: int
    amx: bool
    threads: int


class LinearTask(NamedTuple):
    """One thread's share of a stage of LINEAR.

    Attributes
    ----------
    op
        The instruction, int64 [N_COLUMNS].
    x, y, residual
        Buffers of the source, the target and the residual, float32.
    rows
        Number of rows of y; see `source_row`.
    first_rows, prepared, workspace
        See `Run`.
    thread, threads
        Number of this thread, and of all threads of the stage.
    """

    op: Any
    x: Any
    y: Any
    residual: Any
    rows: int
    first_rows: Any
    prepared: Any
    workspace: Any
    thread: int
    threads: int


@inlined
def source_row(task: LinearTask, row: int) -> int:
    """Return the row of x from which a row of y is computed: with LAST_ONLY, that of a sequence."""
    return task.first_rows[row + 1] - 1 if task.op[LAST_ONLY] else row


class AttentionTask(NamedTuple):
    """One thread's share of a stage of ATTENTION.

    Attributes
    ----------
    x, x_width
        Queries, keys and values of the new tokens, float32, and the length of a row.
    y, y_width
        The result, float32, and the length of a row.
    positions
        Position of each row, int64 [rows].
    first_rows, slots
        See `Run`.
    keys, values
        The layer's cache [slots, H, capacity, D], flat: float32, or float16 as uint16.
    rows, B, H, D, capacity
        See `Run`.
    scale
        Factor of the scores, float32.
    workspace
        Workspace of the thread, float32.
    """

    x: Any
    x_width: int
    y: Any
    y_width: int
    positions: Any
    first_rows: Any
    slots: Any
    keys: Any
    values: Any
    rows: int
    B: int
    H: int
    D: int
    capacity: int
    scale: Any
    workspace: Any


class Matrix(NamedTuple):
    """A matrix in a flat array: its first element and its strides, in elements."""

    array: Any
    start: int
    row_stride: int
    column_stride: int


class QuantizedMatrix(NamedTuple):
    """A packed quantized matrix [O, I] (see `gptx.backends.cpu.quantized`).

    Attributes
    ----------
    words
        Quantized values, uint32, flat [O / 16, I * bits / 32, 16].
    groups, offset_bits
        Scales and offsets, uint32, and their encoding (see `group_scales.py`).
    n_in, group_size, bits
        Inputs, inputs to a group, bits to a value.
    """

    words: Any
    groups: Any
    offset_bits: int
    n_in: int
    group_size: int
    bits: int


@inlined
def quantized_matrix(op: Any) -> QuantizedMatrix:
    """Return the quantized matrix of an instruction."""
    n_in, size = op[N_IN], op[N_IN] * (op[N_OUT] + PANEL_OUTPUTS)
    words, groups = word_array(op[WEIGHT], size), word_array(op[GROUPS], size)
    bits = 8 if op[FORMAT] == INT8 else 4
    return QuantizedMatrix(words, groups, op[OFFSET_BITS], n_in, op[GROUP_SIZE], bits)
