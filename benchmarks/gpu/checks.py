"""Whether the GPU computes what the generic ops do in float64 on the processor.

Every check yields errors and the limit that they must not pass, relative to the largest number that
is expected. The weights are random, or those of the embedded model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np

from benchmarks.gpu import models as gpu_models
from benchmarks.gpu.times import told
from gptx.backends import Backend, Positions, get_backend
from gptx.config import GPT2Config
from gptx.errors import DeviceOutOfMemory
from gptx.generation.engine import TokenGenerator
from gptx.generation.sampling import SamplingParams
from gptx.kv_cache import KVCache
from gptx.logits import next_token_logits, pad
from gptx.model import Transformer
from gptx.quantization import Quantization
from gptx.weights import quantize_weights, to_backend

Finding = tuple[str, float, float]  # what, the error, its limit

LIMITS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}  # of an op
TRAINED_LIMITS = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1e-2}  # of a trained model's logits
RANDOM_LIMITS = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 2e-2}  # attention is sharper there
EXACT = 0.0  # an error is the part of the tokens that differ

# Real heads; a vocabulary and a number of rows that are multiples of nothing.
SMALL = GPT2Config(vocab_size=5003, n_embd=768, n_layer=2, n_head=12)
NARROW = GPT2Config(vocab_size=1009, n_embd=200, n_layer=2, n_head=25, n_positions=64)
BATCHES = ((1,), (5, 1, 33), (7,) * 8, (2,) * 13, (3, 9) * 35)
LONG = (1010, 1003)
STEPS = 4  # after each prompt; the first may not be the graph that the others are
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
class Where:
    """The backend that is checked; "numpy" in a dry run, which has one type only."""

    backend: str = "cupy"

    def make(self, dtype: str = "float32", **options: Any) -> Backend:
        """It, with some options of `get_backend`."""
        return get_backend(self.backend, dtype=self.has(dtype), **options)

    def has(self, dtype: str) -> str:
        """The type itself, or what stands in for it."""
        return dtype if self.backend == "cupy" else "float32"


def reference() -> Backend:
    """The generic ops in float64."""
    return get_backend("numpy", dtype="float64", generic=True)


# The ops


def ops(where: Where, dtype: str) -> Iterator[Finding]:
    """Each op by itself."""
    backend, exact = where.make(dtype), reference()
    for op, cases in _cases(np.random.default_rng(0)).items():
        errors = [
            relative(_run(backend, op, host), _run(exact, op, _rounded(backend, host)))
            for host in cases
        ]
        # NumPy's maximum, since Python's may overlook a NaN
        yield f"{op} {dtype}", float(np.max(errors)), LIMITS[where.has(dtype)]


def _cases(random: np.random.Generator) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of every op of the model, at real widths."""

    def x(*shape: int) -> np.ndarray:
        return random.normal(size=shape) * 2

    def at(first: Sequence[int], counts: Sequence[int]) -> Positions:
        T, last = max(counts), np.array(first) + counts - 1
        index = np.minimum(np.array(first)[:, None] + np.arange(T), last[:, None])
        aligned = len(set(last)) == len(set(counts)) == 1
        return Positions(index, int(last.max()) + 1, aligned, np.asarray)

    def new(positions: Positions) -> np.ndarray:  # [B, H, T, D], repeated where tokens are
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
    """The arguments as the device has them, so that the op's own error is left."""

    def rounded(value: Any) -> Any:
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            return backend.to_numpy(backend.asarray(value)).astype(np.float64)
        return value

    with backend.scope():
        return tuple(map(rounded, arguments))


def _run(backend: Backend, op: str, arguments: tuple[Any, ...]) -> np.ndarray:
    def there(value: Any) -> Any:
        if isinstance(value, Positions):
            return replace(value, bring=backend.asarray)
        return backend.asarray(value) if isinstance(value, np.ndarray) else value

    with backend.scope():
        out = getattr(backend, op)(*map(there, arguments))
        outs = out if isinstance(out, tuple) else (out,)
        return np.concatenate([backend.to_numpy(o).astype(np.float64).ravel() for o in outs])


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, in terms of the largest number."""
    return float(np.abs(got - expected).max() / np.abs(expected).max())


# The forward pass


def forward(
    where: Where,
    dtype: str,
    how: Quantization | None = None,
    config: GPT2Config = SMALL,
    **options: Any,
) -> Iterator[Finding]:
    """Prompts of one length and of several, and decode steps after them, against float64."""
    backend = where.make(dtype, **options)
    config = replace(config, quantization=how)
    model = _model(config, gpu_models.random_weights(config, how), backend)
    limit = RANDOM_LIMITS[where.has(options.get("cache_dtype", dtype))]
    for lengths in (*BATCHES, LONG):
        if max(lengths) < config.n_positions:
            expected = _expected(config, lengths)
            # Kernel by kernel, then as graphs: with early launches, and without.
            errors = [relative(_logits(model, lengths), expected) for _ in range(3)]
            what = f"{len(lengths)} sequences, {max(lengths)} tokens and {STEPS}"
            yield what, float(np.max(errors)), limit


@cache
def _expected(config: GPT2Config, lengths: tuple[int, ...]) -> np.ndarray:
    weights = gpu_models.random_weights(config, config.quantization)
    return _logits(_model(config, weights, reference()), lengths)


def _model(config: GPT2Config, weights: Any, backend: Backend) -> Transformer:
    with backend.scope():
        return Transformer(config, to_backend(weights, backend), backend)


def _logits(model: Transformer, lengths: Sequence[int]) -> np.ndarray:
    """Of random prompts, and of each of some random tokens after them."""
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
    """Its weights, and texts of NumPy's generic ops with them."""

    def __init__(self, how: Quantization | None = None) -> None:
        config, weights = gpu_models.model(gpu_models.EMBEDDED)
        self.weights, self.config = quantize_weights(weights, config, how)
        from gptx.hub.resolve import locate
        from gptx.tokenization.bpe import BytePairTokenizer

        tokenizer = BytePairTokenizer(locate(gpu_models.EMBEDDED, offline=True).tokenizer)
        self.prompts = [tokenizer.encode(text) for text in PROMPTS]

    def on(self, backend: Backend) -> Transformer:
        """The model there."""
        return _model(self.config, self.weights, backend)

    def tokens(self, backend: Backend, params: SamplingParams, n: int = 100) -> list[list[int]]:
        """What all prompts together go on with."""
        found: list[list[int]] = [[] for _ in self.prompts]
        for step in TokenGenerator(self.on(backend), self.prompts, params, max_tokens=n):
            for token in step:
                found[token.sequence].append(token.id or 0)
        return found

    def logits(self, backend: Backend) -> np.ndarray:
        """Of every token of every prompt."""
        model = self.on(backend)
        with backend.scope():
            cache = KVCache(self.config, backend, len(self.prompts), max(map(len, self.prompts)))
            positions = cache.extend([len(ids) for ids in self.prompts])
            ids = backend.asarray(pad(self.prompts))
            return backend.to_numpy(model.forward(ids, positions, cache)).astype(np.float64)


def embedded(where: Where) -> Iterator[Finding]:
    """Greedy tokens and draws identical to NumPy's in float32, logits close in every type."""
    model, numpy = Embedded(), get_backend("numpy", generic=True)
    exact = model.logits(reference())
    greedy = model.tokens(numpy, SamplingParams(seed=0))
    for name, backend in (
        ("compiled", where.make()),
        ("ops", where.make(compile=False)),
        ("generic", where.make(generic=True)),
    ):
        yield f"logits, {name}", float(np.abs(model.logits(backend) - exact).max()), 1e-4
        got = model.tokens(backend, SamplingParams(seed=0))
        yield f"greedy tokens, {name}", _differing(got, greedy), EXACT
    for name, params in SAMPLED.items():
        got = model.tokens(where.make(), params)
        yield f"sampled tokens, {name}", _differing(got, model.tokens(numpy, params)), EXACT
    for dtype in ("float16", "bfloat16"):
        error = relative(model.logits(where.make(dtype)), exact)
        yield f"logits, {dtype}", error, TRAINED_LIMITS[dtype]
    error = relative(model.logits(where.make(cache_dtype="float16")), exact)
    yield "logits, float16 cache", error, TRAINED_LIMITS["float16"]


def embedded_codes(where: Where) -> Iterator[Finding]:
    """The same with quantized weights."""
    for how in (Quantization(64, 8), Quantization(64, 4)):
        model, numpy = Embedded(how), get_backend("numpy", generic=True)
        exact = model.logits(reference())
        error = float(np.abs(model.logits(where.make()) - exact).max())
        yield f"logits, {how}", error, 1e-4
        greedy = SamplingParams(seed=0)
        got = model.tokens(where.make(), greedy)
        yield f"greedy tokens, {how}", _differing(got, model.tokens(numpy, greedy)), EXACT


def _differing(got: list[list[int]], expected: list[list[int]]) -> float:
    pairs = [(a, b) for x, y in zip(got, expected, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(a != b for a, b in pairs) / len(pairs)


# Memory


def memory(where: Where) -> Iterator[Finding]:
    """What does not fit is DeviceOutOfMemory, and the next call works."""
    backend = where.make()
    try:
        with backend.scope():
            backend.zeros((2**46,))
        raised = ""
    except DeviceOutOfMemory as error:
        raised = str(error)
    yield f"out of memory ({raised})", float("memory ran out" not in raised), EXACT
    with backend.scope():
        ones = backend.to_numpy(backend.zeros((1000,)) + 1)
    yield "the call after it", float(np.abs(ones - 1).max()), EXACT


Group = tuple[str, Callable[[], Iterator[Finding]]]  # a title, and what yields the findings


def first(where: Where) -> Iterator[Group]:
    """What has to be right before times mean anything."""
    yield "embedded model", partial(embedded, where)
    for dtype in ("bfloat16", "float32"):
        yield f"forward pass {dtype}", partial(forward, where, dtype)
    yield "out of memory", partial(memory, where)


def rest(where: Where) -> Iterator[Group]:
    """Every other kernel and variant."""
    for dtype in ("float32", "bfloat16", "float16"):
        yield f"ops {dtype}", partial(ops, where, dtype)
    yield "embedded model, codes", partial(embedded_codes, where)
    for group_size, bits in ((64, 4), (64, 8), (32, 4), (128, 4)):
        how = Quantization(group_size, bits)
        yield f"forward pass {how}", partial(forward, where, "bfloat16", how)
    yield "forward pass float16", partial(forward, where, "float16")
    yield "float16 cache", partial(forward, where, "float32", cache_dtype="float16")
    yield "op by op", partial(forward, where, "bfloat16", compile=False)
    yield "narrow heads", partial(forward, where, "float32", config=NARROW)
    yield "int8 float32", partial(forward, where, "float32", Quantization(64, 8))


def run(groups: Iterable[Group], go_on: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """A record for each finding; what raises is one that failed."""
    for title, find in groups:
        if not go_on():
            return
        try:
            for what, error, limit in find():
                ok = error <= limit  # a NaN is not
                yield {"group": title, "check": what, "error": error, "limit": limit, "ok": ok}
        except Exception as error:
            yield {"group": title, "check": title, "error": told(error), "limit": 0.0, "ok": False}
