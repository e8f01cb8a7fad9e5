"""A folder of mlx-lm: safetensors with its names, `[out, in]`, quantized or not.

`hugging_face.py` reads it, with either kind of names. mlx-lm's GPT-2 supports OpenAI's settings
only: a tied head, `gelu_new`, an MLP four times as wide as the model
(https://github.com/ml-explore/mlx-lm, mlx_lm/models/gpt2.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gptx.conversions.checkpoint import (
    Array,
    Checkpoint,
    StoredTensor,
    float_array,
    require_openai_settings,
    unquantized,
    write_config_and_tokenizer,
)
from gptx.conversions.containers.binary import dtype_name
from gptx.conversions.formats import hugging_face
from gptx.conversions.formats.hugging_face import FileTensor, read, write_safetensors
from gptx.errors import GptxError
from gptx.model_files import WEIGHTS, Folder, find_files
from gptx.quantization import Quantization, QuantizedTensor, check_group_size, quantize
from gptx.safetensors_file import SafetensorsFile
from gptx.stored_weights import is_linear_weight, should_quantize

__all__ = ["detect", "read", "write"]


def detect(path: Path) -> bool:
    """Test for a folder with safetensors of MLX."""
    try:
        if not (path.is_dir() and hugging_face.detect(path)):
            return False
        first = find_files(Folder(path)).weights[0]
        return SafetensorsFile(first).metadata.get("format") == "mlx"
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

    It is also gptx's own form of quantized weights. A quantized model with settings that mlx-lm
    does not support is written too; only gptx loads it.

    Parameters
    ----------
    folder
        An empty folder.
    dtype
        Type of the floats; None keeps the type of each tensor.
    quantization
        Quantization of every linear layer and table of tokens; None keeps the checkpoint's.

    Raises
    ------
    ConfigError
        The weights are floats, and mlx-lm's GPT-2 would compute something else.
    ParameterError
        The inputs of a matrix do not divide into groups.
    """
    if quantization is not None:
        checkpoint = _quantized(checkpoint, quantization)
    if checkpoint.config.quantization is None:
        require_openai_settings(checkpoint.config, "mlx-lm's GPT-2", "layer_norm_epsilon")
    layout = [
        tuple(_file_tensors(name, tensor, dtype)) for name, tensor in checkpoint.stored.items()
    ]
    tensors = (_arrays(name, tensor) for name, tensor in checkpoint.tensors.items())
    write_safetensors(folder / WEIGHTS, layout, tensors, "mlx")
    write_config_and_tokenizer(checkpoint, folder, dtype)


def _quantized(checkpoint: Checkpoint, quantization: Quantization) -> Checkpoint:
    stored = {
        name: replace(
            tensor, read=_QuantizingReader(name, tensor, quantization), quantization=quantization
        )
        if should_quantize(name)
        else tensor
        for name, tensor in checkpoint.stored.items()
    }
    for name, tensor in stored.items():
        if tensor.quantization:  # an error comes before the first write
            n_in = tensor.shape[0 if is_linear_weight(name) else 1]
            check_group_size(n_in, quantization.group_size, name)
    return replace(
        checkpoint, config=replace(checkpoint.config, quantization=quantization), stored=stored
    )


@dataclass(frozen=True)
class _QuantizingReader:
    """A function that reads floats and quantizes them."""

    name: str
    floats: StoredTensor
    quantization: Quantization

    def __call__(self) -> QuantizedTensor:
        w = float_array(self.floats.read())
        w = w.T if is_linear_weight(self.name) else w
        return quantize(w, self.quantization.bits, self.quantization.group_size, name=self.name)


def _file_tensors(name: str, tensor: StoredTensor, dtype: str | None) -> Iterator[FileTensor]:
    """Yield the tensors of the file that store one tensor of the model."""
    shape = tensor.shape[::-1] if is_linear_weight(name) else tensor.shape
    if tensor.quantization is None:
        yield FileTensor(f"model.{name}", shape, dtype or dtype_name(tensor.dtype))
        return
    quantization = tensor.quantization
    layer = "model." + name.rpartition(".")[0]
    n_out, n_in = shape
    yield FileTensor(f"{layer}.weight", (n_out, n_in * quantization.bits // 32), "uint32")
    for part in ("scales", "biases"):
        yield FileTensor(
            f"{layer}.{part}", (n_out, n_in // quantization.group_size), dtype or "float32"
        )


def _arrays(name: str, tensor: Array | QuantizedTensor) -> tuple[Array, ...]:
    if isinstance(tensor, QuantizedTensor):
        return tensor.weight, tensor.scales, tensor.offsets
    array = unquantized(tensor)
    return (array.T if is_linear_weight(name) else array,)
