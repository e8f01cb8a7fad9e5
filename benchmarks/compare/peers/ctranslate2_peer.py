"""CTranslate2, with a model from its own converter."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ctranslate2

from benchmarks.compare.peers.base import Engine, Prompts, Tick


class CTranslate2Engine(Engine):
    """CTranslate2's generator; a callback reports each token."""

    version = ctranslate2.__version__

    @classmethod
    def prepare(cls, folder: Path, work: Path, **options: Any) -> None:
        from ctranslate2.converters import TransformersConverter

        class Converter(TransformersConverter):
            """The converter with generated token names instead of those of a tokenizer."""

            def load_tokenizer(self, *args: Any, **more: Any) -> Any:
                config = ctranslate2.converters.transformers.transformers.AutoConfig
                n = config.from_pretrained(folder).vocab_size
                vocabulary = {name_of(i): i for i in range(n)}
                end = name_of(n - 1)
                return SimpleNamespace(
                    get_vocab=lambda: vocabulary, bos_token=end, eos_token=end, unk_token=end
                )

        quantization = options["compute_type"]
        Converter(os.fspath(folder)).convert(os.fspath(work / "model"), quantization=quantization)

    def __init__(self, folder: Path, threads: int, work: Path, compute_type: str) -> None:
        self.generator = ctranslate2.Generator(
            os.fspath(work / "model"), compute_type=compute_type, intra_threads=threads
        )
        self.n_bytes = (work / "model" / "model.bin").stat().st_size

    def generate(self, prompts: Prompts, n_tokens: int, tick: Tick, known: bool = False) -> None:
        step: list[int] = []

        def callback(result: Any) -> bool:
            step.append(result.token_id)
            if len(step) == len(prompts):
                tick(step[:])
                step.clear()
            return False

        names = [[name_of(i) for i in ids] for ids in prompts]
        self.generator.generate_batch(
            [ids[-1:] for ids in names] if known else names,
            static_prompt=names[0][:-1] if known else None,
            include_prompt_in_result=False,
            max_length=n_tokens,
            end_token=[],
            callback=callback,
        )

    def logits(self, ids: list[int]) -> list[float]:
        import numpy as np

        view = self.generator.forward_batch([ids])
        return [float(x) for x in np.array(view)[0, -1]]


def name_of(token: int) -> str:
    """Return the generated name of a token."""
    return f"<{token}>"
