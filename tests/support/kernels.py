"""Single kernels of the NumPy backend, cached on disk, and tensors as the kernels encode them."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numba
import numpy as np

from gptx.backends.cpu import interface, kernels
from gptx.backends.cpu.interface.group_words import decode_lanes, encode_words
from gptx.quantization import QuantizedTensor

_FOLDER = Path(kernels.__file__).parent
_FILES = [*_FOLDER.rglob("*.py"), *Path(interface.__file__).parent.glob("*.py")]
_SOURCES = b"".join(path.read_bytes() for path in sorted(_FILES))
# Numba detects a change of the function's own file only, hence a folder for each checksum.
_CACHE = _FOLDER / "__pycache__" / f"tests-{zlib.crc32(_SOURCES):08x}"


def cached(kernel: Any) -> Any:
    """Compile a kernel, or a function of a test, separately, and cache it on disk."""
    options = {"nogil": True, "fastmath": False, "error_model": "python"}
    if hasattr(kernel, "py_func"):
        options = {key: kernel.targetoptions.get(key, value) for key, value in options.items()}
        kernel = kernel.py_func
    with mock.patch.object(numba.config, "CACHE_DIR", str(_CACHE)):
        return numba.njit(cache=True, **options)(kernel)


def with_encoded_scales(q: QuantizedTensor) -> QuantizedTensor:
    """Return q with the rounded scales of the kernels, to exclude that rounding from errors."""
    words = encode_words(q.scales, q.offsets, q.bits)
    assert words is not None
    scales, offsets = decode_lanes(words[..., None], np.zeros(len(words), int), q.bits)
    return replace(q, scales=scales, offsets=offsets)


def with_float16_scales(q: QuantizedTensor) -> QuantizedTensor:
    """Return q with scales and offsets rounded to float16, which the kernels keep as floats."""
    scales, offsets = (x.astype(np.float16).astype(np.float32) for x in (q.scales, q.offsets))
    assert encode_words(scales, offsets, q.bits) is None
    return replace(q, scales=scales, offsets=offsets)
