"""`gptx.train`: from a text, token files or examples to a trained model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from gptx.backends import TABLE, Backend, get_backend
from gptx.config import GPT2Config
from gptx.errors import ConfigError, NotFoundError, ParameterError, argument, shown
from gptx.file_lock import lock_folder
from gptx.generation.checks import check_count, is_real
from gptx.generation.found_model import FoundModel, find_model
from gptx.generation.names import check_names
from gptx.tokenization.pipeline import PipelineTokenizer
from gptx.tokenization.protocol import Tokenizer
from gptx.training import checkpoint
from gptx.training.callbacks import Callback
from gptx.training.data.opening import is_text, open_data
from gptx.training.data.plan import TRAIN
from gptx.training.data.prepare import JSON_LINES, STANDARD_INPUT, prepare
from gptx.training.data.texts import Paths, as_list
from gptx.training.data.vocabularies import CHARACTERS, VOWELS, TokenizerSource, read_tokenizer
from gptx.training.data.windows import TrainingData
from gptx.training.reports.log_file import LogFile
from gptx.training.reports.plot import LossPlot
from gptx.training.settings import TrainingSettings
from gptx.training.trainer import Trainer, TrainingResult

SETTINGS = tuple(f.name for f in fields(TrainingSettings))
# Settings whose default differs from that of `TrainingSettings`.
DEFAULTS_OF_SIZE: dict[str, Any] = {"learning_rate": 6e-4, "batch_size": 4}
DEFAULTS_OF_INIT: dict[str, Any] = {"learning_rate": 1e-4, "batch_size": 4}
SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 128}  # as nanoGPT's model for a CPU
SMALL_CONTEXT = 64
MAX_CONTEXT_OF_INIT = 256  # default: a sequence of 1,024 tokens takes gigabytes
MIN_STEPS_PER_WARMUP = 10  # the default warm-up is at most a tenth of the steps


def train(
    data: Paths | None = None,
    *,
    output: str | os.PathLike[str] | None = "model",
    init: str | os.PathLike[str] | None = None,
    size: str | None = None,
    n_layer: int | None = None,
    n_head: int | None = None,
    n_embd: int | None = None,
    context: int | None = None,
    tokenizer: TokenizerSource | None = None,
    validation: float | Paths | None = None,
    max_bytes: int | None = None,
    optimizer_state: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    backend: str | Any = None,
    dtype: str | Any = None,
    threads: int | None = None,
    offline: bool = False,
    callbacks: Iterable[Callback] = (),
    **settings: Any,
) -> TrainingResult:
    """Train a model on a text, from scratch or from the weights of a model.

        gptx.train("shakespeare.txt", output="bard")
        gptx.load("bard").generate("ROMEO:")

    Parameters
    ----------
    data
        Text files in UTF-8; .jsonl files of examples, with "text", or "prompt" and "completion"; a
        folder of token files, or the files. With `resume`, None is the data of the run.
    output
        Folder of the run: the best weights, the log, and in `last` the last checkpoint. A text is
        prepared in its folder `data`. None saves nothing.
    init
        Model to start from: everything that `gptx.load` takes. None: from scratch.
    size
        "124M", "355M", "774M" or "1558M": a size of GPT-2, from scratch.
    n_layer, n_head, n_embd
        Layers, heads and width of a model from scratch: 4, 4 and 128 by default.
    context
        Number of tokens of a sequence; from scratch, also the context of the model. 64 by default,
        1,024 with `size`, up to 256 with `init`.
    tokenizer
        "characters" or "vowels", which make a vocabulary of the text; or a tokenizer, see
        `gptx.training.data.prepare`. None: that of `init` or of the data, or else characters.
    validation
        Fraction of a text or of examples for validation, at its end (0.1 by default); or files.
    max_bytes
        Read this number of bytes of a text only.
    optimizer_state
        Optimizer state of llm.c to continue from, beside `init`.
    resume
        Continue the run in `output`, with its settings.
    overwrite
        Replace a run in `output`.
    backend, dtype, threads
        See `gptx.get_backend`; None: those of the run with `resume`, or else "numpy" and "float32".
        In "float16" and "bfloat16", weights and optimizer are float32.
    offline
        Make no connection.
    callbacks
        See `gptx.training.callbacks`. The log and the plot are added for an `output`.
    **settings
        Fields of `gptx.training.settings.TrainingSettings`, such as `steps` and `learning_rate`.

    Returns
    -------
    TrainingResult
        The losses at the end, and the folder of the best weights.

    Raises
    ------
    ParameterError
        An option is unknown or out of range, two contradict each other, or the output folder has
        other files.
    DataError
        The data are damaged, too short, or have ids that the model does not have.
    NotFoundError
        A file, a model or the run to resume does not exist.
    NonFiniteError
        The gradients of ten steps in a row were not finite.
    StorageError
        A file cannot be read or written; checkpoints that exist stay.
    Interrupted
        Ctrl-C; the last step is saved.
    """
    check_names(settings, SETTINGS, dict.fromkeys(_PARAMETERS, "gptx.train"))
    folder = None if output is None else Path(output).expanduser()
    shape = _given(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    sizes = _given(size=size, **shape)
    source = _given(
        data=_absolute("data", data),
        context=context,
        validation=validation if is_real(validation) else _absolute("validation", validation),
        max_bytes=max_bytes,
    )
    _check_source(source, shape)
    if resume:
        start = _resumed(folder, {**sizes, **_given(init=init)}, source, settings)
    elif data is None:
        raise ParameterError(f"{argument('data')} is None, expected a text to learn from")
    elif optimizer_state is not None and init is None:
        raise ParameterError(
            f"{argument('optimizer_state')} needs {argument('init')}, llm.c's model of this step"
        )
    elif init is not None:
        if sizes:
            raise ParameterError(
                f"{argument('init')} has a size of its own: leave out {argument(next(iter(sizes)))}"
            )
        start = _from_model(find_model(init, offline=offline), source, settings)
    else:
        start = _from_scratch(size, shape, source, settings)
    if folder is not None:
        checkpoint.check_output(folder, resume=resume, overwrite=overwrite)
    if backend is None:
        backend = start.backend
    if dtype is None and not isinstance(backend, Backend):
        dtype = start.dtype
    ops = get_backend(backend, dtype=dtype, threads=threads)
    with ExitStack() as stack:
        if folder is not None and not stack.enter_context(lock_folder(folder)):
            raise ParameterError(
                f"another run writes to {folder}: wait for its end, or give another "
                f"{argument('output')}"
            )
        if folder is None or resume:  # the data of a resumed run stay until they are compared
            place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            place = folder
        opened, source = _open(start, folder, place, tokenizer, offline=offline)
        model = start.model
        if isinstance(model, GPT2Config) and not resume:
            model = _with_vocabulary(model, opened.tokenizer)
        trainer = Trainer(
            model,
            opened,
            start.settings,
            output=folder,
            backend=ops,
            callbacks=[LogFile(), LossPlot(), *callbacks] if folder else callbacks,
            optimizer_state=optimizer_state,
            source=source,
            resume=resume,
            overwrite=overwrite,
        )
        return trainer.run()


_PARAMETERS = tuple(name for name in train.__annotations__ if name not in ("settings", "return"))


# The start of a run


@dataclass(frozen=True)
class _Start:
    """The model and the settings with which a run starts.

    Attributes
    ----------
    model
        A model that exists; or a config, from scratch without a vocabulary.
    tokenizer
        Tokenizer of the model; None from scratch.
    source
        Arguments about the data, as JSON has them: data (a list of paths), context, validation and
        max_bytes.
    backend, dtype
        Backend and type of a resumed run; "numpy" and None otherwise.
    """

    model: GPT2Config | FoundModel
    tokenizer: PipelineTokenizer | None
    settings: TrainingSettings
    source: dict[str, Any]
    backend: str = "numpy"
    dtype: str | None = None


def _from_scratch(
    size: str | None, shape: dict[str, Any], source: dict[str, Any], given: Mapping[str, Any]
) -> _Start:
    if size is not None and shape:
        raise ParameterError(
            f"{argument('size')} and {argument(next(iter(shape)))} contradict each other: give one "
            "of them"
        )
    try:
        config = (
            replace(GPT2Config(n_positions=SMALL_CONTEXT), **{**SMALL, **shape})
            if size is None
            else GPT2Config.of_size(size)
        )
    except ConfigError as error:  # of an option, not of a file
        raise ParameterError(error.message) from None
    if "context" in source:
        config = replace(config, n_positions=source["context"])
    settings = _with_defaults(given, {} if size is None else DEFAULTS_OF_SIZE)
    return _Start(config, None, settings, {"context": config.n_positions, **source})


def _from_model(found: FoundModel, source: dict[str, Any], given: Mapping[str, Any]) -> _Start:
    known = found.info.tokenizer if found.info.has_tokenizer else None
    context = min(found.info.config.n_positions, MAX_CONTEXT_OF_INIT)
    return _Start(
        found,
        known if isinstance(known, PipelineTokenizer) else None,
        _with_defaults(given, DEFAULTS_OF_INIT),
        {"context": context, **source},
    )


def _resumed(
    folder: Path | None,
    sizes: Mapping[str, Any],
    source: dict[str, Any],
    given: Mapping[str, Any],
) -> _Start:
    if folder is None or sizes:
        wrong = f"leave out {argument(next(iter(sizes)))}" if sizes else "give its folder"
        raise ParameterError(
            f"{argument('resume')} continues the model of the run in {argument('output')}: {wrong}"
        )
    checkpoint.check_output(folder, resume=True, overwrite=False)
    stored = checkpoint.read_last(folder)
    for name, value in source.items():
        if name != "data" and value != (old := stored.source.get(name)):
            raise ParameterError(
                f"the run in {folder} has {argument(name)} {old!r}, not {value!r}: leave it out to "
                "resume the run"
            )
    source = {**stored.source, **source}
    if "data" not in source:
        raise ParameterError(f"the run in {folder} names no files: give its {argument('data')}")
    if source["data"] == [checkpoint.DATA] and not (folder / checkpoint.DATA).is_dir():
        raise NotFoundError(
            f"{folder / checkpoint.DATA}, the prepared text of the run, does not exist: give its "
            f"{argument('data')} again"
        )
    settings = TrainingSettings.from_dict({**stored.settings.to_dict(), **given})
    backend = stored.backend if stored.backend in TABLE else "numpy"  # or a caller's namespace
    return _Start(stored.config, stored.tokenizer, settings, source, backend, stored.dtype)


def _with_defaults(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> TrainingSettings:
    """Return the settings of a new run; the default of the warm-up depends on the steps."""
    chosen = TrainingSettings(**{**defaults, **given})
    if "warmup" in given:
        return chosen
    return replace(chosen, warmup=min(chosen.warmup, chosen.steps // MIN_STEPS_PER_WARMUP))


def _with_vocabulary(config: GPT2Config, tokenizer: Tokenizer | None) -> GPT2Config:
    """Return the config of a model for the tokens of the data; without a tokenizer, GPT-2's."""
    if tokenizer is None:
        return config
    from gptx.conversions.checkpoint import end_of_text_ids

    n = tokenizer.vocab_size
    return replace(config, vocab_size=n, **end_of_text_ids(n, tokenizer))


# Data


def _given(**arguments: Any) -> dict[str, Any]:
    """Return the arguments that are not None."""
    return {name: value for name, value in arguments.items() if value is not None}


def _absolute(option: str, paths: Any) -> list[str] | None:
    """Return paths that another working directory does not change."""
    if paths is None:
        return None
    try:
        names = [os.fsdecode(name) for name in as_list(paths)]
    except TypeError:
        raise ParameterError(
            f"{argument(option)} is {shown(paths)}, expected a path or a list of paths"
        ) from None
    return [
        STANDARD_INPUT if name == STANDARD_INPUT else os.path.abspath(os.path.expanduser(name))
        for name in names
    ]


def _check_source(source: Mapping[str, Any], shape: Mapping[str, Any]) -> None:
    """Check the options about the data and the size that have a range."""
    counts = {n: source[n] for n in ("context", "max_bytes") if n in source}
    for name, value in {**counts, **shape}.items():
        check_count(name, value)
    if "max_bytes" in counts and source.get("data") and not is_text(source["data"]):
        raise ParameterError(
            f"{argument('max_bytes')} is for a text, and {source['data'][0]} has tokens or "
            "examples: leave it out"
        )
    share: Any = source.get("validation")
    if is_real(share) and not 0 <= share < 1:
        raise ParameterError(
            f"{argument('validation')} is {shown(share)}, expected a fraction of at least 0, less "
            "than 1, or files"
        )


def _open(
    start: _Start,
    folder: Path | None,
    place: Path,
    tokenizer: TokenizerSource | None,
    *,
    offline: bool,
) -> tuple[TrainingData, dict[str, Any]]:
    """Open the data; a text is prepared first, in a folder of `place`.

    Returns
    -------
    data, source
        The data, and the arguments with which a resumed run opens them: those of a prepared text
        are relative to the folder of the run, which may be moved.
    """
    if not isinstance(tokenizer, Tokenizer | str | os.PathLike | None):
        raise ParameterError(
            f"{argument('tokenizer')} is {shown(tokenizer)}, expected a folder, a model that has "
            "one, or an object of the protocol gptx.Tokenizer"
        )
    source = dict(start.source)
    names = [
        name if name == STANDARD_INPUT else os.path.join(folder or "", name)
        for name in source["data"]
    ]
    validation: Any = source.get("validation")
    if is_text(names):
        is_fraction = is_real(validation)
        prepared = prepare(
            names,
            place / checkpoint.DATA,
            tokenizer=tokenizer or start.tokenizer or CHARACTERS,
            validation=() if is_fraction else validation or (),
            validation_fraction=validation if is_fraction else None,
            max_bytes=source.get("max_bytes"),
            overwrite=True,
            offline=offline,
        )
        names, validation, tokenizer = [str(prepared.folder)], None, prepared.tokenizer
        if place == folder:
            source["data"] = [checkpoint.DATA]
    elif isinstance(tokenizer, str) and tokenizer in (CHARACTERS, VOWELS):
        raise ParameterError(
            f"{argument('tokenizer', tokenizer)} makes a vocabulary of a text: give a text, or "
            "leave it out"
        )
    elif tokenizer is None and _has_examples(names):
        tokenizer = start.tokenizer  # token files have their own, which is compared with it
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = read_tokenizer(tokenizer, offline=offline)
    data = open_data(
        names[0] if len(names) == 1 else names,
        context=source["context"],
        batch_size=start.settings.sequences,
        seed=start.settings.seed,
        tokenizer=tokenizer,
        validation=validation,
    )
    return data, source


def _has_examples(names: list[str]) -> bool:
    """Test for .jsonl files, or a folder with them, whose text is encoded when it is opened."""
    return all(
        name.endswith(JSON_LINES) or (Path(name) / f"{TRAIN}{JSON_LINES}").is_file()
        for name in names
    )
