"""The base classes of engines: they continue prompts greedily and report each token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

Prompts = list[list[int]]  # token ids, all of one length
Tick = Callable[[list[int]], Any]


class Engine(ABC):
    """A library with a loaded model, in a worker.

    Parameters
    ----------
    folder
        Folder of the model in the Hub's format: config.json and model.safetensors in float32.
    threads
        Number of threads of the computation, set by the engine's own means.
    work
        Folder of the converted model, which `prepare` has written in another process.

    Attributes
    ----------
    version
        Version of the library.
    n_bytes
        Bytes of the weights, which a decode step reads once.
    """

    version = ""
    n_bytes = 0

    @classmethod  # noqa: B027
    def prepare(cls, folder: Path, work: Path, **options: Any) -> None:
        """Convert the model to `work`, if the library does not read the Hub's format."""

    @classmethod
    def for_one_call(
        cls, n_tokens: int, folder: Path, threads: int, work: Path, **options: Any
    ) -> Engine:
        """Load the engine for one call that generates `n_tokens`."""
        return cls(folder, threads, work, **options)  # type: ignore[call-arg]

    @abstractmethod
    def generate(self, prompts: Prompts, n_tokens: int, tick: Tick, known: bool = False) -> None:
        """Continue prompts of one length by `n_tokens` each.

        `tick(tokens)` is called with one token for each prompt when they are on the host; the
        first time, after the prompts are read. A `known` prompt is a single one, the same in each
        call: the engine may keep the keys and values of all but its last token.
        """

    @abstractmethod
    def logits(self, ids: list[int]) -> list[float] | None:
        """Return the logits after the last of `ids`; None if the engine does not report them."""

    def program(self, ids: list[int], n_tokens: int) -> tuple[list[str], Path] | None:
        """Return the command of a program that continues a prompt, and its working folder.

        None for a library: a Python process loads it.
        """
        return None


def best(logits: Any) -> list[int]:
    """Return the best token of each row of NumPy logits [B, V]."""
    return [int(i) for i in logits.argmax(-1)]
