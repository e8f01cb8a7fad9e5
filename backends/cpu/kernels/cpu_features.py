"""Features of the processor that Numba compiles for."""

from __future__ import annotations

import platform

from numba.core import codegen, config

X86 = platform.machine() in ("x86_64", "AMD64")
ARM = platform.machine() in ("aarch64", "arm64", "ARM64")


def has_feature(name: str) -> bool:
    """Return True if Numba compiles for a processor with this feature (LLVM's name).

    The processor is that of this machine unless Numba's settings name another one.
    """
    features = config.CPU_FEATURES
    features = codegen.get_host_cpu_features() if features is None else features
    return f"+{name}" in features.split(",")


# Conversion of float16 in registers. Without, LLVM calls a function that Numba does not link.
HAS_FLOAT16 = ARM or has_feature("f16c")
HAS_VNNI = has_feature("avx512vnni")
HAS_AMX = has_feature("amx-int8") and has_feature("amx-bf16")
