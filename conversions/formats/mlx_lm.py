"""A folder of mlx-lm: safetensors with its names, `[out, in]`, quantized or not.

Read by `hugging_face.py`, which knows both kinds of names. mlx-lm's GPT-2 has OpenAI's settings
alone: a tied head, `gelu_new`, an MLP four times as wide as the model
(https://github.com/ml-explore/mlx-lm, mlx_lm/models/gpt2.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gptx.conversions.checkpoint import (
    Array,
    Checkpoint,
    Stored,
    float_array,
    plain,
    require_openai,
)
from gptx.conversions.containers.binary import dtype_name
from gptx.conversions.formats import hugging_face
from gptx.conversions.formats.hugging_face import Part, read
from gptx.errors import GptxError
from gptx.files import safetensors_header
from gptx.hub.resolve import locate
from gptx.quantization import Quantization, QuantizedTensor, check_group_size, quantize
from gptx.weights import LINEAR, takes_codes

__all__ = ["detect", "read", "write"]


def detect(path: Path) -> bool:
    """Whether this is a folder with safetensors that MLX wrote."""
    try:
        if not (path.is_dir() and hugging_face.detect(path)):
            return False
        return safetensors_header(locate(path).weights[0])[1].get("format") == "mlx"
    except GptxError:
        return False


def write(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    dtype: str | None = None,
    quantization: Quantization | None = None,
) -> None:
    """Write a folder that mlx-lm and gptx load.

    It is also gptx's own form of quantized weights: those of a model that mlx-lm does not have are
    written all the same, for gptx alone.

    Parameters
    ----------
    folder
        It exists and is empty.
    dtype
        Of what is not quantized; None leaves each tensor as it is.
    quantization
        Quantize every linear layer and table of tokens; None leaves them as they are.

    Raises
    ------
    ConfigError
        The weights are floats, and mlx-lm's GPT-2 would compute something else.
    ParameterError
        A matrix does not divide into such groups.
    """
    if quantization is not None:
        checkpoint = _quantized(checkpoint, quantization)
    if checkpoint.config.quantization is None:
        require_openai(checkpoint.config, "mlx-lm's GPT-2", "layer_norm_epsilon")
    layout = [tuple(_parts(name, tensor, dtype)) for name, tensor in checkpoint.stored.items()]
    tensors = (_arrays(name, tensor) for name, tensor in checkpoint.tensors.items())
    hugging_face.write_safetensors(folder / hugging_face.WEIGHTS, layout, tensors, "mlx")
    hugging_face.write_config(checkpoint, folder, dtype)


def _quantized(checkpoint: Checkpoint, how: Quantization) -> Checkpoint:
    stored = {
        name: replace(tensor, read=_CodesOf(name, tensor, how), quantization=how)
        if takes_codes(name)
        else tensor
        for name, tensor in checkpoint.stored.items()
    }
    for name, tensor in stored.items():
        if tensor.quantization:  # refuse before anything is written
            n_in = tensor.shape[0 if LINEAR.fullmatch(name) else 1]
            check_group_size(n_in, how.group_size, name)
    return replace(checkpoint, config=replace(checkpoint.config, quantization=how), stored=stored)


@dataclass(frozen=True)
class _CodesOf:
    """Reads floats and quantizes them."""

    name: str
    floats: Stored
    how: Quantization

    def __call__(self) -> QuantizedTensor:
        w = float_array(self.floats.read())
        w = w.T if LINEAR.fullmatch(self.name) else w
        return quantize(w, self.how.bits, self.how.group_size, name=self.name)


def _parts(name: str, tensor: Stored, dtype: str | None) -> Iterator[Part]:
    """What a tensor is in the file."""
    shape = tensor.shape[::-1] if LINEAR.fullmatch(name) else tensor.shape
    if tensor.quantization is None:
        yield Part(f"model.{name}", shape, dtype or dtype_name(tensor.dtype))
        return
    how = tensor.quantization
    layer = "model." + name.rpartition(".")[0]
    n_out, n_in = shape
    yield Part(f"{layer}.weight", (n_out, n_in * how.bits // 32), "uint32")
    for part in ("scales", "biases"):
        yield Part(f"{layer}.{part}", (n_out, n_in // how.group_size), dtype or "float32")


def _arrays(name: str, tensor: Array | QuantizedTensor) -> tuple[Array, ...]:
    if isinstance(tensor, QuantizedTensor):
        return tensor.weight, tensor.scales, tensor.biases
    array = plain(tensor)
    return (array.T if LINEAR.fullmatch(name) else array,)
