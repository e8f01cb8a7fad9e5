"""Attention kernels on the emulator, compared with the generic ops in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from gptx.backends import Positions
from tests.emulator import compile_module, cupy_stand_in
from tests.support.cuda_types import GENERIC

with cupy_stand_in.installed():
    from gptx.backends.cuda import attention
    from gptx.backends.cuda.attention import AttentionOp, n_splits
    from gptx.backends.cuda.compiler import CUDA_TYPES, KernelVariant

ERRORS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}  # relative to the largest number
VARIANTS = [  # types of activations and cache, width of a head
    ("float32", "float32", 24),
    ("float32", "float16", 64),
    ("float16", "float16", 8),
    ("bfloat16", "bfloat16", 64),
    ("bfloat16", "float16", 80),
    ("float16", "float16", 128),
    ("float32", "float32", 256),
]
LAYERS, LAYER = 3, 1
MARGIN = 64  # numbers around the cache that kernels must not access


class AttentionCase:
    """A random cache, and attention of random tokens by the kernels.

    Parameters
    ----------
    starts
        Number of cached positions of each of the B sequences.
    new
        Number of new tokens of each sequence; shorter ones repeat their last token.
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
        variant = KernelVariant(dtype, cache_dtype, D)
        self.array_dtype = variant.array_dtype
        new = new or [1] * self.B
        self.T, self.S = max(new), max(np.add(starts, new)) + 7
        self.scale = 1 / np.sqrt(D)
        self.random, self.size = random, size
        # Positions without a token are NaN: a kernel that reads them returns NaN.
        self.slots = np.arange(self.B, 0, -1)  # in another order; slot 0 is free
        shape = LAYERS, (self.B + 1) * H * self.S * D + 2 * MARGIN
        self.keys, self.values = np.full(
            (2, *shape), np.nan, KernelVariant(cache_dtype).array_dtype
        )
        for b, start in enumerate(starts):
            for x in self.layer:
                x[self.slots[b], :, :start] = random.normal(size=(H, start, D))
        addresses = [x[MARGIN:].ctypes.data for buffer in (self.keys, self.values) for x in buffer]
        macros = {"REAL": CUDA_TYPES[dtype], "CACHE": CUDA_TYPES[cache_dtype], "HEAD": str(D)}
        self.module = compile_module(["attention_decode.cu", "attention_prefill.cu"], macros)

        index = [
            [start + min(t, n - 1) for t in range(self.T)]
            for start, n in zip(starts, new, strict=True)
        ]
        self.op = AttentionOp(0, 0, LAYER, self.scale, LAYERS, H, variant)
        self.workspace: Any = SimpleNamespace(
            layout=SimpleNamespace(n_splits=splits),
            dependent_launch=False,
            B=self.B,
            T=self.T,
            index=np.array(index),
            caches=np.array([*addresses, self.S, *self.slots]),
            partial=np.full((self.B, H, splits, D + 2), np.nan, np.float32),
            arrived=np.zeros((self.B, H), np.uint32),
        )

    @property
    def layer(self) -> list[np.ndarray]:
        """Keys and values of the tested layer, [B + 1, H, S, D]."""
        shape = self.B + 1, self.H, self.S, self.D
        return [x[LAYER, MARGIN:-MARGIN].reshape(shape) for x in (self.keys, self.values)]

    def tokens(self) -> np.ndarray:
        """Random queries, keys and values of new tokens [B, T, 3C]; repeated tokens are equal."""
        index = self.workspace.index
        tokens = self.random.normal(size=(self.B, self.T, 3 * self.H * self.D)) * self.size
        for b in range(self.B):
            tokens[b] = tokens[b, index[b] - index[b, 0]]
        return tokens.astype(self.array_dtype)

    def run(self, qkv: np.ndarray) -> np.ndarray:
        """Launch the kernels; return their result [B·T, C]."""
        out = np.full((self.B * self.T, self.H * self.D), np.nan, qkv.dtype)

        def kernel(file: str, name: str, variant: KernelVariant) -> Any:
            def launch(grid: Any, block: Any, *args: Any, dependent: bool, **more: int) -> None:
                self.module.launch(name, (*grid, 1, 1)[:3], (*block, 1, 1)[:3], args, **more)

            return launch

        with mock.patch.object(attention, "kernel", kernel):
            self.op.launch(qkv.reshape(len(out), -1), out, self.workspace)
        return out

    def check(self) -> None:
        """Run the kernels with new tokens; compare the result and the whole cache."""
        qkv, index = self.tokens(), self.workspace.index
        q, *new = GENERIC.split_heads(qkv, self.H)  # [B, H, T, D]
        positions = Positions(index, self.S, False, np.asarray, slots=self.slots)
        after = [x.copy() for x in (self.keys, self.values)]
        exact = []
        for x, buffer, whole in zip(new, self.layer, after, strict=True):
            written = GENERIC.update_kv(buffer, x.astype(buffer.dtype), positions)
            whole[LAYER, MARGIN:-MARGIN] = written.reshape(-1)
            exact.append(np.nan_to_num(written.astype(np.float64))[self.slots])
        expected = GENERIC.attention(q.astype(np.float64), *exact, positions, self.scale)

        out = self.run(qkv).reshape(expected.shape)
        error = np.abs(out.astype(np.float64) - expected).max()
        assert error <= ERRORS[self.dtype] * np.abs(expected).max()
        for given, whole in zip((self.keys, self.values), after, strict=True):
            assert given.tobytes() == whole.tobytes()
        assert not self.workspace.arrived.any()


@pytest.mark.parametrize(("dtype", "cache_dtype", "D"), VARIANTS)
def test_decode_agrees_with_the_generic_op(
    dtype: str, cache_dtype: str, D: int, random: np.random.Generator
) -> None:
    starts = [0, 1, 2, 63, 64, 65, 200]
    AttentionCase(random, dtype, cache_dtype, D, starts=starts).check()


@pytest.mark.parametrize("splits", [1, 2, 5, 32])
def test_decode_with_any_number_of_splits(splits: int, random: np.random.Generator) -> None:
    starts = [3, 128, 129, 333]  # most of 32 blocks are inactive
    AttentionCase(random, starts=starts, splits=splits).check()


def test_consecutive_steps_share_a_workspace(random: np.random.Generator) -> None:
    case = AttentionCase(random, starts=[127, 0, 200], splits=4)
    for _ in range(4):
        case.check()
        case.workspace.index += 1


@pytest.mark.parametrize(("dtype", "cache_dtype", "D"), VARIANTS)
def test_prefill_agrees_with_the_generic_op(
    dtype: str, cache_dtype: str, D: int, random: np.random.Generator
) -> None:
    # An empty cache and one that ends within a tile; short sequences repeat their last token.
    AttentionCase(random, dtype, cache_dtype, D, starts=[0, 37, 5], new=[70, 66, 1], H=1).check()


@pytest.mark.parametrize(("start", "new"), [(0, 2), (0, 64), (64, 64), (1, 65), (130, 129)])
def test_prefill_of_any_length_continues_a_cache(
    start: int, new: int, random: np.random.Generator
) -> None:
    AttentionCase(random, starts=[start], new=[new]).check()


@pytest.mark.parametrize(("dtype", "D"), [("float32", 24), ("bfloat16", 64)])
@pytest.mark.parametrize("new", [1, 66])
def test_scores_of_very_different_size(
    dtype: str, D: int, new: int, random: np.random.Generator
) -> None:
    AttentionCase(random, dtype, dtype, D, starts=[190], new=[new], size=6).check()


@pytest.mark.parametrize(("dtype", "D"), [("float32", 24), ("bfloat16", 64)])
@pytest.mark.parametrize("new", [1, 3])
def test_a_nan_in_the_cache_reaches_the_result(
    dtype: str, D: int, new: int, random: np.random.Generator
) -> None:
    for part in (0, 1):
        case = AttentionCase(random, dtype, dtype, D, starts=[150], new=[new])
        case.layer[part][case.slots[0], 1, 70] = np.nan
        out = case.run(case.tokens())
        assert np.isfinite(out[:, :D]).all()
        assert np.isnan(out[:, D:].astype(np.float32)).all()


def test_splits_give_each_multiprocessor_a_block() -> None:
    for B, H, S in [(1, 12, 1024), (1, 25, 1024), (8, 12, 1024), (16, 12, 1024)]:
        n = n_splits(B, H, S, 132)
        assert 132 <= n * B * H <= 4 * 132
    assert n_splits(1, 12, 1024, 132) == 11
    assert n_splits(128, 12, 1024, 132) == 1


def test_splits_are_limited_by_the_positions() -> None:
    assert n_splits(1, 1, 10**6, 132) == 32
    assert n_splits(1, 1, 65, 132) == 2
    assert n_splits(1, 1, 64, 132) == 1
