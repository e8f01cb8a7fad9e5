"""`gptx info`: the configuration, the tensors and the memory of a model."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import click

from gptx.cli.formatting import format_size
from gptx.cli.options import json_option, offline_option, revision_option
from gptx.config import GPT2Config
from gptx.hub.resolve import locate
from gptx.quantization import QuantizedTensor
from gptx.safetensors_file import BFLOAT16
from gptx.stored_weights import Tensor, open_weights

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@click.command()
@click.argument("model")
@revision_option
@offline_option
@json_option
def info(model: str, revision: str | None, offline: bool, as_json: bool) -> None:
    """Show the configuration, the tensors and the memory of a model.

    MODEL is shakespeare, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder, or a Hub id. The weights
    in a folder are compared with its config.json. For a Hub model gptx downloads config.json and
    the tokenizer, not the weights.

    \b
    Example:
      gptx info gpt2-large
    """
    files = locate(model, revision=revision, offline=offline, weights=False)
    config = GPT2Config.from_file(files.config)
    stored = stored_bytes = None
    if files.revision is None:
        paths = locate(model).weights
        found = open_weights(paths, config)
        config = found.config or config
        stored = sorted(set(map(_stored_type, found.map().values())))
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
        "weights_bytes": {name: n * config.n_parameters for name, n in ITEM_BYTES.items()},
        "cache_bytes_per_token": {
            name: n * _cache_floats_per_token(config) for name, n in ITEM_BYTES.items()
        },
    }
    click.echo(json.dumps(about) if as_json else _text(config, about))


def _stored_type(array: Tensor) -> str:
    if isinstance(array, QuantizedTensor):
        return f"int{array.bits}"
    return "bfloat16" if array.dtype == BFLOAT16 else str(array.dtype)


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
    if about["revision"]:
        lines.append(f"  revision {about['revision']}")
    if config.quantization:
        lines.append(f"  matrices quantized: {config.quantization}")
    if about["stored"]:
        size = format_size(about["stored_bytes"])
        lines.append(f"  weights stored as {', '.join(about['stored'])}, complete: {size}")
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


def _tensor_groups(config: GPT2Config) -> dict[str, tuple[tuple[int, ...], int]]:
    """Group the tensors of all layers under "h.*.": name -> (shape, number of layers)."""
    groups: dict[str, tuple[tuple[int, ...], int]] = {}
    for name, shape in config.tensor_shapes().items():
        name = re.sub(r"^h\.\d+\.", "h.*.", name)
        groups[name] = (shape, groups.get(name, (shape, 0))[1] + 1)
    return groups
