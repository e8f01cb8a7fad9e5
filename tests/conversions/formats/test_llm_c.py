"""gptx.conversions.formats.llm_c, against files assembled from the layout of llm.c."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptx.config import GPT2Config
from gptx.conversions import convert
from gptx.conversions.formats import llm_c
from gptx.errors import ConfigError, WeightsError
from gptx.quantization import QuantizedTensor
from gptx.random_weights import random_weights
from gptx.safetensors_file import widen_bfloat16
from tests.support.fuzz import EXTREMES, damaged_copies, fuzz, refuse_every_prefix
from tests.support.random_models import CASES, to_bfloat16, write_model

TINY = GPT2Config(
    vocab_size=5,
    n_positions=3,
    n_embd=2,
    n_layer=2,
    n_head=1,
    bos_token_id=None,
    eos_token_id=None,
)
STACKED = [  # each for all layers
    "ln_1.weight",
    "ln_1.bias",
    "attn.c_attn.weight",
    "attn.c_attn.bias",
    "attn.c_proj.weight",
    "attn.c_proj.bias",
    "ln_2.weight",
    "ln_2.bias",
    "mlp.c_fc.weight",
    "mlp.c_fc.bias",
    "mlp.c_proj.weight",
    "mlp.c_proj.bias",
]


def expected(config: GPT2Config, version: int = 3, *, padded: int | None = None) -> bytes:
    """Assemble the file of a model of random weights."""
    weights = random_weights(config)
    V = config.vocab_size
    padded = -(-V // 128) * 128 if padded is None else padded
    header = np.zeros(256, "<i4")
    header[:7] = 20240326, version, config.n_positions, V, config.n_layer, config.n_head, 0
    header[6:8] = config.n_embd, 0 if version == 1 else padded
    wte = np.vstack([weights["wte.weight"], np.zeros((padded - V, config.n_embd), np.float32)])
    parts = [wte, weights["wpe.weight"]]
    for kind in STACKED:
        of_kind = [weights[f"h.{layer}.{kind}"] for layer in range(config.n_layer)]
        parts += [w.T if w.ndim == 2 else w for w in of_kind]
    parts += [weights["ln_f.weight"], weights["ln_f.bias"]]
    if version == 5:
        return header.tobytes() + b"".join(to_bfloat16(part).tobytes() for part in parts)
    return header.tobytes() + b"".join(part.tobytes() for part in parts)


def with_header(data: bytes, **fields: int) -> bytes:
    """Replace numbers in the header of a file."""
    names = ["magic", "version", "S", "V", "L", "H", "C", "padded"]
    out = bytearray(data)
    for name, value in fields.items():
        struct.pack_into("<i", out, 4 * names.index(name), value)
    return bytes(out)


def tensors(path: Path, config: GPT2Config | None = None) -> dict[str, np.ndarray]:
    found = {}
    for name, tensor in llm_c.read(path, config).tensors.items():
        assert not isinstance(tensor, QuantizedTensor)
        found[name] = widen_bfloat16(tensor)
    return found


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., Path]:
    def write(config: GPT2Config, **options: Any) -> Path:
        return write_model(tmp_path / "source", config, random_weights(config), **options)

    return write


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "model.bin"
    path.write_bytes(expected(TINY))
    return path


@pytest.mark.parametrize("case", ["124M", "1558M", "355M"])  # 355M needs no padding
def test_the_file_is_what_llm_c_writes(case: str, source: Any, tmp_path: Path) -> None:
    convert(source(CASES[case]), tmp_path / "out.bin", "llm.c")
    assert (tmp_path / "out.bin").read_bytes() == expected(CASES[case])


def test_bfloat16_is_version_5(source: Any, tmp_path: Path) -> None:
    convert(source(CASES["124M"]), tmp_path / "out.bin", "llm.c", dtype="bfloat16")
    assert (tmp_path / "out.bin").read_bytes() == expected(CASES["124M"], 5)


@pytest.mark.parametrize(("dtype", "version"), [("bfloat16", 5), ("float32", 3), ("float16", 3)])
def test_default_type_is_that_of_the_source_or_float32(
    dtype: str, version: int, source: Any, tmp_path: Path
) -> None:
    convert(source(TINY, dtype=dtype), tmp_path / "out.bin", "llm.c")
    data = (tmp_path / "out.bin").read_bytes()
    assert struct.unpack_from("<2i", data) == (20240326, version)


@pytest.mark.parametrize(("version", "padded"), [(1, 211), (3, 256), (3, 211), (3, 300)])
def test_padding_is_skipped(version: int, padded: int, tmp_path: Path) -> None:
    config = CASES["124M"]
    path = tmp_path / "model.bin"
    path.write_bytes(expected(config, version, padded=padded))
    assert llm_c.detect(path)
    found = llm_c.read(path)
    assert found.config == replace(config, bos_token_id=None, eos_token_id=None)
    for name, weight in random_weights(config).items():
        tensor = found.tensors[name]
        assert not isinstance(tensor, QuantizedTensor)
        assert tensor.shape == weight.shape
        assert tensor.tobytes() == weight.tobytes(), name


def test_rest_of_the_header_is_ignored(tiny: Path) -> None:
    data = tiny.read_bytes()  # some of llm.c's programs write uninitialized memory
    tiny.write_bytes(data[:32] + b"\xff" * 992 + data[1024:])
    assert list(tensors(tiny)) == list(TINY.tensor_shapes())


@pytest.mark.parametrize("magic", [20240327, 20240328, 20240520])
def test_states_tokenizers_and_data_are_not_detected(magic: int, tiny: Path) -> None:
    tiny.write_bytes(with_header(tiny.read_bytes(), magic=magic))
    assert not llm_c.detect(tiny)
    with pytest.raises(WeightsError, match=f"starts with {magic}, not 20240326"):
        llm_c.read(tiny)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 2}, "version 2, expected one of 1, 3, 5"),
        ({"version": 4}, "version 4, expected one of 1, 3, 5"),
        ({"L": 0}, "n_layer is 0"),
        ({"L": 2**31 - 1}, "n_layer is 2147483647"),
        ({"L": 3}, r"has \d+ bytes, expected \d+ by its"),
        ({"H": 3}, "n_embd 2 is not a multiple of n_head 3"),
        ({"V": -1}, "vocab_size is -1"),
        ({"V": 129}, "129 tokens, padded to 128"),
        ({"C": 2**31 - 1}, r"has \d+ bytes, expected \d+ by its"),
        ({"padded": 2**31 - 1}, r"has \d+ bytes, expected \d+ by its"),
    ],
)
def test_invalid_headers_are_refused(fields: dict[str, int], message: str, tiny: Path) -> None:
    tiny.write_bytes(with_header(tiny.read_bytes(), **fields))
    with pytest.raises((WeightsError, ConfigError), match=message):
        llm_c.read(tiny)


def test_bytes_after_the_end_are_refused(tiny: Path) -> None:
    tiny.write_bytes(tiny.read_bytes() + b"\0")
    with pytest.raises(WeightsError, match=r"has \d+ bytes, expected \d+ by its header"):
        llm_c.read(tiny)


def test_config_adds_settings_that_the_header_lacks(tiny: Path) -> None:
    given = replace(TINY, eos_token_id=4)
    assert llm_c.read(tiny, given).config == given
    with pytest.raises(ConfigError, match=r"n_head is 1 in .*, and 2 in the given config"):
        llm_c.read(tiny, replace(TINY, n_head=2))
    with pytest.raises(ConfigError, match="n_positions is 3 in"):
        llm_c.read(tiny, replace(TINY, n_positions=4))


@pytest.mark.parametrize(
    "case", ["gelu-erf", "relu", "unscaled", "layer-scaled", "n-inner", "untied", "epsilon"]
)
def test_unsupported_settings_are_refused(case: str, source: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"llm\.c supports only"):
        convert(source(CASES[case]), tmp_path / "out.bin", "llm.c")
    assert not (tmp_path / "out.bin").exists()


def extreme_sizes(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2])):
        value = rng.choice([*EXTREMES, 5, 6, rng.getrandbits(32)])
        struct.pack_into("<I", out, 4 * rng.randrange(8), value % 2**32)
    return bytes(out)


@damaged_copies
@pytest.mark.parametrize("version", [3, 5])
def test_damaged_files_are_refused_or_read(version: int, copies: int, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(expected(replace(TINY, n_embd=1, n_layer=1), version))
    assert fuzz(path, lambda: tensors(path), mutations=[extreme_sizes], copies=copies) > copies // 2
    refuse_every_prefix(path, lambda: tensors(path), copies=copies)
