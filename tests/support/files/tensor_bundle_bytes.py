"""A writer of TensorFlow's checkpoints, independent of gptx's reader.

After tensorflow/core/util/tensor_bundle and LevelDB's doc/table_format.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptx.config import GPT2Config
from gptx.tokenization.pipeline import PipelineTokenizer

MAGIC = bytes.fromhex("57fb808b247547db")
FLOAT, INT64, BFLOAT16 = 1, 9, 14
TYPES = {"<f4": FLOAT, "<f8": 2, "<i8": INT64, "<f2": 19, "<u2": BFLOAT16}  # <u2: bfloat16's bits

Damage = Callable[[bytes], bytes]  # of a block, before its checksum is computed
# Changes the fields of an entry, by number; the name "" is the header.
Change = Callable[[str, dict[int, Any]], None]
Checksum = Callable[[bytes], int]


def _table_of_bytes() -> list[int]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


TABLE = _table_of_bytes()


def slow_crc32c(data: bytes) -> int:
    """Compute CRC-32C byte by byte, the textbook's algorithm."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def mask(crc: int) -> bytes:
    return (((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32).to_bytes(4, "little")


def varint(number: int) -> bytes:
    number %= 2**64
    out = bytearray()
    while number > 127:
        out.append(number % 128 + 128)
        number //= 128
    return bytes([*out, number])


def message(fields: Mapping[int, Any]) -> bytes:
    """Encode a message: int as varint, bytes, (int,) as 4 bytes, a list as a repeated field.

    As in proto3, a field that is 0 is omitted.
    """
    out = b""
    for number, value in fields.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, bytes):
                out += varint(number << 3 | 2) + varint(len(one)) + one
            elif isinstance(one, tuple):
                out += varint(number << 3 | 5) + one[0].to_bytes(4, "little")
            elif one:
                out += varint(number << 3) + varint(one)
    return out


def block(entries: list[tuple[bytes, bytes]], restart: int = 16) -> bytes:
    out, restarts, before = b"", [], b""
    for i, (key, value) in enumerate(entries):
        shared = 0
        if i % restart == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(before), len(key)) and before[shared] == key[shared]:
                shared += 1
        new = key[shared:]
        out += varint(shared) + varint(len(new)) + varint(len(value)) + new + value
        before = key
    restarts = restarts or [0]
    return out + b"".join(n.to_bytes(4, "little") for n in [*restarts, len(restarts)])


def table(
    entries: list[tuple[bytes, bytes]],
    *,
    per_block: int = 100,
    compression: int = 0,
    damage: Damage = bytes,
    again: int = 0,
) -> bytes:
    """Encode sorted keys and values with `per_block` of them in a block.

    The index lists an empty block `again` more times.
    """
    out = b""

    def handle(content: bytes) -> bytes:
        nonlocal out
        content = damage(content)
        place = varint(len(out)) + varint(len(content))
        typed = content + bytes([compression])
        out += typed + mask(slow_crc32c(typed))
        return place

    index = []
    for first in range(0, len(entries), per_block):
        part = entries[first : first + per_block]
        index.append((part[-1][0] + b"\0", handle(block(part))))
    empty = handle(block([]))
    index += [(b"\xff" + i.to_bytes(3, "big"), empty) for i in range(again)]
    footer = empty + handle(block(index, restart=1))
    return out + footer.ljust(40, b"\0") + MAGIC


def write_bundle(
    prefix: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    shards: int = 1,
    change: Change = lambda name, fields: None,
    checksum: Checksum = slow_crc32c,
    **options: Any,
) -> Path:
    """Write `prefix.index` and the files of data; return the path of the index.

    `options` are those of `table`.
    """
    header: dict[int, Any] = {1: shards, 3: message({1: 1})}
    change("", header)
    entries = [(b"", message(header))]
    data = [b""] * shards
    for i, (name, tensor) in enumerate(sorted(tensors.items())):
        shard = i * shards // len(tensors)
        raw = tensor.tobytes()
        dims = [message({1: n}) for n in tensor.shape]
        fields = {
            1: TYPES[tensor.dtype.str],
            2: message({2: dims}),
            3: shard,
            4: len(data[shard]),
            5: len(raw),
            6: (int.from_bytes(mask(checksum(raw)), "little"),),
        }
        change(name, fields)
        entries.append((name.encode(), message(fields)))
        data[shard] += raw
    for shard, raw in enumerate(data):
        path = prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}")
        path.write_bytes(raw)
    index = prefix.with_name(f"{prefix.name}.index")
    index.write_bytes(table(entries, **options))
    return index


def variables(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return weights under the names and in the shapes of OpenAI's src/model.py."""
    found = {}
    for name, array in weights.items():
        scopes = name.split(".")
        if scopes[0] == "h":
            scopes[:2] = [f"h{scopes[1]}"]
        kind = scopes.pop()
        if scopes[-1] in ("ln_1", "ln_2", "ln_f"):
            scopes.append({"weight": "g", "bias": "b"}[kind])
        elif scopes[-1] not in ("wte", "wpe"):
            scopes.append({"weight": "w", "bias": "b"}[kind])
        found["/".join(["model", *scopes])] = array[None] if scopes[-1] == "w" else array
    return found


def write_openai(
    folder: Path,
    config: GPT2Config,
    weights: Mapping[str, np.ndarray],
    tokenizer: PipelineTokenizer | None = None,
    **options: Any,
) -> Path:
    """Write a model in the form of OpenAI's; `options` are those of `write_bundle`."""
    folder.mkdir(exist_ok=True)
    write_bundle(folder / "model.ckpt", variables(weights), **options)
    hparams = {
        "n_vocab": config.vocab_size,
        "n_ctx": config.n_positions,
        "n_embd": config.n_embd,
        "n_head": config.n_head,
        "n_layer": config.n_layer,
    }
    (folder / "hparams.json").write_text(json.dumps(hparams, indent=2))
    names = 'model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n'
    (folder / "checkpoint").write_text(names)
    if tokenizer is not None:
        model = tokenizer.definition()["model"]
        (folder / "encoder.json").write_text(json.dumps(model["vocab"]))
        merges = "".join(" ".join(pair) + "\n" for pair in model["merges"])
        (folder / "vocab.bpe").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    return folder
