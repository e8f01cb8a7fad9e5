"""A writer of files of torch.save, without torch: pickles of single instructions, both containers.

`tests/golden/torch` has files of PyTorch itself, for tests of this writer and of the reader.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptx.config import GPT2Config
from gptx.stored_weights import is_linear_weight
from tests.support.random_models import to_bfloat16

STORAGES = {"<f4": "Float", "<f8": "Double", "<f2": "Half", "|b1": "Bool", "<i8": "Long"}
MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # the start of a legacy file
VERSION = b"\x80\x02M\xe9\x03."
MACHINE = b"\x80\x02}q\x00X\x0d\x00\x00\x00little_endianq\x01\x88s."


@dataclass
class View:
    """A tensor as a view of a flat array."""

    storage: np.ndarray
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    bfloat16: bool = False


@dataclass(frozen=True)
class Raw:
    """Instructions instead of a value."""

    code: bytes


def view(array: np.ndarray, dtype: str = "float32") -> View:
    """Make a tensor with its own storage."""
    if dtype == "bfloat16":
        flat = to_bfloat16(array).astype("<u2").ravel()
    else:
        flat = array.astype({"float32": "<f4", "float16": "<f2", "float64": "<f8"}[dtype]).ravel()
    return contiguous(flat, array.shape, bfloat16=dtype == "bfloat16")


def contiguous(flat: np.ndarray, shape: tuple[int, ...], *, bfloat16: bool = False) -> View:
    """Make a tensor of a flat array in C order."""
    strides = [1]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * size)
    return View(flat, 0, shape, tuple(strides[: len(shape)]), bfloat16)


class Pickle:
    """A pickle of protocol 2; `storages` are those that it names, by key."""

    def __init__(self, value: Any, *, legacy: bool = False) -> None:
        self.storages: dict[str, np.ndarray] = {}
        self._legacy = legacy
        self._keys: dict[int, str] = {}
        self.code = b"\x80\x02" + self._value(value) + b"."

    def _value(self, value: Any) -> bytes:
        match value:
            case Raw():
                return value.code
            case None:
                return b"N"
            case bool():
                return b"\x88" if value else b"\x89"
            case int():
                return b"J" + struct.pack("<i", value)
            case float():
                return b"G" + struct.pack(">d", value)
            case str():
                return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
            case View():
                return self._tensor(value)
            case tuple():
                return b"(" + b"".join(map(self._value, value)) + b"t"
            case list():
                return b"](" + b"".join(map(self._value, value)) + b"e"
            case Mapping():
                items = (self._value(key) + self._value(v) for key, v in value.items())
                return b"}(" + b"".join(items) + b"u"
        raise TypeError(type(value))

    def _tensor(self, view: View) -> bytes:
        key = self._keys.setdefault(id(view.storage), str(len(self._keys)))
        self.storages[key] = view.storage
        kind = "BFloat16" if view.bfloat16 else STORAGES[view.storage.dtype.str]
        id_ = ("storage", Raw(f"ctorch\n{kind}Storage\n".encode()), key, "cpu", view.storage.size)
        hooks = Raw(b"ccollections\nOrderedDict\n)R")
        storage = Raw(self._value((*id_, None) if self._legacy else id_) + b"Q")
        arguments = (storage, view.offset, view.shape, view.strides, False, hooks)
        return b"ctorch._utils\n_rebuild_tensor_v2\n" + self._value(arguments) + b"R"


def zip_bytes(value: Any, *, order: str = "little", folder: str = "archive") -> bytes:
    """Return the file of torch.save(value)."""
    pickle = Pickle(value)
    return zip_of(pickle.code, pickle.storages, order=order, folder=folder)


def zip_of(
    code: bytes,
    storages: Mapping[str, np.ndarray],
    *,
    order: str = "little",
    folder: str = "archive",
) -> bytes:
    """Return an archive of a pickle and of storages, with the CRC-32 of each."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{folder}/data.pkl", code)
        archive.writestr(f"{folder}/byteorder", order)
        for key, array in storages.items():
            swapped = array if order == "little" else array.byteswap()
            archive.writestr(f"{folder}/data/{key}", swapped.tobytes())
        archive.writestr(f"{folder}/version", "3\n")
    return data.getvalue()


def legacy_bytes(value: Any) -> bytes:
    """Return the file of torch.save(value, _use_new_zipfile_serialization=False)."""
    pickle = Pickle(value, legacy=True)
    keys = sorted(pickle.storages)
    parts = [MAGIC, VERSION, MACHINE, pickle.code, Pickle(keys).code]
    for key in keys:
        array = pickle.storages[key]
        parts += [struct.pack("<q", array.size), array.tobytes()]
    return b"".join(parts)


CONTAINERS = {"zip": zip_bytes, "legacy": legacy_bytes}


def state_dict(
    weights: Mapping[str, np.ndarray], dtype: str = "float32", prefix: str = "transformer."
) -> dict[str, Any]:
    """Make transformers' state_dict: with masks, and a head that shares the table's storage."""
    found = {
        name if name.startswith("lm_head") else prefix + name: view(array, dtype)
        for name, array in weights.items()
    }
    n = weights["wpe.weight"].shape[0]
    mask = contiguous(np.tril(np.ones((n, n), np.bool_)).ravel(), (1, 1, n, n))
    found[f"{prefix}h.0.attn.bias"] = mask
    found[f"{prefix}h.0.attn.masked_bias"] = view(np.float32(-1e4))
    found.setdefault("lm_head.weight", found[f"{prefix}wte.weight"])
    return found


def nanogpt(
    config: GPT2Config,
    weights: Mapping[str, np.ndarray],
    *,
    prefix: str = "",
    bias: bool = True,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Make nanoGPT's checkpoint: linear layers [out, in], and an optimizer."""
    model = {}
    for name, array in weights.items():
        if not bias and name.endswith(".bias"):
            continue
        stored = name if name.startswith("lm_head") else f"transformer.{name}"
        model[prefix + stored] = view(array.T if is_linear_weight(name) else array, dtype)
    model.setdefault(f"{prefix}lm_head.weight", model[f"{prefix}transformer.wte.weight"])
    arguments = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    arguments |= {"block_size": config.n_positions, "bias": bias, "dropout": 0.0}
    moments = {"step": view(np.float32(1)), "exp_avg": view(np.ones((2, 3), np.float32))}
    return {
        "model": model,
        "optimizer": {"state": {"0": moments}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.9)}]},
        "model_args": arguments | {"vocab_size": config.vocab_size},
        "iter_num": 2000,
        "best_val_loss": view(np.float32(1.5)),
        "config": {"dataset": "shakespeare_char", "compile": True, "learning_rate": 1e-3},
    }


def write_folder(
    folder: Path, config: GPT2Config, data: bytes, name: str = "pytorch_model.bin"
) -> Path:
    """Write a folder with such a file and a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / name).write_bytes(data)
    return folder
