"""The settings of a run, and the setups that they span: one way to run one model each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

from gptx.backends import get_backend
from gptx.bench import worker
from gptx.bench.sources import Source, open_sources, write_source
from gptx.bench.tables import count
from gptx.bench.worker import Event, Events
from gptx.errors import ParameterError, argument
from gptx.generation.api import load
from gptx.generation.params import SamplingParams
from gptx.generation.text_model import Model
from gptx.process import count_cores
from gptx.quantization import BITS, GROUP_SIZE, Quantization
from gptx.weights import quantized_config

QUANTIZED_DTYPES = tuple(BITS)  # of the weights, in groups of 64
GREEDY = SamplingParams(seed=0)


@dataclass(frozen=True)
class Settings:
    """The choices of the user; None means the default of the grid or the preset.

    Attributes
    ----------
    models, backends, dtypes, batches, depths
        Each list is one dimension of the grid. A dtype may be "int4/bfloat16": the type of
        quantized weights, and the type of the rest (float32 without the second part).
    threads
        None: one for each core. A backend without this setting runs once.
    prompts, outputs
        Numbers of tokens to read and to generate; 0 leaves that trial out.
    repetitions
        Measured runs of each trial, after the warm-up.
    generic
        Run without the backend's own ops.
    budget
        Seconds, for the preset of that name.
    offline
        Make no connection.
    """

    models: tuple[str, ...] = ("shakespeare",)
    backends: tuple[str, ...] = ("numpy",)
    dtypes: tuple[str, ...] = ("float32",)
    threads: tuple[int, ...] | None = None
    batches: tuple[int, ...] = (1,)
    prompts: tuple[int, ...] | None = None
    outputs: tuple[int, ...] | None = None
    depths: tuple[int, ...] = (0,)
    repetitions: int = 5
    generic: bool = False
    budget: float = 1.0
    offline: bool = False


@dataclass(frozen=True)
class Setup:
    """One way to run one model; one or more rows of the table."""

    model: str
    path: str
    backend: str = "numpy"
    dtype: str = "float32"
    threads: int | None = None
    batch: int = 1
    generic: bool = False

    def __str__(self) -> str:
        parts = [self.model, self.backend, "generic" if self.generic else "", self.dtype]
        if self.threads:
            parts.append(count(self.threads, "thread"))
        if self.batch > 1:
            parts.append(f"batch {self.batch}")
        return " ".join(part for part in parts if part)

    @property
    def options(self) -> dict[str, Any]:
        """Options for `gptx.load`."""
        return {
            "backend": self.backend,
            **split_dtype(self.dtype),
            "threads": self.threads,
            "generic": self.generic,
        }

    @property
    def facts(self) -> dict[str, Any]:
        """The fields that go into its records."""
        facts = asdict(self)
        del facts["path"]
        return facts

    def load(self) -> Model:
        """Load the model."""
        return load(self.path, **self.options)


def plan_setups(settings: Settings, sources: Iterable[Source]) -> list[Setup]:
    """Combine every model, backend, dtype, number of threads and batch.

    Raises
    ------
    BackendError, ParameterError
        A backend is not installed or does not support a setting, or a model cannot be quantized in
        this way; raised before any measurement.
    """
    if settings.threads and not any(get_backend(b).has_threads for b in settings.backends):
        get_backend(settings.backends[0], threads=settings.threads[0])  # raises the error
    setups = []
    for source, backend in product(sources, settings.backends):
        for dtype, threads in product(settings.dtypes, _threads(settings, backend)):
            types = split_dtype(dtype)
            activations = types.get("dtype", "float32")
            get_backend(backend, dtype=activations, threads=threads, generic=settings.generic)
            quantized_config(source.config, Quantization.named(types.get("quantize"), GROUP_SIZE))
            path = str(source.path)
            setups += [
                Setup(source.name, path, backend, dtype, threads, batch, settings.generic)
                for batch in settings.batches
            ]
    return setups


def split_dtype(dtype: str) -> dict[str, str]:
    """Convert a dtype of the grid to options of `gptx.load`: `dtype`, `quantize`, or both.

    Raises
    ------
    ParameterError
        The first of two types is not a type of quantized weights.
    """
    weights, slash, activations = dtype.partition("/")
    if not slash:
        return {"quantize" if dtype in QUANTIZED_DTYPES else "dtype": dtype}
    if weights not in QUANTIZED_DTYPES:
        raise ParameterError(
            f"{argument('dtype')} is {dtype!r}: before the slash, expected the type of quantized "
            f"weights, {' or '.join(QUANTIZED_DTYPES)}"
        )
    return {"quantize": weights, "dtype": activations}


def _threads(settings: Settings, backend: str) -> Sequence[int | None]:
    if not get_backend(backend).has_threads:
        return (None,)
    return settings.threads or (count_cores(),)


def check_context(source: Source, needed: int, what: str) -> None:
    """Raise ParameterError if the model's context is shorter than `needed` tokens."""
    if needed > source.config.n_positions:
        raise ParameterError(
            f"{what} needs {needed} tokens of context, {source.name} has "
            f"{source.config.n_positions}: lower {argument('prompts')}, {argument('outputs')} or "
            f"{argument('depths')}"
        )


def single_count(numbers: tuple[int, ...] | None, default: int, option: str) -> int:
    """Return the one number, at least 1, of a preset that takes no list."""
    if numbers is None:
        return default
    if len(numbers) != 1 or numbers[0] < 1:
        given = ",".join(map(str, numbers))
        raise ParameterError(
            f"{argument(option)} is {given}, this preset expects one number of at least 1"
        )
    return numbers[0]


def run_setups(
    task: str, variants: Sequence[Settings], needed: int, what: str, **arguments: Any
) -> Events:
    """Run a task with the setups of all variants, whose models are the same.

    Parameters
    ----------
    needed, what
        Tokens of context that the task needs, and their description for the error.
    """
    with open_sources(variants[0].models, offline=variants[0].offline) as sources:
        for source in sources.values():
            check_context(source, needed, what)
        setups = [x for settings in variants for x in plan_setups(settings, sources.values())]
        for title, setup in number_setups(setups):
            yield from measure_setup(task, title, setup, sources[setup.model], **arguments)


def number_setups(setups: Sequence[Setup]) -> Iterator[tuple[str, Setup]]:
    """Yield each setup with its title: "[2/6] shakespeare numpy int8 1 thread"."""
    for number, setup in enumerate(setups, start=1):
        yield f"[{number}/{len(setups)}] {setup}", setup


def measure_setup(task: str, title: str, setup: Setup, source: Source, **arguments: Any) -> Events:
    """Run a task with a setup in a worker; the title goes before its progress."""
    yield {"progress": f"{title}: loading"}
    write_source(source)
    for event in worker.run_task(task, setup=asdict(setup), **arguments):
        yield {"progress": f"{title}: {event['progress']}"} if "progress" in event else event


def token_rates(tokens: int, samples: list[float]) -> Event:
    """Convert the seconds of runs to tokens per second: mean, and standard deviation if any."""
    values = tokens / np.array(samples)
    return {
        "tokens_per_second": float(values.mean()),
        "tokens_per_second_sd": float(values.std(ddof=1)) if len(samples) > 1 else None,
        "seconds_per_token": float(np.mean(samples)) / tokens,
        "samples": samples,
    }
