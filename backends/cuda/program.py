"""What the CuPy backend launches for each instruction of `fusion.py`, and the memory that it needs.

The residual stream is float32; what else passes from kernel to kernel is of the backend's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from gptx.backends.cuda import attention as cupy_attention
from gptx.backends.cuda.compiler import ROW, Kinds, kernel
from gptx.backends.cuda.linear import Launch, few_rows, products, tiles
from gptx.backends.cuda.quantized import QuantizedWeight
from gptx.backends.fusion import ACTIVATIONS, FusedOp
from gptx.backends.graph import UnsupportedOp

Array = Any
FEW = 8  # rows whose products read the matrix once, and do little else
MANY = 256  # rows above which cuBLAS gains more than a kernel that also does what follows
MULTIPLE = 8  # of which every width has to be one: 16 bytes of the shortest type


class Program:
    """What a forward pass launches, in order.

    Attributes
    ----------
    ops
        One operation for each instruction; each is called with the memory that it works in.
    kinds
        What its kernels are compiled for.
    row_bytes
        Of a row of each buffer of the tape, at most; the last one holds the logits.
    widest
        Numbers to a row of the widest input of a product.
    work
        What the matrix unit multiplies in a layer, on average, for a row.
    head
        The last product, which makes the logits.

    Raises
    ------
    gptx.backends.graph.UnsupportedOp
        The kernels do not cover it.
    """

    def __init__(self, instructions: list[FusedOp], model: Any) -> None:
        config = model.config
        self.kinds: Kinds = model.backend.kinds._replace(head=config.head_dim)
        self.n_head, self.n_layer = config.n_head, config.n_layer
        self.n_positions = config.n_positions
        self.row_bytes = [0] * (1 + max(i.target for i in instructions))
        self.ops: list[Embed | Attention | Linear] = []
        is_stream: dict[int | None, bool] = {}  # what a buffer holds at this point
        n_out = 0
        for i in instructions:
            op: Embed | Attention | Linear
            if is_stream.get(i.source, False) != (i.norm is not None):
                raise UnsupportedOp(
                    "a product of the residual stream without a norm, or the reverse"
                )
            if i.kind == "embed":
                op = Embed(Matrix.of(i.weight, self.kinds), i.table, i.target)
                n_out = op.table.n_in
            elif i.kind == "attention":
                op = Attention(i.source or 0, i.target, i.layer, i.scale)
                n_out = config.n_embd
            else:
                op = Linear.of(i, self.kinds)
                n_out = op.weight.n_out
            is_stream[i.target] = i.kind == "embed" or i.residual is not None
            self.row_bytes[i.target] = max(self.row_bytes[i.target], 4 * n_out)
            self.ops.append(op)
        *inner, self.head = (op for op in self.ops if isinstance(op, Linear))
        self.widest = max(op.weight.n_in for op in (*inner, self.head))
        self.work = sum(op.weight.work for op in inner) // self.n_layer
        self.vocab_size = n_out

    def launch(self, memory: Memory) -> None:
        """Launch all of it on the current stream."""
        for op in self.ops:
            op(memory)


class Memory:
    """What a forward pass of B sequences with T new tokens works in, besides weights and cache.

    Attributes
    ----------
    ids
        Tokens, int64 [B, T]; if T is 1, they lie where `ids_address` says.
    index
        Positions of the tokens, int64 [B, T]; if T is 1, the pass itself goes on from those of the
        tokens before.
    caches
        Addresses of the keys of each layer, of the values, and the cache's room, int64 [2L + 1].
    ids_address
        The address of the tokens if T is 1, int64 [1].
    in_graph
        Whether this is launched as a graph, in which cuBLAS may not be.
    normed, last
        Room for rows after their layer norm [B·T, widest], and for a row of each sequence [B, C].
    partial, arrived
        What `attend_step` needs (see `cupy_attention.py`).
    early
        Whether kernels may begin before the one ahead has ended.
    logits
        What the last operation writes, float32 [B, V] or [B·T, V].
    nbytes
        Of all but what is small.
    """

    def __init__(self, program: Program, B: int, T: int, *, in_graph: bool) -> None:
        self.program, self.B, self.T, self.in_graph = program, B, T, in_graph
        self.early = False
        self.ids, self.index = (cupy.zeros((B, T), cupy.int64) for _ in range(2))
        table = cupy.zeros(2 * program.n_layer + 2, cupy.int64)
        self._table, self.caches, self.ids_address = table, table[:-1], table[-1:]
        self.multiprocessors = int(cupy.cuda.Device().attributes["MultiProcessorCount"])
        self.normed = cupy.empty((B * T, program.widest), program.kinds.real)
        self.last = cupy.empty((B, program.head.weight.n_in), cupy.float32)
        head, (*widths, logits_bytes) = program.head, program.row_bytes
        n_last = B if head.last else B * T
        self._buffers = [cupy.empty(B * T * n, cupy.uint8) for n in widths]
        self._buffers.append(cupy.empty(n_last * logits_bytes, cupy.uint8))
        self.logits = self.view(head.target, n_last, program.vocab_size, cupy.float32)
        self._addresses: list[int] = []
        self._positions: list[int] = []  # in `index`, if T is 1
        self.splits = cupy_attention.splits(
            B, program.n_head, program.n_positions, self.multiprocessors
        )
        self.partial, self.arrived = cupy_attention.scratch(
            B, program.n_head, self.splits, program.kinds.head
        )
        self.nbytes = sum(x.nbytes for x in (self.normed, self.last, self.partial, *self._buffers))

    def fill(self, ids: Array, positions: np.ndarray, cache: Any) -> None:
        """Set tokens and positions [B, n], of which the last is repeated up to T; and the addresses
        of a cache. What is as the pass before has left it is not sent again.

        If T is 1, the tokens stay where they are; they are kept alive until the next call.
        """
        addresses = [x.data.ptr for x in (*cache.keys, *cache.values)]
        addresses.append(cache.keys[0].shape[2])
        if self.T == 1:
            self._kept = cupy.ascontiguousarray(ids, cupy.int64)
            addresses.append(self._kept.data.ptr)
            before = (positions[:, 0] - 1).tolist()
            if before != self._positions:
                self.index.set(np.array(before).reshape(self.B, 1))
            self._positions = [position + 1 for position in before]
        else:
            n = ids.shape[1]
            self.ids[:, :n] = ids
            self.ids[:, n:] = ids[:, -1:]
            repeated = np.repeat(positions[:, -1:], self.T - n, axis=1)
            self.index.set(np.concatenate([positions, repeated], axis=1))
            addresses.append(0)
        if addresses != self._addresses:
            self._addresses = addresses
            self._table.set(np.array(addresses, np.int64))

    def launch(
        self,
        file: str,
        name: str,
        kinds: Kinds,
        grid: Sequence[int],
        block: Sequence[int],
        *args: Any,
        shared_bytes: int = 0,
    ) -> None:
        """Launch a kernel (see `cupy_kernels.py`), as early as this memory allows."""
        launch = kernel(file, name, kinds)
        launch(grid, block, *args, shared_bytes=shared_bytes, early=self.early)

    def view(self, buffer: int, n_rows: int, n: int, dtype: Any) -> Array:
        """The first rows of a buffer [n_rows, n]."""
        return cupy.ndarray((n_rows, n), dtype, memptr=self._buffers[buffer].data)


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight [O, I] as kernels take it: numbers, each output's together, or codes."""

    rows: Array | QuantizedWeight
    kinds: Kinds

    @classmethod
    def of(cls, weight: Any, kinds: Kinds, *, is_table: bool = True) -> Matrix:
        """From what `CupyBackend.matrix`, `asarray` (a table) or `quantized` made."""
        if isinstance(weight, QuantizedWeight):
            kinds = kinds._replace(bits=weight.kinds.bits, group=weight.kinds.group)
        else:
            weight = cupy.ascontiguousarray(weight if is_table else weight.T)
        if weight.shape[1] % MULTIPLE:
            raise UnsupportedOp(f"{weight.shape[1]} inputs")
        return cls(weight, kinds)

    @property
    def n_out(self) -> int:
        """O."""
        return int(self.rows.shape[0])

    @property
    def n_in(self) -> int:
        """I."""
        return int(self.rows.shape[1])

    @property
    def work(self) -> int:
        """What the matrix unit multiplies for a row."""
        itemsize = np.dtype(self.kinds.real).itemsize
        return self.n_in * self.n_out * products(itemsize, self.kinds.bits)

    @property
    def parts(self) -> tuple[Array | None, ...]:
        """Weight, scales and offsets, as kernels take them."""
        if isinstance(self.rows, QuantizedWeight):
            return self.rows.weight, self.rows.scales, self.rows.offsets
        return self.rows, None, None

    def floats(self) -> Array:
        """Numbers [O, I]."""
        return self.rows.floats() if isinstance(self.rows, QuantizedWeight) else self.rows


@dataclass(frozen=True, eq=False)
class Embed:
    """Token's row + position's row -> stream."""

    table: Matrix
    positions: Array
    target: int

    def __call__(self, memory: Memory) -> None:
        n_rows, n = memory.B * memory.T, self.table.n_in
        out = memory.view(self.target, n_rows, n, cupy.float32)
        name, ids = ("embed_next", memory.ids_address) if memory.T == 1 else ("embed", memory.ids)
        arguments = (ids, memory.index, *self.table.parts, self.positions, out, np.int32(n))
        memory.launch("rows.cu", name, self.table.kinds, (n_rows,), ROW, *arguments)


@dataclass(frozen=True, eq=False)
class Attention:
    """Keys and values into the cache, then attention over all of it."""

    source: int
    target: int
    layer: int
    scale: float

    def __call__(self, memory: Memory) -> None:
        program = memory.program
        kinds, n_rows = program.kinds, memory.B * memory.T
        n = program.n_head * kinds.head
        qkv = memory.view(self.source, n_rows, 3 * n, kinds.real)
        out = memory.view(self.target, n_rows, n, kinds.real)
        cupy_attention.launch(self, memory, qkv, out)


@dataclass(frozen=True, eq=False)
class Linear:
    """Layer norm, product, bias, activation, residual: what the instruction has of them."""

    source: int
    target: int
    weight: Matrix
    bias: Array | None
    norm: tuple[Array, Array, float] | None
    activation: int
    residual: int | None
    is_head: bool
    last: bool

    @classmethod
    def of(cls, i: FusedOp, kinds: Kinds) -> Linear:
        """From an instruction of the tape."""
        activation = 0 if i.activation is None else 1 + ACTIVATIONS.index(i.activation)
        weight = Matrix.of(i.weight, kinds, is_table=i.is_head)
        source = i.source or 0
        return cls(
            source, i.target, weight, i.bias, i.norm, activation, i.residual, i.is_head, i.last
        )

    def __call__(self, memory: Memory) -> None:
        w, real = self.weight, self.weight.kinds.real
        n_rows = memory.B * memory.T
        x = memory.view(self.source, n_rows, w.n_in, cupy.float32 if self.norm else real)
        if self.last:
            n_rows, x = memory.B, self._last(x, memory)
        wide = self.is_head or self.residual is not None
        out = memory.view(self.target, n_rows, w.n_out, cupy.float32 if wide else real)
        residual = None
        if self.residual is not None:
            residual = memory.view(self.residual, n_rows, w.n_out, cupy.float32)
        shape = n_rows, w.n_in, w.n_out, memory.multiprocessors
        size = np.dtype(real).itemsize
        if n_rows <= FEW:
            normed = self.norm is not None
            launch = few_rows(*shape, itemsize=size, bits=w.kinds.bits, normed=normed)
            inputs: tuple[Any, ...] = (x,)
            if self.norm:
                weight, bias, epsilon = self.norm
                inputs = x, weight, bias, np.float32(epsilon)
            self._multiply("gemv.cu", launch, inputs, residual, out, memory)
            return
        if self.norm:
            x = self._normalized(x, memory)
        if n_rows <= MANY or self.is_head or memory.in_graph:
            launch = tiles(*shape, itemsize=size, bits=w.kinds.bits, group=w.kinds.group)
            self._multiply("gemm.cu", launch, (x,), residual, out, memory)
        else:
            y = x @ w.floats().T
            flags = np.int32(self.activation), np.int32(wide)
            arguments = y, self.bias, residual, out, np.int32(w.n_out), *flags
            memory.launch("rows.cu", "finish", w.kinds, (n_rows,), ROW, *arguments)

    def _multiply(
        self,
        file: str,
        launch: Launch,
        inputs: tuple[Any, ...],
        residual: Array | None,
        out: Array,
        memory: Memory,
    ) -> None:
        w, wide = self.weight, out.dtype == cupy.float32
        numbers = len(out), w.n_in, w.n_out, self.activation, wide
        arguments = *inputs, *w.parts, self.bias, residual, out, *map(np.int32, numbers)
        grid, block, shared_bytes = launch.grid, launch.block, launch.shared_bytes
        memory.launch(
            file, launch.name, w.kinds, grid, block, *arguments, shared_bytes=shared_bytes
        )

    def _last(self, x: Array, memory: Memory) -> Array:
        """The last row of each sequence."""
        if memory.B == 1:
            return x[-1:]
        shape, kinds = (np.int32(memory.T), np.int32(self.weight.n_in)), self.weight.kinds
        memory.launch("rows.cu", "take_last", kinds, (memory.B,), ROW, x, memory.last, *shape)
        return memory.last

    def _normalized(self, x: Array, memory: Memory) -> Array:
        assert self.norm is not None
        weight, bias, epsilon = self.norm
        kinds = self.weight.kinds
        out = cupy.ndarray(x.shape, kinds.real, memptr=memory.normed.data)
        arguments = x, weight, bias, np.float32(epsilon), out, np.int32(x.shape[1])
        memory.launch("rows.cu", "normalize", kinds, (len(x),), ROW, *arguments)
        return out
