"""Quantize a small random model with llama.cpp, decode it there, and compute its logits and ids.

The environment needs llama-cpp-python, which compiles llama.cpp, and what gptx imports:

    python -m venv /tmp/llama-cpp
    /tmp/llama-cpp/bin/pip install llama-cpp-python==0.3.36 array-api-compat safetensors tokenizers
    PYTHONPATH=. /tmp/llama-cpp/bin/python tests/golden/make_gguf.py

gguf/*.gguf
    Files as `llama-quantize` writes them. Matrices whose rows are no multiple of 256 get another
    type than the one of the file's name.
gguf/llama_cpp.json
    For each file: SHA-256 of each tensor as float32 (`llama-quantize --allow-requantize … F32`),
    and the ids of `TEXT`.
gguf/logits.npz
    `ids` [T], and for each file logits [T, V]. llama.cpp rounds the activations to 8 bits.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from gptx.config import GPT2Config  # noqa: E402
from gptx.conversions.containers.gguf import GgufFile  # noqa: E402
from gptx.conversions.formats.gguf import write  # noqa: E402
from gptx.random_weights import random_weights  # noqa: E402
from tests.support.byte_tokenizers import small_tokenizer  # noqa: E402
from tests.support.files.gguf import checkpoint  # noqa: E402

# One matrix of each layer has rows of 256: the blocks of most types have as many numbers.
CONFIG = GPT2Config(
    vocab_size=260,
    n_positions=24,
    n_embd=32,
    n_layer=2,
    n_head=2,
    n_inner=256,
    bos_token_id=None,
    eos_token_id=256,
)
FILE_TYPES = {
    "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "iq4_xs": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_XS,
}
FLOAT32 = llama_cpp.LLAMA_FTYPE_ALL_F32
TEXT = "the thin <br>\n  th’e é<|endoftext|>"


def quantize(source: Path, destination: Path, file_type: int) -> None:
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread, options.allow_requantize = file_type, 1, True
    paths = str(source).encode(), str(destination).encode()
    assert llama_cpp.llama_model_quantize(*paths, ctypes.byref(options)) == 0


def checksums(path: Path) -> dict[str, str]:
    """Return the SHA-256 of the tensors of a file of F32."""
    file = GgufFile(path)
    return {
        name: hashlib.sha256(file.read(tensor).tobytes()).hexdigest()
        for name, tensor in file.tensors.items()
    }


def run(path: Path, ids: list[int]) -> tuple[np.ndarray, list[int]]:
    """Return llama.cpp's logits of ids, and its ids of `TEXT`."""
    options = {"n_ctx": 0, "n_threads": 1, "logits_all": True, "verbose": False}
    cache = {"type_k": 0, "type_v": 0}  # in float32
    llama = llama_cpp.Llama(str(path), **options, **cache)
    llama.eval(ids)
    found = llama.tokenize(TEXT.encode(), add_bos=False, special=True)
    return np.array(llama.scores[: len(ids)]), found


def main() -> None:
    folder = HERE / "gguf"
    folder.mkdir(exist_ok=True)
    ids = [(7919 * i + 11) % 259 for i in range(16)]
    logits, facts = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        source, decoded = Path(temporary, "source.gguf"), Path(temporary, "decoded.gguf")
        write(checkpoint(CONFIG, random_weights(CONFIG), small_tokenizer()), source)
        for name, file_type in FILE_TYPES.items():
            path = folder / f"{name}.gguf"
            quantize(source, path, file_type)
            quantize(path, decoded, FLOAT32)
            logits[name], text_ids = run(path, ids)
            facts[name] = {"text": TEXT, "ids": text_ids, "sha256": checksums(decoded)}
            print(f"{path.name}: {path.stat().st_size} bytes, logits std {logits[name].std():.2f}")
    np.savez_compressed(folder / "logits.npz", ids=ids, **logits)
    (folder / "llama_cpp.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
