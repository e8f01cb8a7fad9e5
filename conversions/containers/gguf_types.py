"""The types of a GGUF file's tensors: plain numbers, and blocks of 32 that share a scale.

What a block holds is what ggml's quantizer puts into it, and its numbers are those that ggml
computes with, bit for bit (https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c,
`quantize_row_q8_0_ref`, `dequantize_row_q8_0` and their like; numbers of the types in
https://github.com/ggml-org/ggml/blob/master/include/ggml.h, `enum ggml_type`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gptx.conversions.containers.binary import Array, cast
from gptx.errors import WeightsError
from gptx.safetensors_file import BFLOAT16


@dataclass(frozen=True)
class Type:
    """A type of tensors.

    Attributes
    ----------
    name, id
        What ggml calls it, and its number in files.
    dtype
        Of the numbers that are read; those of blocks come as float32.
    block, size
        Numbers in a block, and its bytes.
    encode, decode
        Rows of float32 (and what errors call them) -> uint8 [blocks, size]; and that ->
        float32 [blocks, block]. None where the numbers lie in the file as they are.
    """

    name: str
    id: int
    dtype: np.dtype
    block: int
    size: int
    encode: Callable[[Array, str], Array] | None = None
    decode: Callable[[Array], Array] | None = None


def _q8_0(x: Array, what: str) -> Array:
    """32 numbers: a float16 scale, the largest magnitude / 127, and 32 signed bytes."""
    blocks = x.reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    out = np.empty((len(blocks), 34), np.uint8)
    out[:, :2] = _float16(scale, "Q8_0", what)
    y = blocks * _inverse(scale)
    whole = np.trunc(y)
    whole += np.trunc((y - whole) * 2)  # halves away from zero, where NumPy's round is to even
    out[:, 2:] = whole.astype(np.int8).view(np.uint8)
    return out


def _q4_0(x: Array, what: str) -> Array:
    """32 numbers: a float16 scale and 16 bytes, byte i with number i below and i + 16 above.

    The number of the largest magnitude becomes -8, so the scale can be negative.
    """
    blocks = x.reshape(-1, 32)
    largest = np.abs(blocks).argmax(axis=1, keepdims=True)
    scale = np.take_along_axis(blocks, largest, axis=1) / np.float32(-8)
    out = np.empty((len(blocks), 18), np.uint8)
    out[:, :2] = _float16(scale, "Q4_0", what)
    y = (blocks * _inverse(scale) + np.float32(8.5)).astype(np.uint8)
    y = np.minimum(y, 15)
    out[:, 2:] = y[:, :16] | y[:, 16:] << 4
    return out


def _float16(scale: Array, name: str, what: str) -> Array:
    """Scales as the bytes of float16."""
    with np.errstate(over="ignore"):
        narrow = scale.astype("<f2")
    if not np.isfinite(narrow).all():
        raise WeightsError(f"{what} holds a number that is not finite in {name}: keep float32")
    return narrow.view(np.uint8)


def _inverse(scale: Array) -> Array:
    """1 / scale, and 0 where that is too large: such a scale is 0 in float16."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = 1 / scale
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _from_q8_0(raw: Array) -> Array:
    return _scaled(raw, raw[:, 2:].view(np.int8))


def _from_q4_0(raw: Array) -> Array:
    codes = np.concatenate((raw[:, 2:] & 15, raw[:, 2:] >> 4), axis=1).view(np.int8)
    return _scaled(raw, codes - np.int8(8))


def _scaled(raw: Array, codes: Array) -> Array:
    scale = np.ascontiguousarray(raw[:, :2]).view("<f2")
    with np.errstate(all="ignore"):  # a damaged scale can be an infinity or a NaN
        return codes.astype(np.float32) * scale.astype(np.float32)


def _floats(name: str, id: int, dtype: str) -> Type:
    def encode(x: Array, what: str) -> Array:
        return cast(x, dtype, what)

    size = 4 if dtype == "float32" else 2
    kind = BFLOAT16 if dtype == "bfloat16" else np.dtype(f"<f{size}")
    return Type(name, id, kind, 1, size, encode)


FLOATS = {
    "float32": _floats("F32", 0, "float32"),
    "float16": _floats("F16", 1, "float16"),
    "bfloat16": _floats("BF16", 30, "bfloat16"),
}
BLOCKS = {
    8: Type("Q8_0", 8, np.dtype(np.float32), 32, 34, _q8_0, _from_q8_0),
    4: Type("Q4_0", 2, np.dtype(np.float32), 32, 18, _q4_0, _from_q4_0),
}  # by bits
INTEGERS = {
    "int8": Type("I8", 24, np.dtype(np.int8), 1, 1),
    "int32": Type("I32", 26, np.dtype("<i4"), 1, 4),
}
TYPES = {kind.id: kind for kinds in (FLOATS, BLOCKS, INTEGERS) for kind in kinds.values()}

# What else there is, to be refused by its name.
# fmt: off
OTHERS = {
    3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS",
    18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    25: "I16", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
    39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}
# fmt: on
