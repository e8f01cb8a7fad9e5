"""Training on a GPU: gradients against float64, then steps beside PyTorch's, in turns."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from benchmarks.gpu.checks import Finding, Group, Target, make_reference, run_groups
from benchmarks.gpu.models import load_model, model_folder
from benchmarks.gpu.times import Setting, format_error
from benchmarks.training_peers.gptx_peer import OneBatch
from gptx.backends import Backend, Positions, gradients
from gptx.backends.backward import Batch, Dropout, LossFunction, loss_function
from gptx.backends.graph import named_weights
from gptx.bench.sources import random_ids
from gptx.bench.worker import Event
from gptx.config import GPT2Config
from gptx.model import Transformer, forward
from gptx.random_weights import random_weights
from gptx.training import optimizers
from gptx.training.settings import TrainingSettings
from gptx.training.trainer import Trainer
from gptx.weights import to_backend

ROUNDS = 7
WARM_UP = 3  # updates before the first round; the first one compiles
STEPS = 5  # updates in a round
LEARNING_RATE = 1e-4

# Largest error of a gradient, relative to the norm of its tensor.
OP_LIMITS = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}
MODEL_LIMITS = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 6e-2}
LOSS_LIMITS = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}  # of engines, relative

# Heads of the real width; numbers of rows and a vocabulary that no block size divides.
SMALL = GPT2Config(vocab_size=1009, n_positions=160, n_embd=192, n_layer=2, n_head=3)
SHAPE = 3, 150  # sequences and tokens
DROPOUT = Dropout(0.1, 0.1, 0.1, seed=5)
VARIANTS = {"": None, ", dropout": DROPOUT}


# Checks


def check_gradients(target: Target, dtype: str) -> Iterator[Finding]:
    """Check each gradient at real widths."""
    backend, exact = target.make(dtype), make_reference()
    limit = OP_LIMITS[target.supported(dtype)]
    for text, (name, arguments, options) in _cases(np.random.default_rng(0)).items():
        rounded = [_rounded(backend, x) for x in arguments]
        with backend.scope():
            on_device = [_on_backend(backend, x) for x in rounded]
            found = gradients.function(backend, name)(*on_device, **options)
            again = gradients.function(backend, name)(*on_device, **options)
            results = [[_to_host(backend, x) for x in _as_tuple(y)] for y in (found, again)]
        expected = _as_tuple(gradients.function(exact, name)(*rounded, **options))
        errors = [norm_error(a, b) for a, b in zip(results[0], expected, strict=True)]
        yield f"{text} {dtype}", float(np.max(errors)), limit
        equal = all(np.array_equal(a, b) for a, b in zip(*results, strict=True))
        yield f"{text} {dtype}, the same bits again", float(not equal), 0.0


def _cases(random: np.random.Generator) -> dict[str, tuple[str, list[Any], dict[str, Any]]]:
    """Return function, arguments and options of each check."""

    def x(*shape: int) -> np.ndarray:
        return random.normal(size=shape)

    def at(B: int, T: int) -> Positions:
        return Positions(np.broadcast_to(np.arange(T), (B, T)), T, True, np.asarray)

    wanted = {"wanted": (True, True, True)}
    ids = random.integers(0, 5003, (3, 400)) ** 2 // 5003  # some are frequent
    counter = {"seed": 2**40, "step": 3, "site": 2, "first_row": 2**33}
    targets, weights = random.integers(0, 5003, 300), random.uniform(size=300).astype(np.float32)
    heads = {"64": (2, 12, 333, 64), "80": (1, 5, 200, 80), "128": (1, 3, 130, 128)}
    attention = {
        f"attention_vjp, D = {D}": (
            "attention_vjp",
            [x(B, T, H * n), *(x(B, H, T, n) for _ in range(3)), at(B, T), 0.1],
            wanted,
        )
        for D, (B, H, T, n) in heads.items()
    }
    return {
        "linear_vjp": ("linear_vjp", [x(3, 400, 96), x(3, 400, 768), x(768, 96), x(96)], wanted),
        "layer_norm_vjp": (
            "layer_norm_vjp",
            [x(3, 400, 768), x(3, 400, 768) + 3, x(768), x(768), 1e-5],
            wanted,
        ),
        "embed_vjp": ("embed_vjp", [x(3, 400, 768), ids, x(5003, 768)], {"wanted": (False, True)}),
        **{
            f"{op}_vjp": (f"{op}_vjp", [x(2, 99, 3072), 3 * x(2, 99, 3072)], {"wanted": (True,)})
            for op in ("gelu_new", "gelu", "relu")
        },
        **attention,
        "dropout": ("dropout", [x(2, 99, 768), 0.2], counter),
        "cross_entropy": (
            "cross_entropy",
            [x(300, 768) / 9, x(5003, 768) / 3, targets, weights],
            {"wanted": (True, True)},
        ),
    }


def check_model(target: Target, dtype: str, config: GPT2Config = SMALL) -> Iterator[Finding]:
    """Check loss and gradients of a small model, and an update."""
    B, T = SHAPE[0], min(SHAPE[1], config.n_positions - 1)
    tokens = np.array(random_ids(config, B, T + 1))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((B, T), np.float32))
    host = random_weights(config)
    backend, exact = target.make(dtype), make_reference()
    limit = MODEL_LIMITS[target.supported(dtype)]
    for text, dropout in VARIANTS.items():
        expected = _gradients(exact, config, host, batch, dropout)
        found = _gradients(backend, config, host, batch, dropout)
        errors = [norm_error(found[name], expected[name]) for name in expected]
        yield f"loss and gradients{text}", float(np.max(errors)), limit
    yield "an update", *_check_update(backend, expected)


def _gradients(
    backend: Backend,
    config: GPT2Config,
    host: dict[str, np.ndarray],
    batch: Batch,
    dropout: Dropout | None,
) -> dict[str, np.ndarray]:
    """Return the loss and the gradients by name."""
    with backend.scope():
        model = Transformer(config, to_backend(host, backend), backend)
        function: LossFunction = loss_function(forward, model, dropout=dropout)
        weights = dict(named_weights(model.weights))
        loss, found = function.gradients(weights, batch, scale=1 / batch.n_tokens, step=4)
        return {name: _to_host(backend, g) for name, g in {"loss": loss, **found}.items()}


def _check_update(backend: Backend, tensors: dict[str, np.ndarray]) -> tuple[float, float]:
    """Return the error of AdamW and of the norm, for gradients as large as the weights."""
    exact = make_reference()
    options = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "step": 3, "grad_scale": 0.5}
    options |= {"decays": [0.1] * len(tensors)}
    host = [x.astype(np.float32) for x in tensors.values()]
    results = []
    for ops in (backend, exact):
        wide = "float64" if ops is exact else "float32"
        with ops.scope():
            parts = [[ops.asarray(x * f, wide) for x in host] for f in (1, 1, 0.1)]
            parts.append([ops.asarray(x * x, wide) for x in host])
            norm = optimizers.function(ops, "squared_norm")(parts[1])
            new = optimizers.function(ops, "adamw_update")(*parts, **options)
            results.append([_to_host(ops, x) for x in (norm, *new[0], *new[1], *new[2])])
    errors = [norm_error(a, b) for a, b in zip(*results, strict=True)]
    return float(np.max(errors)), 1e-5


def norm_error(got: np.ndarray | None, expected: np.ndarray | None) -> float:
    """Return the norm of the difference relative to the norm of the expected tensor."""
    if expected is None or got is None:
        return 0.0 if got is expected else np.inf
    return float(np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30))


def _as_tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def _to_host(backend: Backend, x: Any) -> Any:
    return None if x is None else backend.to_numpy(x).astype(np.float64)


def _rounded(backend: Backend, x: Any) -> Any:
    """Round float64 to the backend's dtype, so that only the function's error remains."""
    if not isinstance(x, np.ndarray) or x.dtype != np.float64:
        return x
    with backend.scope():
        return _to_host(backend, backend.asarray(x))


def _on_backend(backend: Backend, x: Any) -> Any:
    """Copy an argument: float64 becomes the backend's dtype, float32 stays."""
    if isinstance(x, Positions):
        return Positions(x.host, x.stop, x.aligned, backend.asarray)
    if not isinstance(x, np.ndarray):
        return x
    return backend.asarray(x, "float32" if x.dtype == np.float32 else None)


def groups(target: Target) -> Iterator[Group]:
    """Return the checks, the most important first."""
    dtypes = ("bfloat16", "float32", "float16") if target.backend == "cupy" else ("float32",)
    for dtype in dtypes:
        yield f"gradients {dtype}", partial(check_gradients, target, dtype)
        yield f"training {dtype}", partial(check_model, target, dtype)


def run_checks(until: float, backend: str = "cupy") -> Iterator[Event]:
    """Yield a record for each finding."""
    yield from run_groups(groups(Target(backend)), until)


# Times


class TrainingEngine(ABC):
    """A model with one batch."""

    name: str

    @abstractmethod
    def step(self) -> float:
        """Make one update; return the loss before it, on the host."""

    def memory(self) -> int:
        """Return the peak of the device's memory, in bytes; 0 if unknown."""
        return 0


class GptxTraining(TrainingEngine):
    """The steps of `gptx train`."""

    def __init__(self, name: str, setting: Setting, tokens: np.ndarray) -> None:
        self.name = name
        settings = TrainingSettings(
            steps=10**6,
            batch_size=len(tokens),
            learning_rate=LEARNING_RATE,
            schedule="constant",
            warmup=0,
        )
        backend = Target(setting.backend).make(setting.dtype)
        folder = model_folder(setting.size)
        self.trainer = Trainer(folder, OneBatch(tokens), settings, backend=backend)

    def step(self) -> float:
        return self.trainer.step().loss

    def memory(self) -> int:
        return self.trainer.backend.peak_memory()


def make_engine(name: str, setting: Setting, tokens: np.ndarray) -> TrainingEngine:
    """Make the engine "gptx" or "torch eager"."""
    if name == "gptx":
        return GptxTraining(name, setting, tokens)
    from benchmarks.gpu.peers.pytorch_training import PyTorchTraining

    config, weights = load_model(setting.size)
    return PyTorchTraining(name, config, weights, setting.dtype, setting.device, tokens)


def run_times(
    until: float, setting: dict[str, Any], names: Sequence[str], B: int, T: int
) -> Iterator[Event]:
    """Check the losses of the engines against the first, then time updates in turns."""
    chosen = Setting(**setting)
    shared = {"section": "training", **asdict(chosen), "batch": B, "tokens": T}
    config, _ = load_model(chosen.size)
    tokens = np.array(random_ids(config, B, T + 1))
    engines: dict[str, TrainingEngine] = {}
    losses: dict[str, list[float]] = {}
    for name in names:
        try:
            engine = make_engine(name, chosen, tokens)
            losses[name] = [engine.step() for _ in range(WARM_UP)]
            engines[name] = engine
        except Exception as error:  # of any library
            yield {**shared, "engine": name, "error": format_error(error)}
    limit = LOSS_LIMITS[chosen.dtype]
    for name, found in list(losses.items())[1:]:
        error = float(np.max(np.abs(np.divide(found, losses[names[0]]) - 1)))
        check = {"section": "checks", "group": f"the losses of {names[0]}"}
        yield check | {"check": f"{name}, {chosen.size}", "error": error, "limit": limit,
                       "ok": error <= limit}  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(ROUNDS):
        if time.time() > until:
            break
        for name, engine in engines.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                engine.step()
            seconds[name].append((time.perf_counter() - start) / STEPS)
    for name, engine in engines.items():
        if seconds[name]:
            facts = {"engine": name, "seconds": seconds[name], "memory": engine.memory()}
            yield shared | facts | {"losses": losses[name]}
