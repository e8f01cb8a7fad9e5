"""What the processor can do that Numba compiles for."""

from __future__ import annotations

import platform

from numba.core import codegen, config

X86 = platform.machine() in ("x86_64", "AMD64")
ARM = platform.machine() in ("aarch64", "arm64", "ARM64")


def has(feature: str) -> bool:
    """Whether Numba compiles for a processor with this feature, under LLVM's name: that of this
    machine, unless Numba's settings name another."""
    found = config.CPU_FEATURES
    found = codegen.get_host_cpu_features() if found is None else found
    return f"+{feature}" in found.split(",")


# Whether float16 is converted in registers; else LLVM would call a function that Numba has not.
HALF = ARM or has("f16c")
