"""transformers on PyTorch."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from benchmarks.compare.peers.base import Engine, Prompts, Tick


class TransformersEngine(Engine):
    """The model called step by step: `generate()` adds work to each step."""

    version = f"{transformers.__version__}, torch {torch.__version__}"

    def __init__(self, folder: Path, threads: int, work: Path, dtype: str) -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.model = transformers.GPT2LMHeadModel.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        ).eval()
        self.n_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self.known: transformers.DynamicCache | None = None

    def generate(self, prompts: Prompts, n_tokens: int, tick: Tick, known: bool = False) -> None:
        ids = torch.tensor(prompts)
        past = transformers.DynamicCache(config=self.model.config)
        if known:
            if self.known is None:
                self.model(ids[:, :-1], past_key_values=past, logits_to_keep=1)
                self.known = past
            past, ids = self.known, ids[:, -1:]
            if (extra := past.get_seq_length() - len(prompts[0]) + 1) > 0:
                past.crop(-extra)
        for _ in range(n_tokens):
            out = self.model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            tick(ids[:, 0].tolist())

    def logits(self, ids: list[int]) -> list[float]:
        return list(self.model(torch.tensor([ids])).logits[0, -1].float().tolist())
