"""transformers' GPT-2 on PyTorch, eager or compiled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers

from benchmarks.training_peers.base import (
    BETAS,
    CLIP,
    EPSILON,
    LEARNING_RATE,
    WEIGHT_DECAY,
    TrainingEngine,
)


class PyTorchTraining(TrainingEngine):
    """A training loop as in nanoGPT, with PyTorch's fused AdamW."""

    def __init__(self, folder: Path, threads: int, tokens: np.ndarray, compiled: bool) -> None:
        torch.set_num_threads(threads)
        no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        self.model = transformers.GPT2LMHeadModel.from_pretrained(
            folder, dtype=torch.float32, **no_dropout
        ).train()
        ids = torch.tensor(tokens)
        self.ids, self.targets = ids[:, :-1].contiguous(), ids[:, 1:].flatten()
        self.loss = torch.compile(self._loss) if compiled else self._loss
        self.parameters = list(self.model.parameters())
        matrices = [p for p in self.parameters if p.dim() >= 2]
        vectors = [p for p in self.parameters if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors}],
            lr=LEARNING_RATE,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=0.0,
            fused=True,
        )
        kernels = torch.backends.cpu.get_cpu_capability()
        self.version = (
            f"torch {torch.__version__} {kernels}, transformers {transformers.__version__}"
        )

    def _loss(self) -> torch.Tensor:
        logits = self.model(self.ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.targets)

    def step(self) -> float:
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.item())
