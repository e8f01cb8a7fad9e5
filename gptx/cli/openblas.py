"""Selection of OpenBLAS's kernels, by an environment variable that it reads when NumPy loads it."""

from __future__ import annotations

import os
import sys

VARIABLE = "OPENBLAS_CORETYPE"
# The instruction sets that OpenBLAS compiles its SkylakeX kernels for.
SKYLAKEX_FLAGS = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


def select_kernels(cpuinfo: str = "/proc/cpuinfo") -> None:
    """Set the variable to SkylakeX where the processor has AVX-512 (Linux on x86-64 only).

    Call it before NumPy is imported. A value that the user has set is kept.

    OpenBLAS selects by the processor's model number. For an unknown number (a new processor, or a
    virtual machine that reports another one) it can select the Haswell kernels. They reach 250
    instead of 470 GFLOP/s for a large product on two cores of a Zen 5. SkylakeX is never slower
    than OpenBLAS's own choice: NumPy's wheels have no later kernels. The later ones of other builds
    (Cooperlake, SapphireRapids) differ in bfloat16 only, which NumPy does not use.
    """
    if VARIABLE in os.environ or sys.platform != "linux" or os.uname().machine != "x86_64":
        return
    try:
        with open(cpuinfo, encoding="utf-8") as lines:
            flags = next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        return
    if SKYLAKEX_FLAGS.issubset(flags.split()):
        os.environ[VARIABLE] = "SkylakeX"
