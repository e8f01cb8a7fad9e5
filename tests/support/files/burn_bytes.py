"""A writer of gpt-burn folders: MessagePack in the form of rmp-serde."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gptx.config import GPT2Config
from gptx.random_weights import random_weights

NAMES = {"half::binary16::f16": np.float16, "f32": np.float32, "f64": np.float64}


def pack(x: Any) -> bytes:
    """Encode dicts, lists, strings, None and integers; an array becomes Burn's tensor."""
    if x is None:
        return b"\xc0"
    if isinstance(x, np.ndarray):
        return pack({"id": "9bd1", "param": {"value": Raw(numbers(x)), "shape": list(x.shape)}})
    if isinstance(x, Raw):
        return x.data
    if isinstance(x, int):
        return integer(x)
    if isinstance(x, str):
        text = x.encode()
        head = bytes([0xA0 + len(text)]) if len(text) < 32 else bytes([0xD9, len(text)])
        return head + text
    if isinstance(x, dict):
        items = [pack(part) for item in x.items() for part in item]
        return bytes([0x80 + len(x)]) + b"".join(items)
    return length(len(x)) + b"".join(map(pack, x))


@dataclass(frozen=True)
class Raw:
    """Encoded bytes."""

    data: bytes


def length(n: int) -> bytes:
    if n < 16:
        return bytes([0x90 + n])
    return struct.pack(">BH", 0xDC, n) if n < 2**16 else struct.pack(">BI", 0xDD, n)


def integer(n: int) -> bytes:
    if n < 128:
        return bytes([n])
    for marker, code in ((0xCC, "B"), (0xCD, "H"), (0xCE, "I")):
        if n < 256 ** struct.calcsize(code):
            return struct.pack(f">B{code}", marker, n)
    raise AssertionError(n)


def numbers(x: np.ndarray) -> bytes:
    if x.dtype == np.float16:
        return length(x.size) + b"".join(integer(int(n)) for n in x.ravel().view(np.uint16))
    code = {4: ">Bf", 8: ">Bd"}[x.dtype.itemsize]
    marker = {4: 0xCA, 8: 0xCB}[x.dtype.itemsize]
    return length(x.size) + b"".join(struct.pack(code, marker, n) for n in x.ravel())


def narrow(config: GPT2Config) -> GPT2Config:
    """Return the same sizes with gpt-burn's settings: erf, an untied head."""
    return replace(
        config,
        activation_function="gelu",
        tie_word_embeddings=False,
        layer_norm_epsilon=1e-10,
        bos_token_id=None,
        eos_token_id=None,
    )


def burn_weights(config: GPT2Config, kind: str = "f32") -> dict[str, np.ndarray]:
    """Draw random weights in a type of Burn; the biases that it lacks are zero."""
    weights = {n: x.astype(NAMES[kind]) for n, x in random_weights(narrow(config)).items()}
    for name, x in weights.items():
        if name.endswith(("c_attn.bias", "attn.c_proj.bias")):
            x[:] = 0
    return weights


def record(weights: dict[str, np.ndarray], bias: np.ndarray, n_layer: int, kind: str) -> Any:
    """Nest the structs of gpt-burn."""
    w = weights

    def norm(name: str) -> dict[str, Any]:
        return {"gamma": w[f"{name}.weight"], "beta": w[f"{name}.bias"], "epsilon": None}

    def linear(weight: np.ndarray, bias: np.ndarray | None = None) -> dict[str, Any]:
        return {"weight": weight, "bias": bias}

    def block(h: str) -> dict[str, Any]:
        query, key, value = np.split(w[f"{h}.attn.c_attn.weight"], 3, axis=1)
        return {
            "norm_1": norm(f"{h}.ln_1"),
            "multi_head": {
                "n_heads": None,
                "d_k": None,
                "query": linear(query),
                "key": linear(key),
                "value": linear(value),
                "attn_dropout": None,
                "out": linear(w[f"{h}.attn.c_proj.weight"]),
                "resid_dropout": None,
            },
            "norm_2": norm(f"{h}.ln_2"),
            "pwff": {
                "linear_1": linear(w[f"{h}.mlp.c_fc.weight"], w[f"{h}.mlp.c_fc.bias"]),
                "gelu": None,
                "linear_2": linear(w[f"{h}.mlp.c_proj.weight"], w[f"{h}.mlp.c_proj.bias"]),
                "dropout": None,
            },
        }

    metadata = dict.fromkeys(("int", "format", "version", "settings"), "x")
    item = {
        "token_embedding": {"weight": w["wte.weight"]},
        "positional_embedding": {"weight": w["wpe.weight"]},
        "dropout": None,
        "blocks": [block(f"h.{layer}") for layer in range(n_layer)],
        "norm": norm("ln_f"),
        "linear": linear(w["lm_head.weight"].T, bias),
    }
    return {"metadata": {"float": kind, **metadata}, "item": item, "_b": []}


def sizes(config: GPT2Config) -> dict[str, int]:
    return {
        "context_length": config.n_positions,
        "vocab_size": config.vocab_size,
        "n_layers": config.n_layer,
        "n_heads": config.n_head,
        "d_model": config.n_embd,
        "d_hidden": config.mlp_dim,
    }


def write_burn(
    folder: Path, config: GPT2Config, bias: np.ndarray | None = None, kind: str = "f32"
) -> dict[str, np.ndarray]:
    """Write a random model; return its weights under gptx's names, without the head's bias."""
    folder.mkdir(exist_ok=True)
    weights = burn_weights(config, kind)
    bias = np.zeros(config.vocab_size) if bias is None else bias
    data = record(weights, bias.astype(NAMES[kind]), config.n_layer, kind)
    (folder / "model.mpk").write_bytes(pack(data))
    (folder / "config.json").write_text(json.dumps({"seed": 0, "model": sizes(config)}))
    return weights
