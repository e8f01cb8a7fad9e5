"""Quantization: matrices of 8-bit and 4-bit integers, in MLX's affine layout.

Each row consists of groups of `group_size` weights. A group has one scale and one offset, and each
weight a quantized value q of `bits` bits: w = scale · q + offset. The quantized values are packed
in 32-bit words along the input, lowest bits first. A file calls the offsets `biases`, as MLX does.

Shapes: O outputs (rows), I inputs, G = I / group_size groups a row.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptx.errors import ConfigError, ParameterError, WeightsError, argument

BITS = {"int8": 8, "int4": 4}
GROUP_SIZES = (32, 64, 128)
GROUP_SIZE = 64  # default

BLOCK_WEIGHTS = 2**18  # weights quantized at a time: they stay in the cache of a core
MIN_SCALE = np.float32(1e-7)  # MLX's
MAX_MAGNITUDE = 1e30  # of a weight; divided by MIN_SCALE, it is still a float32


@dataclass(frozen=True)
class Quantization:
    """The quantization that the matrices of a model share.

    Attributes
    ----------
    group_size
        Number of weights that share a scale and an offset: 32, 64 or 128.
    bits
        Number of bits of a quantized value: 4 or 8.

    Raises
    ------
    ParameterError
        A value is not one of these.
    """

    group_size: int
    bits: int

    def __post_init__(self) -> None:
        for name, allowed in (("group_size", GROUP_SIZES), ("bits", tuple(BITS.values()))):
            value = getattr(self, name)
            if not isinstance(value, int) or value not in allowed:
                raise ParameterError(
                    f"{argument(name)} is {value!r}, expected {_alternatives(allowed)}"
                )

    def __str__(self) -> str:
        return f"int{self.bits} in groups of {self.group_size}"

    @classmethod
    def named(cls, quantize: str | None, group_size: int = GROUP_SIZE) -> Quantization | None:
        """Return the quantization that options of `gptx.load` select; None without `quantize`.

        Raises
        ------
        ParameterError
            An option is invalid, or a group size was given without `quantize`.
        """
        if quantize is None:
            if group_size != GROUP_SIZE:
                raise ParameterError(
                    f"{argument('group_size')} is {group_size!r}, but {argument('quantize')} is "
                    f"missing: give {argument('quantize', *BITS)}"
                )
            return None
        if not isinstance(quantize, str) or quantize not in BITS:
            raise ParameterError(
                f"{argument('quantize')} is {quantize!r}, expected {_alternatives(BITS)}"
            )
        return cls(group_size, BITS[quantize])

    @classmethod
    def from_dict(cls, data: Any, name: str = "quantization") -> Quantization:
        """Read the object `name` of a config.json, as MLX's libraries write it.

        Raises
        ------
        ConfigError
            The object is invalid, of another library, or has a setting that is not supported.
        """
        if not isinstance(data, dict):
            raise ConfigError(f'{name} is {data!r}, expected {{"group_size": ..., "bits": ...}}')
        if "quant_method" in data:
            raise ConfigError(
                f"{name} is of the method {data['quant_method']!r}, expected MLX's: "
                f"load the model's float weights with {argument('quantize', 'int4')}"
            )
        if data.get("mode", "affine") != "affine":
            raise ConfigError(f"{name} has the mode {data['mode']!r}, gptx reads 'affine'")
        if more := [key for key in data if key not in ("group_size", "bits", "mode")]:
            raise ConfigError(
                f"{name} has {more[0]!r}, which is not supported: "
                "expected one group_size and bits for all layers"
            )
        try:
            return cls(data.get("group_size"), data.get("bits"))  # type: ignore[arg-type]
        except ParameterError as error:
            raise ConfigError(f"{name} is not supported: {error}") from None


def _alternatives(values: Iterable[Any]) -> str:
    *first, last = map(repr, values)
    return f"{', '.join(first)} or {last}"


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A quantized matrix [O, I].

    Attributes
    ----------
    weight
        Quantized values, packed: uint32 [O, I * bits / 32].
    scales, offsets
        Float32 [O, G].
    group_size, bits
        See `Quantization`.

    Raises
    ------
    WeightsError
        The three arrays do not fit each other.
    ParameterError
        The group size or the number of bits is not supported.
    """

    weight: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray
    group_size: int
    bits: int

    def __post_init__(self) -> None:
        Quantization(self.group_size, self.bits)
        if self.weight.dtype != np.uint32 or self.weight.ndim != 2:
            raise WeightsError(
                f"the quantized values are {self.weight.dtype} {list(self.weight.shape)}, "
                "expected a matrix of uint32"
            )
        n_out, n_in = self.shape
        n_groups = -(-n_in // self.group_size)
        for name in ("scales", "offsets"):
            part = getattr(self, name)
            if part.dtype != np.float32 or part.shape != (n_out, n_groups):
                raise WeightsError(
                    f"the {name} are {part.dtype} {list(part.shape)}, expected float32 "
                    f"{[n_out, n_groups]} for {[n_out, n_in]} in groups of {self.group_size}"
                )
        if n_in % self.group_size:
            raise WeightsError(f"{n_in} inputs do not divide into groups of {self.group_size}")

    def __getitem__(self, rows: slice) -> QuantizedTensor:
        """Return the matrix of some rows."""
        parts = self.weight[rows], self.scales[rows], self.offsets[rows]
        return QuantizedTensor(*parts, self.group_size, self.bits)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.weight.shape[0], self.weight.shape[1] * 32 // self.bits

    @property
    def quantization(self) -> Quantization:
        """Group size and bits."""
        return Quantization(self.group_size, self.bits)

    @property
    def nbytes(self) -> int:
        """Bytes of all three arrays."""
        return self.weight.nbytes + self.scales.nbytes + self.offsets.nbytes


def check_group_size(n_in: int, group_size: int, name: str) -> None:
    """Raise ParameterError unless the inputs of the matrix `name` divide into groups."""
    if n_in % group_size:
        fit = [size for size in GROUP_SIZES if n_in % size == 0]
        raise ParameterError(
            f"{argument('group_size')} is {group_size}, but {name} has {n_in} inputs: "
            + (
                f"give {' or '.join(map(str, fit))}"
                if fit
                else f"expected a multiple of {min(GROUP_SIZES)}"
            )
        )


def quantize(
    w: np.ndarray,
    bits: int,
    group_size: int,
    *,
    name: str = "matrix",
    threads: int | None = None,
) -> QuantizedTensor:
    """Quantize a matrix w [O, I] of floats, with the result of `mx.quantize`.

    Zero and the end of a group that is farther from zero are exact. The step between two quantized
    values is chosen for that; the other end is clipped by one step at most.

    Parameters
    ----------
    name
        Name of the matrix in errors.
    threads
        Number of CPU threads; None takes one for each processor.

    Raises
    ------
    ParameterError
        I is not a multiple of `group_size`, or `group_size` or `bits` is not supported.
    WeightsError
        A weight is not finite, or its magnitude exceeds 1e30.
    """
    from concurrent.futures import ThreadPoolExecutor

    Quantization(group_size, bits)
    n_out, n_in = w.shape
    check_group_size(n_in, group_size, name)
    n_groups = n_in // group_size
    packed = np.empty((n_out, n_in * bits // 8), np.uint8)
    scales, offsets = (np.empty((n_out, n_groups), np.float32) for _ in range(2))

    @np.errstate(all="ignore")  # numbers that are not finite raise WeightsError below
    def fill(rows: slice) -> None:
        x = np.empty((len(w[rows]), n_groups, group_size), np.float32)
        for group in range(n_groups):  # six times faster for a transposed w
            x[:, group] = w[rows, group * group_size : (group + 1) * group_size]
        low, high = x.min(axis=-1), x.max(axis=-1)
        negative = np.abs(low) > np.abs(high)
        edge = np.where(negative, low, high)
        if not (np.abs(edge) <= MAX_MAGNITUDE).all():  # False for a NaN
            raise WeightsError(
                f"{name} holds a NaN, an infinity or a number beyond 1e30: fetch the model again"
            )
        scale = np.maximum((high - low) / np.float32(2**bits - 1), MIN_SCALE)
        scale = np.where(negative, scale, -scale)
        steps = np.rint(edge / scale)  # from zero to the edge
        nonzero = steps != 0
        scales[rows] = np.divide(edge, steps, out=scale, where=nonzero)
        offsets[rows] = np.where(nonzero, edge, 0)
        x -= offsets[rows, :, None]
        x /= scales[rows, :, None]
        np.rint(x, out=x)
        np.clip(x, 0, 2**bits - 1, out=x)
        q = x.astype(np.uint8).reshape(-1, n_in)
        packed[rows] = q if bits == 8 else q[:, 0::2] | q[:, 1::2] << 4

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:  # NumPy releases the GIL
        for _ in pool.map(fill, _row_blocks(n_out, n_in)):
            pass  # the iteration raises the errors of the threads
    return QuantizedTensor(packed.view("<u4"), scales, offsets, group_size, bits)


def unpack(q: QuantizedTensor) -> np.ndarray:
    """Return the quantized values of a matrix, uint8 [O, I]."""
    packed = np.ascontiguousarray(q.weight, "<u4").view(np.uint8)
    if q.bits == 8:
        return packed
    values = np.empty(q.shape, np.uint8)
    np.bitwise_and(packed, 15, out=values[:, 0::2])
    np.right_shift(packed, 4, out=values[:, 1::2])
    return values


def dequantize(q: QuantizedTensor) -> np.ndarray:
    """Return the floats of a quantized matrix, float32 [O, I]."""
    n_out, n_in = q.shape
    w = np.empty((n_out, n_in // q.group_size, q.group_size), np.float32)
    for rows in _row_blocks(n_out, n_in):
        np.multiply(unpack(q[rows]).reshape(w[rows].shape), q.scales[rows, :, None], out=w[rows])
        w[rows] += q.offsets[rows, :, None]
    return w.reshape(n_out, n_in)


def _row_blocks(n_out: int, n_in: int) -> Iterator[slice]:
    """Yield slices of rows with about `BLOCK_WEIGHTS` weights each."""
    n = max(1, BLOCK_WEIGHTS // max(1, n_in))
    return (slice(first, first + n) for first in range(0, n_out, n))
