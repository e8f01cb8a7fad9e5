"""Options that a model suggests: its generation_config.json, in gptx's names.

transformers applies this file always, gptx only on request (`generation_config=True`). As there,
`do_sample` false is temperature 0, and the default of `top_k` is 50 if `do_sample` is true. The
ends of text in the file are always used (`gptx.config`); `max_length` is not: it counts the prompt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from gptx.errors import ConfigError, NotFoundError, ParameterError, StorageError, argument, shown
from gptx.generation.options import Options, check_options
from gptx.model_files import CONFIG, GENERATION, ModelFiles

TOP_K = 50  # the default of transformers
MAX_BYTES = 2**20
# Names of transformers -> those of gptx.
NAMES = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "bad_words_ids": "ban",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
    "num_return_sequences": "n",
}
SUGGESTIBLE = {*NAMES.values(), "sequence_bias"}  # options that the file can have
# Options of a draw, which transformers ignores without `do_sample`.
OF_DRAWS = ("temperature", "top_k", "top_p", "min_p", "typical_p")
# Settings that change the output and that gptx does not have -> values that do nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "begin_suppress_tokens": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "token_healing": (False,),
    "min_length": (0,),
}


def read_generation_config(files: ModelFiles) -> dict[str, Any] | None:
    """Read the generation_config.json beside the config.json of a model; None if it has none.

    Raises
    ------
    ConfigError
        The file is not a JSON object.
    StorageError
        It cannot be read.
    """
    path = files.config.with_name(GENERATION)
    if files.config.name != CONFIG or not path.is_file():
        return None
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"over {MAX_BYTES} bytes")
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}): fetch it again") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}, expected a JSON object")
    return data


def suggested_options(files: ModelFiles) -> Options:
    """Return the options of `generate` that the generation_config.json of a model has.

    Raises
    ------
    NotFoundError
        The model has no such file.
    ConfigError
        A value is invalid, or not supported.
    """
    data = read_generation_config(files)
    path = files.config.with_name(GENERATION)
    if data is None:
        raise NotFoundError(
            f"{GENERATION} is missing beside the config of {files.name}: leave out "
            f"{argument('generation_config')}"
        )
    options = _options_of(data, path)
    try:
        check_options(options)
    except ParameterError as error:
        raise ConfigError(f"{path}: {error}") from None
    return options


def with_suggested(given: Options, files: ModelFiles) -> Options:
    """Return the options of a request, and those that the model suggests for the others."""
    return cast("Options", {**suggested_options(files), **given})


def _options_of(data: dict[str, Any], path: Path) -> Options:
    data = {name: value for name, value in data.items() if value is not None}
    for name, without_effect in UNSUPPORTED.items():
        if name in data and data[name] not in without_effect:
            raise ConfigError(
                f"{path} has {name} {shown(data[name])}, which gptx does not support: give the "
                "other settings as options"
            )
    samples = bool(data.get("do_sample", False))
    found: dict[str, Any] = {
        NAMES[name]: value
        for name, value in data.items()
        if name in NAMES and (samples or name not in OF_DRAWS)
    }
    if samples:
        found = {"temperature": 1.0, "top_k": TOP_K, **found}
    if found.get("n") == 1:
        del found["n"]
    if bias := data.get("sequence_bias"):
        found["sequence_bias"] = _sequence_bias(bias, path)
    if suppressed := data.get("suppress_tokens"):
        found["ban"] = [*found.get("ban", []), *([token] for token in suppressed)]
    return cast("Options", found)


def _sequence_bias(given: Any, path: Path) -> dict[Any, float]:
    """Return transformers' list of [token ids, bias] as a dict."""
    try:
        return {tuple(ids): float(bias) for ids, bias in given}
    except (TypeError, ValueError):
        raise ConfigError(
            f"{path} has sequence_bias {shown(given)}, expected a list of [token ids, number]"
        ) from None
