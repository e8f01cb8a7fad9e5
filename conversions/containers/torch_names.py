"""The names in a pickle of torch.save, and what they stand for here.

Tensors are described and never built: what PyTorch would call with the arguments in the file (its
torch/_utils.py, https://github.com/pytorch/pytorch) is a function of this module, of the arguments
alone. A name that is not in `NAMES` stands for nothing, and is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gptx.errors import WeightsError
from gptx.files import BFLOAT16

MAX_DIMENSIONS = 8
MAX_NAME = 1000  # letters: a file can have long ones compared as often as it likes


class Nothing:
    """Something that no model needs."""


NOTHING = Nothing()


@dataclass(frozen=True, slots=True)
class Storage:
    """Numbers in a row somewhere in the file; tensors are views of them.

    Attributes
    ----------
    key
        Its name in the file.
    dtype
        Of the numbers, little endian.
    size
        How many they are.
    """

    key: str
    dtype: np.dtype
    size: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A view of a storage: a first number, a shape, and steps, all counted in numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def storage(id: Any) -> Storage:
    """("storage", type, key, device, size), and in files before PyTorch 1.6 None.

    Raises
    ------
    WeightsError
        It is something else.
    """
    match id:
        case (str(kind), np.dtype() as dtype, str(key), _, int(size), *view):
            whole = not view or (len(view) == 1 and view[0] is None)
            if kind == "storage" and len(key) <= MAX_NAME and size >= 0 and whole:
                return Storage(key, dtype, size)
    raise WeightsError("its pickle names a storage in a way that PyTorch does not")


def known(name: str) -> Any:
    """What a name stands for: a function of a tuple of arguments, or the type of a storage.

    Raises
    ------
    WeightsError
        It is not one that tensors need.
    """
    if name not in NAMES:
        shown = ".".join(name.split())[:100]
        raise WeightsError(
            f"its pickle asks for {ascii(shown)[1:-1]}, which no tensor needs: gptx runs nothing "
            "that a file names. If you trust it, save its tensors alone with torch.save"
        )
    return NAMES[name]


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[str, Any]:
    if arguments:
        raise WeightsError("its pickle makes an OrderedDict in a way that PyTorch does not")
    return {}


def _nothing(arguments: tuple[Any, ...]) -> Nothing:
    return NOTHING


def _tensor(arguments: tuple[Any, ...]) -> Tensor:
    """(storage, offset, shape, strides, ...), whose numbers lie within the storage."""
    match arguments:
        case (Storage() as storage, int(offset), tuple(shape), tuple(strides), *_):
            numbers = (offset, *shape[:MAX_DIMENSIONS], *strides[:MAX_DIMENSIONS])
            if (
                len(shape) == len(strides) <= MAX_DIMENSIONS
                and all(type(number) is int and number >= 0 for number in numbers)
                and offset + extent(shape, strides) <= storage.size
            ):
                return Tensor(storage, offset, shape, strides)
    raise WeightsError("its pickle holds a tensor that does not lie within its storage")


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How many numbers there are from the first of a view to its last."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))


def _parameter(arguments: tuple[Any, ...]) -> Tensor:
    if not (arguments and isinstance(arguments[0], Tensor)):
        raise WeightsError("its pickle holds a parameter that is no tensor")
    return arguments[0]


NAMES: dict[str, Any] = {
    "collections OrderedDict": _ordered_dict,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_parameter_with_state": _parameter,
    "torch DoubleStorage": np.dtype("<f8"),
    "torch FloatStorage": np.dtype("<f4"),
    "torch HalfStorage": np.dtype("<f2"),
    "torch BFloat16Storage": BFLOAT16,
    "torch LongStorage": np.dtype("<i8"),
    "torch IntStorage": np.dtype("<i4"),
    "torch ShortStorage": np.dtype("<i2"),
    "torch CharStorage": np.dtype("<i1"),
    "torch ByteStorage": np.dtype("<u1"),
    "torch BoolStorage": np.dtype("?"),
    # What stands beside the tensors in a checkpoint: a loss that NumPy computed, a device, a set.
    **dict.fromkeys(
        (
            "torch Size",
            "torch device",
            "torch bfloat16",
            "torch float16",
            "torch float32",
            "torch float64",
            "numpy dtype",
            "numpy.core.multiarray scalar",
            "numpy._core.multiarray scalar",
            "_codecs encode",
            *(
                f"{module} {name}"
                for module in ("builtins", "__builtin__")
                for name in ("set", "frozenset", "bytearray")
            ),
        ),
        _nothing,
    ),
}
