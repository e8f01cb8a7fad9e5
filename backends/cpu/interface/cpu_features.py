"""Features of the processor that the kernels are compiled for; `GPTX_ISA` leaves some out."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from contextlib import suppress
from functools import cache

import llvmlite.binding as llvm

from gptx.errors import BackendError

X86 = platform.machine() in ("x86_64", "AMD64")
ARM = platform.machine() in ("aarch64", "arm64", "ARM64")

VARIABLE = "GPTX_ISA"
# LLVM's name of a processor that has each set, the feature that stands for it, and the beginnings
# of the names of all features beyond it.
_BEYOND_AVX2 = ("amx", "avx10", "avx512", "avxifma", "avxneconvert", "avxvnni", "gfni")
_BEYOND_VNNI = ("amx", "avx10", "avx512fp16", "avxifma", "avxneconvert", "avxvnni")
_BEYOND_AVX512 = (
    *_BEYOND_VNNI, "avx512bf16", "avx512bitalg", "avx512ifma", "avx512vbmi", "avx512vnni",
    "avx512vp", "gfni", "vaes", "vpclmulqdq",
)  # fmt: skip
_BEYOND_DOTPROD = ("bf16", "i8mm", "sme", "sve")
INSTRUCTION_SETS = {
    "avx2": ("haswell", "avx2", _BEYOND_AVX2),
    "avx512": ("skylake-avx512", "avx512dq", _BEYOND_AVX512),
    "vnni": ("icelake-server", "avx512vnni", _BEYOND_VNNI),
    "dotprod": ("neoverse-n1", "dotprod", _BEYOND_DOTPROD),
}

# Features of ARM that LLVM does not read: an entry and a bit of Linux's auxiliary vector (AT_HWCAP,
# AT_HWCAP2), and macOS's name.
_ARM_FEATURES = {
    "dotprod": (16, 20, b"hw.optional.arm.FEAT_DotProd"),
    "i8mm": (26, 13, b"hw.optional.arm.FEAT_I8MM"),
}

ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA = 158, 0x1023, 18  # of Linux on x86-64


def restricted(isa: str, features: str) -> tuple[str, str]:
    """Return LLVM's name and features of a processor that stops at one of `INSTRUCTION_SETS`.

    "none" is what every processor of this architecture has. `features` are those of this one.

    Raises
    ------
    BackendError
        The set is unknown, or this processor does not have it.
    """
    expected = f"expected {', '.join(INSTRUCTION_SETS)} or none"
    if isa == "none":
        return ("x86-64" if X86 else "generic"), ""
    if isa not in INSTRUCTION_SETS:
        raise BackendError(f"{VARIABLE} is {isa!r}, {expected}")
    name, required, beyond = INSTRUCTION_SETS[isa]
    names = features.split(",")
    if f"+{required}" not in names:
        raise BackendError(f"{VARIABLE} is {isa!r}, which this processor does not have, {expected}")
    return name, ",".join(f"-{x[1:]}" if x[1:].startswith(beyond) else x for x in names)


def _host_features() -> str:
    """Return the features of this processor, as LLVM names them."""
    features = []
    with suppress(RuntimeError):  # LLVM does not read them on this system
        features.append(llvm.get_host_cpu_features().flatten())
    if ARM:
        features += [f"+{name}" for name, keys in _ARM_FEATURES.items() if _system_reports(*keys)]
    return ",".join(filter(None, features))


def _system_reports(entry: int, bit: int, name: bytes) -> bool:
    """Return True if Linux or macOS reports one of `_ARM_FEATURES`."""
    if sys.platform == "linux":
        return bool(ctypes.CDLL(None).getauxval(entry) >> bit & 1)
    elif sys.platform == "darwin":
        value, size = ctypes.c_int(), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
        result = ctypes.byref(value), ctypes.byref(size)
        ctypes.CDLL(None).sysctlbyname(name, *result, None, ctypes.c_size_t(0))
        return value.value == 1
    else:
        return False


NAME = os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name()
FEATURES = os.environ.get("NUMBA_CPU_FEATURES", _host_features())
if os.environ.get(VARIABLE):
    NAME, FEATURES = restricted(os.environ[VARIABLE], FEATURES)


def has_feature(name: str) -> bool:
    """Return True if the kernels are compiled for a processor with this feature (LLVM's name)."""
    return f"+{name}" in FEATURES.split(",")


# Conversion of float16 in registers. Without, LLVM calls a function that Numba does not link.
HAS_FLOAT16 = ARM or has_feature("f16c")
HAS_AVX2, HAS_AVX512 = has_feature("avx2"), has_feature("avx512f")
HAS_VNNI = has_feature("avx512vnni")
HAS_DOTPROD, HAS_I8MM = has_feature("dotprod"), has_feature("i8mm")  # NEON's sdot and usdot
HAS_BYTE_PRODUCTS = HAS_VNNI or HAS_DOTPROD
HAS_PAIR_PRODUCTS = X86  # pmaddwd, of SSE2
HAS_AMX = has_feature("amx-int8") and has_feature("amx-bf16")


@cache
def amx_is_allowed() -> bool:
    """Request the tile registers of AMX from Linux, which saves them for each thread.

    Returns
    -------
    bool
        False if the processor has no AMX, or Linux refuses.
    """
    if not HAS_AMX or sys.platform != "linux" or not X86:
        return False
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0
