"""What `gpu.py` times: gptx in its layers here, PyTorch's ways in `gpu_peers.py`."""

from __future__ import annotations

import importlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from gptx.backends import get_backend
from gptx.bench.speed import weights_bytes
from gptx.config import GPT2Config
from gptx.generation.engine import TokenGenerator
from gptx.generation.sampling import SamplingParams, make_sampler
from gptx.kv_cache import KVCache
from gptx.logits import next_token_logits
from gptx.model import Transformer
from gptx.stored_weights import Tensor
from gptx.weights import to_backend

GREEDY = SamplingParams(seed=0)


class Engine:
    """Continues prompts, greedily.

    Attributes
    ----------
    weights_bytes
        What its weights take on the device.
    kernels
        How many a decode step launches, where the engine itself knows.
    """

    name: str
    weights_bytes: int
    kernels: int | None = None

    def prepare(self, batch: int, room: int, n_tokens: int) -> None:
        """Get ready for prompts and continuations of so many tokens; what that takes counts as
        time to compile."""

    def tokens(self, prompts: np.ndarray, n: int) -> Iterator[list[int]]:
        """`n` new tokens after prompts [B, T]: B of them a step, when they are on the host."""
        raise NotImplementedError

    def device_seconds(self, prompts: np.ndarray, n: int) -> tuple[float, float]:
        """Seconds until the first tokens, and seconds of a step, by the device's own clock; no
        token is read on the host."""
        raise NotImplementedError

    def elapsed(self, work: Callable[[], None]) -> float:
        """Seconds that some work takes the device."""
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def logits(self, ids: list[int]) -> np.ndarray:
        """Those of the next token [V]."""
        raise NotImplementedError

    def memory(self) -> tuple[int, int]:
        """Bytes of the device that this engine's library holds, and the most since `release`."""
        return 0, 0

    def release(self) -> None:
        """Give memory that nobody uses back to the device."""


class Gptx(Engine):
    """gptx: its engine as a user has it.

    Parameters
    ----------
    backend
        Its name.
    attributes
        To set on the backend (see `CupyBackend`).
    options
        Of `get_backend`: which layer, which types.
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

    def prepare(self, batch: int, room: int, n_tokens: int) -> None:
        prompts = np.zeros((batch, room - n_tokens + 1), np.int64)
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
                self._demand(ids)

            def steps() -> None:
                nonlocal ids
                for _ in range(n - 1):
                    positions = cache.extend([1] * B)
                    ids = backend.decode(self.model, ids, positions, cache, sampler).ids
                self._demand(ids)

            return self.elapsed(first), self.elapsed(steps) / max(n - 1, 1)

    def _demand(self, ids: Any) -> None:
        """Have a lazy library compute; CuPy is told to by its events."""
        if self._cupy is None:
            self.backend.to_numpy(ids)

    def elapsed(self, work: Callable[[], None]) -> float:
        if self._cupy is None:
            return super().elapsed(work)
        start, end = (self._cupy.cuda.Event() for _ in range(2))
        self.backend.synchronize()
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(self._cupy.cuda.get_elapsed_time(start, end)) / 1e3

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
