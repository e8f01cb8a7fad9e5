"""GPT-2 in PyTorch with PyTorch's own means of speed.

A plain model with preallocated keys and values runs eagerly, as a CUDA graph, compiled, or both.
transformers runs eagerly, or compiled with its static cache. All have the same tensors. Tokens stay
on the device for the next step; each is read while the next is computed.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.engines import Engine
from gptx.config import GPT2Config

Weights = Mapping[str, np.ndarray]

GELUS = {"gelu_new": "tanh", "gelu": "none"}

# Each shape of each engine is compiled.
torch._dynamo.config.recompile_limit = 64
COMPILER = "inductor"


class Block(nn.Module):
    """One layer, with its keys and values [B, H, S, D]."""

    keys: Tensor
    values: Tensor

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        C, M, epsilon = config.n_embd, config.mlp_dim, config.layer_norm_epsilon
        self.n_head = config.n_head
        self.gelu = nn.GELU(GELUS[config.activation_function])
        self.ln_1 = nn.LayerNorm(C, epsilon)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
        self.ln_2 = nn.LayerNorm(C, epsilon)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, M), "c_proj": nn.Linear(M, C)})

    def forward(self, x: Tensor, index: Tensor, visible: Tensor | None) -> Tensor:
        B, T, C = x.shape
        qkv = self.attn["c_attn"](self.ln_1(x))  # [B, T, 3C]
        q, k, v = qkv.view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # 3 x [B, H, T, D]
        self.keys.index_copy_(2, index, k)
        self.values.index_copy_(2, index, v)
        if visible is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=visible)
        x = x + self.attn["c_proj"](y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp["c_proj"](self.gelu(self.mlp["c_fc"](self.ln_2(x))))


class PlainGPT2(nn.Module):
    """A plain GPT-2 in PyTorch with a tied head."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)

    def with_own_cache(self) -> PlainGPT2:
        """Return a model with the same weights and its own keys and values."""
        with torch.device("meta"):
            other = PlainGPT2(self.config)
        other.load_state_dict(self.state_dict(), assign=True)
        return other.eval().requires_grad_(False)

    def allocate(self, batch: int, capacity: int) -> None:
        """Allocate keys and values at fixed addresses."""
        like = self.wte.weight
        for block in self.h:
            shape = (batch, self.config.n_head, capacity, self.config.head_dim)
            block.keys, block.values = (like.new_zeros(shape) for _ in range(2))
            for buffer in (block.keys, block.values):
                torch._dynamo.mark_static_address(buffer)  # for CUDA graphs

    def forward(self, ids: Tensor, index: Tensor) -> Tensor:
        """Return logits [B, V] after ids [B, T] at positions [T]: a prompt from 0, or a token."""
        x = self.wte(ids) + self.wpe(index)  # [B, T, C]
        visible = None
        if ids.shape[1] == 1:
            capacity = self.h[0].keys.shape[2]
            visible = (torch.arange(capacity, device=ids.device) <= index)[None, None, None]
        for block in self.h:
            x = block(x, index, visible)
        return F.linear(self.ln_f(x[:, -1]), self.wte.weight)

    def best(self, ids: Tensor, index: Tensor) -> Tensor:
        """Return the best next tokens [B, 1]."""
        return self(ids, index).argmax(-1, keepdim=True)


def compile_step(step: Callable[..., Tensor], mode: str) -> Callable[..., Tensor]:
    """Compile a function for fixed shapes, as one graph."""
    return torch.compile(step, mode=mode, fullgraph=True, dynamic=False, backend=COMPILER)


class TorchEngine(Engine):
    """The base of the PyTorch engines: the loop and the clock.

    Attributes
    ----------
    prepared
        Names of the attributes that `prepare` sets; `release` deletes them.
    """

    prepared: tuple[str, ...] = ()

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name = name
        self.device = next(model.parameters()).device
        self.is_cuda = self.device.type == "cuda"
        self.weights_bytes = sum(p.numel() * p.element_size() for p in model.parameters())

    @abstractmethod
    def first(self, prompts: Tensor) -> Tensor:
        """Read prompts [B, T]; return the first new tokens [B, 1]."""

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """Return the tokens [B, 1] after those of the last step."""

    @torch.inference_mode()
    def tokens(self, prompts: np.ndarray, n: int) -> Iterator[list[int]]:
        ids = self.first(torch.from_numpy(prompts).to(self.device))
        arrived = self._copy_to_host(ids)
        for k in range(1, n):
            if k == 1:
                yield arrived()  # at once: nothing delays the first token
            ids = self.step(ids)
            before, arrived = arrived, self._copy_to_host(ids)
            if k > 1:
                yield before()
        yield arrived()

    def _copy_to_host(self, ids: Tensor) -> Callable[[], list[int]]:
        """Start a copy of tokens to the host; return a function that waits for it."""
        if not self.is_cuda:
            return ids[:, 0].tolist
        host = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
        host.copy_(ids, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def wait() -> list[int]:
            copied.synchronize()
            return host[:, 0].tolist()

        return wait

    @torch.inference_mode()
    def device_seconds(self, prompts: np.ndarray, n: int) -> tuple[float, float]:
        ids = torch.from_numpy(prompts).to(self.device)

        def first() -> None:
            nonlocal ids
            ids = self.first(ids)

        def steps() -> None:
            nonlocal ids
            for _ in range(n - 1):
                ids = self.step(ids)

        return self.elapsed(first), self.elapsed(steps) / max(n - 1, 1)

    def elapsed(self, work: Callable[[], None]) -> float:
        if not self.is_cuda:
            return super().elapsed(work)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def memory(self) -> tuple[int, int]:
        if not self.is_cuda:
            return super().memory()
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()

    def release(self) -> None:
        for name in self.prepared:
            self.__dict__.pop(name, None)
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


class PlainEngine(TorchEngine):
    """The plain model; its decode step is compiled with the mode `compiled`, or a CUDA graph."""

    prepared = ("model", "_best", "_read", "_graph")

    def __init__(
        self, name: str, model: PlainGPT2, *, compiled: str = "", graph: bool = False
    ) -> None:
        super().__init__(name, model)
        self._weights = model
        self.compiled = compiled
        self.has_graph = graph and self.is_cuda

    @torch.inference_mode()
    def prepare(self, batch: int, capacity: int, n_tokens: int) -> None:
        self.model = self._weights.with_own_cache()
        self.model.allocate(batch, capacity)
        self.index = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.ids = torch.zeros((batch, 1), dtype=torch.int64, device=self.device)
        self._best: Callable[..., Tensor] = self.model.best
        self._read: Callable[..., Tensor] = self.model.best
        if self.compiled:
            self._best = compile_step(self.model.best, self.compiled)
            if n_tokens == 1:  # compile the prompt too if it is the only work
                self._read = self._best
        if self.has_graph:
            self._capture()

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                self._in_place()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._in_place()

    def _in_place(self) -> None:
        self.ids.copy_(self._next(self.ids))
        self.index.add_(1)

    def _next(self, ids: Tensor) -> Tensor:
        # For one query, attention fused by Inductor is faster than the library's kernels.
        attention = sdpa_kernel(SDPBackend.MATH) if self.compiled else contextlib.nullcontext()
        with attention:
            return self._best(ids, self.index)

    def first(self, prompts: Tensor) -> Tensor:
        T = prompts.shape[1]
        self.index.fill_(T)
        positions = torch.arange(T, device=self.device)
        return self._read(prompts, positions).clone()

    def step(self, tokens: Tensor) -> Tensor:
        if self.has_graph:
            if tokens is not self.ids:
                self.ids.copy_(tokens)
            self._graph.replay()
            return self.ids
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        tokens = self._next(tokens).clone()  # the compiled model overwrites its output
        self.index.add_(1)
        return tokens

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> np.ndarray:
        model = self._weights.with_own_cache()
        model.allocate(1, len(ids))
        prompt = torch.tensor([ids], device=self.device)
        logits = model(prompt, torch.arange(len(ids), device=self.device))
        return logits[0].float().cpu().numpy()


class TransformersEngine(TorchEngine):
    """The model of transformers, called step by step; with its static cache if compiled."""

    prepared = ("_best", "_cache")

    def __init__(self, name: str, model: Any, *, compiled: str = "") -> None:
        super().__init__(name, model)
        self.model = model
        self.compiled = compiled

    def prepare(self, batch: int, capacity: int, n_tokens: int) -> None:
        import transformers

        self._best: Callable[[Tensor], Tensor] = self._uncompiled
        self._cache: Any = None
        if self.compiled:
            self._cache = transformers.StaticCache(config=self.model.config, max_cache_len=capacity)
            self._best = compile_step(self._uncompiled, self.compiled)

    def _uncompiled(self, ids: Tensor) -> Tensor:
        out = self.model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def first(self, prompts: Tensor) -> Tensor:
        import transformers

        if self.compiled:
            self._cache.reset()
        else:
            self._cache = transformers.DynamicCache(config=self.model.config)
        return self._uncompiled(prompts)

    def step(self, tokens: Tensor) -> Tensor:
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        return self._best(tokens).clone()

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> np.ndarray:
        logits = self.model(torch.tensor([ids], device=self.device)).logits
        return logits[0, -1].float().cpu().numpy()


def plain_model(config: GPT2Config, weights: Weights, dtype: str, device: str) -> PlainGPT2:
    """Make the plain model with gptx's float weights and a tied head."""
    with torch.device("meta"):
        model = PlainGPT2(config)
    matrices = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    state = {
        name: x.T.contiguous() if name in matrices else x
        for name, x in _tensors(weights, dtype, device)
    }
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def transformers_model(config: GPT2Config, weights: Weights, dtype: str, device: str) -> Any:
    """Make the model of transformers with the same weights."""
    import transformers

    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config.to_dict()))
    state = {f"transformer.{name}": x for name, x in _tensors(weights, dtype, device)}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _tensors(weights: Weights, dtype: str, device: str) -> Iterator[tuple[str, Tensor]]:
    for name, x in weights.items():
        writable = np.require(x, requirements="W")  # PyTorch requires it
        yield name, torch.from_numpy(writable).to(device, getattr(torch, dtype))
