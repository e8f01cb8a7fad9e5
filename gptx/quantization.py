"""Quantization: matrices of 8-bit and 4-bit codes, in MLX's affine layout.

Each row is cut into groups of `group_size` weights. A group has one scale and one bias, and each
weight a code of `bits` bits: w = scale · code + bias. The codes lie in 32-bit words, along the
input, lowest bits first.

Shapes: O outputs (rows), I inputs, G = I / group_size groups a row.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptx.errors import ConfigError, ParameterError, WeightsError

BITS = {"int8": 8, "int4": 4}
GROUP_SIZES = (32, 64, 128)
GROUP_SIZE = 64  # unless another is asked for

BLOCK = 2**18  # numbers that are worked on at once: they stay in a core's cache
SMALLEST_SCALE = np.float32(1e-7)  # MLX's
LARGEST_WEIGHT = 1e30  # divided by that scale, it is still a float32


@dataclass(frozen=True)
class Quantization:
    """How the matrices of a model are quantized.

    Attributes
    ----------
    group_size
        Weights that share a scale and a bias: 32, 64 or 128.
    bits
        Bits of a code, 4 or 8.
    """

    group_size: int
    bits: int

    def __post_init__(self) -> None:
        for name, allowed in (("group_size", GROUP_SIZES), ("bits", tuple(BITS.values()))):
            value = getattr(self, name)
            if not isinstance(value, int) or value not in allowed:
                raise ParameterError(f"{name} is {value!r}, expected {_either(allowed)}")

    def __str__(self) -> str:
        return f"int{self.bits} in groups of {self.group_size}"

    @classmethod
    def named(cls, quantize: str | None, group_size: int = GROUP_SIZE) -> Quantization | None:
        """What the options of `gptx.load` ask for; None where they ask for none.

        Raises
        ------
        ParameterError
            One of them is not what it can be, or there is a group size alone.
        """
        if quantize is None:
            if group_size != GROUP_SIZE:
                raise ParameterError(
                    f"group_size is {group_size!r}, but nothing is quantized: "
                    f"give quantize={_either(BITS)}, too"
                )
            return None
        if not isinstance(quantize, str) or quantize not in BITS:
            raise ParameterError(f"quantize is {quantize!r}, expected {_either(BITS)}")
        return cls(group_size, BITS[quantize])

    @classmethod
    def from_dict(cls, data: Any, name: str = "quantization") -> Quantization:
        """Read the object `name` of a config.json, as MLX's libraries write it.

        Raises
        ------
        ConfigError
            It belongs to another library, or asks for what gptx does not read.
        """
        if not isinstance(data, dict):
            raise ConfigError(f'{name} is {data!r}, expected {{"group_size": ..., "bits": ...}}')
        if "quant_method" in data:
            raise ConfigError(
                f"{name} is that of {data['quant_method']!r}, gptx reads the one of MLX: "
                "take the model's float weights, and load them with quantize='int4'"
            )
        if data.get("mode", "affine") != "affine":
            raise ConfigError(f"{name} is of the mode {data['mode']!r}, gptx reads 'affine'")
        if more := [key for key in data if key not in ("group_size", "bits", "mode")]:
            raise ConfigError(
                f"{name} has {more[0]!r}, which gptx does not support: "
                "it reads a group_size and bits that all layers share"
            )
        try:
            return cls(data.get("group_size"), data.get("bits"))  # type: ignore[arg-type]
        except ParameterError as error:
            raise ConfigError(f"{name} is not one that gptx reads: {error}") from None


def _either(values: Any) -> str:
    *first, last = map(repr, values)
    return f"{', '.join(first)} or {last}"


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A quantized matrix [O, I].

    Attributes
    ----------
    weight
        The codes, uint32 [O, I * bits / 32].
    scales, biases
        Float32 [O, G].
    group_size, bits
        See `Quantization`.

    Raises
    ------
    WeightsError
        The three parts do not fit each other.
    ParameterError
        There is no such group size or number of bits.
    """

    weight: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    group_size: int
    bits: int

    def __post_init__(self) -> None:
        Quantization(self.group_size, self.bits)
        if self.weight.dtype != np.uint32 or self.weight.ndim != 2:
            raise WeightsError(
                f"the codes are {self.weight.dtype} {list(self.weight.shape)}, "
                "expected a matrix of uint32"
            )
        n_out, n_in = self.shape
        n_groups = -(-n_in // self.group_size)
        for name in ("scales", "biases"):
            part = getattr(self, name)
            if part.dtype != np.float32 or part.shape != (n_out, n_groups):
                raise WeightsError(
                    f"the {name} are {part.dtype} {list(part.shape)}, expected float32 "
                    f"{[n_out, n_groups]} for {[n_out, n_in]} in groups of {self.group_size}"
                )
        if n_in % self.group_size:
            raise WeightsError(f"{n_in} inputs are no whole number of groups of {self.group_size}")

    def __getitem__(self, rows: slice) -> QuantizedTensor:
        """Some of the rows."""
        parts = self.weight[rows], self.scales[rows], self.biases[rows]
        return QuantizedTensor(*parts, self.group_size, self.bits)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.weight.shape[0], self.weight.shape[1] * 32 // self.bits

    @property
    def nbytes(self) -> int:
        """Bytes of all three parts."""
        return self.weight.nbytes + self.scales.nbytes + self.biases.nbytes


def check_group_size(n_in: int, group_size: int, name: str) -> None:
    """Raise ParameterError unless the inputs of a matrix are a whole number of groups."""
    if n_in % group_size:
        fit = [size for size in GROUP_SIZES if n_in % size == 0]
        raise ParameterError(
            f"group_size is {group_size}, but {name} has {n_in} inputs: "
            + (f"give {' or '.join(map(str, fit))}" if fit else "no group size divides that")
        )


def quantize(
    w: np.ndarray,
    bits: int,
    group_size: int,
    *,
    name: str = "matrix",
    threads: int | None = None,
) -> QuantizedTensor:
    """Quantize a matrix w [O, I] of floats as `mx.quantize` does: the result is the same.

    The end of a group that is farther from zero is met exactly, and so is zero, to which the step
    is fitted; the other end may be cut off, by one step at most.

    Parameters
    ----------
    name
        What errors call the matrix.
    threads
        How many work at it; None is as many as there are processors.

    Raises
    ------
    ParameterError
        I is not a multiple of `group_size`, or that and `bits` are none that there are.
    WeightsError
        A weight is not finite, or beyond 1e30.
    """
    from concurrent.futures import ThreadPoolExecutor

    Quantization(group_size, bits)
    n_out, n_in = w.shape
    check_group_size(n_in, group_size, name)
    n_groups = n_in // group_size
    codes = np.empty((n_out, n_in * bits // 8), np.uint8)
    scales, biases = (np.empty((n_out, n_groups), np.float32) for _ in range(2))

    @np.errstate(all="ignore")  # what is not finite is refused, not warned of
    def fill(rows: slice) -> None:
        x = np.empty((len(w[rows]), n_groups, group_size), np.float32)
        for group in range(n_groups):  # a transposed w is copied six times faster like this
            x[:, group] = w[rows, group * group_size : (group + 1) * group_size]
        low, high = x.min(axis=-1), x.max(axis=-1)
        negative = np.abs(low) > np.abs(high)
        edge = np.where(negative, low, high)
        if not (np.abs(edge) <= LARGEST_WEIGHT).all():  # which a NaN is not
            raise WeightsError(f"{name} holds a NaN, an infinity or a number beyond 1e30")
        scale = np.maximum((high - low) / np.float32(2**bits - 1), SMALLEST_SCALE)
        scale = np.where(negative, scale, -scale)
        steps = np.rint(edge / scale)  # from zero to the edge; below, a whole number of them
        some = steps != 0
        scales[rows] = np.divide(edge, steps, out=scale, where=some)
        biases[rows] = np.where(some, edge, 0)
        x -= biases[rows, :, None]
        x /= scales[rows, :, None]
        np.rint(x, out=x)
        np.clip(x, 0, 2**bits - 1, out=x)
        code = x.astype(np.uint8).reshape(-1, n_in)
        codes[rows] = code if bits == 8 else code[:, 0::2] | code[:, 1::2] << 4

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:  # NumPy lets others run meanwhile
        for _ in pool.map(fill, _blocks(n_out, n_in)):
            pass  # but for what it raises
    return QuantizedTensor(codes.view("<u4"), scales, biases, group_size, bits)


def unpack(q: QuantizedTensor) -> np.ndarray:
    """The codes of a quantized matrix, uint8 [O, I]."""
    packed = np.ascontiguousarray(q.weight, "<u4").view(np.uint8)
    if q.bits == 8:
        return packed
    codes = np.empty(q.shape, np.uint8)
    np.bitwise_and(packed, 15, out=codes[:, 0::2])
    np.right_shift(packed, 4, out=codes[:, 1::2])
    return codes


def dequantize(q: QuantizedTensor) -> np.ndarray:
    """The floats that a quantized matrix stands for, float32 [O, I]."""
    n_out, n_in = q.shape
    w = np.empty((n_out, n_in // q.group_size, q.group_size), np.float32)
    for rows in _blocks(n_out, n_in):
        np.multiply(unpack(q[rows]).reshape(w[rows].shape), q.scales[rows, :, None], out=w[rows])
        w[rows] += q.biases[rows, :, None]
    return w.reshape(n_out, n_in)


def _blocks(n_out: int, n_in: int) -> Iterator[slice]:
    """The rows of a matrix in parts of about `BLOCK` numbers."""
    n = max(1, BLOCK // max(1, n_in))
    return (slice(first, first + n) for first in range(0, n_out, n))
