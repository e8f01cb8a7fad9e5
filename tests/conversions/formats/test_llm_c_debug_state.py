"""Debug states of llm.c: the bytes of the file, and what the reader refuses."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gptx.conversions.formats.llm_c_debug_state import DebugState, read, write
from gptx.errors import ConfigError, StorageError, WeightsError
from gptx.random_weights import random_weights
from tests.conversions.formats.test_llm_c import STACKED
from tests.support.random_models import CASES, random_ids

CONFIG = CASES["tiny"]  # 101 tokens, padded to 128
B, T, V, C = 2, 3, CONFIG.vocab_size, CONFIG.n_embd


def state() -> DebugState:
    """Make a state of two sequences; random numbers stand for what a model computes."""
    ids = random_ids(CONFIG, B, T + 1).astype(np.int32)
    logits = np.arange(B * T * V, dtype=np.float32).reshape(B, T, V)
    return DebugState(ids[:, :-1], ids[:, 1:], logits, 4.625, random_weights(CONFIG, seed=1))


def expected(of: DebugState) -> bytes:
    """Assemble the file."""
    header = np.zeros(256, "<i4")
    header[:4] = 20240327, 2, B, T
    g = of.gradients
    parts = [np.vstack([g["wte.weight"], np.zeros((27, C), "f4")]), g["wpe.weight"]]
    parts += [g[f"h.0.{kind}"].T for kind in STACKED]  # the transpose of a vector is the vector
    parts += [g["ln_f.weight"], g["ln_f.bias"]]
    return b"".join(
        [
            header.tobytes(),
            of.ids.tobytes(),
            of.targets.tobytes(),
            of.logits.tobytes(),
            struct.pack("<f", of.loss),
            *(part.tobytes() for part in parts),
        ]
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "state.bin"
    path.write_bytes(expected(state()))
    return path


def test_the_file_is_what_llm_c_reads(tmp_path: Path) -> None:
    write(state(), CONFIG, tmp_path / "state.bin")
    assert (tmp_path / "state.bin").read_bytes() == expected(state())


def test_other_types_are_converted(tmp_path: Path) -> None:
    found = state()
    wide = {name: g.astype(np.float64) for name, g in found.gradients.items()}
    ids = np.asfortranarray(found.ids.astype(np.int64))
    logits = found.logits.astype(np.float64)
    write(replace(found, ids=ids, logits=logits, gradients=wide), CONFIG, tmp_path / "state.bin")
    assert (tmp_path / "state.bin").read_bytes() == expected(found)


def test_reading(path: Path) -> None:
    found, original = read(path, CONFIG), state()
    for name in ("ids", "targets", "logits"):
        np.testing.assert_array_equal(getattr(found, name), getattr(original, name), name)
    assert found.loss == original.loss
    assert set(found.gradients) == set(CONFIG.tensor_shapes())
    for name, gradient in original.gradients.items():
        np.testing.assert_array_equal(found.gradients[name], gradient, name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: 20240326}, "starts with 20240326, not 20240327"),
        ({1: 1}, "version 1, expected 2"),
        ({2: 3}, "for 3 x 3 tokens and this config"),
        ({2: -2, 3: -3}, "for -2 x -3 tokens and this config"),
        ({2: 2**31 - 1, 3: 2**31 - 1}, "for 2147483647 x 2147483647 tokens and this config"),
    ],
    ids=["magic", "version", "batch", "negative", "huge"],
)
def test_damaged_headers_are_refused(changes: dict[int, int], message: str, path: Path) -> None:
    data = bytearray(path.read_bytes())
    for place, value in changes.items():
        struct.pack_into("<i", data, 4 * place, value)
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=message):
        read(path, CONFIG)


@pytest.mark.parametrize("n_bytes", [0, 15, 1024, -1])
def test_truncated_files_are_refused(n_bytes: int, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(WeightsError, match=r"truncated|expected"):
        read(path, CONFIG)


def test_a_state_of_another_model_is_refused(path: Path) -> None:
    with pytest.raises(WeightsError, match="give the config of its model"):
        read(path, CASES["124M"])
    with pytest.raises(StorageError, match="cannot be read"):
        read(path.with_name("absent"), CONFIG)


def test_a_state_that_llm_c_would_misread_is_not_written(tmp_path: Path) -> None:
    found = state()
    without = {name: g for name, g in found.gradients.items() if name != "wpe.weight"}
    out = tmp_path / "state.bin"
    with pytest.raises(WeightsError, match=r"wpe\.weight of the debug state is missing"):
        write(replace(found, gradients=without), CONFIG, out)
    with pytest.raises(WeightsError, match=r"logits of the debug state is \(2, 2, 101\)"):
        write(replace(found, logits=found.logits[:, 1:]), CONFIG, out)
    with pytest.raises(ConfigError, match=r"activation_function is 'relu', llm\.c supports only"):
        write(found, replace(CONFIG, activation_function="relu"), out)
    assert not list(tmp_path.iterdir())
