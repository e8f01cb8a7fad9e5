"""What a peer has to do: continue prompts of token ids, greedily, and say when a token is there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

Tick = Callable[[list[int]], Any]


class Measured:
    """What runs in a process of its own, with the model loaded.

    Parameters
    ----------
    folder
        The model as the Hub keeps it: config.json and model.safetensors in float32.
    threads
        Of the computation. Engines are told by their own means, as their users would.
    work
        A folder for files in the library's own format; made by `prepare`, in a process before.

    Attributes
    ----------
    version
        The library's.
    n_bytes
        Size of the weights, which a decode step reads once.
    """

    version = ""
    n_bytes = 0

    @classmethod
    def prepare(cls, folder: Path, work: Path, **options: Any) -> None:
        """Convert the model, where the library does not read the folder itself."""


class Engine(Measured, ABC):
    """A library with the model loaded, in one precision."""

    @classmethod
    def for_one_call(
        cls, n_tokens: int, folder: Path, threads: int, work: Path, **options: Any
    ) -> Engine:
        """The engine as one would load it to generate `n_tokens` and no more."""
        return cls(folder, threads, work, **options)  # type: ignore[call-arg]

    @abstractmethod
    def generate(
        self, prompts: list[list[int]], n_tokens: int, tick: Tick, known: bool = False
    ) -> None:
        """Continue prompts of one length by `n_tokens` each.

        `tick(tokens)` is called with one token for each prompt as soon as they are on the host, the
        first time when the prompts are read. A prompt that is `known` is always the same single
        one: the keys and values of all but its last token may be kept from call to call.
        """

    @abstractmethod
    def logits(self, ids: list[int]) -> list[float] | None:
        """The logits after the last of `ids`; None if it does not tell."""

    def program(self, ids: list[int], n_tokens: int) -> tuple[list[str], Path] | None:
        """A program that continues a prompt by itself, and the folder to start it in; None for a
        library, which a process of Python is started for."""
        return None


def best(logits: Any) -> list[int]:
    """The best token of each row of NumPy logits [B, V]."""
    return [int(i) for i in logits.argmax(-1)]
