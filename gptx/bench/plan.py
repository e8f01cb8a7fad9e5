"""What is to be measured: the settings of a run, and the setups and trials that they span."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from gptx.backends import get_backend
from gptx.bench.machine import cores
from gptx.bench.sources import Source
from gptx.errors import ParameterError
from gptx.generation.api import Model, load
from gptx.quantization import BITS

QUANTIZED = tuple(BITS)  # of the weights, in groups of 64
PROMPT, OUTPUT = 512, 128  # llama-bench's


@dataclass(frozen=True)
class Settings:
    """What the user chose; None is the default of whatever is run.

    Attributes
    ----------
    models, backends, dtypes, batches, depths
        Each list is one dimension of the grid. A dtype is "int4/bfloat16", too: quantized weights,
        and the type of the rest, without which that is float32.
    threads
        None: one for each core. Backends without that setting run once, whatever it says.
    prompts, outputs
        Tokens to read and to generate; 0 leaves that trial out.
    repetitions
        How often each trial is measured, after a first time that is thrown away.
    generic
        Without the backend's own ops.
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
    """One way to run one model; a row or several of the table."""

    model: str
    folder: str
    backend: str = "numpy"
    dtype: str = "float32"
    threads: int | None = None
    batch: int = 1
    generic: bool = False

    def __str__(self) -> str:
        parts = [self.model, self.backend, "generic" if self.generic else "", self.dtype]
        if self.threads:
            parts.append(f"{self.threads} thread{'s' * (self.threads > 1)}")
        if self.batch > 1:
            parts.append(f"batch {self.batch}")
        return " ".join(part for part in parts if part)

    @property
    def options(self) -> dict[str, Any]:
        """What `gptx.load` is given beside the folder."""
        return {
            "backend": self.backend,
            **types(self.dtype),
            "threads": self.threads,
            "generic": self.generic,
        }

    @property
    def facts(self) -> dict[str, Any]:
        """What goes into its records."""
        facts = asdict(self)
        del facts["folder"]
        return facts

    def load(self) -> Model:
        """Load the model."""
        return load(self.folder, **self.options)


@dataclass(frozen=True)
class Trial:
    """A test, as llama-bench calls it: read a prompt or generate, after `depth` tokens.

    One of the first two numbers is 0.
    """

    prompt: int
    output: int
    depth: int = 0

    def __str__(self) -> str:
        name = f"pp{self.prompt}" if self.prompt else f"tg{self.output}"
        return f"{name} @ d{self.depth}" if self.depth else name


def setups(settings: Settings, sources: Iterable[Source]) -> list[Setup]:
    """Every combination of model, backend, dtype, threads and batch.

    Raises
    ------
    BackendError, ParameterError
        A backend is not there, or cannot do what is asked: known before anything is measured.
    """
    if settings.threads and not any(get_backend(b).has_threads for b in settings.backends):
        get_backend(settings.backends[0], threads=settings.threads[0])  # says that it has none
    found = []
    for source, backend in product(sources, settings.backends):
        for dtype, threads in product(settings.dtypes, _threads(settings, backend)):
            activations = types(dtype).get("dtype", "float32")
            get_backend(backend, dtype=activations, threads=threads, generic=settings.generic)
            found += [
                Setup(
                    source.name,
                    str(source.folder),
                    backend,
                    dtype,
                    threads,
                    batch,
                    settings.generic,
                )
                for batch in settings.batches
            ]
    return found


def types(dtype: str) -> dict[str, str]:
    """What `gptx.load` is given for a dtype of the grid: `dtype`, `quantize`, or both.

    Raises
    ------
    ParameterError
        Two types are given, of which the first is not that of codes.
    """
    weights, slash, activations = dtype.partition("/")
    if not slash:
        return {"quantize" if dtype in QUANTIZED else "dtype": dtype}
    if weights not in QUANTIZED:
        raise ParameterError(
            f"dtype is {dtype!r}: before the slash, expected the type of quantized weights, "
            f"{' or '.join(QUANTIZED)}"
        )
    return {"quantize": weights, "dtype": activations}


def _threads(settings: Settings, backend: str) -> Sequence[int | None]:
    return (settings.threads or (cores(),)) if get_backend(backend).has_threads else (None,)


def trials(settings: Settings, source: Source) -> list[Trial]:
    """The trials of one model, those that read before those that generate, depth by depth.

    Without a number from the user, they are as long as llama-bench's or as the context allows.

    Raises
    ------
    ParameterError
        There is nothing to measure, or a trial does not fit the context.
    """
    deepest = max(settings.depths)
    check_context(source, deepest + 1, f"a depth of {deepest}")
    room = source.config.n_positions - deepest
    prompts = (min(PROMPT, room),) if settings.prompts is None else settings.prompts
    # Generating starts from one token, so that there is something to go on from.
    outputs = (min(OUTPUT, room - 1),) if settings.outputs is None else settings.outputs
    found = []
    for depth in settings.depths:
        found += [Trial(n, 0, depth) for n in prompts if n]
        found += [Trial(0, n, depth) for n in outputs if n]
    if not found:
        raise ParameterError("there is nothing to measure: give -p or -n more than 0 tokens")
    for trial in found:
        check_context(source, trial.depth + (trial.prompt or trial.output + 1), str(trial))
    return found


def check_context(source: Source, needed: int, what: str) -> None:
    """Raise ParameterError if the model's context does not hold so many tokens."""
    if needed > source.config.n_positions:
        raise ParameterError(
            f"{what} needs {needed} tokens of context, {source.name} has "
            f"{source.config.n_positions}: lower -p, -n or -d"
        )


def single(numbers: tuple[int, ...] | None, default: int, option: str) -> int:
    """The one number, at least 1, of a preset that has no use for a list."""
    if numbers is None:
        return default
    if len(numbers) != 1 or numbers[0] < 1:
        given = ",".join(map(str, numbers))
        raise ParameterError(f"{option} is {given}, this preset expects one number of at least 1")
    return numbers[0]
