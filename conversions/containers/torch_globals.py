"""The globals that a pickle of torch.save may name, and their replacements.

A tensor is described, not built. Where PyTorch calls a function with arguments from the file
(torch/_utils.py, https://github.com/pytorch/pytorch), gptx calls one of this module, which has no
side effects. A global that is not in `GLOBALS` is an `UnknownGlobal`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptx.errors import WeightsError
from gptx.safetensors_file import BFLOAT16

MAX_DIMENSIONS = 8
MAX_NUMBERS = 2**48  # of a tensor, and in a stride: NumPy's are below 2**63 bytes
MAX_NAME_LENGTH = 200  # characters: a file can cause any number of comparisons and copies of names

# Functions for tensors that are sparse, quantized, nested, without numbers or of a subclass.
OTHER_TENSORS = (
    "torch._utils _rebuild_",
    "torch._tensor _rebuild_",
    "torch.serialization _get_layout",
)


class Ignored:
    """The type of `IGNORED`."""


IGNORED = Ignored()  # replaces a value that no model needs


@dataclass(frozen=True, slots=True)
class TorchStorage:
    """A contiguous array in the file; tensors are views of it.

    Attributes
    ----------
    key
        Its name in the file.
    dtype
        Type of its numbers, little endian.
    size
        Count of its numbers.
    """

    key: str
    dtype: np.dtype
    size: int


@dataclass(frozen=True, slots=True)
class TorchTensor:
    """A view of a storage; offset and strides are counted in numbers, not in bytes."""

    storage: TorchStorage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Count of the storage's numbers from the first one of the view to the last one."""
        return _extent(self.shape, self.strides)


def storage_of_id(id: Any) -> TorchStorage:
    """Make a storage of its persistent id: ("storage", type, key, device, size[, None]).

    Raises
    ------
    WeightsError
        The id has another form.
    """
    match id:
        case (str(kind), np.dtype() as dtype, str(key), _, int(size), *view):
            is_base = not view or (len(view) == 1 and view[0] is None)  # before PyTorch 1.6
            if kind == "storage" and len(key) <= MAX_NAME_LENGTH and size >= 0 and is_base:
                return TorchStorage(key, dtype, size)
        case (str(_), UnknownGlobal() as unknown, *_) if unknown.name.startswith("torch"):
            raise WeightsError(
                f"its pickle has a storage of the type {unknown.shown}, which gptx does not read: "
                "save the tensors as float32"
            )
    raise WeightsError("its pickle has a storage of a form that PyTorch does not write")


@dataclass(frozen=True, slots=True)
class UnknownGlobal:
    """A global that tensors do not need.

    Attributes
    ----------
    name
        Module and name, with a space between.
    """

    name: str

    @property
    def shown(self) -> str:
        """Module and name for a message, shortened and escaped."""
        return ascii(".".join(self.name.split())[:100])[1:-1]

    def error(self) -> WeightsError:
        """Return the error for a pickle that calls it."""
        if self.name.startswith(OTHER_TENSORS):
            return WeightsError(
                f"its pickle has a tensor of a kind that gptx does not read ({self.shown}): save "
                "dense tensors of floats"
            )
        return WeightsError(
            f"its pickle names {self.shown}, which no tensor needs, and gptx runs no code of a "
            "file: if you trust it, save only its tensors with torch.save"
        )


def resolve_global(name: str) -> Any:
    """Return the replacement of a global: a function of a tuple of arguments, or a dtype.

    Parameters
    ----------
    name
        Module and name, with a space between. A name that is not in `GLOBALS` becomes an
        `UnknownGlobal`.
    """
    return GLOBALS.get(name) or UnknownGlobal(name)


def _empty_dict(arguments: tuple[Any, ...]) -> dict[str, Any]:
    return {}


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[str, Any]:
    if arguments:
        raise WeightsError("its pickle has an OrderedDict of a form that PyTorch does not write")
    return {}


def _ignored(arguments: tuple[Any, ...]) -> Ignored:
    return IGNORED


def _tensor(arguments: tuple[Any, ...]) -> TorchTensor:
    """Describe a tensor from (storage, offset, shape, strides, ...) after a check of its bounds."""
    match arguments:
        case (TorchStorage() as storage, int(offset), tuple(shape), tuple(strides), *_):
            numbers = (offset, *shape[:MAX_DIMENSIONS], *strides[:MAX_DIMENSIONS])
            if (
                len(shape) == len(strides) <= MAX_DIMENSIONS
                and all(type(number) is int and 0 <= number <= MAX_NUMBERS for number in numbers)
                and math.prod(size or 1 for size in shape) <= MAX_NUMBERS
                and offset + _extent(shape, strides) <= storage.size
            ):
                return TorchTensor(storage, offset, shape, strides)
    raise WeightsError("its pickle has a tensor that is not within its storage")


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))


def _parameter(arguments: tuple[Any, ...]) -> TorchTensor:
    if not (arguments and isinstance(arguments[0], TorchTensor)):
        raise WeightsError("its pickle has a parameter that is not a tensor")
    return arguments[0]


def _tensor_with_attributes(arguments: tuple[Any, ...]) -> TorchTensor:
    """Describe a tensor with attributes of Python, from (function, class, arguments, state)."""
    match arguments:
        case (function, _, tuple(inner), _) if function is _tensor:
            return _tensor(inner)
    raise WeightsError("its pickle has a tensor of a class that gptx does not read")


GLOBALS: dict[str, Any] = {
    "collections OrderedDict": _ordered_dict,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_parameter_with_state": _parameter,
    "torch._tensor _rebuild_from_type_v2": _tensor_with_attributes,
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
    "collections defaultdict": _empty_dict,  # its items follow
    # Other values of a checkpoint: a loss that NumPy computed, a device, a set, the state of a
    # generator of random numbers, the path of the best file.
    **dict.fromkeys(
        (
            "torch Size",
            "torch Tensor",
            "torch device",
            *(
                f"torch {dtype}"
                for dtype in (
                    *("bfloat16", "float16", "float32", "float64"),
                    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
                    *("complex64", "complex128"),
                    *("int64", "int32", "int16", "int8"),
                    *("uint64", "uint32", "uint16", "uint8", "bool"),
                )
            ),
            "numpy dtype",
            "numpy.core.multiarray scalar",
            "numpy._core.multiarray scalar",
            "numpy.core.multiarray _reconstruct",
            "numpy._core.multiarray _reconstruct",
            "numpy ndarray",
            "_codecs encode",
            "collections Counter",
            "collections deque",
            "datetime date",
            "datetime datetime",
            "datetime timedelta",
            "datetime timezone",
            "pathlib Path",
            "pathlib PosixPath",
            "pathlib PurePosixPath",
            "pathlib WindowsPath",
            "pathlib PureWindowsPath",
            "pathlib._local PosixPath",
            "pathlib._local WindowsPath",
            "torch.torch_version TorchVersion",
            "typing Any",
            *(
                f"{module} {name}"
                for module in ("builtins", "__builtin__")
                for name in (
                    "set",
                    "frozenset",
                    "bytearray",
                    "list",
                    "dict",
                    "tuple",
                    "int",
                    "float",
                    "complex",
                    "str",
                    "bool",
                    "range",
                    "xrange",
                    "slice",
                )
            ),
        ),
        _ignored,
    ),
}
