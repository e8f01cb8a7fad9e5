"""The sampler kernel on the emulator, compared with definitions in float64 and NumPy's Philox."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from gptx.generation.params import SamplingParams
from gptx.generation.sampling import uniform
from tests.emulator import KERNELS, Module, compile_text
from tests.support.sampling_reference import (
    INF,
    NUMPY,
    Floats,
    make_sampler,
    min_p,
    softmax,
    step,
    top_k,
    top_p,
)

SOURCE = "".join((KERNELS / name).read_text("utf-8") for name in ("philox.cuh", "sampler.cu"))
UNIFORM = """
extern "C" __global__ void uniforms(const u64* keys, unsigned* out) {
    const u64* key = keys + 3 * threadIdx.x;
    out[threadIdx.x] = uniform(key[0], key[1], key[2]);
}
"""


@pytest.fixture(scope="module")
def kernels() -> Module:
    return compile_text(SOURCE + UNIFORM, {})


class SamplerCase:
    """The kernel's arguments for B sequences, except their logits."""

    def __init__(self, kernels: Module, shape: tuple[int, int], **params: Any) -> None:
        (B, V), self.params, self.kernels = shape, SamplingParams(**params), kernels
        self.streams, self.steps = np.arange(B), np.zeros(B, np.int64)
        self.seen: Any = np.zeros(shape, np.uint8) if "repetition_penalty" in params else None
        penalized = {"presence_penalty", "frequency_penalty"} & params.keys()
        self.counts: Any = np.zeros(shape, np.int32) if penalized else None
        self.bias: Any = None
        if self.params.logit_bias:
            self.bias = np.zeros(V, np.float32)
            for token, bias in self.params.logit_bias.items():
                self.bias[token] = bias
        self.threads = min(1024, -(-V // 32) * 32)
        self.blocks = 1
        self.scratch: Any = None
        self.block_maxima = np.zeros((B, 2), np.uint64)
        self.host_ids: Any = np.full(B, -7)

    def __call__(self, logits: Any, order: int = 1) -> list[int]:
        p, x = self.params, np.asarray(logits, np.float32)
        B, V = x.shape
        ids = np.full(B, -7)
        numbers = p.repetition_penalty, p.presence_penalty, p.frequency_penalty, p.temperature
        args = [
            *(x, np.int32(V), self.bias, self.seen, self.counts, *map(np.float32, numbers)),
            *(np.int32(p.top_k), np.float32(p.top_p)),
            np.float32(math.log(p.min_p) if p.min_p else -INF),
            *(np.uint64(p.seed or 0), self.streams, self.steps, self.scratch, self.block_maxima),
            *(ids, self.host_ids),
        ]
        shared = 17 * 1024 + (4 * V if p.temperature and self.scratch is None else 0)
        self.kernels.launch(
            "sample", (self.blocks, B, 1), (self.threads, 1, 1), args, shared, order
        )
        assert self.host_ids is None or self.host_ids.tolist() == ids.tolist()
        return ids.tolist()


def draw(x: Floats, k: int, p: float, m: float, u: float) -> int:
    """The token that the definitions draw from one row, in float64."""
    x = top_k(x.astype(np.float64), k)
    x = top_p(x, p)
    cdf = np.cumsum(softmax(min_p(x, m) if m else x))
    return int(np.searchsorted(cdf, u * cdf[-1], side="right"))


def possible(x: Floats, params: SamplingParams, u: float) -> set[int]:
    """The tokens that may be drawn, where float32 can decide one way and another."""
    top, least = params.top_p, params.min_p
    tops = (top,) if top in (0, 1) else (top * (1 - 3e-6), top, top * (1 + 3e-6))
    leasts = (least,) if least in (0, 1) else (least * (1 - 3e-6), least * (1 + 3e-6))
    around_u = (max(u - 3e-6, 0), u, min(u + 3e-6, 1 - 2**-24))
    return {draw(x, params.top_k, *at) for at in itertools.product(tops, leasts, around_u)}


@pytest.mark.parametrize("seed", [0, 42, 2**63 - 1, 2**63, 2**64 - 1])
def test_uniform_numbers_equal_numpys_bit_for_bit(kernels: Module, seed: int) -> None:
    counts = [*range(4), 1023, 2**32 - 1, 2**32, 2**40]
    keys = np.array(list(itertools.product([seed], [0, 1, 7, 2**33], counts)), np.uint64)
    out = np.zeros(len(keys), np.uint32)
    kernels.launch("uniforms", (1, 1, 1), (len(keys), 1, 1), [keys, out])
    assert (out / 2**24).tolist() == [uniform(*map(int, key)) for key in keys]


FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 60},
    {"top_p": 0.0},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"min_p": 0.05},
    {"top_k": 30, "top_p": 0.8, "min_p": 0.02},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("V", [97, 320])
def test_draws_agree_with_the_definitions(
    kernels: Module, random: np.random.Generator, filters: dict[str, Any], V: int
) -> None:
    params = {"temperature": 0.7, "seed": 9, **filters}
    case = SamplerCase(kernels, (12, V), **params)
    sure = 0
    for count in range(3):
        x = random.normal(random.choice([-90, 0, 20]), 3, (12, V)).astype(np.float32)
        for row, token, stream in zip(x, case(x), case.streams, strict=True):
            scaled = row / np.float32(0.7)
            tokens = possible(scaled, case.params, uniform(9, int(stream), count))
            assert token in tokens
            sure += len(tokens) == 1
    assert sure >= 33
    assert case.steps.tolist() == [3] * 12


def test_draws_from_a_large_vocabulary(kernels: Module, random: np.random.Generator) -> None:
    x = random.normal(-80, 3, (1, 50257)).astype(np.float32)
    for filters in ({}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.99}):
        case = SamplerCase(kernels, x.shape, temperature=1.0, seed=1, **filters)
        for row, token, stream in zip(x, case(x), case.streams, strict=True):
            assert token in possible(row, case.params, uniform(1, int(stream), 0))


EVERYTHING: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.3,
    "logit_bias": {3: -INF, 5: 1.0},
}


@pytest.mark.parametrize("drawn", [{}, {"temperature": 1.0, "top_k": 9, "top_p": 0.9, "seed": 3}])
def test_penalties_agree_with_the_generic_sampler_at_each_step(
    kernels: Module, random: np.random.Generator, drawn: dict[str, Any]
) -> None:
    shape = 4, 40
    prompts = [[1, 2], [7], [7, 7, 9], [0]]
    case = SamplerCase(kernels, shape, **EVERYTHING, **drawn)
    for row, ids in zip(case.seen, prompts, strict=True):
        row[ids] = 1
    sampler = make_sampler(NUMPY, shape, prompts=prompts, **EVERYTHING, **drawn)
    flat = random.normal(0, 0.3, (8, *shape)).astype(np.float32)  # penalties decide
    found = [case(x) for x in flat]
    assert found == [step(sampler, x) for x in flat]
    assert len({token for tokens in found for token in tokens}) > 10
    counts = [np.bincount(row, minlength=40).tolist() for row in np.transpose(found)]
    assert case.counts.tolist() == counts


@pytest.mark.parametrize("V", [1, 2, 31, 33, 64, 1023, 1025, 2049])
def test_vocabularies_of_any_size(kernels: Module, random: np.random.Generator, V: int) -> None:
    x = random.normal(0, 2, (3, V)).astype(np.float32)
    assert SamplerCase(kernels, x.shape)(x) == x.argmax(axis=-1).tolist()
    case = SamplerCase(kernels, x.shape, temperature=1.0, top_p=0.9, seed=2)
    for row, token, stream in zip(x, case(x), case.streams, strict=True):
        assert token in possible(row, case.params, uniform(2, int(stream), 0))


def test_logits_that_do_not_fit_in_shared_memory(
    kernels: Module, random: np.random.Generator
) -> None:
    x = random.normal(0, 2, (3, 300)).astype(np.float32)
    options = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 2}
    near, far = (SamplerCase(kernels, x.shape, **options) for _ in range(2))
    far.scratch = np.zeros((4, 300), np.float32)  # allocated for more sequences
    assert near(x) == far(x)


def test_the_host_array_may_be_null(kernels: Module, random: np.random.Generator) -> None:
    x = random.normal(0, 2, (3, 300)).astype(np.float32)
    case = SamplerCase(kernels, x.shape)
    case.host_ids = None
    assert case(x) == x.argmax(axis=-1).tolist()


def test_equal_logits(kernels: Module) -> None:
    x = np.zeros((8, 2000), np.float32)
    x[:, ::2] = -0.0
    assert SamplerCase(kernels, x.shape)(x) == [0] * 8
    for filters in ({}, {"top_k": 1}, {"top_p": 0.1}, {"min_p": 1.0}):
        case = SamplerCase(kernels, x.shape, temperature=1.0, seed=4, **filters)
        # All tokens are kept.
        assert case(x) == [int(2000 * uniform(4, stream, 0)) for stream in range(8)]


def test_tokens_equal_to_the_threshold_are_kept(kernels: Module) -> None:
    x = np.tile(
        np.array([1, 5, 2, 4, 4, 4, np.nextafter(np.float32(4), 0), -3], np.float32), (90, 1)
    )
    for filters in ({"top_k": 2}, {"top_p": 0.6}):  # the best token has 0.46
        case = SamplerCase(kernels, x.shape, temperature=1.0, seed=4, **filters)
        assert set(case(x)) == {1, 3, 4, 5}


def test_infinite_logits_after_the_temperature(kernels: Module) -> None:
    x = np.tile(np.array([3e38, -3e38, 3.1e38, 0], np.float32), (30, 1))
    assert SamplerCase(kernels, x.shape)(x) == [2] * 30
    for filters in ({}, {"top_k": 2}, {"top_p": 0.5}):
        case = SamplerCase(kernels, x.shape, temperature=1e-6, seed=4, **filters)
        assert set(case(x)) == {0, 2}


def test_the_smallest_and_the_largest_random_number(kernels: Module) -> None:
    least, largest = 27197895, 5479583  # streams of seed 0
    assert (uniform(0, least, 0), uniform(0, largest, 0)) == (0, 1 - 2**-24)
    case = SamplerCase(kernels, (3, 4), temperature=1.0, seed=0)
    case.streams[:] = least, largest, largest
    faint = -20 * math.log(2)
    x = [[-60, 0, faint, -60], [-60, 0, faint, -60], [-60, 0, 1.5 * faint, -60]]
    assert case(x) == [1, 2, 1]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 2, "top_p": 0.9}])
def test_rows_with_logits_that_are_not_finite(kernels: Module, options: dict[str, Any]) -> None:
    x = np.zeros((5, 50), np.float32)
    x[:, 7] = 90
    for row, value in ((1, math.nan), (2, INF), (3, -INF)):
        x[row, 40] = value
    case = SamplerCase(kernels, x.shape, presence_penalty=0.1, **options)
    assert case(x) == [7, -1, -1, -1, 7]
    assert case.counts.sum(axis=-1).tolist() == [1, 0, 0, 0, 1]


def test_the_result_is_independent_of_the_order_of_threads(
    kernels: Module, random: np.random.Generator
) -> None:
    x = random.normal(0, 4, (4, 700)).astype(np.float32)
    runs = []
    for order in range(4):
        case = SamplerCase(
            kernels, x.shape, temperature=1.2, top_k=99, top_p=0.97, frequency_penalty=0.1, seed=8
        )
        runs.append([case(x, order) for _ in range(3)])
    assert runs == [runs[0]] * 4


def test_several_blocks_for_a_row(kernels: Module, random: np.random.Generator) -> None:
    x = random.integers(0, 9, (3, 3000)).astype(np.float32)  # equal logits in every block
    x[1, 2500] = 9
    case = SamplerCase(kernels, x.shape, frequency_penalty=10.0)
    case.blocks, case.threads = 5, 64
    expected = [x.argmax(axis=-1).tolist()]
    assert case(x) == expected[0]
    found, x[0, 77] = case(x), math.nan
    assert all(a != b for a, b in zip(found, expected[0], strict=True))
    assert case(x)[0] == -1
    assert not case.block_maxima.any()
    assert case.steps.tolist() == [3] * 3
