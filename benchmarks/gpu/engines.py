"""The engines that are timed: the base class, and gptx. The peers are in `peers/`."""

from __future__ import annotations

import importlib
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks.gpu.device import event_seconds
from gptx.backends import get_backend
from gptx.bench.grid import weights_bytes
from gptx.bench.setups import GREEDY
from gptx.config import GPT2Config
from gptx.generation.engine import TokenGenerator
from gptx.generation.sampling import make_sampler
from gptx.kv_cache import KVCache
from gptx.logits import next_token_logits
from gptx.model import Transformer
from gptx.stored_weights import Tensor
from gptx.weights import to_backend


class Engine(ABC):
    """A model that continues prompts, greedily.

    Attributes
    ----------
    weights_bytes
        Bytes of the weights on the device.
    kernels
        Number of kernels of a decode step, if the engine counts them.
    """

    name: str
    weights_bytes: int
    kernels: int | None = None

    def prepare(self, batch: int, capacity: int, n_tokens: int) -> None:  # noqa: B027, optional
        """Prepare for `capacity` positions, `n_tokens` of them new; counts as compile time."""

    @abstractmethod
    def tokens(self, prompts: np.ndarray, n: int) -> Iterator[list[int]]:
        """Yield `n` steps after prompts [B, T]: B new tokens each, when they are on the host."""

    @abstractmethod
    def device_seconds(self, prompts: np.ndarray, n: int) -> tuple[float, float]:
        """Return the seconds of the first tokens and of a step, on the device's clock.

        No token is read on the host.
        """

    def elapsed(self, work: Callable[[], None]) -> float:
        """Return the seconds of some work on the device."""
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    @abstractmethod
    def logits(self, ids: list[int]) -> np.ndarray:
        """Return the logits [V] of the next token."""

    def memory(self) -> tuple[int, int]:
        """Return the bytes that the library holds, and the peak since `release`."""
        return 0, 0

    def release(self) -> None:  # noqa: B027, optional
        """Return unused memory to the device."""


class GptxEngine(Engine):
    """gptx's engine.

    Parameters
    ----------
    backend
        The name of the backend.
    attributes
        Attributes to set on the backend (see `CupyBackend`).
    options
        Options of `get_backend`.
    """

    def __init__(
        self,
        name: str,
        config: GPT2Config,
        weights: Mapping[str, Tensor],
        *,
        backend: str,
        attributes: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.name = name
        self.backend = get_backend(backend, **options)
        vars(self.backend).update(attributes or {})
        with self.backend.scope():
            self.model = Transformer(config, to_backend(weights, self.backend), self.backend)
        self.weights_bytes = weights_bytes(self.model)[0]
        self._cupy = importlib.import_module("cupy") if self.backend.name == "cupy" else None

    def prepare(self, batch: int, capacity: int, n_tokens: int) -> None:
        prompts = np.zeros((batch, capacity - n_tokens + 1), np.int64)
        for _ in range(self.backend.warm_up):  # each with one decode step
            deque(self.tokens(prompts, min(n_tokens, 2)), maxlen=0)
        with self.backend.scope():
            self.kernels = getattr(self.model.forward, "kernels_per_token", None)

    def tokens(self, prompts: np.ndarray, n: int) -> Iterator[list[int]]:
        for step in TokenGenerator(self.model, prompts.tolist(), GREEDY, max_tokens=n):
            yield [-1 if token.id is None else token.id for token in step]

    def device_seconds(self, prompts: np.ndarray, n: int) -> tuple[float, float]:
        backend, texts = self.backend, prompts.tolist()
        B, T = prompts.shape
        with backend.scope():
            cache = KVCache(self.model.config, backend, B, T + n - 1)
            vocab_size = self.model.config.vocab_size
            sampler = make_sampler(GREEDY, backend, texts, list(range(B)), vocab_size)
            ids: Any = None

            def first() -> None:
                nonlocal ids
                ids = backend.sample(next_token_logits(self.model, texts, cache), sampler).ids
                self._compute(ids)

            def steps() -> None:
                nonlocal ids
                for _ in range(n - 1):
                    positions = cache.extend([1] * B)
                    ids = backend.decode(self.model, ids, positions, cache, sampler).ids
                self._compute(ids)

            return self.elapsed(first), self.elapsed(steps) / max(n - 1, 1)

    def _compute(self, ids: Any) -> None:
        """Make a lazy library compute; with CuPy, the end event waits."""
        if self._cupy is None:
            self.backend.to_numpy(ids)

    def elapsed(self, work: Callable[[], None]) -> float:
        if self._cupy is None:
            return super().elapsed(work)
        self.backend.synchronize()
        return event_seconds(work)

    def logits(self, ids: list[int]) -> np.ndarray:
        with self.backend.scope():
            cache = KVCache(self.model.config, self.backend, 1, len(ids))
            return self.backend.to_numpy(next_token_logits(self.model, [ids], cache))[0]

    def memory(self) -> tuple[int, int]:
        if self._cupy is None:
            return super().memory()
        pool = self._cupy.get_default_memory_pool()
        return pool.used_bytes(), pool.total_bytes()

    def release(self) -> None:
        if self._cupy is not None:
            with self.backend.scope():
                self._cupy.get_default_memory_pool().free_all_blocks()
