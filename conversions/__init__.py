"""Conversions: GPT-2 models read from and written to the file formats of other programs.

    >>> from gptx.conversions import convert
    >>> convert("gpt2", "model.gguf", quantize="int8")

Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptx.conversions.converter import convert
    from gptx.conversions.reading import read
    from gptx.conversions.registry import DTYPES, FORMATS, QUANTIZED_TYPES, Format, detect

_HOME = {
    "DTYPES": "registry",
    "FORMATS": "registry",
    "Format": "registry",
    "QUANTIZED_TYPES": "registry",
    "convert": "converter",
    "detect": "registry",
    "read": "reading",
}

__all__ = ["DTYPES", "FORMATS", "QUANTIZED_TYPES", "Format", "convert", "detect", "read"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"gptx.conversions.{_HOME[name]}"), name)
