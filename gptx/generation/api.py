"""Functions of the package: load a model, generate, stream."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, Never, Unpack, cast, overload

from gptx import weights
from gptx.backends import Backend, get_backend
from gptx.config import GPT2Config
from gptx.errors import ModelWarning, ParameterError
from gptx.generation.found_model import find_model
from gptx.generation.model_info import ModelInfo
from gptx.generation.names import check_names
from gptx.generation.options import (
    AllOneOptions,
    AllOptions,
    LoadOptions,
    Options,
    check_load_options,
    check_options,
)
from gptx.generation.prompts import Prompt, single_prompt, split_prompts
from gptx.generation.request import Request
from gptx.generation.results import Result
from gptx.generation.text_model import (
    Chunks,
    Model,
    check_streamed,
    generate_request,
    stream_request,
)
from gptx.model import Transformer
from gptx.quantization import GROUP_SIZE, Quantization
from gptx.tokenization.protocol import Tokenizer

# Tokens times parameters from which a single call may compile the kernels, once for a machine: 100
# tokens of the 124M model.
MIN_WORK_TO_COMPILE = 100 * 124_000_000

# Options of `find_model`.
FIND_OPTIONS = ("config", "tokenizer", "ignore_unknown", "revision", "offline", "token")

Check = Callable[[ModelInfo], object]


def load(
    model: str | os.PathLike[str] = "gpt2",
    *,
    backend: str | Any = "numpy",
    dtype: str | Any = None,
    device: Any = None,
    threads: int | None = None,
    generic: bool = False,
    compile: bool = True,
    cache_dtype: str | Any = None,
    quantize: str | None = None,
    group_size: int = GROUP_SIZE,
    config: str | os.PathLike[str] | GPT2Config | None = None,
    tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
    ignore_unknown: bool = False,
    revision: str | None = None,
    offline: bool = False,
    token: str | None = None,
    **unknown: Never,
) -> Model:
    """Load a model.

    Parameters
    ----------
    model
        An embedded name ("shakespeare"); a file or folder of any format that `gptx convert` reads,
        such as GGUF; "openai:124M" and the other sizes; or a Hub id: "openai-community/gpt2", or
        one of the short names gpt2, gpt2-medium, gpt2-large and gpt2-xl.
    other parameters
        See `gptx.generation.options.LoadOptions`.

    Raises
    ------
    ParameterError
        An option is unknown or invalid, or the model cannot be quantized in this way.
    NotFoundError, HubUnavailableError, AuthorizationError, IntegrityError, StorageError
        The files do not exist, or cannot be downloaded or read.
    ConfigError, WeightsError
        The files do not describe a GPT-2 that gptx can run.
    TokenizerError
        The given tokenizer is damaged, or not that of the model.
    BackendError
        The backend is not available, or does not support `dtype`.

    Warns
    -----
    ModelWarning
        For each note on the model, see `Model.notes`.
    """
    options = LoadOptions(
        backend=backend, dtype=dtype, device=device, threads=threads, generic=generic,
        compile=compile, cache_dtype=cache_dtype, quantize=quantize, group_size=group_size,
        config=config, tokenizer=tokenizer, ignore_unknown=ignore_unknown,
        revision=revision, offline=offline, token=token,
        **unknown,  # type: ignore[typeddict-item]  # `check_load_options` raises the error
    )  # fmt: skip
    return _load(model, options)


def _load(model: Any, options: LoadOptions, check: Check | None = None) -> Model:
    """Load a model; `check` gets its config and tokenizer before the weights are downloaded."""
    check_load_options(options)
    rest: dict[str, Any] = dict(options)
    quantize, group_size = rest.pop("quantize", None), rest.pop("group_size", GROUP_SIZE)
    find_options = {name: rest.pop(name) for name in FIND_OPTIONS if name in rest}
    quantization = Quantization.named(quantize, group_size)
    backend = get_backend(rest.pop("backend", "numpy"), **rest)
    found = find_model(model, **find_options)
    info = found.info
    weights.quantized_config(info.config, quantization)  # its error before the download
    if check is not None:
        check(info)
    opened = found.open()
    loaded = weights.load(
        opened.arrays,
        opened.config,
        backend,
        quantization=quantization,
        threads=options.get("threads"),
    )
    info.config = loaded.config
    notes = opened.notes + loaded.notes
    for note in notes:
        _warn(f"{info.name}: {note}")
    transformer = Transformer(loaded.config, loaded.tree, backend)
    return Model(transformer, info, loaded.fingerprint, notes)


def _warn(note: str) -> None:
    """Warn at the line that called gptx."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("gptx."):
        level, frame = level + 1, frame.f_back
    warnings.warn(note, ModelWarning, stacklevel=level)


def load_once(
    model: Any,
    max_tokens: int | None,
    check: Check | None = None,
    **options: Unpack[LoadOptions],
) -> Model:
    """Load a model for a single call; compile only what pays for at most `max_tokens`.

    Kernels that are compiled already are used in any case.

    Parameters
    ----------
    check
        Function that gets config and tokenizer before the weights are downloaded or read. It raises
        the error of a request that this model cannot fulfill, see `text_model.Request.check`.
    """
    loaded = _load(model, options, check)
    if "compile" not in options and not isinstance(options.get("backend"), Backend):
        expected = loaded.config.n_positions if max_tokens is None else max_tokens
        work = expected * loaded.config.n_parameters
        loaded.backend.compiles = work >= MIN_WORK_TO_COMPILE or loaded.backend.is_compiled()
    return loaded


@overload
def generate(
    prompt: str | list[int],
    *,
    model: str | os.PathLike[str] | Model = "gpt2",
    **options: Unpack[AllOneOptions],
) -> Result: ...
@overload
def generate(
    prompt: list[str] | list[list[int]],
    *,
    model: str | os.PathLike[str] | Model = "gpt2",
    **options: Unpack[AllOptions],
) -> list[Result]: ...
@overload
def generate(
    prompt: str | list[int],
    *,
    n: int,
    model: str | os.PathLike[str] | Model = "gpt2",
    **options: Unpack[AllOneOptions],
) -> list[Result]: ...
def generate(
    prompt: Any,
    *,
    model: str | os.PathLike[str] | Model = "gpt2",
    **options: Unpack[AllOptions],
) -> Result | list[Result]:
    """Load a model and continue a prompt, or each of several.

    Takes the options of `load` and of `Model.generate`; returns the result of the latter. The
    prompt is checked before the weights are downloaded or read. For more than one call, `load` the
    model once.
    """
    prompts, single = split_prompts(prompt)
    return generate_request(*_loaded(model, prompts, options), single=single)


def stream(
    prompt: Prompt,
    *,
    model: str | os.PathLike[str] | Model = "gpt2",
    **options: Unpack[AllOptions],
) -> Chunks:
    """Load a model and continue one prompt, see `Model.stream`; options as of `generate`."""
    prompts = [single_prompt(prompt, "stream")]
    return stream_request(*_loaded(model, prompts, options, streamed=True))


def _loaded(
    model: Any, prompts: list[Prompt], options: AllOptions, *, streamed: bool = False
) -> tuple[Model, Request]:
    check_names(options, AllOptions.__annotations__)
    given = {k: v for k, v in options.items() if k in LoadOptions.__annotations__}
    rest = cast("Options", {k: v for k, v in options.items() if k not in given})
    checked = check_options(rest)  # before the download of a large model
    request = Request(prompts, check_streamed(checked) if streamed else checked)
    if isinstance(model, Model):
        if given:
            raise ParameterError(
                f"a loaded model takes no {', '.join(given)}: give it to gptx.load()"
            )
        return model, request
    max_tokens = request.options.max_tokens
    return load_once(model, max_tokens, request.check, **cast("LoadOptions", given)), request
