"""Which kernels OpenBLAS takes: decided before NumPy is imported, since that loads it."""

from __future__ import annotations

import os
import platform
import sys

VARIABLE = "OPENBLAS_CORETYPE"
# What its SkylakeX kernels are compiled for.
AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


def choose_kernels(cpuinfo: str = "/proc/cpuinfo") -> None:
    """Have OpenBLAS use AVX-512 where the processor can, on Linux and x86-64.

    OpenBLAS goes by the processor's model number. One that it does not know, because it is new or
    because a virtual machine shows another, may get the Haswell kernels: 250 instead of 470 GFLOP/s
    for a large product on two cores of a Zen 5. SkylakeX is never a step down: NumPy's wheels have
    no later core, and the later ones of other builds (Cooperlake, SapphireRapids) differ from it in
    bfloat16 alone, in which NumPy does not compute. What the user has set is left as it is.
    """
    if VARIABLE in os.environ or sys.platform != "linux" or platform.machine() != "x86_64":
        return
    try:
        with open(cpuinfo, encoding="utf-8") as lines:
            flags = next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        return
    if AVX512.issubset(flags.split()):
        os.environ[VARIABLE] = "SkylakeX"
