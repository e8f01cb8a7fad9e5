"""CuPy: the whole sampler of `gptx.generation.sampling` as one launch of `cuda/sampler.cu` a step.

It reads nothing from the host but its arguments, which stay the same: random numbers are computed
where they are used, and the device counts the steps. The tokens it writes twice: for the next step,
and to the host's own memory, which takes no copy.
"""

from __future__ import annotations

import math
from typing import Any

import cupy
import cupyx
import numpy as np

from gptx.backends.cuda.compiler import Kinds, kernel
from gptx.backends.cuda.host_copy import HostCopies, HostCopy

Array = Any
WARP, MOST_THREADS = 32, 1024  # of a block, which works on one sequence
ROOM_BYTES = 17 * 1024  # of shared memory that the kernel takes besides the logits
AT_ONCE = 8  # logits that a thread reads in one go
SLOTS = 4  # tokens of so many steps may be on their way to the host


class CupySampler:
    """What `Backend.sampler` returns; the arguments are those of `gptx.generation.sampling.Sampler`."""

    def __init__(
        self,
        kinds: Kinds,
        arrivals: HostCopies,
        params: Any,
        prompts: list[list[int]],
        streams: list[int],
        vocab_size: int,
    ) -> None:
        B, V = len(prompts), vocab_size
        self._greedy = params.greedy
        device = cupy.cuda.Device(kinds.device)
        self._kernel = kernel("sampler.cu", "sample", kinds)
        self._streams = cupy.asarray(np.array(streams, np.int64))
        self._steps = cupy.zeros(B, np.int64)
        self._bias = self._seen = self._counts = self._scratch = None
        if params.logit_bias:
            bias = np.zeros(V, np.float32)
            bias[list(params.logit_bias)] = list(params.logit_bias.values())
            self._bias = cupy.asarray(bias)
        if params.repetition_penalty != 1:
            seen = np.zeros((B, V), np.uint8)
            for row, ids in zip(seen, prompts, strict=True):
                row[ids] = 1
            self._seen = cupy.asarray(seen)
        if params.presence_penalty or params.frequency_penalty:
            self._counts = cupy.zeros((B, V), np.int32)
        self._meetings = cupy.zeros((B, 2), np.uint64)
        self._ids = cupy.empty(B, np.int64)
        self._arrivals, self._n_calls = arrivals, 0
        host = cupyx.empty_pinned((SLOTS, B), np.int64)  # where the device can write, too
        memory = cupy.cuda.UnownedMemory(host.ctypes.data, host.nbytes, host, kinds.device)
        self._slots = [
            (row, cupy.ndarray(B, np.int64, cupy.cuda.MemoryPointer(memory, 8 * B * i)))
            for i, row in enumerate(host)
        ]
        self._n_processors = device.attributes["MultiProcessorCount"]
        self._threads = min(-(-V // WARP) * WARP, MOST_THREADS)
        self._shared_bytes = ROOM_BYTES
        if not params.greedy:
            self._shared_bytes += 4 * V
            if self._shared_bytes > device.attributes["MaxSharedMemoryPerBlockOptin"]:
                self._shared_bytes = ROOM_BYTES
                self._scratch = cupy.empty((B, V), np.float32)
        # As `gptx.generation.sampling` has them: below 1e-30, float32 has no room.
        temperature = 0 if params.greedy else max(params.temperature, 1e-30)
        self._numbers = (
            np.float32(params.repetition_penalty),
            np.float32(params.presence_penalty),
            np.float32(params.frequency_penalty),
            np.float32(temperature),
            np.int32(params.top_k if params.top_k < V else 0),
            np.float32(params.top_p),
            np.float32(math.log(params.min_p) if params.min_p > 0 else -math.inf),
            np.uint64(params.seed or 0),
        )

    def __call__(self, logits: Array) -> tuple[Array, HostCopy]:
        """Sample a token id from each row of float32 logits [B, V]; -1 where a logit is not finite.

        Returns
        -------
        ids
            Token ids [B] on the device; every call returns the same array.
        host_ids
            Their copy to the host; to be read before `SLOTS` further calls.
        """
        B, V = logits.shape
        host, told = self._slots[self._n_calls % SLOTS]
        self._n_calls += 1
        blocks = 1  # of a row; a greedy row has as many as there are processors and work for them
        if self._greedy:
            useful = -(-V // (AT_ONCE * self._threads))
            blocks = max(1, min(useful, self._n_processors // B))
        self._kernel(
            (blocks, B),
            (self._threads,),
            cupy.ascontiguousarray(logits),
            np.int32(V),
            self._bias,
            self._seen,
            self._counts,
            *self._numbers,
            self._streams,
            self._steps,
            self._scratch,
            self._meetings,
            self._ids,
            told,
            shared_bytes=self._shared_bytes,
        )
        return self._ids, self._arrivals.expect(host)

    def keep(self, rows: list[int]) -> None:
        """Drop all sequences but `rows`."""
        index = cupy.asarray(np.array(rows))
        self._streams, self._steps = self._streams[index], self._steps[index]
        self._ids = cupy.empty(len(rows), np.int64)
        self._slots = [(host[: len(rows)], device) for host, device in self._slots]
        if self._seen is not None:
            self._seen = self._seen[index]
        if self._counts is not None:
            self._counts = self._counts[index]
