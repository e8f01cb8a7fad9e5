"""`gptx info`: what a model is made of, and how much memory it takes."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import click

from gptx.cli.options import format_size, json_option, offline_option, revision_option
from gptx.config import GPT2Config
from gptx.files import BFLOAT16
from gptx.hub.resolve import locate
from gptx.quantization import QuantizedTensor
from gptx.weights import Tensor, read_weights

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@click.command()
@click.argument("model")
@revision_option
@offline_option
@json_option
def info(model: str, revision: str | None, offline: bool, as_json: bool) -> None:
    """Show the sizes and tensors of MODEL, and its memory for each dtype.

    MODEL is a name, a folder or a Hub id. The weights of an embedded model or a folder are checked
    against its config; of a Hub model only the config is fetched.
    """
    files = locate(model, revision=revision, offline=offline, weights=False)
    config = GPT2Config.from_file(files.config)
    stored = stored_bytes = None
    if files.revision is None:
        paths = locate(model).weights
        stored = sorted(set(map(_kind, read_weights(paths, config).values())))
        stored_bytes = sum(path.stat().st_size for path in paths)
    about = {
        "model": files.name,
        "revision": files.revision,
        "config": config.to_dict(),
        "parameters": config.n_parameters,
        "stored": stored,
        "stored_bytes": stored_bytes,
        "tokenizer": sorted(files.tokenizer),
        "tensors": {name: list(shape) for name, shape in config.tensor_shapes().items()},
        "weights_bytes": {name: n * config.n_parameters for name, n in BYTES.items()},
        "cache_bytes_per_token": {name: n * _cache_per_token(config) for name, n in BYTES.items()},
    }
    click.echo(json.dumps(about) if as_json else _text(config, about))


def _kind(array: Tensor) -> str:
    if isinstance(array, QuantizedTensor):
        return f"int{array.bits}"
    return "bfloat16" if array.dtype == BFLOAT16 else str(array.dtype)


def _cache_per_token(config: GPT2Config) -> int:
    return 2 * config.n_layer * config.n_embd


def _text(config: GPT2Config, about: dict[str, Any]) -> str:
    lines = [
        f"{about['model']}: {config.n_parameters:,} parameters",
        f"  layers {config.n_layer}, heads {config.n_head}, width {config.n_embd}, "
        f"context {config.n_positions}, vocabulary {config.vocab_size}",
        f"  activation {config.activation_function}, "
        f"head {'tied to the embedding' if config.tie_word_embeddings else 'of its own'}, "
        f"tokenizer: {', '.join(about['tokenizer']) or 'none'}",
    ]
    if about["revision"]:
        lines.append(f"  revision {about['revision']}")
    if config.quantization:
        lines.append(f"  matrices quantized: {config.quantization}")
    if about["stored"]:
        size = format_size(about["stored_bytes"])
        lines.append(f"  weights stored as {', '.join(about['stored'])}, all there: {size}")
    lines += ["", f"{'tensor':<26} {'shape':<14} {'count':>5} {'parameters':>14}"]
    for name, (shape, count) in _groups(config).items():
        n = count * math.prod(shape)
        lines.append(f"{name:<26} {list(shape)!s:<14} {count:>5} {n:>14,}")
    lines += ["", f"{'memory':<9} {'weights':>10} {'cache, a token':>15} {'cache, full':>12}"]
    for dtype, n in BYTES.items():
        token = n * _cache_per_token(config)
        lines.append(
            f"{dtype:<9} {format_size(n * config.n_parameters):>10} {format_size(token):>15} "
            f"{format_size(token * config.n_positions):>12}"
        )
    return "\n".join(lines)


def _groups(config: GPT2Config) -> dict[str, tuple[tuple[int, ...], int]]:
    """Tensors by name with the layer left open: name -> (shape, how many)."""
    groups: dict[str, tuple[tuple[int, ...], int]] = {}
    for name, shape in config.tensor_shapes().items():
        name = re.sub(r"^h\.\d+\.", "h.*.", name)
        groups[name] = (shape, groups.get(name, (shape, 0))[1] + 1)
    return groups
