"""The engines of `benchmarks/training.py`; each is imported in its own process only."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """An engine.

    Attributes
    ----------
    where
        The module in this package and the class, "module:Class".
    needs
        Packages for `pip install`.
    options
        Options of the class.
    """

    where: str
    needs: str
    options: dict[str, Any] = field(default_factory=dict)


TABLE = {
    "gptx": Row("gptx_peer:GptxTraining", "'.[fast]'"),
    "PyTorch eager": Row("pytorch_peer:PyTorchTraining", "torch transformers", {"compiled": False}),
    "PyTorch compiled": Row(
        "pytorch_peer:PyTorchTraining", "torch transformers", {"compiled": True}
    ),
    "llm.c": Row("llm_c_peer:LlmCTraining", "gptx"),
}


def engine_class(name: str) -> Any:
    """Import the class of an engine."""
    module, _, cls = TABLE[name].where.partition(":")
    return getattr(importlib.import_module(f"benchmarks.training_peers.{module}"), cls)
