"""Checks of the GPU against the generic ops in float64 on the processor.

Every check yields an error and its limit, both relative to the largest expected number. The weights
are random, or those of the embedded model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np

from benchmarks.gpu.models import EMBEDDED, load_model
from benchmarks.gpu.times import format_error
from gptx.backends import Backend, Positions, get_backend
from gptx.config import GPT2Config
from gptx.errors import DeviceOutOfMemory
from gptx.generation.engine import TokenGenerator
from gptx.generation.params import SamplingParams
from gptx.kv_cache import KVCache
from gptx.logits import next_token_logits, pad
from gptx.model import Transformer
from gptx.quantization import Quantization
from gptx.random_weights import random_weights
from gptx.stored_weights import Tensor
from gptx.weights import quantize_weights, to_backend

Finding = tuple[str, float, float]  # text, error, limit

OP_LIMITS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
TRAINED_LIMITS = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1e-2}  # logits
RANDOM_LIMITS = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 2e-2}  # sharper attention
EXACT = 0.0  # the error is the share of tokens that differ

# Heads of the real width; a vocabulary and numbers of rows that no block size divides.
SMALL = GPT2Config(vocab_size=5003, n_embd=768, n_layer=2, n_head=12)
NARROW = GPT2Config(vocab_size=1009, n_embd=200, n_layer=2, n_head=25, n_positions=64)
BATCHES = ((1,), (5, 1, 33), (7,) * 8, (2,) * 13, (3, 9) * 35)
LONG = (1010, 1003)
STEPS = 4  # decode steps after each prompt; the first may run without a graph
PROMPTS = (
    "First Citizen:\nBefore we proceed any further, hear me speak.",
    "ROMEO:\n",
    "To be, or not to be",
)
SAMPLED = {
    "temperature": SamplingParams(temperature=0.9, seed=7),
    "top-k, top-p, min-p": SamplingParams(temperature=0.8, top_k=50, top_p=0.9, min_p=0.02, seed=8),
    "penalties, bias": SamplingParams(
        temperature=1.1,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias={7: -2.5, 9: 1.0},
        seed=9,
    ),
}


@dataclass(frozen=True)
class Target:
    """The backend under test; "numpy" in a dry run, which has float32 only."""

    backend: str = "cupy"

    def make(self, dtype: str = "float32", **options: Any) -> Backend:
        """Make the backend with options of `get_backend`."""
        return get_backend(self.backend, dtype=self.supported(dtype), **options)

    def supported(self, dtype: str) -> str:
        """Return the type, or float32 in a dry run."""
        return dtype if self.backend == "cupy" else "float32"


def make_reference() -> Backend:
    """Make the backend of the generic ops in float64."""
    return get_backend("numpy", dtype="float64", generic=True)


# The ops


def check_ops(target: Target, dtype: str) -> Iterator[Finding]:
    """Check each op."""
    backend, exact = target.make(dtype), make_reference()
    for op, cases in _cases(np.random.default_rng(0)).items():
        errors = [
            relative_error(_run(backend, op, host), _run(exact, op, _rounded(backend, host)))
            for host in cases
        ]
        # NumPy's maximum propagates NaN; Python's may not.
        yield f"{op} {dtype}", float(np.max(errors)), OP_LIMITS[target.supported(dtype)]


def _cases(random: np.random.Generator) -> dict[str, list[tuple[Any, ...]]]:
    """Return the arguments of every op of the model, at real widths."""

    def x(*shape: int) -> np.ndarray:
        return random.normal(size=shape) * 2

    def at(first: Sequence[int], counts: Sequence[int]) -> Positions:
        T, last = max(counts), np.array(first) + counts - 1
        index = np.minimum(np.array(first)[:, None] + np.arange(T), last[:, None])
        aligned = len(set(last)) == len(set(counts)) == 1
        return Positions(index, int(last.max()) + 1, aligned, np.asarray)

    def new(positions: Positions) -> np.ndarray:  # [B, H, T, D], repeated like the tokens
        B, T = positions.host.shape
        source = (positions.host - positions.host[:, :1])[:, None, :, None]
        return np.take_along_axis(x(B, 12, T, 64), source, 2)

    places = [at(*p) for p in (([0], [70]), ([1000], [1]), ([3, 900], [1, 1]), ([0, 5], [70, 9]))]
    return {
        "embed": [(random.integers(0, 5003, (3, 7)), x(5003, 768))],
        "linear": [(x(3, 1, 768), x(768, 2304) / 30, x(2304)), (x(1, 70, 768), x(768, 96), x(96))],
        "unembed": [(x(2, 3, 768), x(5003, 768) / 30)],
        "layer_norm": [(x(2, 3, 768) + 5, x(768), x(768), 1e-5), (x(1, 1, 200), x(200), x(200), 1)],
        "gelu_new": [(x(2, 3, 3072) * 3,)],
        "gelu": [(x(2, 3, 3072) * 3,)],
        "relu": [(x(2, 3, 7),)],
        "split_heads": [(x(2, 3, 2304), 12)],
        "softmax": [(x(2, 3, 1000) * 5,)],
        "update_kv": [(x(len(p.host), 12, p.stop + 3, 64), new(p), p) for p in places],
        "attention": [
            (
                x(len(p.host), 12, p.host.shape[1], 64),
                x(len(p.host), 12, p.stop, 64),
                x(len(p.host), 12, p.stop, 64),
                p,
                0.125,
            )
            for p in places
        ],
    }


def _rounded(backend: Backend, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Round the arguments to the backend's dtype, so that only the op's error remains."""

    def rounded(value: Any) -> Any:
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            return backend.to_numpy(backend.asarray(value)).astype(np.float64)
        return value

    with backend.scope():
        return tuple(map(rounded, arguments))


def _run(backend: Backend, op: str, arguments: tuple[Any, ...]) -> np.ndarray:
    def on_backend(value: Any) -> Any:
        if isinstance(value, Positions):
            return replace(value, asarray=backend.asarray)
        return backend.asarray(value) if isinstance(value, np.ndarray) else value

    with backend.scope():
        out = getattr(backend, op)(*map(on_backend, arguments))
        outs = out if isinstance(out, tuple) else (out,)
        return np.concatenate([backend.to_numpy(o).astype(np.float64).ravel() for o in outs])


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference relative to the largest expected number."""
    return float(np.abs(got - expected).max() / np.abs(expected).max())


# The forward pass


def check_forward(
    target: Target,
    dtype: str,
    how: Quantization | None = None,
    config: GPT2Config = SMALL,
    **options: Any,
) -> Iterator[Finding]:
    """Check prompts of one length and of several, and decode steps after them."""
    backend = target.make(dtype, **options)
    config = replace(config, quantization=how)
    model = _make_model(config, _random_weights(config), backend)
    limit = RANDOM_LIMITS[target.supported(options.get("cache_dtype", dtype))]
    for lengths in (*BATCHES, LONG):
        if max(lengths) < config.n_positions:
            expected = _expected(config, lengths)
            # Kernel by kernel, then graphs with and without programmatic dependent launch.
            errors = [relative_error(_logits(model, lengths), expected) for _ in range(3)]
            text = f"{len(lengths)} sequences, {max(lengths)} tokens and {STEPS}"
            yield text, float(np.max(errors)), limit


@cache
def _expected(config: GPT2Config, lengths: tuple[int, ...]) -> np.ndarray:
    return _logits(_make_model(config, _random_weights(config), make_reference()), lengths)


@cache
def _random_weights(config: GPT2Config) -> dict[str, Tensor]:
    floats = replace(config, quantization=None)
    return quantize_weights(random_weights(floats), floats, config.quantization)[0]


def _make_model(config: GPT2Config, weights: Any, backend: Backend) -> Transformer:
    with backend.scope():
        return Transformer(config, to_backend(weights, backend), backend)


def _logits(model: Transformer, lengths: Sequence[int]) -> np.ndarray:
    """Return the logits after random prompts, and after each of `STEPS` random tokens."""
    random, backend = np.random.default_rng(sum(lengths)), model.backend
    prompts = [random.integers(0, model.config.vocab_size, n).tolist() for n in lengths]
    with backend.scope():
        cache = KVCache(model.config, backend, len(lengths), max(lengths) + STEPS)
        found = [backend.to_numpy(next_token_logits(model, prompts, cache))]
        for _ in range(STEPS):
            ids = random.integers(0, model.config.vocab_size, (len(lengths), 1))
            positions = cache.extend([1] * len(lengths))
            logits = model.forward(backend.asarray(ids), positions, cache)
            found.append(backend.to_numpy(logits)[:, 0])
    return np.stack(found).astype(np.float64)


# The embedded model


class Embedded:
    """The embedded model, quantized on request, and its tokenized prompts."""

    def __init__(self, how: Quantization | None = None) -> None:
        config, weights = load_model(EMBEDDED)
        self.weights, self.config = quantize_weights(weights, config, how)
        from gptx.hub.resolve import locate
        from gptx.tokenization.pipeline import PipelineTokenizer

        tokenizer = PipelineTokenizer(locate(EMBEDDED, offline=True).tokenizer)
        self.prompts = [tokenizer.encode(text) for text in PROMPTS]

    def on(self, backend: Backend) -> Transformer:
        """Make the model on a backend."""
        return _make_model(self.config, self.weights, backend)

    def tokens(self, backend: Backend, params: SamplingParams, n: int = 100) -> list[list[int]]:
        """Return `n` tokens after each prompt, generated in one batch."""
        found: list[list[int]] = [[] for _ in self.prompts]
        for step in TokenGenerator(self.on(backend), self.prompts, params, max_tokens=n):
            for token in step:
                found[token.sequence].append(token.id or 0)
        return found

    def logits(self, backend: Backend) -> np.ndarray:
        """Return the logits of every token of every prompt."""
        model = self.on(backend)
        with backend.scope():
            cache = KVCache(self.config, backend, len(self.prompts), max(map(len, self.prompts)))
            positions = cache.extend([len(ids) for ids in self.prompts])
            ids = backend.asarray(pad(self.prompts))
            return backend.to_numpy(model.forward(ids, positions, cache)).astype(np.float64)


def check_embedded(target: Target) -> Iterator[Finding]:
    """Check greedy and sampled tokens against NumPy's in float32, and logits in every type."""
    model, numpy = Embedded(), get_backend("numpy", generic=True)
    exact = model.logits(make_reference())
    greedy = model.tokens(numpy, SamplingParams(seed=0))
    for name, backend in (
        ("compiled", target.make()),
        ("ops", target.make(compile=False)),
        ("generic", target.make(generic=True)),
    ):
        yield f"logits, {name}", float(np.abs(model.logits(backend) - exact).max()), 1e-4
        got = model.tokens(backend, SamplingParams(seed=0))
        yield f"greedy tokens, {name}", _share_differing(got, greedy), EXACT
    for name, params in SAMPLED.items():
        got = model.tokens(target.make(), params)
        yield f"sampled tokens, {name}", _share_differing(got, model.tokens(numpy, params)), EXACT
    for dtype in ("float16", "bfloat16"):
        error = relative_error(model.logits(target.make(dtype)), exact)
        yield f"logits, {dtype}", error, TRAINED_LIMITS[dtype]
    error = relative_error(model.logits(target.make(cache_dtype="float16")), exact)
    yield "logits, float16 cache", error, TRAINED_LIMITS["float16"]


def check_embedded_quantized(target: Target) -> Iterator[Finding]:
    """Check logits and greedy tokens with quantized weights."""
    for how in (Quantization(64, 8), Quantization(64, 4)):
        model, numpy = Embedded(how), get_backend("numpy", generic=True)
        exact = model.logits(make_reference())
        error = float(np.abs(model.logits(target.make()) - exact).max())
        yield f"logits, {how}", error, 1e-4
        greedy = SamplingParams(seed=0)
        got = model.tokens(target.make(), greedy)
        yield f"greedy tokens, {how}", _share_differing(got, model.tokens(numpy, greedy)), EXACT


def _share_differing(got: list[list[int]], expected: list[list[int]]) -> float:
    pairs = [(a, b) for x, y in zip(got, expected, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(a != b for a, b in pairs) / len(pairs)


# Memory


def check_memory(target: Target) -> Iterator[Finding]:
    """Check that memory that runs out is DeviceOutOfMemory, and that the next call works."""
    backend = target.make()
    try:
        with backend.scope():
            backend.zeros((2**46,))
        raised = ""
    except DeviceOutOfMemory as error:
        raised = str(error)
    yield f"out of memory ({raised})", float("out of memory" not in raised), EXACT
    with backend.scope():
        ones = backend.to_numpy(backend.zeros((1000,)) + 1)
    yield "the call after it", float(np.abs(ones - 1).max()), EXACT


Group = tuple[str, Callable[[], Iterator[Finding]]]  # title, and generator of findings


def first_groups(target: Target) -> Iterator[Group]:
    """Return the checks without which times are meaningless."""
    yield "embedded model", partial(check_embedded, target)
    for dtype in ("bfloat16", "float32"):
        yield f"forward pass {dtype}", partial(check_forward, target, dtype)
    yield "out of memory", partial(check_memory, target)


def other_groups(target: Target) -> Iterator[Group]:
    """Return the checks of every other kernel and variant."""
    for dtype in ("float32", "bfloat16", "float16"):
        yield f"ops {dtype}", partial(check_ops, target, dtype)
    yield "embedded model, quantized", partial(check_embedded_quantized, target)
    for group_size, bits in ((64, 4), (64, 8), (32, 4), (128, 4)):
        how = Quantization(group_size, bits)
        yield f"forward pass {how}", partial(check_forward, target, "bfloat16", how)
    yield "forward pass float16", partial(check_forward, target, "float16")
    yield "float16 cache", partial(check_forward, target, "float32", cache_dtype="float16")
    yield "op by op", partial(check_forward, target, "bfloat16", compile=False)
    yield "narrow heads", partial(check_forward, target, "float32", config=NARROW)
    yield "int8 float32", partial(check_forward, target, "float32", Quantization(64, 8))


def run_checks(until: float, which: str, backend: str = "cupy") -> Iterator[dict[str, Any]]:
    """Run the groups "first" or "rest"; yield a record for each finding."""
    groups = {"first": first_groups, "rest": other_groups}[which](Target(backend))
    yield from run_groups(groups, until)


def run_groups(groups: Iterable[Group], until: float) -> Iterator[dict[str, Any]]:
    """Yield a record for each finding; an exception is a failed check."""
    for title, check in groups:
        if time.time() > until:
            return
        shared = {"section": "checks", "group": title}
        try:
            for text, error, limit in check():
                ok = error <= limit  # False for NaN
                yield {**shared, "check": text, "error": error, "limit": limit, "ok": ok}
        except Exception as error:
            failure = {"check": title, "error": format_error(error), "limit": 0.0, "ok": False}
            yield shared | failure
