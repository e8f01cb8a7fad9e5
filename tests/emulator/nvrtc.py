"""NVRTC, the CUDA compiler of kernels, from its wheel; it needs no GPU."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import re
from collections.abc import Sequence

import pytest

OPTIONS = ("-std=c++17", "-ftz=true", "--device-as-default-execution-space")  # as CuPy's
LIBRARY = re.compile(r"libnvrtc\.so[.\d]*|nvrtc64_\d+_0\.dll")


@functools.cache
def load_nvrtc() -> ctypes.CDLL:
    """Load the library, whose name depends on its version; skip the test if it is missing."""
    for distribution in importlib.metadata.distributions():
        if distribution.name.startswith("nvidia-cuda-nvrtc"):
            for file in distribution.files or ():
                if LIBRARY.fullmatch(file.name):
                    return ctypes.CDLL(str(file.locate()))
    assert not os.environ.get("CI"), "NVRTC is missing in CI"
    pytest.skip("NVRTC is missing: pip install nvidia-cuda-nvrtc")


@functools.cache
def version() -> str:
    """Return the version of the library, such as "12.4"."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    load_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def compile_code(code: str, options: Sequence[str]) -> tuple[str, str]:
    """Compile CUDA C++; return PTX ("" after an error) and the compiler's messages."""
    nvrtc, program = load_nvrtc(), ctypes.c_void_p()
    texts = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    created = nvrtc.nvrtcCreateProgram(ctypes.byref(program), code.encode(), b"", 0, None, None)
    assert created == 0
    failed = nvrtc.nvrtcCompileProgram(program, len(options), texts)
    log = _output(program, "ProgramLog") or f"error {failed}" * bool(failed)
    ptx = "" if failed else _output(program, "PTX")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return ptx, log


def _output(program: ctypes.c_void_p, kind: str) -> str:
    size = ctypes.c_size_t()
    getattr(load_nvrtc(), f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(load_nvrtc(), f"nvrtcGet{kind}")(program, text)
    return text.value.decode()
