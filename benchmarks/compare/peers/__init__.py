"""The registry of engines: a row and a file for each.

An engine's library is imported only in the process of that engine.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

PRECISIONS = ("float32", "16 bits", "int8", "int4")


@dataclass(frozen=True)
class Row:
    """An engine.

    Attributes
    ----------
    where
        The module in this package and the class, "module:Class".
    needs
        Packages for `pip install`.
    options
        Options of the class.
    files
        Name of the folder for the converted model; "" if the engine reads the Hub's format.
    skips
        Workloads that are not measured.
    """

    precision: str
    where: str
    needs: str
    options: dict[str, Any] = field(default_factory=dict)
    files: str = ""
    skips: tuple[str, ...] = ()


def _gptx(precision: str, *skips: str, **options: str) -> Row:
    where, files = "gptx_peer:GptxEngine", options.get("quantize", "")
    return Row(precision, where, "'.[fast]'", options, files and f"gptx-{files}", skips)


def _gptx_f16_cache(precision: str, **options: str) -> Row:
    """Return a row with float16 keys and values, as in llama.cpp."""
    skips = ("prefill19", "prefill512", "batch", "process")
    return _gptx(precision, *skips, cache_dtype="float16", **options)


def _numpy(*skips: str, cache: bool) -> Row:
    return Row("float32", "numpy_peer:NumpyEngine", "gptx", {"cache": cache}, skips=skips)


def _transformers(precision: str, dtype: str) -> Row:
    where = "transformers_peer:TransformersEngine"
    return Row(precision, where, "torch transformers", {"dtype": dtype})


def _ctranslate2(precision: str) -> Row:
    where, options = "ctranslate2_peer:CTranslate2Engine", {"compute_type": precision}
    needs, files = "ctranslate2 torch transformers", f"ctranslate2-{precision}"
    return Row(precision, where, needs, options, files)


def _llama(precision: str, dtype: str, flash: bool = True) -> Row:
    options = {"dtype": dtype, "flash": flash}
    where = "llama_cpp_peer:LlamaEngine"
    return Row(precision, where, "llama-cpp-python", options, f"llama.cpp-{dtype}")


def _fastgpt(kernels: str = "") -> Row:
    """Return a row of a program that prints its tokens when it ends."""
    where, options = "fastgpt_peer:FastGptEngine", {"kernels": kernels}
    skips = ("decode", "deep", "prefill19", "prefill512", "batch")
    return Row("float32", where, "gptx", options, "fastgpt", skips)


_ONNX = Row("float32", "onnxruntime_peer:OnnxEngine", "onnx onnxruntime", files="onnx")

# llama.cpp runs with flash attention (its default) and without, fastGPT with the kernels that
# OpenBLAS selects and with those for Haswell: which is faster depends on the machine.
TABLE = {
    "gptx float32": _gptx("float32"),
    "gptx float32, f16 cache": _gptx_f16_cache("float32"),
    "llama.cpp F32": _llama("float32", "F32"),
    "llama.cpp F32, fa off": _llama("float32", "F32", flash=False),
    "fastGPT float32": _fastgpt(),
    "fastGPT float32, Haswell": _fastgpt("Haswell"),
    "CTranslate2 float32": _ctranslate2("float32"),
    "onnxruntime float32": _ONNX,
    "transformers float32": _transformers("float32", "float32"),
    "NumPy float32": _numpy("batch", cache=True),
    "NumPy float32, no cache": _numpy("batch", "deep", cache=False),
    "llama.cpp F16": _llama("16 bits", "F16"),
    "llama.cpp F16, fa off": _llama("16 bits", "F16", flash=False),
    "transformers bfloat16": _transformers("16 bits", "bfloat16"),
    "gptx int8": _gptx("int8", quantize="int8"),
    "gptx int8, f16 cache": _gptx_f16_cache("int8", quantize="int8"),
    "llama.cpp Q8_0": _llama("int8", "Q8_0"),
    "llama.cpp Q8_0, fa off": _llama("int8", "Q8_0", flash=False),
    "CTranslate2 int8": _ctranslate2("int8"),
    "gptx int4": _gptx("int4", quantize="int4"),
    "gptx int4, f16 cache": _gptx_f16_cache("int4", quantize="int4"),
    "llama.cpp Q4_0": _llama("int4", "Q4_0"),
    "llama.cpp Q4_0, fa off": _llama("int4", "Q4_0", flash=False),
}
REFERENCE = "NumPy float32"  # the logits of the others are compared with its logits


def engine_class(name: str) -> Any:
    """Import the class of an engine."""
    module, _, cls = TABLE[name].where.partition(":")
    return getattr(importlib.import_module(f"benchmarks.compare.peers.{module}"), cls)
