"""GPT-2, written once against the Python array API and run by NumPy, CuPy or MLX.

    >>> import gptx
    >>> print(gptx.generate("ROMEO:", model="shakespeare", max_tokens=40))

Names are imported when they are first used: `import gptx` imports no other package.
"""

from __future__ import annotations

import importlib
import os

from gptx._version import __version__

TYPE_CHECKING = False  # for type checkers it is True; the import of `typing` takes time
if TYPE_CHECKING:
    from typing import Any

    from gptx import research
    from gptx.backends import Backend, available, get_backend
    from gptx.config import GPT2Config
    from gptx.errors import GptxError, Interrupted
    from gptx.generation.api import generate, load, stream
    from gptx.generation.params import SamplingParams
    from gptx.generation.results import Chunk, Result, Score
    from gptx.generation.text_model import Model
    from gptx.kv_cache import KVCache
    from gptx.tokenization.protocol import Tokenizer
    from gptx.training.api import train

# In a checkout, backends/ and conversions/ are beside this folder, not in it. With their parent in
# `__path__`, Python finds them there without an installation.
if not os.path.isdir(os.path.join(os.path.dirname(__file__), "backends")):
    __path__.append(os.path.dirname(os.path.dirname(__file__)))

_MODULES = {
    "Backend": "gptx.backends",
    "available": "gptx.backends",
    "get_backend": "gptx.backends",
    "KVCache": "gptx.kv_cache",
    "GPT2Config": "gptx.config",
    "GptxError": "gptx.errors",
    "Interrupted": "gptx.errors",
    "Chunk": "gptx.generation.results",
    "Model": "gptx.generation.text_model",
    "Result": "gptx.generation.results",
    "Score": "gptx.generation.results",
    "generate": "gptx.generation.api",
    "load": "gptx.generation.api",
    "stream": "gptx.generation.api",
    "train": "gptx.training.api",
    "SamplingParams": "gptx.generation.params",
    "Tokenizer": "gptx.tokenization.protocol",
}

__all__ = [
    "Backend",
    "Chunk",
    "GPT2Config",
    "GptxError",
    "Interrupted",
    "KVCache",
    "Model",
    "Result",
    "SamplingParams",
    "Score",
    "Tokenizer",
    "__version__",
    "available",
    "generate",
    "get_backend",
    "load",
    "research",
    "stream",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "research":
        return importlib.import_module("gptx.research")  # which sets the attribute
    if name not in _MODULES:
        raise AttributeError(f"module 'gptx' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
