"""attention_decode.cu and attention_prefill.cu on the CPU, launched as the CuPy backend does: against the
generic ops in float64 on the same rounded numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

from gptx.backends import Positions, get_backend
from gptx.backends.cuda import attention as cupy_attention
from tests.emulator import compile_module

GENERIC = get_backend("numpy", dtype="float64", generic=True)
TYPES = {
    "float32": ("float", np.float32),
    "float16": ("half_t", np.float16),
    "bfloat16": ("bf16_t", bfloat16),
}
ERRORS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}  # of the largest number
KINDS = [  # of activations, of the cache, width of a head
    ("float32", "float32", 24),
    ("float32", "float16", 64),
    ("float16", "float16", 8),
    ("bfloat16", "bfloat16", 64),
    ("bfloat16", "float16", 80),
    ("float16", "float16", 128),
    ("float32", "float32", 256),
]
LAYERS, LAYER = 3, 1
EDGE = 64  # numbers around the cache that nobody may touch


class Attention:
    """Random tokens and a random cache, on the CPU in place of a device.

    Parameters
    ----------
    starts
        How many positions of each of the B sequences are in the cache.
    new
        How many new tokens each has; those with fewer than others repeat their last one.
    """

    def __init__(
        self,
        random: np.random.Generator,
        dtype: str = "bfloat16",
        cache_dtype: str = "bfloat16",
        D: int = 64,
        *,
        starts: list[int],
        new: list[int] | None = None,
        H: int = 2,
        splits: int = 3,
        size: float = 1.0,
    ) -> None:
        self.dtype, self.D, self.H, self.B = dtype, D, H, len(starts)
        new = new or [1] * self.B
        self.T, self.S = max(new), max(np.add(starts, new)) + 7
        self.scale = 1 / np.sqrt(D)
        self.random, self.size = random, size
        # What no token has been put into is NaN: who reads it can be told.
        room = LAYERS, self.B * H * self.S * D + 2 * EDGE
        self.keys, self.values = np.full((2, *room), np.nan, TYPES[cache_dtype][1])
        for b, start in enumerate(starts):
            for x in self.layer:
                x[b, :, :start] = random.normal(size=(H, start, D))
        addresses = [x[EDGE:].ctypes.data for buffer in (self.keys, self.values) for x in buffer]
        macros = {"REAL": TYPES[dtype][0], "CACHE": TYPES[cache_dtype][0], "HEAD": str(D)}
        module = compile_module(["attention_decode.cu", "attention_prefill.cu"], macros)

        index = [
            [start + min(t, n - 1) for t in range(self.T)]
            for start, n in zip(starts, new, strict=True)
        ]

        def launch(
            file: str, name: str, kinds: Any, grid: Any, block: Any, *args: Any, **more: int
        ) -> None:
            module.launch(name, (*grid, 1, 1)[:3], (*block, 1, 1)[:3], args, **more)

        kinds = SimpleNamespace(dtype=dtype, cache_dtype=cache_dtype, head=D)
        self.memory = SimpleNamespace(
            program=SimpleNamespace(kinds=kinds, n_head=H, n_layer=LAYERS),
            B=self.B,
            T=self.T,
            index=np.array(index),
            caches=np.array([*addresses, self.S]),
            splits=splits,
            partial=np.full((self.B, H, splits, D + 2), np.nan, np.float32),
            arrived=np.zeros((self.B, H), np.uint32),
            launch=launch,
        )

    @property
    def layer(self) -> list[np.ndarray]:
        """Keys and values of the layer in use, [B, H, S, D]."""
        shape = self.B, self.H, self.S, self.D
        return [x[LAYER, EDGE:-EDGE].reshape(shape) for x in (self.keys, self.values)]

    def tokens(self) -> np.ndarray:
        """Queries, keys and values of new tokens [B, T, 3C]; one that is repeated is the same."""
        index = self.memory.index
        tokens = self.random.normal(size=(self.B, self.T, 3 * self.H * self.D)) * self.size
        for b in range(self.B):
            tokens[b] = tokens[b, index[b] - index[b, 0]]
        return tokens.astype(TYPES[self.dtype][1])

    def run(self, qkv: np.ndarray) -> np.ndarray:
        """What the kernels make of them, [B·T, C]."""
        out = np.full((self.B * self.T, self.H * self.D), np.nan, qkv.dtype)
        op = SimpleNamespace(layer=LAYER, scale=self.scale)
        cupy_attention.launch(op, self.memory, qkv.reshape(len(out), -1), out)
        return out

    def check(self) -> None:
        """Attend with new tokens: the result and the cache are what they have to be."""
        qkv, index = self.tokens(), self.memory.index
        q, *new = GENERIC.split_heads(qkv, self.H)  # [B, H, T, D]
        positions = Positions(index, self.S, False, np.asarray)
        after = [x.copy() for x in (self.keys, self.values)]
        exact = []
        for x, buffer, whole in zip(new, self.layer, after, strict=True):
            written = GENERIC.update_kv(buffer, x.astype(buffer.dtype), positions)
            whole[LAYER, EDGE:-EDGE] = written.reshape(-1)
            exact.append(np.nan_to_num(written.astype(np.float64)))
        expected = GENERIC.attention(q.astype(np.float64), *exact, positions, self.scale)

        out = self.run(qkv).reshape(expected.shape)
        error = np.abs(out.astype(np.float64) - expected).max()
        assert error <= ERRORS[self.dtype] * np.abs(expected).max()
        for given, whole in zip((self.keys, self.values), after, strict=True):
            assert given.tobytes() == whole.tobytes()
        assert not self.memory.arrived.any()


@pytest.mark.parametrize(("dtype", "cache_dtype", "D"), KINDS)
def test_a_step_is_the_generic_one(
    dtype: str, cache_dtype: str, D: int, random: np.random.Generator
) -> None:
    starts = [0, 1, 2, 63, 64, 65, 200]
    Attention(random, dtype, cache_dtype, D, starts=starts).check()


@pytest.mark.parametrize("splits", [1, 2, 5, 32])
def test_a_step_is_the_same_however_many_blocks_share_it(
    splits: int, random: np.random.Generator
) -> None:
    starts = [3, 128, 129, 333]  # in 32 blocks, most have nothing to do
    Attention(random, starts=starts, splits=splits).check()


def test_steps_follow_each_other_in_the_same_room(random: np.random.Generator) -> None:
    attention = Attention(random, starts=[127, 0, 200], splits=4)
    for _ in range(4):
        attention.check()
        attention.memory.index += 1


@pytest.mark.parametrize(("dtype", "cache_dtype", "D"), KINDS)
def test_a_prompt_is_the_generic_one(
    dtype: str, cache_dtype: str, D: int, random: np.random.Generator
) -> None:
    # From nothing and from the middle of a tile; sequences with fewer new tokens repeat the last.
    Attention(random, dtype, cache_dtype, D, starts=[0, 37, 5], new=[70, 66, 1], H=1).check()


@pytest.mark.parametrize(("start", "new"), [(0, 2), (0, 64), (64, 64), (1, 65), (130, 129)])
def test_prompts_of_any_length_continue_a_cache(
    start: int, new: int, random: np.random.Generator
) -> None:
    Attention(random, starts=[start], new=[new]).check()


@pytest.mark.parametrize(("dtype", "D"), [("float32", 24), ("bfloat16", 64)])
@pytest.mark.parametrize("new", [1, 66])
def test_scores_may_be_far_apart(dtype: str, D: int, new: int, random: np.random.Generator) -> None:
    Attention(random, dtype, dtype, D, starts=[190], new=[new], size=6).check()


@pytest.mark.parametrize(("dtype", "D"), [("float32", 24), ("bfloat16", 64)])
@pytest.mark.parametrize("new", [1, 3])
def test_a_nan_in_the_cache_is_not_lost(
    dtype: str, D: int, new: int, random: np.random.Generator
) -> None:
    for part in (0, 1):
        attention = Attention(random, dtype, dtype, D, starts=[150], new=[new])
        attention.layer[part][0, 1, 70] = np.nan
        out = attention.run(attention.tokens())
        assert np.isfinite(out[:, :D]).all()
        assert np.isnan(out[:, D:].astype(np.float32)).all()


def test_a_step_gives_each_multiprocessor_a_block() -> None:
    for B, H, S in [(1, 12, 1024), (1, 25, 1024), (8, 12, 1024), (16, 12, 1024)]:
        n = cupy_attention.splits(B, H, S, 132)
        assert 132 <= n * B * H <= 4 * 132
    assert cupy_attention.splits(1, 12, 1024, 132) == 11
    assert cupy_attention.splits(128, 12, 1024, 132) == 1


def test_a_step_has_no_more_blocks_than_it_can_use() -> None:
    assert cupy_attention.splits(1, 1, 10**6, 132) == 32
    assert cupy_attention.splits(1, 1, 65, 132) == 2
    assert cupy_attention.splits(1, 1, 64, 132) == 1
