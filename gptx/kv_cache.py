"""The KV cache: keys and values of the tokens before the new ones.

Each layer has two preallocated buffers [N, H, S, D], for keys and values. Each of the N slots holds
one sequence and has a length. The engine calls `extend` before a forward pass, the model calls
`update` in each layer. A pass can take some of the slots, in any order, so a sequence leaves a
batch without a copy of the others.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptx.backends import Backend, Positions
from gptx.config import GPT2Config
from gptx.errors import DataError, NotFoundError, ParameterError, WeightsError
from gptx.files import atomic_file
from gptx.safetensors_file import read_safetensors, write_safetensors

Array = Any
FORMAT = "gptx-kv-cache"
MAX_REPR_SEQUENCES = 8  # whose lengths the `repr` of a cache shows


class KVCache:
    """Keys and values of sequences in `n_slots` slots of up to `capacity` tokens each.

    Attributes
    ----------
    keys, values
        Buffers of each layer, L arrays [n_slots, H, capacity, D].
    lengths
        Number of tokens in each slot, NumPy integers [n_slots].
    tokens, fingerprint
        Token ids of each sequence, and the checksum of the weights that computed the cache;
        None and "" if `Model.prefill` did not fill it.
    """

    def __init__(self, config: GPT2Config, backend: Backend, n_slots: int, capacity: int) -> None:
        if not 1 <= capacity <= config.n_positions:
            raise ParameterError(
                f"cache capacity is {capacity}, expected 1 to {config.n_positions} (the context)"
            )
        if n_slots < 1:
            raise ParameterError(f"the cache has {n_slots} sequences, expected at least 1")
        self.config = config
        self.backend = backend
        self.capacity = capacity
        self.lengths = np.zeros(n_slots, dtype=np.int64)
        self.tokens: list[list[int]] | None = None
        self.fingerprint = ""
        shape = (n_slots, config.n_head, capacity, config.head_dim)
        dtype = backend.cache_dtype
        # One array for all buffers: a large array can be on huge pages of memory.
        buffers = backend.zeros((2 * config.n_layer, *shape), dtype)
        layers = range(config.n_layer)
        self.keys = [buffers[2 * layer, ...] for layer in layers]
        self.values = [buffers[2 * layer + 1, ...] for layer in layers]

    def __repr__(self) -> str:
        lengths = ", ".join(str(length) for length in self.lengths[:MAX_REPR_SEQUENCES])
        more = ", …" if len(self.lengths) > MAX_REPR_SEQUENCES else ""
        plural = "s" * (len(self.lengths) != 1)
        return (
            f"<gptx.KVCache of {len(self.lengths)} sequence{plural}: {lengths}{more} of "
            f"{self.capacity} tokens, {self.backend.name} {self.backend.cache_dtype}, "
            f"{self.n_bytes / 1e6:,.2f} MB>"
        )

    @property
    def n_bytes(self) -> int:
        """Size of the buffers, in bytes."""
        itemsize = int(self.backend.cache_dtype[-2:]) // 8  # "bfloat16" has 2 bytes
        return itemsize * sum(math.prod(x.shape) for x in (*self.keys, *self.values))

    def extend(
        self, counts: Sequence[int] | np.ndarray, slots: Sequence[int] | None = None
    ) -> Positions:
        """Add `counts[b]` new tokens to sequence b; return their positions.

        The next forward pass takes ids [B, max(counts)]; a sequence with fewer new tokens repeats
        its last one (see `Positions` and `gptx.logits.pad`).

        Parameters
        ----------
        counts
            Number of new tokens of each of the B sequences.
        slots
            The slot of each sequence, all different; None for all slots in order.

        Raises
        ------
        ParameterError
            The tokens exceed the capacity.
        """
        if slots is not None and list(slots) == list(range(len(self.lengths))):
            slots = None
        counts, rows = np.asarray(counts), slice(None) if slots is None else np.asarray(slots)
        first = self.lengths[rows]
        ends = first + counts
        T, stop = int(counts.max()), int(ends.max())
        if stop > self.capacity:
            raise ParameterError(
                f"{stop} tokens exceed the cache's capacity of {self.capacity}: make it larger"
            )
        is_rectangle = int(counts.min()) == T
        host = first[:, None] + np.arange(T)
        if not is_rectangle:
            host = np.minimum(host, ends[:, None] - 1)
        self.lengths[rows] = ends
        return Positions(
            host,
            stop,
            is_rectangle and int(ends.min()) == stop,
            self.backend.asarray,
            slots=None if slots is None else rows,
            counts=None if is_rectangle else counts,
        )

    def update(self, layer: int, k: Array, v: Array, positions: Positions) -> tuple[Array, Array]:
        """Add keys and values [B, H, T, D] of the new tokens; return all so far, [B, H, S, D]."""
        for buffers, new in ((self.keys, k), (self.values, v)):
            new = self._cast(new, buffers[layer].dtype)
            buffers[layer] = self.backend.update_kv(buffers[layer], new, positions)
        k, v = (self._read(x[layer], positions) for x in (self.keys, self.values))
        return self._cast(k, self.backend.float_dtype), self._cast(v, self.backend.float_dtype)

    def _read(self, buffer: Array, positions: Positions) -> Array:
        """Return the keys or values of a pass, [B, H, S, D]; a copy if its slots are no range."""
        rows = positions.rows
        if isinstance(rows, slice):
            return buffer[rows, :, : positions.stop, :]
        return self.backend.xp.take(buffer[:, :, : positions.stop, :], rows, axis=0)

    def _cast(self, x: Array, dtype: Any) -> Array:
        return x if x.dtype == dtype else self.backend.xp.astype(x, dtype)

    def trim(self, slot: int, length: int) -> None:
        """Drop all but the first `length` tokens of a slot."""
        self.lengths[slot] = min(length, self.lengths[slot])

    def copy(
        self, length: int, slots: Sequence[int], source: KVCache | None = None, slot: int = 0
    ) -> None:
        """Copy the first `length` tokens of a slot of `source`, or of this cache, to `slots`.

        They replace the tokens of these slots.
        """
        source = self if source is None else source
        self.lengths[list(slots)] = 0
        positions = self.extend([length] * len(slots), slots)
        shape = (len(slots), self.config.n_head, length, self.config.head_dim)
        for targets, sources in ((self.keys, source.keys), (self.values, source.values)):
            for layer, (target, x) in enumerate(zip(targets, sources, strict=True)):
                x = self._cast(x[slot : slot + 1, :, :length, :], target.dtype)
                x = self.backend.xp.broadcast_to(x, shape)
                targets[layer] = self.backend.update_kv(target, x, positions)

    def prefix(self, length: int, capacity: int) -> KVCache:
        """Return a new cache with the first `length` tokens of this cache's first sequence."""
        new = KVCache(self.config, self.backend, 1, capacity)
        new.copy(length, [0], self)
        return new

    def save(self, path: str | Path) -> None:
        """Write the cache to one safetensors file, which `load` reads on any backend.

        Raises
        ------
        ParameterError
            The path is neither a string nor a path object.
        StorageError
            The file cannot be written; an existing file stays unchanged.
        """
        _check_path(path)
        stop = int(self.lengths.max())
        tensors = {"lengths": self.lengths}
        for layer, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            for name, x in (("k", k), ("v", v)):
                with self.backend.scope():
                    host = self.backend.to_numpy(x[:, :, :stop, :])
                tensors[f"h.{layer}.{name}"] = np.ascontiguousarray(host)
        metadata = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "tokens": json.dumps(self.tokens),
        }
        with atomic_file(path) as file:
            write_safetensors(file, tensors, metadata)

    @classmethod
    def load(
        cls, path: str | Path, config: GPT2Config, backend: Backend, capacity: int | None = None
    ) -> KVCache:
        """Read a file that `save` wrote, for a model of the same shape.

        `capacity` is the number of tokens of each sequence; the default is the context.

        Raises
        ------
        NotFoundError
            The file does not exist.
        DataError
            The file is damaged, is not a cache, or belongs to a model of another shape.
        ParameterError
            The cache exceeds `capacity`, or the path is neither a string nor a path object.
        """
        _check_path(path)
        if not Path(path).is_file():
            raise NotFoundError(f"cache {path} does not exist, or is not a regular file")
        no_cache = DataError(
            f"{path} is not a KV cache, or is damaged: expected a file that KVCache.save() or "
            "`gptx generate --prompt-cache` wrote"
        )
        try:
            tensors, metadata = read_safetensors(path)
        except WeightsError:
            raise no_cache from None
        lengths = tensors.get("lengths")
        if metadata.get("format") != FORMAT or lengths is None or lengths.dtype.kind != "i":
            raise no_cache
        stop = int(lengths.max(initial=0))
        shape = (lengths.size, config.n_head, stop, config.head_dim)
        names = [f"h.{layer}.{name}" for layer in range(config.n_layer) for name in ("k", "v")]
        if set(tensors) != {"lengths", *names} or any(
            tensors[n].shape != shape or tensors[n].dtype.kind != "f" for n in names
        ):
            raise DataError(
                f"{path} belongs to another model: expected {config.n_layer} layers of keys and "
                f"values {list(shape)}"
            )
        if lengths.ndim != 1 or lengths.min(initial=1) < 1 or stop > config.n_positions:
            raise DataError(
                f"{path} holds sequences of {lengths.tolist()} tokens, expected 1 to "
                f"{config.n_positions}"
            )
        if capacity is not None and capacity < stop:
            raise ParameterError(
                f"cache capacity is {capacity}, expected at least the {stop} tokens of {path}"
            )
        cache = cls(config, backend, lengths.size, capacity or config.n_positions)
        cache.fingerprint = metadata.get("fingerprint", "")
        cache.tokens = _tokens(metadata, lengths, path)
        positions = cache.extend([stop] * lengths.size)  # values past a length are never read
        for layer in range(config.n_layer):
            k, v = (backend.asarray(tensors[f"h.{layer}.{name}"]) for name in ("k", "v"))
            cache.update(layer, k, v, positions)
        cache.lengths = lengths.astype(np.int64)
        return cache


def _check_path(path: Any) -> None:
    if not isinstance(path, str | os.PathLike):
        raise ParameterError(f"the path of the cache is {path!r}, expected a string or a Path")


def _tokens(metadata: dict[str, str], lengths: np.ndarray, path: Any) -> list[list[int]] | None:
    """Return the token ids of a saved cache; None if it has none."""
    try:
        tokens = json.loads(metadata.get("tokens", "null"))
        if tokens is None or [len(ids) for ids in tokens] == lengths.tolist():
            return tokens
    except (ValueError, TypeError):
        pass
    raise DataError(
        f"{path}: its token ids do not match its {lengths.tolist()} positions: save it again"
    )
