"""Launch the kernels of one compiled text on the CPU."""

from __future__ import annotations

import ctypes
import mmap
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.emulator import access_counter
from tests.emulator.guarded_memory import Copy, find_copy, guarded

LOCK = threading.Lock()  # the libraries keep the state of one launch in static variables


class Module:
    """The kernels of one compiled text.

    Parameters
    ----------
    library
        Return the path of a kernel's library, or of the library of "all" kernels.
    separate_kernels
        True if each kernel has a separate library.

    Attributes
    ----------
    kernels
        Name of a kernel -> types of its parameters: NumPy's names, after "*" for a pointer and
        after "!*" for a pointer to const.
    """

    def __init__(self, library: Callable[[str], Path], *, separate_kernels: bool) -> None:
        self._path, self._separate_kernels = library, separate_kernels
        self._libraries: dict[str, ctypes.CDLL] = {}
        all_kernels = self._load("all")
        all_kernels.describe_kernels.restype = ctypes.c_char_p
        lines = all_kernels.describe_kernels().decode().splitlines()
        self.kernels = {name: types for name, *types in (line.split() for line in lines)}

    def _load(self, kernel: str) -> ctypes.CDLL:
        name = kernel if self._separate_kernels else "all"
        if name not in self._libraries:
            library = ctypes.CDLL(str(self._path(name)))
            library.launch.restype = ctypes.c_char_p
            library.count_waits.restype = ctypes.c_ulonglong
            self._libraries[name] = library
        return self._libraries[name]

    @property
    def n_waits(self) -> int:
        """Number of calls of `grid_dependency_sync` so far, over all threads of all launches."""
        return sum(library.count_waits() for library in self._libraries.values())

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        shared_bytes: int = 0,
        seed: int = 1,
    ) -> None:
        """Run a kernel until it ends.

        Parameters
        ----------
        args
            Contiguous arrays, NumPy scalars and None (a null pointer), of the types of the
            kernel's parameters. The kernel works on copies of the arrays between inaccessible
            pages. Arrays that it may write to are copied back.
        shared_bytes
            Bytes of dynamic shared memory.
        seed
            Seed of the order in which the threads run.

        Raises
        ------
        AssertionError
            An argument does not match, or the kernel has a fault; the message names it.
        """
        self.check_arguments(name, args)
        types = self.kernels[name]
        arrays = [arg for arg in args if isinstance(arg, np.ndarray)]
        with LOCK, guarded(arrays) as copies:
            values = [_passed_value(arg, copies) for arg in args]
            library = self._load(name)
            trace = access_counter.begin_trace(library)
            fault = library.launch(
                list(self.kernels).index(name),
                (ctypes.c_uint * 3)(*grid),
                (ctypes.c_uint * 3)(*block),
                ctypes.c_size_t(shared_bytes),
                (ctypes.c_void_p * len(args))(*(value.ctypes.data for value in values)),
                ctypes.c_uint(seed),
            )
            if trace is not None:
                at = [int(v) if "*" in t else 0 for (v,), t in zip(values, types, strict=True)]
                access_counter.end_trace(library, name, trace, at)
            assert not fault, locate_fault(fault.decode(), args, copies)
            for arg, expected in zip(args, types, strict=True):
                if isinstance(arg, np.ndarray):
                    copy = find_copy(copies, arg)
                    assert copy.is_clean_around(), f"{name} writes before or behind {expected}"
                    if not expected.startswith("!"):
                        copy.copy_back()

    def check_arguments(self, name: str, args: Sequence[Any]) -> None:
        """Raise an AssertionError if an argument does not match the kernel's parameter."""
        assert name in self.kernels, f"no kernel {name!r} among {', '.join(self.kernels)}"
        types = self.kernels[name]
        assert len(args) == len(types), f"{name} takes {len(types)} arguments, not {len(args)}"
        for i, (arg, expected) in enumerate(zip(args, types, strict=True)):
            where = f"{name}, argument {i}: expected {expected}"
            if "*" not in expected:
                assert isinstance(arg, np.generic), f"{where}, not {type(arg).__name__}"
                assert arg.dtype.name == expected, f"{where}, not {arg.dtype.name}"
            elif arg is not None:
                assert isinstance(arg, np.ndarray), f"{where}, not {type(arg).__name__}"
                contiguous = arg.flags.c_contiguous or arg.flags.f_contiguous
                assert contiguous, f"{where}, contiguous"
                fits = expected.endswith(("*void", f"*{arg.dtype.name}"))
                assert fits, f"{where}, not an array of {arg.dtype.name}"


def _passed_value(arg: Any, copies: Sequence[Copy]) -> np.ndarray:
    """Return the kernel's copy of an argument: an array of one number or one address."""
    if arg is None:
        return np.zeros(1, np.uint64)
    if isinstance(arg, np.ndarray):
        copy = find_copy(copies, arg)
        arg = np.uint64(copy.address + arg.ctypes.data - copy.start)
    return np.array([arg])


def locate_fault(fault: str, args: Sequence[Any], copies: Sequence[Copy]) -> str:
    """Append to a fault at an address the argument that is near that address."""
    found = re.search("no array is at address (0x[0-9a-f]+|0)", fault)
    near = []
    for i, arg in enumerate(args if found else ()):
        if isinstance(arg, np.ndarray):
            copy = find_copy(copies, arg)
            distance = int(found[1], 16) - copy.address - arg.ctypes.data + copy.start
            if -mmap.PAGESIZE < distance < arg.nbytes + mmap.PAGESIZE:
                near.append(f"byte {distance} of the {arg.nbytes} of argument {i}")
    return f"{fault} ({', '.join(near) or 'near no argument'})" if found else fault
