"""gptx on its NumPy backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gptx
from benchmarks.compare.peers.base import Engine, Prompts, Tick
from gptx.bench.grid import weights_bytes
from gptx.conversions import convert
from gptx.generation.api import load_once
from gptx.generation.engine import TokenGenerator
from gptx.generation.params import SamplingParams
from gptx.kv_cache import KVCache

FOLDER = "mlx"


class GptxEngine(Engine):
    """The token generator that `Model.generate` runs."""

    version = gptx.__version__

    @classmethod
    def prepare(cls, folder: Path, work: Path, **options: Any) -> None:
        convert(folder, work / FOLDER, quantize=options["quantize"])

    def __init__(
        self,
        folder: Path,
        threads: int,
        work: Path,
        n_tokens: int | None = None,
        quantize: str = "",
        **options: Any,
    ) -> None:
        path = work / FOLDER if quantize else folder
        self.model = load_once(path, n_tokens, threads=threads, **options)
        self.n_bytes = weights_bytes(self.model.gpt2)[0]
        self.known: KVCache | None = None

    @classmethod
    def for_one_call(
        cls, n_tokens: int, folder: Path, threads: int, work: Path, **options: Any
    ) -> GptxEngine:
        return cls(folder, threads, work, n_tokens, **options)  # as in `gptx.generate`

    def generate(self, prompts: Prompts, n_tokens: int, tick: Tick, known: bool = False) -> None:
        if known and self.known is None:
            self.known = self.model.prefill(prompts[0])
        steps = TokenGenerator(
            self.model.gpt2,
            prompts,
            SamplingParams(),
            max_tokens=n_tokens,
            cache=self.known if known else None,
        )
        for step in steps:
            tick([int(token.id) for token in step if token.id is not None])

    def logits(self, ids: list[int]) -> list[float]:
        return [float(x) for x in self.model.logits(ids)[-1]]
