"""The rules for the weights of a model in the files of every format: names, head, shapes, types.

Names are the Hub's without the prefix `transformer.` (`h.0.attn.c_attn.weight`), layouts are the
Hub's Conv1D `[in, out]`, and a tied head is not stored twice. A quantized matrix is one
`QuantizedTensor` [out, in] under the name of its weight.

All readers decide with `settle_head` if the head is tied, and check the tensors with
`check_weights`, so a fault has one message.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol, TypeVar

import numpy as np

from gptx.config import GPT2Config
from gptx.errors import WeightsError
from gptx.quantization import Quantization, QuantizedTensor
from gptx.safetensors_file import BFLOAT16, widen_bfloat16
from gptx.tensor_names import listed, unknown_error, unknown_note

Tensor = np.ndarray | QuantizedTensor
T = TypeVar("T")

# Names

_LINEAR_WEIGHT = re.compile(r"h\.\d+\.(attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj))\.weight")

TABLE = "wte.weight"
POSITIONS = "wpe.weight"
HEAD = "lm_head.weight"
TABLES = (TABLE, POSITIONS, HEAD)  # [N, C] in every layout

OWN_HEAD_NOTE = (
    "the config has tie_word_embeddings: true, but lm_head.weight differs from wte.weight: "
    "the model's own head is used"
)
COMPARE_NUMBERS = 2**18  # compared at a time: they stay in the cache of a core


def is_linear_weight(name: str) -> bool:
    """Test for the matrix of a linear layer, which is [in, out] here and [out, in] elsewhere."""
    return _LINEAR_WEIGHT.fullmatch(name) is not None


def should_quantize(name: str) -> bool:
    """Test for a tensor that `quantize_weights` quantizes: linear layers, tables of tokens.

    mlx-lm quantizes the small table of positions too; gptx reads that and computes with floats.
    """
    return _may_be_quantized(name) and name != POSITIONS


def _may_be_quantized(name: str) -> bool:
    return name in TABLES or is_linear_weight(name)


# Tensors


class DescribedTensor(Protocol):
    """A tensor in a file, described before it is read; see
    `gptx.safetensors_weights.SafetensorsTensor`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as in `GPT2Config.tensor_shapes`."""

    @property
    def dtype(self) -> np.dtype:
        """Type of the array; float32 for a quantized matrix."""

    @property
    def quantization(self) -> Quantization | None:
        """Quantization of the matrix; None for floats."""

    @property
    def file_type(self) -> str | None:
        """Name of the type in the file if `dtype` is another one, such as "Q6_K"; else None."""


def no_float_message(name: str, dtype: np.dtype) -> str:
    """Return the message for a tensor of another type than a float type."""
    return f"tensor {name} is of type {dtype}, expected a float type"


def is_float(dtype: np.dtype) -> bool:
    """Test for a float type, `BFLOAT16` among them."""
    return dtype.kind == "f" or dtype == BFLOAT16


def settle_head(
    tensors: Mapping[str, T], config: GPT2Config | None, is_same: Callable[[T, T], bool]
) -> tuple[dict[str, T], GPT2Config | None, tuple[str, ...]]:
    """Decide by the tensors if the head is tied, as transformers 5 does.

    A config is often wrong about it. A head that equals the table of tokens is a duplicate, which
    is dropped. A head that differs is used. A head without a table is the table as well.

    Parameters
    ----------
    tensors
        Name -> tensor, in the form of the reader.
    config
        None if the files come without one. A config that unties the head decides.
    is_same
        Function that returns True if two tensors have the same shape and numbers.

    Returns
    -------
    tensors, config, notes
        The tensors and the config that fit each other, and the differences from the given config,
        one sentence each.
    """
    found = dict(tensors)
    if HEAD not in found or (config is not None and not config.tie_word_embeddings):
        return found, config, ()
    if TABLE not in found:
        found[TABLE] = found.pop(HEAD)
    elif is_same(found[HEAD], found[TABLE]):
        del found[HEAD]
    elif config is not None:
        return found, replace(config, tie_word_embeddings=False), (OWN_HEAD_NOTE,)
    return found, config, ()


def have_same_numbers(a: np.ndarray, b: np.ndarray) -> bool:
    """Compare the shapes and the numbers of two arrays of any types, some rows at a time.

    A NaN equals a NaN.
    """
    if a.shape != b.shape:
        return False
    a, b = np.atleast_1d(a), np.atleast_1d(b)
    n_rows = max(1, COMPARE_NUMBERS * len(a) // max(1, a.size))
    for first in range(0, len(a), n_rows):
        x, y = (widen_bfloat16(array[first : first + n_rows]) for array in (a, b))
        if not (np.array_equal(x, y) or np.array_equal(x, y, equal_nan=True)):
            return False
    return True


def drop_unknown(
    found: Mapping[str, T], config: GPT2Config
) -> tuple[dict[str, T], tuple[str, ...]]:
    """Leave out the tensors that the config does not have; return the others, and a note."""
    expected = config.tensor_shapes()
    known = {name: tensor for name, tensor in found.items() if name in expected}
    unknown = [name for name in found if name not in expected]
    return known, (unknown_note(unknown),) if unknown else ()


def type_name(tensor: DescribedTensor) -> str:
    """Return the name of the type of a tensor: "float32", "bfloat16", "int4"."""
    if tensor.quantization is not None:
        return f"int{tensor.quantization.bits}"
    return "bfloat16" if tensor.dtype == BFLOAT16 else str(tensor.dtype)


def check_weights(found: Mapping[str, Tensor | DescribedTensor], config: GPT2Config) -> None:
    """Check names, shapes and types of all tensors of a model against its config.

    In a quantized model some matrices may be floats: mlx-lm does not quantize a matrix with inputs
    that do not divide into groups.

    Raises
    ------
    WeightsError
        A tensor is missing, unknown, or of another shape or type.
    """
    expected = config.tensor_shapes()
    if missing := [name for name in expected if name not in found]:
        if missing == [HEAD]:
            raise WeightsError(
                f"tensor {HEAD} is missing, but the config has tie_word_embeddings: false: fetch "
                "the model again, or set it to true if the head is the table of tokens"
            )
        raise WeightsError(f"{listed(missing)} missing: the weights do not fit the config")
    if unknown := [name for name in found if name not in expected]:
        raise unknown_error(unknown)
    for name, expected_shape in expected.items():
        shape, dtype, quantization = _described(name, found[name])
        if quantization is not None:
            allowed = config.quantization if _may_be_quantized(name) else None
            if quantization != allowed:
                raise WeightsError(
                    f"tensor {name} is {quantization}, expected {allowed or 'floats'}"
                )
        elif not is_float(dtype):
            raise WeightsError(no_float_message(name, dtype))
        if shape != expected_shape:
            raise WeightsError(
                f"tensor {name} has shape {list(shape)}, expected {list(expected_shape)}: "
                "the weights do not fit the config"
            )


def _described(
    name: str, tensor: Tensor | DescribedTensor
) -> tuple[tuple[int, ...], np.dtype, Quantization | None]:
    """Return the shape in the Hub's layout, the type of floats, and the quantization."""
    if isinstance(tensor, np.ndarray):
        return tensor.shape, tensor.dtype, None
    if isinstance(tensor, QuantizedTensor):
        shape = tensor.shape[::-1] if is_linear_weight(name) else tensor.shape
        return shape, np.dtype(np.float32), tensor.quantization
    return tensor.shape, tensor.dtype, tensor.quantization
