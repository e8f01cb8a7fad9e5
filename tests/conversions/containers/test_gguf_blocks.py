"""gptx.conversions.containers.gguf_blocks and gguf_types, against the package `gguf`."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptx.conversions.containers.gguf_types import (
    BLOCK_TYPES,
    FLOAT_TYPES,
    QUANTIZED_TYPES,
    TYPES_BY_ID,
    UNSUPPORTED_TYPES,
    TensorType,
)
from gptx.errors import WeightsError
from tests.support.files.gguf import IDS, decoded

gguf = pytest.importorskip("gguf")

# Scales that people's files do not have; half of the blocks get one in each scale.
ODD_SCALES = np.array([0x0000, 0x8000, 0x0001, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0xFE01], "<u2")
seeds = st.integers(0, 2**32 - 1)

HALVES = {"d", "dmin", "m"}


def random_blocks(kind: TensorType, seed: int, n: int, *, odd: bool = False) -> np.ndarray:
    """Draw blocks of random bytes, uint8 [n, block_bytes], with scales of both signs."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (n, kind.block_bytes), dtype=np.uint8)
    blocks = raw.view(kind.layout)[:, 0]
    for name in HALVES & set(kind.layout.names or ()):
        scales = rng.normal(size=n).astype("<f2").view("<u2")
        if odd:
            scales = np.where(rng.random(n) < 0.5, rng.choice(ODD_SCALES, n), scales)
        blocks[name] = scales.view("<f2")
    return raw


def expected(kind: TensorType, raw: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.dequantize(raw, gguf.GGMLQuantizationType[kind.name])


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
@given(seed=seeds, n=st.integers(1, 7), odd=st.booleans())
@settings(max_examples=15, deadline=None)
def test_blocks_are_decoded_bit_for_bit(kind: TensorType, seed: int, n: int, odd: bool) -> None:
    raw = random_blocks(kind, seed, n, odd=odd)
    found = kind.decode(raw)
    assert found.dtype == np.float32
    assert found.shape == (n, kind.block_numbers)
    assert found.tobytes() == expected(kind, raw).tobytes()


def test_every_scale_of_mxfp4() -> None:
    (kind,) = (kind for kind in BLOCK_TYPES if kind.name == "MXFP4")
    raw = random_blocks(kind, 0, 256)
    raw[:, 0] = np.arange(256)
    assert kind.decode(raw).tobytes() == expected(kind, raw).tobytes()


def test_sizes_of_blocks_are_those_of_ggml() -> None:
    for kind in TYPES_BY_ID.values():
        sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind.id)]
        assert sizes == (kind.block_numbers, kind.block_bytes), kind.name


def test_every_type_of_ggml_has_its_name() -> None:
    known = UNSUPPORTED_TYPES | {id: kind.name for id, kind in TYPES_BY_ID.items()}
    assert {t.value: t.name for t in gguf.GGMLQuantizationType}.items() <= known.items()
    assert not UNSUPPORTED_TYPES.keys() & TYPES_BY_ID.keys()


# Encoding


def blocks_of(seed: int) -> np.ndarray:
    """Draw blocks of many magnitudes, some with ties, halves, zeros, subnormal numbers."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(8, 32)) * 10.0 ** rng.integers(-46, 5, (8, 1))
    x[rng.random((8, 32)) < 0.1] = 0
    x[0] = rng.integers(-127, 128, 32) / 2  # the scale is 1/2, or a little less
    x[1] = rng.choice([-4.0, 4.0], 32)
    x[2] = 0
    return x.astype(np.float32)


def inverse(scale: np.float32) -> np.float32:
    with np.errstate(all="ignore"):
        inverse = np.float32(1) / scale
    return inverse if np.isfinite(inverse) else np.float32(0)


def q8_0(block: np.ndarray) -> bytes:
    """Encode a block as ggml's quantize_row_q8_0_ref, one number at a time."""
    scale = np.float32(max(abs(x) for x in block)) / np.float32(127)
    out = struct.pack("<e", scale)
    for x in block:
        y = float(x * inverse(scale))
        out += struct.pack("b", int(math.copysign(math.floor(abs(y) + 0.5), y)))
    return out


def q4_0(block: np.ndarray) -> bytes:
    """Encode a block as ggml's quantize_row_q4_0_ref, one number at a time."""
    scale = np.float32(max(block, key=abs)) / np.float32(-8)
    quants = [min(15, int(x * inverse(scale) + np.float32(8.5))) for x in block]
    low, high = quants[:16], quants[16:]
    return struct.pack("<e", scale) + bytes(a | b << 4 for a, b in zip(low, high, strict=True))


KINDS = {kind.name: kind for kind in (*FLOAT_TYPES.values(), *QUANTIZED_TYPES.values())}


def encoded(type: str, x: np.ndarray) -> bytes:
    encode = KINDS[type].encode
    assert encode is not None
    return encode(x, "tensor").tobytes()


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_blocks_are_those_of_ggml(seed: int) -> None:
    x = blocks_of(seed)
    for type, block in {"Q8_0": q8_0, "Q4_0": q4_0}.items():
        assert encoded(type, x) == b"".join(map(block, x))


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_blocks_are_close_to_the_numbers(seed: int) -> None:
    x = blocks_of(seed)
    largest = np.abs(x).max(axis=1, keepdims=True).astype(np.float64)
    # Half a step (at one end of Q4_0 a whole one), and the rounding of the scale to float16
    for type, steps, slack in (("Q8_0", 127, 0.5), ("Q4_0", 8, 1.0)):
        back = decoded(encoded(type, x), IDS[type]).reshape(x.shape)
        limit = largest * (slack / steps * 1.001 + 2.0**-11) + steps * 2.0**-25
        assert (np.abs(back - x) <= limit).all()


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_float16_is_rounded_to_the_nearest(seed: int) -> None:
    x = blocks_of(seed)
    x = x[np.abs(x).max(axis=1) < 65504]
    back = decoded(encoded("F16", x), 1).reshape(x.shape)
    assert (np.abs(back - x) <= np.abs(x) * 2.0**-11 + 2.0**-25).all()


@pytest.mark.parametrize("bad", [3.4e38, -3.4e38, np.inf, np.nan])
@pytest.mark.parametrize("kind", QUANTIZED_TYPES.values(), ids=lambda kind: kind.name)
def test_numbers_that_a_scale_cannot_represent(kind: TensorType, bad: float) -> None:
    x = np.zeros(64, np.float32)
    x[40] = bad
    assert kind.encode is not None
    with pytest.raises(WeightsError, match=f"^x has a number that is not finite in {kind.name}"):
        kind.encode(x, "x")
