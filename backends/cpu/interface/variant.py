"""Formats that the kernels of this process are compiled for: `GPTX_KERNELS` leaves some out.

A model needs a few of the formats. Without the others, the kernels compile in less time
(see `../machine_code.py`). Whoever needs several variants, such as the tests, sets the variable to
compile their formats together.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from gptx.backends.cpu.interface.cpu_features import HAS_FLOAT16
from gptx.backends.cpu.interface.instructions import FLOAT32, FLOAT32_TRANSPOSED, INT4, INT8

VARIABLE = "GPTX_KERNELS"
FORMATS = {FLOAT32: "float32", FLOAT32_TRANSPOSED: "float32", INT8: "int8", INT4: "int4"}
FLOAT16_CACHE = "float16-cache"
NAMES = (*dict.fromkeys(FORMATS.values()), FLOAT16_CACHE)

_names = os.environ.get(VARIABLE, ",".join(NAMES[:-1])).split(",")
HAS_FLOATS, HAS_INT8, HAS_INT4 = (name in _names for name in NAMES[:-1])
HAS_QUANTIZED = HAS_INT8 or HAS_INT4
HAS_FLOAT16_CACHE = FLOAT16_CACHE in _names and HAS_FLOAT16  # else LLVM could not link it


def variant_name(formats: Iterable[int], float16_cache: bool) -> str:
    """Return the name of the variant for matrices of these formats: a value of the variable.

    It has the formats of the variable, too.
    """
    names = {FORMATS[number] for number in formats} | set(os.environ.get(VARIABLE, "").split(","))
    return ",".join([x for x in NAMES[:-1] if x in names] + [FLOAT16_CACHE] * float16_cache)
