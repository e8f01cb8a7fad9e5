"""The sampler of `gptx.generation.sampling` as one launch of `kernels/sampler.cu` for each step.

Its arguments are the same at each step, because the device counts the steps and computes the random
numbers. The kernel writes the tokens to device memory for the next step, and to page-locked host
memory, which saves a copy.
"""

from __future__ import annotations

import math
from typing import Any

import cupy
import cupyx
import numpy as np

from gptx.backends.cuda.compiler import KernelVariant, kernel
from gptx.backends.cuda.host_copy import HostCopy, PendingCopies

Array = Any
WARP, MAX_THREADS = 32, 1024  # of a block
WORKSPACE_BYTES = 17 * 1024  # of shared memory, besides the logits, as in sampler.cu
LOADS_IN_FLIGHT = 8  # of logits in a thread, as in sampler.cu
PENDING_STEPS = 4  # whose tokens may be unread on the host


class CupySampler:
    """The result of `CupyBackend.sampler`.

    Parameters
    ----------
    variant
        Variant of the kernel.
    pending_copies
        The backend's pending copies to the host.
    params, prompts, streams, vocab_size, outputs
        As in `gptx.generation.sampling.Sampler`.
    """

    def __init__(
        self,
        variant: KernelVariant,
        pending_copies: PendingCopies,
        params: Any,
        prompts: list[list[int]],
        streams: list[int],
        vocab_size: int,
        outputs: list[list[int]] | None = None,
    ) -> None:
        B, V = len(prompts), vocab_size
        outputs = outputs or [[] for _ in prompts]
        self._greedy = params.greedy
        device = cupy.cuda.Device(variant.device)
        self._kernel = kernel("sampler.cu", "sample", variant)
        self._streams = cupy.asarray(np.array(streams, np.int64))
        self._steps = cupy.asarray(np.array([len(output) for output in outputs], np.int64))
        self._bias = self._seen = self._counts = self._scratch = None
        if params.logit_bias:
            bias = np.zeros(V, np.float32)
            bias[list(params.logit_bias)] = list(params.logit_bias.values())
            self._bias = cupy.asarray(bias)
        if params.repetition_penalty != 1:
            seen = np.zeros((B, V), np.uint8)
            for row, ids, output in zip(seen, prompts, outputs, strict=True):
                row[[*ids, *output]] = 1
            self._seen = cupy.asarray(seen)
        if params.presence_penalty or params.frequency_penalty:
            counts = [np.bincount(output, minlength=V) for output in outputs]
            self._counts = cupy.asarray(np.array(counts, np.int32))
        self._block_maxima = cupy.zeros((B, 2), np.uint64)
        self._ids = cupy.empty(B, np.int64)
        self._pending_copies, self._n_calls = pending_copies, 0
        host = cupyx.empty_pinned((PENDING_STEPS, B), np.int64)  # the device can write to it
        memory = cupy.cuda.UnownedMemory(host.ctypes.data, host.nbytes, host, variant.device)
        self._host_ids = [  # host and device arrays of the same memory
            (row, cupy.ndarray(B, np.int64, cupy.cuda.MemoryPointer(memory, 8 * B * i)))
            for i, row in enumerate(host)
        ]
        self._multiprocessors = device.attributes["MultiProcessorCount"]
        self._threads = min(-(-V // WARP) * WARP, MAX_THREADS)
        self._shared_bytes = WORKSPACE_BYTES
        if not params.greedy:
            self._shared_bytes += 4 * V
            if self._shared_bytes > device.attributes["MaxSharedMemoryPerBlockOptin"]:
                self._shared_bytes = WORKSPACE_BYTES
                self._scratch = cupy.empty((B, V), np.float32)
        # The limit of `gptx.generation.sampling`: logits / 1e-30 are finite in float32.
        temperature = 0 if params.greedy else max(params.temperature, 1e-30)
        self._scalars = (
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
            Their copy to the host; valid until `PENDING_STEPS` further calls.
        """
        B, V = logits.shape
        host, host_ids = self._host_ids[self._n_calls % PENDING_STEPS]
        self._n_calls += 1
        blocks = 1  # of a row; the kernel splits greedy rows only
        if self._greedy:
            useful = -(-V // (LOADS_IN_FLIGHT * self._threads))
            blocks = max(1, min(useful, self._multiprocessors // B))
        self._kernel(
            (blocks, B),
            (self._threads,),
            cupy.ascontiguousarray(logits),
            np.int32(V),
            self._bias,
            self._seen,
            self._counts,
            *self._scalars,
            self._streams,
            self._steps,
            self._scratch,
            self._block_maxima,
            self._ids,
            host_ids,
            shared_bytes=self._shared_bytes,
        )
        return self._ids, self._pending_copies.track(host)

    def keep(self, rows: list[int]) -> None:
        """Keep the sequences `rows` only."""
        index = cupy.asarray(np.array(rows))
        self._streams, self._steps = self._streams[index], self._steps[index]
        self._ids = cupy.empty(len(rows), np.int64)
        self._host_ids = [(host[: len(rows)], device) for host, device in self._host_ids]
        if self._seen is not None:
            self._seen = self._seen[index]
        if self._counts is not None:
            self._counts = self._counts[index]
