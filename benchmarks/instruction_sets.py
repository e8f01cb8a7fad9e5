"""Engines restricted to the instruction set of an older processor (`--isa`)."""

from __future__ import annotations

from pathlib import Path

# Environment variables of gptx, OpenBLAS, MKL, PyTorch, oneDNN and CTranslate2.
ISAS = {
    "avx2": {
        "GPTX_ISA": "avx2",
        "OPENBLAS_CORETYPE": "Haswell",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "CT2_FORCE_CPU_ISA": "AVX2",
    },
    "avx512": {
        "GPTX_ISA": "avx512",
        "OPENBLAS_CORETYPE": "SkylakeX",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "CT2_FORCE_CPU_ISA": "AVX512",
    },
}
NAMES = {"avx2": "AVX2", "avx512": "AVX-512"}
NEVER_RESTRICTED = ("onnxruntime", "fastGPT")  # beginnings of names
BEYOND = {"avx2": "AVX512", "avx512": "AMX"}  # what llama.cpp's version names if it was built so


def is_restricted(isa: str | None, name: str, version: str) -> bool:
    """Return True if an engine uses no instructions beyond the set."""
    if isa is None:
        return True
    if name.startswith("llama.cpp"):  # as it was built
        return BEYOND[isa] not in version
    return not name.startswith(NEVER_RESTRICTED)


def instruction_set() -> str:
    """Return the widest vector instructions of the processor: "AMX", "AVX-512", "AVX2" or ""."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return ""
    flags = set(text.partition("flags")[2].partition("\n")[0].split())
    names = {"amx_tile": "AMX", "avx512f": "AVX-512", "avx2": "AVX2"}
    return next((name for flag, name in names.items() if flag in flags), "")
