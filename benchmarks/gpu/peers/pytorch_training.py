"""transformers' GPT-2 in training: eager PyTorch with its fused AdamW, and autocast in 16 bits."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.gpu.peers.pytorch_peer import Weights, transformers_model
from benchmarks.gpu.training import LEARNING_RATE, TrainingEngine
from gptx.config import GPT2Config
from gptx.training.settings import TrainingSettings


class PyTorchTraining(TrainingEngine):
    """A training loop as in nanoGPT: float32 weights, and `dtype` for products."""

    def __init__(
        self,
        name: str,
        config: GPT2Config,
        weights: Weights,
        dtype: str,
        device: str,
        tokens: np.ndarray,
    ) -> None:
        self.name, self.device = name, device
        self.model = transformers_model(config, weights, "float32", device).requires_grad_(True)
        # "eval" leaves out dropout only.
        ids = torch.from_numpy(tokens).to(device)
        self.ids, self.targets = ids[:, :-1].contiguous(), ids[:, 1:].flatten()
        self.parameters = list(self.model.parameters())
        settings = TrainingSettings()
        self.clip = settings.clip
        matrices = [p for p in self.parameters if p.dim() >= 2]
        vectors = [p for p in self.parameters if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=LEARNING_RATE,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=True,
        )
        self.autocast: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if dtype != "float32":
            self.autocast = torch.autocast(device, getattr(torch, dtype))

    def step(self) -> float:
        with self.autocast:
            logits = self.model(self.ids, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), self.targets)
        loss.backward()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    def memory(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else 0
