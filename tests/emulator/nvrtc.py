"""NVRTC, CUDA's compiler of kernels, from its wheel: it needs no GPU."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import re
from collections.abc import Sequence

import pytest

# Those that CuPy adds to its user's.
OPTIONS = ("-std=c++17", "-ftz=true", "--device-as-default-execution-space")
LIBRARY = re.compile(r"libnvrtc\.so[.\d]*|nvrtc64_\d+_0\.dll")


@functools.cache
def nvrtc() -> ctypes.CDLL:
    """The library, named otherwise in each version of CUDA; where it is not, a test is skipped."""
    for distribution in importlib.metadata.distributions():
        if distribution.name.startswith("nvidia-cuda-nvrtc"):
            for file in distribution.files or ():
                if LIBRARY.fullmatch(file.name):
                    return ctypes.CDLL(str(file.locate()))
    assert not os.environ.get("CI"), "CI has no NVRTC"
    pytest.skip("NVRTC is not there: pip install nvidia-cuda-nvrtc")


def compile_code(code: str, options: Sequence[str]) -> tuple[str, str]:
    """PTX, and what the compiler says: nothing if it has no complaint."""
    program = ctypes.c_void_p()
    texts = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    created = nvrtc().nvrtcCreateProgram(ctypes.byref(program), code.encode(), b"", 0, None, None)
    assert created == 0
    failed = nvrtc().nvrtcCompileProgram(program, len(options), texts)
    log = _text(program, "ProgramLog") or f"error {failed}" * bool(failed)
    ptx = "" if failed else _text(program, "PTX")
    nvrtc().nvrtcDestroyProgram(ctypes.byref(program))
    return ptx, log


def _text(program: ctypes.c_void_p, what: str) -> str:
    size = ctypes.c_size_t()
    getattr(nvrtc(), f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc(), f"nvrtcGet{what}")(program, text)
    return text.value.decode()
