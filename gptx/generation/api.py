"""Functions of the package: load a model, generate, stream."""

from __future__ import annotations

import os
from typing import Any, Unpack, cast, overload

from gptx import weights
from gptx.backends import Backend, get_backend
from gptx.config import GPT2Config
from gptx.errors import ParameterError
from gptx.generation.options import (
    AllOptions,
    CheckedOptions,
    LoadOptions,
    Options,
    Prompt,
    check_options,
)
from gptx.generation.results import Result
from gptx.generation.text_model import Chunks, Model, generate_checked, stream_checked
from gptx.hub.resolve import locate
from gptx.model import Transformer
from gptx.quantization import GROUP_SIZE, Quantization

# Tokens times parameters from which a single call gains more by compilation than the import of
# Numba takes: 100 tokens of the 124M model.
MIN_WORK_TO_COMPILE = 100 * 124_000_000


def load(
    model: str | os.PathLike[str] = "gpt2",
    *,
    backend: str | Any = "numpy",
    dtype: str | None = None,
    device: Any = None,
    threads: int | None = None,
    generic: bool = False,
    compile: bool = True,
    cache_dtype: str | None = None,
    quantize: str | None = None,
    group_size: int = GROUP_SIZE,
    revision: str | None = None,
    offline: bool = False,
    token: str | None = None,
) -> Model:
    """Load a model.

    Parameters
    ----------
    model
        An embedded name ("shakespeare"), a folder, or a Hub id: "openai-community/gpt2", or one of
        the short names gpt2, gpt2-medium, gpt2-large and gpt2-xl.
    other parameters
        See `gptx.generation.options.LoadOptions`.

    Raises
    ------
    ParameterError
        The model cannot be quantized in this way.
    NotFoundError, HubUnavailableError, AuthorizationError, IntegrityError, StorageError
        The files do not exist, or cannot be downloaded or read.
    ConfigError, WeightsError
        The files do not describe a GPT-2 that gptx can run.
    BackendError
        The backend is not available, or does not support `dtype`.
    """
    quantization = Quantization.named(quantize, group_size)  # before the download of a large model
    made = get_backend(backend, dtype=dtype, device=device, threads=threads, generic=generic,
                       compile=compile, cache_dtype=cache_dtype)  # fmt: skip
    files = locate(model, revision=revision, offline=offline, token=token)
    config = GPT2Config.from_file(files.config)
    with made.scope():
        loaded = weights.load(
            files.weights, config, made, quantization=quantization, threads=threads
        )
    return Model(Transformer(loaded.config, loaded.tree, made), files, loaded.fingerprint)


def load_once(model: Any, max_tokens: int | None, **options: Unpack[LoadOptions]) -> Model:
    """Load a model for a single call; compile it only if that pays for at most `max_tokens`."""
    loaded = load(model, **options)
    if "compile" not in options and not isinstance(options.get("backend"), Backend):
        expected = loaded.config.n_positions if max_tokens is None else max_tokens
        loaded.backend.compiles = expected * loaded.config.n_parameters >= MIN_WORK_TO_COMPILE
    return loaded


@overload
def generate(
    prompt: str | list[int],
    *,
    model: str | os.PathLike[str] | Model = "gpt2",
    **options: Unpack[AllOptions],
) -> Result: ...
@overload
def generate(
    prompt: list[str] | list[list[int]],
    *,
    model: str | os.PathLike[str] | Model = "gpt2",
    **options: Unpack[AllOptions],
) -> list[Result]: ...
def generate(
    prompt: Any,
    *,
    model: str | os.PathLike[str] | Model = "gpt2",
    **options: Unpack[AllOptions],
) -> Result | list[Result]:
    """Load a model and continue a prompt, or each of several.

    Takes the options of `load` and of `Model.generate`; returns the result of the latter. For more
    than one call, `load` the model once.
    """
    loaded, checked = _loaded(model, options)
    return generate_checked(loaded, prompt, checked)


def stream(
    prompt: Prompt,
    *,
    model: str | os.PathLike[str] | Model = "gpt2",
    **options: Unpack[AllOptions],
) -> Chunks:
    """Load a model and continue one prompt, see `Model.stream`; options as of `generate`."""
    loaded, checked = _loaded(model, options)
    return stream_checked(loaded, [prompt], checked)


def _loaded(model: Any, options: AllOptions) -> tuple[Model, CheckedOptions]:
    given = {k: v for k, v in options.items() if k in LoadOptions.__annotations__}
    rest = cast("Options", {k: v for k, v in options.items() if k not in given})
    checked = check_options(rest)  # before the download of a large model
    if isinstance(model, Model):
        if given:
            raise ParameterError(
                f"a loaded model takes no {', '.join(given)}: give it to gptx.load()"
            )
        return model, checked
    return load_once(model, checked.max_tokens, **cast("LoadOptions", given)), checked
