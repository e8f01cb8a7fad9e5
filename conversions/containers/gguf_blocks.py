"""Blocks of GGUF: 32 or 256 quantized numbers that share scales.

Encoding and decoding equal ggml's bit for bit
(https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c, `quantize_row_q8_0_ref`,
`dequantize_row_q6_K` and their like; layouts:
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h, `block_q6_K` and its like).

A layout is a NumPy dtype of one block. Its fields have ggml's names: `d`, the scale; `dmin` or `m`,
the scale of the minimum, or the minimum; `scales`, integer scales of the groups of a block; `qs`
or `ql`, the low bits of the numbers; `qh`, their high bits. N is the number of blocks.
"""

from __future__ import annotations

import numpy as np

from gptx.conversions.containers.binary import Array
from gptx.errors import WeightsError

HALF, BYTE = "<f2", "u1"

Q4_0 = np.dtype([("d", HALF), ("qs", BYTE, 16)])
Q4_1 = np.dtype([("d", HALF), ("m", HALF), ("qs", BYTE, 16)])
Q5_0 = np.dtype([("d", HALF), ("qh", BYTE, 4), ("qs", BYTE, 16)])
Q5_1 = np.dtype([("d", HALF), ("m", HALF), ("qh", BYTE, 4), ("qs", BYTE, 16)])
Q8_0 = np.dtype([("d", HALF), ("qs", "i1", 32)])
Q2_K = np.dtype([("scales", BYTE, 16), ("qs", BYTE, 64), ("d", HALF), ("dmin", HALF)])
Q3_K = np.dtype([("qh", BYTE, 32), ("ql", BYTE, 64), ("scales", BYTE, 12), ("d", HALF)])
Q4_K = np.dtype([("d", HALF), ("dmin", HALF), ("scales", BYTE, 12), ("qs", BYTE, 128)])
Q5_K = np.dtype(
    [("d", HALF), ("dmin", HALF), ("scales", BYTE, 12), ("qh", BYTE, 32), ("ql", BYTE, 128)]
)
Q6_K = np.dtype([("ql", BYTE, 128), ("qh", BYTE, 64), ("scales", "i1", 16), ("d", HALF)])
IQ4_NL = Q4_0
IQ4_XS = np.dtype([("d", HALF), ("scales_h", BYTE, 2), ("scales_l", BYTE, 4), ("qs", BYTE, 128)])
TQ1_0 = np.dtype([("qs", BYTE, 48), ("qh", BYTE, 4), ("d", HALF)])
TQ2_0 = np.dtype([("qs", BYTE, 64), ("d", HALF)])
MXFP4 = np.dtype([("e", BYTE), ("qs", BYTE, 16)])

# The numbers that 4 bits select: ggml's `kvalues_iq4nl`, and E2M1 (OCP Microscaling 1.0) times 2.
# fmt: off
NON_LINEAR = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
# fmt: on
E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


# Decoding: blocks [N] of a layout -> float32 [N, numbers]


def decode_q4_0(blocks: Array) -> Array:
    """Decode 4-bit numbers less 8."""
    return _scaled(blocks["d"], _split_bytes(blocks["qs"], 4, 16) - np.int8(8))


def decode_q4_1(blocks: Array) -> Array:
    """Decode 4-bit numbers and a minimum."""
    return _scaled(blocks["d"], _split_bytes(blocks["qs"], 4, 16)) + _column(blocks["m"])


def decode_q5_0(blocks: Array) -> Array:
    """Decode 5-bit numbers less 16."""
    return _scaled(blocks["d"], _five_bits(blocks) - np.int8(16))


def decode_q5_1(blocks: Array) -> Array:
    """Decode 5-bit numbers and a minimum."""
    return _scaled(blocks["d"], _five_bits(blocks)) + _column(blocks["m"])


def _five_bits(blocks: Array) -> Array:
    low, high = _split_bytes(blocks["qs"], 4, 16), _split_bytes(blocks["qh"], 1, 1)
    return low | high << 4


def decode_q8_0(blocks: Array) -> Array:
    """Decode signed bytes."""
    return _scaled(blocks["d"], blocks["qs"])


def decode_q2_k(blocks: Array) -> Array:
    """Decode 2-bit numbers in 16 groups with a 4-bit scale and minimum."""
    scales, minima = blocks["scales"] & 15, blocks["scales"] >> 4
    return _affine_groups(blocks, scales, minima, _split_bytes(blocks["qs"], 2, 32))


def decode_q3_k(blocks: Array) -> Array:
    """Decode 3-bit numbers less 4 in 16 groups with a 6-bit scale."""
    packed = blocks["scales"]
    scales = _split_bytes(packed[:, :8], 4, 8) | _split_bytes(packed[:, 8:], 2, 4) << 4
    numbers = _split_bytes(blocks["ql"], 2, 32) | _split_bytes(blocks["qh"], 1, 32) << 2
    return _scaled_groups(blocks["d"], scales - np.int8(32), numbers - np.int8(4))


def decode_q4_k(blocks: Array) -> Array:
    """Decode 4-bit numbers in 8 groups with a 6-bit scale and minimum."""
    return _affine_groups(blocks, *_six_bit_pairs(blocks), _split_bytes(blocks["qs"], 4, 32))


def decode_q5_k(blocks: Array) -> Array:
    """Decode 5-bit numbers in 8 groups with a 6-bit scale and minimum."""
    numbers = _split_bytes(blocks["ql"], 4, 32) | _split_bytes(blocks["qh"], 1, 32) << 4
    return _affine_groups(blocks, *_six_bit_pairs(blocks), numbers)


def _six_bit_pairs(blocks: Array) -> tuple[Array, Array]:
    """Return the scales and the minima [N, 8] of Q4_K and Q5_K.

    Four bytes have the first scales, four the first minima, each with two high bits of a later
    one; the last four have the low bits of the later scales and minima.
    """
    a, b, low = blocks["scales"][:, :4], blocks["scales"][:, 4:8], blocks["scales"][:, 8:]
    scales = np.concatenate((a & 63, low & 15 | a >> 6 << 4), axis=1)
    minima = np.concatenate((b & 63, low >> 4 | b >> 6 << 4), axis=1)
    return scales, minima


def decode_q6_k(blocks: Array) -> Array:
    """Decode 6-bit numbers less 32 in 16 groups with a signed 8-bit scale."""
    numbers = _split_bytes(blocks["ql"], 4, 64) | _split_bytes(blocks["qh"], 2, 32) << 4
    return _scaled_groups(blocks["d"], blocks["scales"], numbers - np.int8(32))


def decode_iq4_nl(blocks: Array) -> Array:
    """Decode 4-bit numbers of the table `NON_LINEAR`."""
    return _scaled(blocks["d"], NON_LINEAR[_split_bytes(blocks["qs"], 4, 16)])


def decode_iq4_xs(blocks: Array) -> Array:
    """Decode 4-bit numbers of the table `NON_LINEAR` in 8 groups with a 6-bit scale."""
    low, high = _split_bytes(blocks["scales_l"], 4, 1), _split_bytes(blocks["scales_h"], 2, 1)
    scales = (low | high << 4) - np.int8(32)
    return _scaled_groups(blocks["d"], scales, NON_LINEAR[_split_bytes(blocks["qs"], 4, 16)])


def decode_tq1_0(blocks: Array) -> Array:
    """Decode ternary digits, five a byte in `qs`, four in `qh`; the first digit is the highest."""
    digits = [
        _ternary_digits(blocks["qs"][:, :32], 5),
        _ternary_digits(blocks["qs"][:, 32:], 5),
        _ternary_digits(blocks["qh"], 4),
    ]
    return _scaled(blocks["d"], np.concatenate(digits, axis=1) - np.int8(1))


def _ternary_digits(packed: Array, n: int) -> Array:
    """Return the first n digits of bytes [N, k], as [N, n·k]: a byte is a fraction of 256."""
    powers = np.array([[1], [3], [9], [27], [81]], np.uint8)[:n]
    rest = packed[:, None, :] * powers  # modulo 256: the digits before are gone
    return (rest.astype(np.uint16) * 3 >> 8).astype(np.int8).reshape(len(packed), -1)


def decode_tq2_0(blocks: Array) -> Array:
    """Decode 2-bit numbers less 1."""
    return _scaled(blocks["d"], _split_bytes(blocks["qs"], 2, 32) - np.int8(1))


def decode_mxfp4(blocks: Array) -> Array:
    """Decode 4-bit floats with a power of two as their scale."""
    # 2^(e - 128): half of E8M0, because `E2M1` has doubled numbers. It is subnormal for e < 2.
    scales = np.ldexp(np.float32(1), blocks["e"].astype(np.int32) - 128)
    return _scaled(scales, E2M1[_split_bytes(blocks["qs"], 4, 16)])


def _split_bytes(packed: Array, bits: int, run: int) -> Array:
    """Split bytes into numbers of `bits` bits.

    The numbers of `run` bytes are together: first the lowest bits of each byte, then the next.

    Returns
    -------
    array
        int8 [N, 8 / bits · bytes].
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    numbers = packed.reshape(len(packed), -1, 1, run) >> shifts & (1 << bits) - 1
    return numbers.reshape(len(packed), -1).view(np.int8)


def _scaled(scales: Array, numbers: Array) -> Array:
    """Multiply numbers [N, k] by the scale of their block [N]."""
    return _column(scales) * numbers.astype(np.float32)


def _scaled_groups(d: Array, scales: Array, numbers: Array) -> Array:
    """Multiply numbers [N, k] by the scales of their groups [N, G], and by d [N]."""
    grouped = numbers.reshape(*scales.shape, -1).astype(np.float32)
    return (_scaled(d, scales)[:, :, None] * grouped).reshape(numbers.shape)


def _affine_groups(blocks: Array, scales: Array, minima: Array, numbers: Array) -> Array:
    """Multiply numbers [N, k] by the scales of their groups [N, G], and subtract the minima."""
    grouped = _scaled_groups(blocks["d"], scales, numbers).reshape(*scales.shape, -1)
    return (grouped - _scaled(blocks["dmin"], minima)[:, :, None]).reshape(numbers.shape)


def _column(values: Array) -> Array:
    return values.astype(np.float32)[:, None]


# Encoding: float32 -> blocks


def encode_q8_0(x: Array, label: str) -> Array:
    """Encode 32 numbers as a float16 scale (the largest magnitude / 127) and 32 signed bytes."""
    rows = x.reshape(-1, 32)
    scales = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
    blocks = np.empty(len(rows), Q8_0)
    blocks["d"] = _float16(scales, "Q8_0", label)[:, 0]
    y = rows * _inverse(scales)
    whole = np.trunc(y)
    whole += np.trunc((y - whole) * 2)  # halves away from zero; NumPy rounds them to even
    blocks["qs"] = whole.astype(np.int8)
    return blocks


def encode_q4_0(x: Array, label: str) -> Array:
    """Encode 32 numbers as a float16 scale and 16 bytes.

    Byte i has number i in its low half and number i + 16 in its high half. The number of the
    largest magnitude becomes -8, so the scale can be negative.
    """
    rows = x.reshape(-1, 32)
    largest = np.abs(rows).argmax(axis=1, keepdims=True)
    scales = np.take_along_axis(rows, largest, axis=1) / np.float32(-8)
    blocks = np.empty(len(rows), Q4_0)
    blocks["d"] = _float16(scales, "Q4_0", label)[:, 0]
    y = (rows * _inverse(scales) + np.float32(8.5)).astype(np.uint8)
    y = np.minimum(y, 15)
    blocks["qs"] = y[:, :16] | y[:, 16:] << 4
    return blocks


def _float16(scales: Array, name: str, label: str) -> Array:
    with np.errstate(over="ignore"):
        narrow = scales.astype(HALF)
    if not np.isfinite(narrow).all():
        raise WeightsError(f"{label} has a number that is not finite in {name}: use float32")
    return narrow


def _inverse(scales: Array) -> Array:
    """Compute 1 / scale, or 0 where that is not finite: such a scale is 0 in float16."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = 1 / scales
    return np.where(np.isfinite(inverse), inverse, np.float32(0))
