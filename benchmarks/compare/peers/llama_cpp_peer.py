"""llama.cpp through the functions of its C library, as llama-cpp-python declares them."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import llama_cpp as c
import numpy as np

from benchmarks.compare.peers.base import Engine, Prompts, Tick, best
from gptx.conversions import convert

FILE = "model.gguf"
FLOATS = {"F32": "float32", "F16": "float16"}
BLOCKS = {"Q8_0": "int8", "Q4_0": "int4"}
# Those that it was built for, "AVX2" and "FMA" for example.
FEATURES = [
    part.split()[0]
    for part in c.llama_print_system_info().decode().partition(":")[2].split("|")
    if part.strip().endswith("= 1")
]
BATCH_CONTEXT = 128  # tokens of each sequence in a batch


@c.llama_log_callback
def silence(level: int, text: bytes, data: Any) -> None:
    """Drop the messages of llama.cpp: each load writes a hundred lines."""


class LlamaEngine(Engine):
    """One call of llama_decode for each step, and NumPy's argmax over the logits in place."""

    version = f"llama-cpp-python {c.__version__} {' '.join(FEATURES)}"

    @classmethod
    def prepare(cls, folder: Path, work: Path, **options: Any) -> None:
        dtype = options["dtype"]
        choice = {"dtype": FLOATS[dtype]} if dtype in FLOATS else {"quantize": BLOCKS[dtype]}
        convert(folder, work / FILE, "gguf", **choice)

    def __init__(
        self, folder: Path, threads: int, work: Path, dtype: str, flash: bool = True
    ) -> None:
        c.llama_log_set(silence, ctypes.c_void_p())
        c.llama_backend_init()
        model = os.fsencode(work / FILE)
        self.model = c.llama_model_load_from_file(model, c.llama_model_default_params())
        if not self.model:
            raise RuntimeError("llama.cpp did not load the file")
        self.n_bytes = c.llama_model_size(self.model)
        self.V = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))
        self.n_context = c.llama_model_n_ctx_train(self.model)
        self.threads, self.flash = threads, flash
        self.contexts: dict[int, Any] = {}
        self.known: list[int] = []

    def generate(self, prompts: Prompts, n_tokens: int, tick: Tick, known: bool = False) -> None:
        context = self._context(len(prompts))
        memory = c.llama_get_memory(context)
        n = len(prompts[0])
        if known and self.known == prompts[0]:
            c.llama_memory_seq_rm(memory, 0, n - 1, -1)
        else:
            c.llama_memory_clear(memory, False)
            self.known = []
            if known:
                self._decode(context, [prompts[0][:-1]], 0)
                self.known = prompts[0]
        start = n - 1 if known else 0
        new = [ids[start:] for ids in prompts]
        for _ in range(n_tokens):
            tokens = best(self._decode(context, new, start))
            tick(tokens)
            start += len(new[0])
            new = [[token] for token in tokens]

    def logits(self, ids: list[int]) -> list[float]:
        context = self._context(1)
        c.llama_memory_clear(c.llama_get_memory(context), False)
        self.known = []
        return [float(x) for x in self._decode(context, [ids], 0)[0]]

    def _context(self, n: int) -> Any:
        """Return a context for n sequences; for one it has the full length of the model."""
        if n not in self.contexts:
            params = c.llama_context_default_params()
            params.n_ctx = self.n_context if n == 1 else n * BATCH_CONTEXT
            params.n_seq_max = n
            params.n_threads = params.n_threads_batch = self.threads
            if not self.flash:
                params.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_DISABLED
            self.contexts[n] = c.llama_init_from_model(self.model, params)
        return self.contexts[n]

    def _decode(self, context: Any, new: list[list[int]], start: int) -> np.ndarray:
        """Add tokens from position `start` to each sequence; return logits [B, V] of the last."""
        T = len(new[0])
        if len(new) == 1:  # llama.cpp counts the positions
            tokens = (c.llama_token * T)(*new[0])
            failed = c.llama_decode(context, c.llama_batch_get_one(tokens, T))
        else:
            batch = c.llama_batch_init(T * len(new), 0, 1)
            batch.n_tokens = T * len(new)
            for i, token in enumerate(token for ids in new for token in ids):
                batch.token[i] = token
                batch.pos[i] = start + i % T
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = i // T
                batch.logits[i] = i % T == T - 1
            failed = c.llama_decode(context, batch)
            c.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode failed with {failed}")
        return np.ctypeslib.as_array(c.llama_get_logits(context), (len(new), self.V))
