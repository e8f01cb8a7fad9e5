"""`gptx info`: the configuration, the tensors and the memory of a model."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import click

from gptx.cli.formatting import format_size, print_json
from gptx.cli.options import (
    complete_model,
    config_option,
    ignore_unknown_option,
    json_option,
    offline_option,
    revision_option,
)
from gptx.config import GPT2Config
from gptx.generation.found_model import find_model
from gptx.generation.suggested import read_generation_config

NO_SETTINGS = ("transformers_version", "_from_model_config")  # of generation_config.json
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@click.command()
@click.argument("model", shell_complete=complete_model)
@config_option
@ignore_unknown_option
@revision_option
@offline_option
@json_option
def info(
    model: str,
    config: str | None,
    ignore_unknown: bool,
    revision: str | None,
    offline: bool,
    as_json: bool,
) -> None:
    """Show the configuration, the tensors and the memory of a model.

    MODEL is shakespeare, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a Hub id, or a file or folder of a
    format that gptx convert --list names. The names, shapes and types of the weights in a file are
    compared with the configuration; their numbers are not read. For a Hub model gptx downloads
    config.json and the tokenizer, not the weights.

    \b
    Examples:
      gptx info gpt2-large
      gptx info model.gguf
    """
    found = find_model(
        model, config=config, ignore_unknown=ignore_unknown, revision=revision, offline=offline
    )
    settings, files = found.info.config, found.info.files
    stored = found.open() if found.is_local else None
    if stored is not None:
        settings = stored.config
    tokenizer = sorted(files.tokenizer)
    if found.info.has_tokenizer and not tokenizer:
        tokenizer = [files.config.name]
    about: dict[str, Any] = {
        "model": files.name,
        "revision": files.revision,
        "format": stored and stored.format,
        "config": settings.to_dict(),
        "parameters": settings.n_parameters,
        "stored": stored and stored.types,
        "stored_bytes": stored and stored.n_bytes,
        "tokenizer": tokenizer,
        "generation_config": read_generation_config(files),
        "notes": list(stored.notes) if stored else [],
        "tensors": {name: list(shape) for name, shape in settings.tensor_shapes().items()},
        "weights_bytes": {name: n * settings.n_parameters for name, n in ITEM_BYTES.items()},
        "cache_bytes_per_token": {
            name: n * _cache_floats_per_token(settings) for name, n in ITEM_BYTES.items()
        },
    }
    for note in about["notes"]:
        click.echo(f"Note: {note}", err=True)
    if as_json:
        print_json(about)
    else:
        click.echo(_text(settings, about))


def _cache_floats_per_token(config: GPT2Config) -> int:
    """Return the number of floats in the KV cache for one token."""
    return 2 * config.n_layer * config.n_embd


def _text(config: GPT2Config, about: dict[str, Any]) -> str:
    lines = [
        f"{about['model']}: {config.n_parameters:,} parameters",
        f"  layers {config.n_layer}, heads {config.n_head}, width {config.n_embd}, "
        f"context {config.n_positions}, vocabulary {config.vocab_size}",
        f"  activation {config.activation_function}, "
        f"head {'tied to the embedding' if config.tie_word_embeddings else 'not tied'}, "
        f"tokenizer: {', '.join(about['tokenizer']) or 'none'}",
    ]
    if about["generation_config"] is not None:
        lines.append(f"  generation_config.json: {_settings(about['generation_config'])}")
    if about["revision"]:
        lines.append(f"  revision {about['revision']}")
    if config.quantization:
        lines.append(f"  matrices quantized: {config.quantization}")
    if about["stored"]:
        types, size = ", ".join(about["stored"]), format_size(about["stored_bytes"])
        lines.append(f"  {about['format']}, stored as {types}, complete: {size}")
    lines += ["", f"{'tensor':<26} {'shape':<14} {'count':>5} {'parameters':>14}"]
    for name, (shape, count) in _tensor_groups(config).items():
        n = count * math.prod(shape)
        lines.append(f"{name:<26} {list(shape)!s:<14} {count:>5} {n:>14,}")
    lines += ["", f"{'memory':<9} {'weights':>10} {'cache per token':>15} {'full cache':>12}"]
    for dtype, n in ITEM_BYTES.items():
        token = n * _cache_floats_per_token(config)
        lines.append(
            f"{dtype:<9} {format_size(n * config.n_parameters):>10} {format_size(token):>15} "
            f"{format_size(token * config.n_positions):>12}"
        )
    return "\n".join(lines)


def _settings(generation_config: dict[str, Any]) -> str:
    """Return the settings that transformers' generation would take, in one line."""
    shown = [
        f"{name} {json.dumps(value)}"
        for name, value in generation_config.items()
        if value is not None and name not in NO_SETTINGS
    ]
    return f"{', '.join(shown) or 'no settings'} (gptx generate --generation-config)"


def _tensor_groups(config: GPT2Config) -> dict[str, tuple[tuple[int, ...], int]]:
    """Group the tensors of all layers under "h.*.": name -> (shape, number of layers)."""
    groups: dict[str, tuple[tuple[int, ...], int]] = {}
    for name, shape in config.tensor_shapes().items():
        name = re.sub(r"^h\.\d+\.", "h.*.", name)
        groups[name] = (shape, groups.get(name, (shape, 0))[1] + 1)
    return groups
