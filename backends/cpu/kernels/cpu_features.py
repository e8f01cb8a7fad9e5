"""Features of the processor that Numba compiles for, and `GPTX_ISA`, which leaves some out."""

from __future__ import annotations

import os
import platform

from numba.core import codegen, config

from gptx.errors import BackendError

X86 = platform.machine() in ("x86_64", "AMD64")
ARM = platform.machine() in ("aarch64", "arm64", "ARM64")

VARIABLE = "GPTX_ISA"
# LLVM's name of a processor that has each set, the feature that stands for it, and the beginnings
# of the names of all features beyond it.
_BEYOND_AVX2 = ("amx", "avx10", "avx512", "avxifma", "avxneconvert", "avxvnni")
_BEYOND_VNNI = ("amx", "avx10", "avx512fp16", "avxifma", "avxneconvert", "avxvnni")
_BEYOND_AVX512 = (
    *_BEYOND_VNNI, "avx512bf16", "avx512bitalg", "avx512ifma", "avx512vbmi", "avx512vnni",
    "avx512vp", "gfni", "vaes", "vpclmulqdq",
)  # fmt: skip
INSTRUCTION_SETS = {
    "avx2": ("haswell", "avx2", _BEYOND_AVX2),
    "avx512": ("skylake-avx512", "avx512dq", _BEYOND_AVX512),
    "vnni": ("icelake-server", "avx512vnni", _BEYOND_VNNI),
}


def restrict(isa: str) -> None:
    """Make Numba compile for one of `INSTRUCTION_SETS`, or "none": what each x86-64 has.

    Raises
    ------
    BackendError
        The set is unknown, or the processor does not have it.
    """
    expected = f"expected {', '.join(INSTRUCTION_SETS)} or none"
    if isa == "none":
        config.CPU_NAME, config.CPU_FEATURES = "x86-64" if X86 else "generic", ""
        return
    if isa not in INSTRUCTION_SETS:
        raise BackendError(f"{VARIABLE} is {isa!r}, {expected}")
    name, required, beyond = INSTRUCTION_SETS[isa]
    if not has_feature(required):
        raise BackendError(f"{VARIABLE} is {isa!r}, which this processor does not have, {expected}")
    features = codegen.get_host_cpu_features().split(",")
    config.CPU_NAME = name
    config.CPU_FEATURES = ",".join(f"-{x[1:]}" if x[1:].startswith(beyond) else x for x in features)


def has_feature(name: str) -> bool:
    """Return True if Numba compiles for a processor with this feature (LLVM's name).

    The processor is that of this machine unless `GPTX_ISA` or Numba's settings name another one.
    """
    features = config.CPU_FEATURES
    features = codegen.get_host_cpu_features() if features is None else features
    return f"+{name}" in features.split(",")


if os.environ.get(VARIABLE):
    restrict(os.environ[VARIABLE])

# Conversion of float16 in registers. Without, LLVM calls a function that Numba does not link.
HAS_FLOAT16 = ARM or has_feature("f16c")
HAS_AVX512 = has_feature("avx512f")
HAS_VNNI = has_feature("avx512vnni")
HAS_AMX = has_feature("amx-int8") and has_feature("amx-bf16")
