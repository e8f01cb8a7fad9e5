"""`gptx.train`: from a text, token files or examples to a trained model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

from gptx.backends import get_backend
from gptx.config import GPT2Config
from gptx.errors import ConfigError, ParameterError, argument
from gptx.generation.found_model import FoundModel, find_model
from gptx.generation.names import check_names
from gptx.tokenization.pipeline import PipelineTokenizer
from gptx.training import checkpoint
from gptx.training.callbacks import Callback
from gptx.training.data import TrainingData
from gptx.training.log_file import LogFile
from gptx.training.opening import is_text, open_data
from gptx.training.plot import LossPlot
from gptx.training.prepare import prepare
from gptx.training.settings import TrainingSettings
from gptx.training.texts import Paths, as_list
from gptx.training.trainer import Trainer, TrainingResult
from gptx.training.vocabularies import CHARACTERS, VOWELS, TokenizerSource, read_tokenizer

SETTINGS = tuple(f.name for f in fields(TrainingSettings))
# Start of a run -> settings whose default differs from that of `TrainingSettings`.
DEFAULTS: dict[str, dict[str, Any]] = {
    "scratch": {},
    "size": {"learning_rate": 6e-4, "batch_size": 4},
    "init": {"learning_rate": 1e-4, "batch_size": 4},
}
SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 128}  # as nanoGPT's model for a CPU
SMALL_CONTEXT = 64
MAX_CONTEXT_OF_INIT = 256  # default: a sequence of 1,024 tokens takes gigabytes
MAX_WARMUP_PART = 10  # the default warm-up is at most this part of the steps


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
    backend: str | Any = "numpy",
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
        `gptx.training.prepare.prepare`. None: that of `init` or of the data, or else characters.
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
        See `gptx.get_backend`. In "float16" and "bfloat16", weights and optimizer are float32.
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
    shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
    shape = {name: value for name, value in shape.items() if value is not None}
    folder = None if output is None else Path(output).expanduser()
    with ExitStack() as stack:
        if resume:
            if folder is None or init is not None or size is not None or shape:
                raise ParameterError(
                    f"{argument('resume')} takes the model of the run in {argument('output')}: "
                    f"leave out {argument('init')}, {argument('size')} and the like"
                )
            checkpoint.check_output(folder, resume=True, overwrite=False)
            stored = checkpoint.read_last(folder)
            chosen = TrainingSettings.from_dict(stored.settings.to_dict() | settings)
            source = dict(stored.source) | _given(data, context, validation, max_bytes)
            if not source.get("data"):
                raise ParameterError(
                    f"the run in {folder} has no data of files: give {argument('data')}"
                )
            model: GPT2Config | FoundModel = stored.config
            dtype = dtype or stored.dtype
            known: PipelineTokenizer | None = stored.tokenizer
        else:
            start = "init" if init is not None else "size" if size is not None else "scratch"
            if data is None:
                raise ParameterError(f"{argument('data')} is None, expected a text to learn from")
            if start == "init" and (size is not None or shape):
                raise ParameterError(
                    f"{argument('init')} has a size of its own: leave out {argument('size')}, "
                    f"{argument('n_layer')} and the like"
                )
            chosen = _with_defaults(settings, start)
            found = find_model(init, offline=offline) if init is not None else None
            known = _tokenizer_of(found)
            config = found.info.config if found else _scratch_config(size, shape, context)
            source = _given(data, context, validation, max_bytes)
            source.setdefault("context", min(config.n_positions, MAX_CONTEXT_OF_INIT) if found else
                              config.n_positions)  # fmt: skip
            if folder is not None:
                checkpoint.check_output(folder, resume=False, overwrite=overwrite)
            model = found or config
        ops = get_backend(backend, dtype=dtype, threads=threads)
        opened = _open(
            source, folder, stack, chosen, tokenizer=tokenizer, known=known, resume=resume,
            offline=offline,
        )  # fmt: skip
        if isinstance(model, GPT2Config) and not resume:
            model = _with_vocabulary(model, opened.tokenizer)
        trainer = Trainer(
            model,
            opened,
            chosen,
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


def _given(
    data: Paths | None,
    context: int | None,
    validation: float | Paths | None,
    max_bytes: int | None,
) -> dict[str, Any]:
    """Return the arguments about the data that are not None, as JSON has them."""
    if validation is not None and not isinstance(validation, int | float):
        validation = [os.path.abspath(os.path.expanduser(name)) for name in as_list(validation)]
    arguments = {
        "data": data and [os.path.abspath(os.path.expanduser(name)) for name in as_list(data)],
        "context": context,
        "validation": validation,
        "max_bytes": max_bytes,
    }
    return {name: value for name, value in arguments.items() if value is not None}


def _with_defaults(given: Mapping[str, Any], start: str) -> TrainingSettings:
    """Return the settings of a new run; some defaults depend on its start."""
    chosen = TrainingSettings(**{**DEFAULTS[start], **given})
    if "warmup" in given:
        return chosen
    warmup = min(chosen.warmup, chosen.steps // MAX_WARMUP_PART)
    return TrainingSettings.from_dict(chosen.to_dict() | {"warmup": warmup})


def _scratch_config(size: str | None, shape: dict[str, int], context: int | None) -> GPT2Config:
    """Return the config of a model from scratch, before its vocabulary is known."""
    try:
        if size is not None:
            if shape:
                raise ParameterError(
                    f"{argument('size')} and {argument(next(iter(shape)))} contradict each other: "
                    "give one of them"
                )
            given = {} if context is None else {"n_positions": context}
            return GPT2Config.of_size(size, **given)
        return GPT2Config(
            n_positions=SMALL_CONTEXT if context is None else context, **{**SMALL, **shape}
        )
    except ConfigError as error:  # of an option, not of a file
        raise ParameterError(error.message) from None


def _with_vocabulary(config: GPT2Config, tokenizer: PipelineTokenizer | None) -> GPT2Config:
    """Return the config of a model for the tokens of the data; without a tokenizer, GPT-2's."""
    if tokenizer is None:
        return config
    from gptx.conversions.checkpoint import end_of_text_ids

    facts = end_of_text_ids(tokenizer.vocab_size, tokenizer)
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return GPT2Config(**values | {"vocab_size": tokenizer.vocab_size} | facts)


def _tokenizer_of(found: FoundModel | None) -> PipelineTokenizer | None:
    if found is None or not found.info.has_tokenizer:
        return None
    tokenizer = found.info.tokenizer
    return tokenizer if isinstance(tokenizer, PipelineTokenizer) else None


def _open(
    source: dict[str, Any],
    folder: Path | None,
    stack: ExitStack,
    settings: TrainingSettings,
    *,
    tokenizer: TokenizerSource | None,
    known: PipelineTokenizer | None,
    resume: bool,
    offline: bool,
) -> TrainingData:
    """Open the data; a text is prepared first, and `source` changed to the result.

    Parameters
    ----------
    source
        See `_given`.
    folder
        Output folder; for None and for a resumed run, a text is prepared in a temporary folder.
    known
        Tokenizer of the model.
    """
    names = [str((folder or Path()) / name) for name in source["data"]]
    validation = source.get("validation")
    if is_text(names):
        if folder is None or resume:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            place = folder
        is_fraction = isinstance(validation, int | float)
        prepared = prepare(
            names,
            place / checkpoint.DATA,
            tokenizer=tokenizer if tokenizer is not None else known or CHARACTERS,
            validation=() if is_fraction or validation is None else validation,
            validation_fraction=validation if is_fraction else None,
            max_bytes=source.get("max_bytes"),
            overwrite=True,
            offline=offline,
        )
        names, validation, tokenizer = [str(prepared.folder)], None, None
        if place == folder:  # a relative path: the folder of the run may be moved
            source["data"] = [checkpoint.DATA]
            source.pop("validation", None)
            source.pop("max_bytes", None)
    if tokenizer in (CHARACTERS, VOWELS):
        raise ParameterError(
            f"{argument('tokenizer')} is {tokenizer!r}, which needs a text to make a vocabulary of"
        )
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = read_tokenizer(tokenizer, offline=offline)
    if tokenizer is not None and not isinstance(tokenizer, PipelineTokenizer):
        raise ParameterError(
            f"{argument('tokenizer')} is an object, expected a folder or a model for these data"
        )
    return open_data(
        names[0] if len(names) == 1 else names,
        context=source["context"],
        batch_size=settings.sequences,
        seed=settings.seed,
        tokenizer=tokenizer or (None if is_prepared(names) else known),
        validation=validation,
    )


def is_prepared(names: list[str]) -> bool:
    """Test for a folder with a tokenizer of its own, which is compared with that of the model."""
    return len(names) == 1 and (Path(names[0]) / "tokenizer.json").is_file()
