"""Quantization: matrices of 8-bit and 4-bit integers, in MLX's affine layout.

A file can have other quantizations of MLX, which `gptx.dequantization` reads as floats.

Each row consists of groups of `group_size` weights. A group has one scale and one offset, and each
weight a quantized value q of `bits` bits: w = scale · q + offset. The quantized values are packed
in 32-bit words along the input, lowest bits first. A file calls the offsets `biases`, as MLX does.

Shapes: O outputs (rows), I inputs, G = I / group_size groups a row.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gptx.errors import ConfigError, ParameterError, WeightsError, argument

BITS = {"int8": 8, "int4": 4}
GROUP_SIZES = (32, 64, 128)
GROUP_SIZE = 64  # default

BLOCK_WEIGHTS = 2**18  # weights quantized at a time: they stay in the cache of a core
MIN_SCALE = np.float32(1e-7)  # MLX's
MAX_MAGNITUDE = 1e30  # of a weight; divided by MIN_SCALE, it is still a float32


# Modes of MLX. A mode of small floats has one group size and one number of bits.
SMALL_FLOATS = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
STORED_BITS = (2, 3, 4, 5, 6, 8)  # of the mode affine
_SETTINGS = {"group_size", "bits", "mode"}


@dataclass(frozen=True)
class Quantization:
    """The quantization that the matrices of a model share.

    Attributes
    ----------
    group_size
        Number of weights that share a scale and an offset: 32, 64 or 128.
    bits
        Number of bits of a quantized value: 4 or 8. A file can have 2, 3, 5 or 6 too.
    mode
        "affine". A file can have "mxfp4", "mxfp8" or "nvfp4" too; these have a group size and bits
        of their own.
    layers
        Layers of a file with another quantization, or with floats (None): `h.0.attn.c_attn`, ...

    Raises
    ------
    ParameterError
        A value is not one of these.
    """

    group_size: int
    bits: int
    mode: str = "affine"
    layers: tuple[tuple[str, Quantization | None], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.mode, str) or self.mode not in ("affine", *SMALL_FLOATS):
            modes = _alternatives(("affine", *SMALL_FLOATS))
            raise ParameterError(f"mode is {self.mode!r}, expected {modes}")
        settings: dict[str, tuple[int, ...]] = {"group_size": GROUP_SIZES, "bits": STORED_BITS}
        if self.mode != "affine":
            group_size, bits = SMALL_FLOATS[self.mode]
            settings = {"group_size": (group_size,), "bits": (bits,)}
        for name, allowed in settings.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value not in allowed:
                raise ParameterError(
                    f"{argument(name)} is {value!r}, expected {_alternatives(allowed)}"
                )

    def __str__(self) -> str:
        return f"{self.type_name} in groups of {self.group_size}"

    @property
    def type_name(self) -> str:
        """Name of the type of the quantized values: "int4", "mxfp4", ..."""
        return f"int{self.bits}" if self.mode == "affine" else self.mode

    @property
    def computed(self) -> Quantization | None:
        """The part with which backends compute; None if all matrices are read as floats."""
        if self.mode == "affine" and self.bits in BITS.values():
            return replace(self, layers=())
        return None

    def check_computed(self) -> None:
        """Raise ParameterError for a quantization that only files have."""
        if self.computed is None:
            raise ParameterError(f"bits is {self.bits!r}, expected {_alternatives(BITS.values())}")

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
        layers = {key: value for key, value in data.items() if key not in _SETTINGS}
        for key, value in layers.items():
            known = isinstance(value, bool) or (isinstance(value, dict) and set(value) <= _SETTINGS)
            if not known or "." not in key:
                raise ConfigError(
                    f"{name} has {key!r}, which is not supported: expected group_size, bits and "
                    "mode, of all layers or of one"
                )
        try:
            others = tuple(
                (key.removeprefix("model."), cls._of_settings(value) if value else None)
                for key, value in layers.items()
                if value is not True  # as all
            )
            return replace(cls._of_settings(data), layers=others)
        except ParameterError as error:
            raise ConfigError(f"{name} is not supported: {error}") from None

    @classmethod
    def _of_settings(cls, data: dict[str, Any]) -> Quantization:
        group_size, bits = (data.get(name) for name in ("group_size", "bits"))
        return cls(group_size, bits, data.get("mode", "affine"))  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Return the object for a config.json."""
        data: dict[str, Any] = {"group_size": self.group_size, "bits": self.bits}
        if self.mode != "affine":
            data["mode"] = self.mode
        layers = {f"model.{name}": kind.to_dict() if kind else False for name, kind in self.layers}
        return data | layers


def _alternatives(values: Iterable[Any]) -> str:
    *first, last = map(repr, values)
    return f"{', '.join(first)} or {last}" if first else last


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
        self.quantization.check_computed()
        check_packed(self.quantization, self.weight, scales=self.scales, offsets=self.offsets)

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


def check_packed(kind: Quantization, weight: np.ndarray, **groups: np.ndarray) -> tuple[int, int]:
    """Check the arrays of a quantized matrix against each other; return its shape [O, I].

    Parameters
    ----------
    weight
        Numbers of `kind.bits` bits, packed: uint32 [O, I * bits / 32].
    groups
        Name -> numbers of the groups [O, G]: float32 for the mode affine, else uint8.

    Raises
    ------
    WeightsError
        They do not fit each other.
    """
    if weight.dtype != np.uint32 or weight.ndim != 2:
        raise WeightsError(
            f"the quantized values are {weight.dtype} {list(weight.shape)}, "
            "expected a matrix of uint32"
        )
    dtype = np.dtype(np.float32 if kind.mode == "affine" else np.uint8)
    n_out, n_in = weight.shape[0], weight.shape[1] * 32 // kind.bits
    n_groups = -(-n_in // kind.group_size)
    for name, array in groups.items():
        if array.dtype != dtype or array.shape != (n_out, n_groups):
            raise WeightsError(
                f"the {name} are {array.dtype} {list(array.shape)}, expected {dtype} "
                f"{[n_out, n_groups]} for {[n_out, n_in]} in groups of {kind.group_size}"
            )
    if n_in % kind.group_size:
        raise WeightsError(f"{n_in} inputs do not divide into groups of {kind.group_size}")
    return n_out, n_in


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

    Quantization(group_size, bits).check_computed()
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
        for _ in pool.map(fill, row_blocks(n_out, n_in)):
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
    for rows in row_blocks(n_out, n_in):
        np.multiply(unpack(q[rows]).reshape(w[rows].shape), q.scales[rows, :, None], out=w[rows])
        w[rows] += q.offsets[rows, :, None]
    return w.reshape(n_out, n_in)


def row_blocks(n_out: int, n_in: int) -> Iterator[slice]:
    """Yield slices of rows with about `BLOCK_WEIGHTS` weights each."""
    n = max(1, BLOCK_WEIGHTS // max(1, n_in))
    return (slice(first, first + n) for first in range(0, n_out, n))
