"""gptx.conversions.containers.gguf_blocks and gguf_types, against the package `gguf`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptx.conversions.containers.gguf_types import (
    BLOCK_TYPES,
    TYPES_BY_ID,
    UNSUPPORTED_TYPES,
    TensorType,
)

gguf = pytest.importorskip("gguf")

# Scales that people's files do not have; half of the blocks get one in each scale.
ODD_SCALES = np.array([0x0000, 0x8000, 0x0001, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0xFE01], "<u2")
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
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 7), odd=st.booleans())
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
