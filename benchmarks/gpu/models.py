"""Models for the GPU benchmark, random ones or the embedded one, and the work that they take."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from gptx.bench.sources import RANDOM, Source, find_source, write_source
from gptx.config import SIZES, GPT2Config
from gptx.quantization import Quantization
from gptx.safetensors_weights import open_weights
from gptx.stored_weights import Tensor, should_quantize
from gptx.weights import quantize_weights

EMBEDDED = "shakespeare"


def load_model(size: str, quantize: str | None = None) -> tuple[GPT2Config, dict[str, Tensor]]:
    """Load a config and weights on the host; nothing is downloaded.

    Random weights are written to the folder for temporary files and read from there by later jobs.

    Parameters
    ----------
    size
        One of OpenAI's sizes for random weights, or the name of the embedded model.
    quantize
        "int8" or "int4" for quantized weights in groups of 64, None for floats.
    """
    source = _source(size)
    weights = open_weights([source.path / "model.safetensors"], source.config).map()
    quantized, config = quantize_weights(weights, source.config, Quantization.named(quantize))
    return config, quantized


def model_folder(size: str) -> Path:
    """Return the folder of a model of `load_model`."""
    return _source(size).path


def _source(size: str) -> Source:
    name = RANDOM + size if size in SIZES else size
    source = find_source(name, Path(tempfile.gettempdir()), offline=True)
    write_source(source)
    return source


def step_bytes(config: GPT2Config, itemsize: int) -> int:
    """Return the bytes of weights that a decode step reads: all but the positions.

    Each group of quantized values has a scale and an offset in float32.
    """
    how, n_bytes = config.quantization, 0.0
    for name, shape in config.tensor_shapes().items():
        if name == "wpe.weight":
            continue
        quantized = how and should_quantize(name)
        each = how.bits / 8 + 8 / how.group_size if how and quantized else itemsize
        n_bytes += each * math.prod(shape)
    return int(n_bytes)


def token_cache_bytes(config: GPT2Config, itemsize: int) -> int:
    """Return the bytes of the keys and values of one token."""
    return 2 * config.n_layer * config.n_embd * itemsize


def prompt_flops(config: GPT2Config, n: int) -> int:
    """Return the operations to read a prompt of `n` tokens, with the logits of the last only."""
    L, C, M = config.n_layer, config.n_embd, config.mlp_dim
    products = 2 * n * L * (4 * C * C + 2 * C * M)
    attention = 2 * 2 * L * C * n * (n + 1) // 2
    return products + attention + 2 * C * config.vocab_size
