"""Select and launch the kernels that multiply: GEMV, a tile of GEMM, or cuBLAS.

The constants repeat those of `kernels/gemv.cu` and `kernels/gemm.cu`, which explain them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import cupy
import numpy as np

from gptx.backends.cuda.compiler import ROW_BLOCK, KernelVariant, kernel
from gptx.backends.cuda.quantized import QuantizedWeight
from gptx.backends.cuda.workspace import Workspace
from gptx.backends.fusion import ACTIVATIONS, FusedOp
from gptx.backends.graph import UnsupportedOp

Array = Any

MAX_GEMV_ROWS = 8  # a GEMV reads the matrix once
MAX_GEMM_ROWS = 256  # above, cuBLAS saves more than a fused epilogue
WIDTH_MULTIPLE = 8  # of every width: 16 bytes of a 16-bit type
MAX_SHARED_BYTES = 158 * 1024  # of a block on every device with bfloat16 tensor cores
WARP = 32

GEMV_ROWS = (1, 2, 4, 8)  # of a block of gemv_R
GEMV_OUTPUTS = 2  # of a team of threads
TEAM_SIZES = (8, 16, *range(WARP, 385, WARP))  # threads

# gemm_MxN, for M outputs and N rows: splits of the inputs, stages and threads of a block.
GEMM_TILES = {
    (16, 16): (4, 4, 128),
    (32, 32): (4, 3, 128),
    (48, 48): (4, 3, 256),
    (64, 64): (2, 3, 256),
    (96, 64): (2, 3, 256),
    (128, 128): (1, 3, 256),
}
SLICE_BYTES = 128  # of a row of activations

# Throughput of a multiprocessor in the cost model of plan_gemm.
MACS_PER_CYCLE = 1024
BYTES_PER_CYCLE = 64


class LaunchPlan(NamedTuple):
    """A kernel and its launch configuration.

    Attributes
    ----------
    name
        Name of the kernel.
    grid, block
        Blocks, and threads of a block, along x and y.
    shared_bytes
        Bytes of dynamic shared memory of a block.
    """

    name: str
    grid: tuple[int, int]
    block: tuple[int, int]
    shared_bytes: int


def plan_gemv(
    n_rows: int,
    n_in: int,
    n_out: int,
    multiprocessors: int,
    *,
    itemsize: int,
    bits: int = 0,
    with_layer_norm: bool = False,
) -> LaunchPlan:
    """Plan `gemv_R` or `layer_norm_gemv_R`, which read the weight once for R rows.

    Parameters
    ----------
    n_rows, n_in, n_out
        Shapes: x [n_rows, n_in], weight [n_out, n_in].
    multiprocessors
        Number of multiprocessors of the device.
    itemsize
        Bytes of an activation.
    bits
        Bits of a quantized value; 0 if weights have the type of activations.
    with_layer_norm
        Fuse the layer norm of x.
    """
    numbers = 128 // (bits or 8 * itemsize)  # of a vector of 16 bytes
    vectors = n_in // numbers  # of a row of the weight

    def shared_bytes(R: int) -> int:
        x = R * _ceil(vectors, 8) * 8 * numbers * (4 if bits else itemsize)
        sums = _ceil(R * vectors, 4) * 16 if bits else 0
        norm = 2 * n_in * itemsize + R * n_in * 4 if with_layer_norm else 0
        return x + sums + norm

    fitting = [R for R in GEMV_ROWS if shared_bytes(R) <= MAX_SHARED_BYTES] or [1]
    R = next((R for R in fitting if n_rows <= R), fitting[-1])
    depth = 4 if not bits else 3 if R == 1 else 2
    threads = 384 if R < 4 else 256
    min_team = max(8, R * GEMV_OUTPUTS)

    # One block for each multiprocessor if it can have all its weights in flight; else two.
    in_flight = multiprocessors * threads * depth * GEMV_OUTPUTS * 16
    blocks = multiprocessors if n_out * vectors * 16 <= in_flight else 2 * multiprocessors
    row_blocks = _ceil(n_rows, R)
    groups = _ceil(n_out, GEMV_OUTPUTS)
    per_block = _ceil(groups, max(1, blocks // row_blocks))
    rounds = _ceil(per_block * min_team, threads)
    teams = _ceil(per_block, rounds)
    # The widest team that fits, but no wider than reduces the number of steps.
    max_team = max(team for team in TEAM_SIZES if team * teams <= threads)
    steps = _ceil(vectors, max_team)
    team = min(team for team in TEAM_SIZES if team >= min_team and team * steps >= vectors)
    teams = _ceil(teams * team, WARP) * WARP // team  # whole warps
    name = f"layer_norm_gemv_{R}" if with_layer_norm else f"gemv_{R}"
    grid = row_blocks, _ceil(groups, teams * rounds)
    return LaunchPlan(name, grid, (team, teams), shared_bytes(R))


def plan_gemm(
    n_rows: int,
    n_in: int,
    n_out: int,
    multiprocessors: int,
    *,
    itemsize: int,
    bits: int = 0,
    group_size: int = 0,
) -> LaunchPlan:
    """Plan `gemm_MxN` with the tile of the lowest estimated time.

    Parameters are those of `plan_gemv`; `group_size` is the number of quantized values in a group.
    """

    def cycles(tile: tuple[int, int]) -> float:
        # For each input: the time to multiply, plus the time to load a tile's operands.
        M, N = tile
        multiply = mma_per_product(itemsize, bits) * M * N / MACS_PER_CYCLE
        load = itemsize * (M + min(N, n_rows)) / BYTES_PER_CYCLE
        waves = _ceil(_ceil(n_rows, N) * _ceil(n_out, M), multiprocessors)
        return waves * (multiply + load)

    M, N = min(GEMM_TILES, key=cycles)
    splits, stages, threads = GEMM_TILES[M, N]
    slice_inputs, x_bits = SLICE_BYTES // itemsize, 8 * itemsize
    operands = splits * slice_inputs * (M * (bits or x_bits) + N * x_bits) // 8
    scales = splits * M * max(1, slice_inputs // group_size) * 8 if bits else 0
    sums = splits * N * (M + 4) * 4
    shared_bytes = max(stages * (operands + scales), sums)
    return LaunchPlan(
        f"gemm_{M}x{N}", (_ceil(n_rows, N), _ceil(n_out, M)), (threads, 1), shared_bytes
    )


def mma_per_product(itemsize: int, bits: int) -> int:
    """Return tensor core products for one product: a float32 is the sum of three bf16 (bf16x3)."""
    return 1 if itemsize == 2 else 3 if bits else 6


@dataclass(frozen=True, eq=False)
class WeightMatrix:
    """A weight [O, I] in the layout of the kernels: each output's inputs are consecutive.

    Attributes
    ----------
    rows
        Array [O, I] in C order, or quantized weight [O, I].
    variant
        Variant of the kernels that read it.
    """

    rows: Array | QuantizedWeight
    variant: KernelVariant

    @classmethod
    def from_packed(
        cls, weight: Any, variant: KernelVariant, *, is_table: bool = True
    ) -> WeightMatrix:
        """Wrap a table [O, I], or the result of `CupyBackend.pack_weight` or `pack_quantized`.

        Raises
        ------
        gptx.backends.graph.UnsupportedOp
            I is no multiple of WIDTH_MULTIPLE.
        """
        if isinstance(weight, QuantizedWeight):
            quantized = weight.variant
            variant = variant._replace(bits=quantized.bits, group_size=quantized.group_size)
        else:
            weight = cupy.ascontiguousarray(weight if is_table else weight.T)
        if weight.shape[1] % WIDTH_MULTIPLE:
            raise UnsupportedOp(f"{weight.shape[1]} inputs")
        return cls(weight, variant)

    @property
    def n_out(self) -> int:
        """O."""
        return int(self.rows.shape[0])

    @property
    def n_in(self) -> int:
        """I."""
        return int(self.rows.shape[1])

    @property
    def macs_per_row(self) -> int:
        """Multiply-accumulate operations of the tensor cores for a row."""
        v = self.variant
        return self.n_in * self.n_out * mma_per_product(v.itemsize, v.bits)

    @property
    def arrays(self) -> tuple[Array | None, ...]:
        """Weight, scales and offsets: arguments of the kernels."""
        if isinstance(self.rows, QuantizedWeight):
            return self.rows.weight, self.rows.scales, self.rows.offsets
        return self.rows, None, None

    def dequantize(self) -> Array:
        """Return the weight [O, I] in the backend's dtype."""
        return self.rows.dequantize() if isinstance(self.rows, QuantizedWeight) else self.rows


@dataclass(frozen=True, eq=False)
class LinearOp:
    """Fused layer norm, product, bias, activation and residual.

    Attributes
    ----------
    source, target, residual
        Numbers of buffers; residual is None if nothing is added.
    weight
        Weight [O, I].
    bias
        Bias [O] or None.
    norm
        Weight, bias and epsilon of the layer norm, or None.
    activation
        0 for none, or 1 + its index in ACTIVATIONS.
    is_head
        True if the result is the logits.
    last
        True if only the last row of each sequence is computed.
    multiprocessors
        Number of multiprocessors of the device.
    """

    source: int
    target: int
    residual: int | None
    weight: WeightMatrix
    bias: Array | None
    norm: tuple[Array, Array, float] | None
    activation: int
    is_head: bool
    last: bool
    multiprocessors: int

    @classmethod
    def from_fused(cls, op: FusedOp, variant: KernelVariant, multiprocessors: int) -> LinearOp:
        """Convert a fused op of kind "linear"."""
        return cls(
            source=op.source or 0,
            target=op.target,
            residual=op.residual,
            weight=WeightMatrix.from_packed(op.weight, variant, is_table=op.is_head),
            bias=op.bias,
            norm=op.norm,
            activation=0 if op.activation is None else 1 + ACTIVATIONS.index(op.activation),
            is_head=op.is_head,
            last=op.last,
            multiprocessors=multiprocessors,
        )

    def __call__(self, workspace: Workspace) -> None:
        """Launch the kernels on the current stream."""
        w, dtype = self.weight, self.weight.variant.array_dtype
        n_rows = workspace.B * workspace.T
        x = workspace.view(self.source, n_rows, w.n_in, cupy.float32 if self.norm else dtype)
        if self.last:
            n_rows, x = workspace.B, self._gather_last(x, workspace)
        float32_out = self.is_head or self.residual is not None
        out_dtype = cupy.float32 if float32_out else dtype
        out = workspace.view(self.target, n_rows, w.n_out, out_dtype)
        residual = None
        if self.residual is not None:
            residual = workspace.view(self.residual, n_rows, w.n_out, cupy.float32)
        shape = n_rows, w.n_in, w.n_out, self.multiprocessors
        itemsize, bits = w.variant.itemsize, w.variant.bits
        if n_rows <= MAX_GEMV_ROWS:
            with_layer_norm = self.norm is not None
            plan = plan_gemv(*shape, itemsize=itemsize, bits=bits, with_layer_norm=with_layer_norm)
            inputs: tuple[Any, ...] = (x,)
            if self.norm:
                weight, bias, epsilon = self.norm
                inputs = x, weight, bias, np.float32(epsilon)
            self._multiply("gemv.cu", plan, inputs, residual, out, workspace)
            return
        if self.norm:
            x = self._layer_norm(x, workspace)
        if n_rows <= MAX_GEMM_ROWS or self.is_head or workspace.in_graph:
            group_size = w.variant.group_size
            plan = plan_gemm(*shape, itemsize=itemsize, bits=bits, group_size=group_size)
            self._multiply("gemm.cu", plan, (x,), residual, out, workspace)
        else:
            self._multiply_with_cublas(x, residual, out, workspace)

    def _multiply(
        self,
        file: str,
        plan: LaunchPlan,
        inputs: tuple[Any, ...],
        residual: Array | None,
        out: Array,
        workspace: Workspace,
    ) -> None:
        w = self.weight
        sizes = len(out), w.n_in, w.n_out, self.activation, out.dtype == cupy.float32
        args = (*inputs, *w.arrays, self.bias, residual, out, *map(np.int32, sizes))
        multiply = kernel(file, plan.name, w.variant)
        multiply(
            plan.grid,
            plan.block,
            *args,
            shared_bytes=plan.shared_bytes,
            dependent=workspace.dependent_launch,
        )

    def _multiply_with_cublas(
        self, x: Array, residual: Array | None, out: Array, workspace: Workspace
    ) -> None:
        w = self.weight
        y = x @ w.dequantize().T
        sizes = w.n_out, self.activation, out.dtype == cupy.float32
        args = (y, self.bias, residual, out, *map(np.int32, sizes))
        epilogue = kernel("elementwise.cu", "linear_epilogue", w.variant)
        epilogue((len(x),), ROW_BLOCK, *args, dependent=workspace.dependent_launch)

    def _gather_last(self, x: Array, workspace: Workspace) -> Array:
        """Return the last row of each sequence, [B, I]."""
        if workspace.B == 1:
            return x[-1:]
        gather = kernel("elementwise.cu", "gather_last", self.weight.variant)
        args = (x, workspace.last, np.int32(workspace.T), np.int32(self.weight.n_in))
        gather((workspace.B,), ROW_BLOCK, *args, dependent=workspace.dependent_launch)
        return workspace.last

    def _layer_norm(self, x: Array, workspace: Workspace) -> Array:
        assert self.norm is not None
        weight, bias, epsilon = self.norm
        variant = self.weight.variant
        out = cupy.ndarray(x.shape, variant.array_dtype, memptr=workspace.normalized.data)
        args = (x, weight, bias, np.float32(epsilon), out, np.int32(x.shape[1]))
        normalize = kernel("layer_norm.cu", "layer_norm_stream", variant)
        normalize((len(x),), ROW_BLOCK, *args, dependent=workspace.dependent_launch)
        return out


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
