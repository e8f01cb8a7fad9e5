"""The servers of `benchmarks/serving.py`; each is a program of its own."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

PRECISIONS = ("float32", "int8", "int4")


@dataclass(frozen=True)
class Row:
    """A server.

    Attributes
    ----------
    precision
        Precision of the weights.
    where
        The module in this package and the class, "module:Class".
    needs
        Packages for `pip install`.
    options
        Options of the class.
    """

    precision: str
    where: str
    needs: str
    options: dict[str, Any] = field(default_factory=dict)


def _gptx(precision: str) -> Row:
    options = {} if precision == "float32" else {"quantize": precision}
    return Row(precision, "gptx_peer:GptxServer", "'.[fast,serve]'", options)


def _llama(precision: str, dtype: str) -> Row:
    return Row(
        precision, "llama_cpp_peer:LlamaServer", "'llama-cpp-python[server]'", {"dtype": dtype}
    )


TABLE = {
    "gptx float32": _gptx("float32"),
    "gptx int8": _gptx("int8"),
    "gptx int4": _gptx("int4"),
    "llama.cpp F32": _llama("float32", "F32"),
    "llama.cpp Q8_0": _llama("int8", "Q8_0"),
    "llama.cpp Q4_0": _llama("int4", "Q4_0"),
    "mlx_lm float32": Row("float32", "mlx_lm_peer:MlxServer", "mlx-lm"),
    "transformers float32": Row(
        "float32", "transformers_peer:TransformersServer", "'transformers[serving]'"
    ),
}


def server_class(name: str) -> Any:
    """Import the class of a server."""
    module, _, cls = TABLE[name].where.partition(":")
    return getattr(importlib.import_module(f"benchmarks.serving_peers.{module}"), cls)
