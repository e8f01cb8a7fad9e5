"""The tensor types of GGUF: plain numbers, and blocks of 32 numbers that share a scale.

Encoding and decoding equal ggml's bit for bit
(https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c, `quantize_row_q8_0_ref`,
`dequantize_row_q8_0` and their like; type numbers:
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
class TensorType:
    """A type of tensors.

    Attributes
    ----------
    name, id
        ggml's name, and its number in files.
    dtype
        Type of the decoded numbers; float32 for blocks.
    block_numbers, block_bytes
        Count of numbers in a block, and its size in bytes. Plain numbers have blocks of one.
    encode
        Function that converts rows of floats (float32 for blocks) to the data of the file; its
        second argument is their label in error messages. None for integers.
    decode
        Function that converts uint8 [blocks, block_bytes] to float32 [blocks, block_numbers]. None
        for plain numbers.
    """

    name: str
    id: int
    dtype: np.dtype
    block_numbers: int
    block_bytes: int
    encode: Callable[[Array, str], Array] | None = None
    decode: Callable[[Array], Array] | None = None


def _encode_q8_0(x: Array, label: str) -> Array:
    """Encode 32 numbers as a float16 scale (the largest magnitude / 127) and 32 signed bytes."""
    blocks = x.reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    out = np.empty((len(blocks), 34), np.uint8)
    out[:, :2] = _float16(scale, "Q8_0", label)
    y = blocks * _inverse(scale)
    whole = np.trunc(y)
    whole += np.trunc((y - whole) * 2)  # halves away from zero; NumPy rounds them to even
    out[:, 2:] = whole.astype(np.int8).view(np.uint8)
    return out


def _encode_q4_0(x: Array, label: str) -> Array:
    """Encode 32 numbers as a float16 scale and 16 bytes.

    Byte i has number i in its low half and number i + 16 in its high half. The number of the
    largest magnitude becomes -8, so the scale can be negative.
    """
    blocks = x.reshape(-1, 32)
    largest = np.abs(blocks).argmax(axis=1, keepdims=True)
    scale = np.take_along_axis(blocks, largest, axis=1) / np.float32(-8)
    out = np.empty((len(blocks), 18), np.uint8)
    out[:, :2] = _float16(scale, "Q4_0", label)
    y = (blocks * _inverse(scale) + np.float32(8.5)).astype(np.uint8)
    y = np.minimum(y, 15)
    out[:, 2:] = y[:, :16] | y[:, 16:] << 4
    return out


def _float16(scale: Array, name: str, label: str) -> Array:
    """Convert scales to the bytes of float16."""
    with np.errstate(over="ignore"):
        narrow = scale.astype("<f2")
    if not np.isfinite(narrow).all():
        raise WeightsError(f"{label} has a number that is not finite in {name}: use float32")
    return narrow.view(np.uint8)


def _inverse(scale: Array) -> Array:
    """Compute 1 / scale, or 0 where that is not finite: such a scale is 0 in float16."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = 1 / scale
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _decode_q8_0(raw: Array) -> Array:
    return _scaled(raw, raw[:, 2:].view(np.int8))


def _decode_q4_0(raw: Array) -> Array:
    unsigned = np.concatenate((raw[:, 2:] & 15, raw[:, 2:] >> 4), axis=1).view(np.int8)
    return _scaled(raw, unsigned - np.int8(8))


def _scaled(raw: Array, quantized: Array) -> Array:
    scale = np.ascontiguousarray(raw[:, :2]).view("<f2")
    with np.errstate(all="ignore"):  # a damaged scale can be infinite or NaN
        return quantized.astype(np.float32) * scale.astype(np.float32)


def _float_type(name: str, id: int, dtype: str) -> TensorType:
    def encode(x: Array, label: str) -> Array:
        return cast(x, dtype, label)

    size = 4 if dtype == "float32" else 2
    kind = BFLOAT16 if dtype == "bfloat16" else np.dtype(f"<f{size}")
    return TensorType(name, id, kind, 1, size, encode)


FLOAT_TYPES = {
    "float32": _float_type("F32", 0, "float32"),
    "float16": _float_type("F16", 1, "float16"),
    "bfloat16": _float_type("BF16", 30, "bfloat16"),
}
# Bits a weight -> type.
BLOCK_TYPES = {
    8: TensorType("Q8_0", 8, np.dtype(np.float32), 32, 34, _encode_q8_0, _decode_q8_0),
    4: TensorType("Q4_0", 2, np.dtype(np.float32), 32, 18, _encode_q4_0, _decode_q4_0),
}
INTEGER_TYPES = {
    "int8": TensorType("I8", 24, np.dtype(np.int8), 1, 1),
    "int32": TensorType("I32", 26, np.dtype("<i4"), 1, 4),
}
TYPES_BY_ID = {
    kind.id: kind for kinds in (FLOAT_TYPES, BLOCK_TYPES, INTEGER_TYPES) for kind in kinds.values()
}

# Types that are not supported, for error messages.
# fmt: off
UNSUPPORTED_TYPES = {
    3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS",
    18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    25: "I16", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
    39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}
# fmt: on
