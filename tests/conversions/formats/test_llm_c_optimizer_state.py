"""gptx.conversions.formats.llm_c_optimizer_state: AdamW's moments in llm.c's file."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gptx.config import GPT2Config
from gptx.conversions.formats import llm_c_optimizer_state
from gptx.conversions.formats.llm_c_optimizer_state import OptimizerState
from gptx.errors import ConfigError, WeightsError
from gptx.random_weights import random_weights

CONFIG = GPT2Config(vocab_size=130, n_positions=16, n_embd=8, n_layer=2, n_head=2)
PADDED = 256  # rows of the table of tokens in the file


def make_state() -> OptimizerState:
    m, v, w = (random_weights(replace(CONFIG, bos_token_id=None), seed=i) for i in range(3))
    return OptimizerState(100, m, v, w)


def reference_bytes(state: OptimizerState) -> bytes:
    """Write the file as llm.c's `save_state` does: kinds of tensors, layer after layer."""
    header = np.zeros(256, "<i4")
    header[[0, 1, 2, 4, 10]] = 20240527, 1, 1, state.master is not None, state.step
    header[20:24].view("<u8")[:] = 13371337
    parts = [header.tobytes()]
    kinds = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    for tensors in (state.m, state.v, state.master):
        if tensors is None:
            continue
        table = np.zeros((PADDED, 8), np.float32)
        table[:130] = tensors["wte.weight"]
        parts += [table.tobytes(), tensors["wpe.weight"].tobytes()]
        for kind in [f"{kind}.{part}" for kind in kinds for part in ("weight", "bias")]:
            for layer in range(2):
                array = tensors[f"h.{layer}.{kind}"]
                parts.append(np.ascontiguousarray(array.T if array.ndim == 2 else array).tobytes())
        parts += [tensors["ln_f.weight"].tobytes(), tensors["ln_f.bias"].tobytes()]
    return b"".join(parts)


@pytest.mark.parametrize("has_master", [True, False])
def test_the_bytes_of_llm_c(has_master: bool, tmp_path: Path) -> None:
    state = make_state() if has_master else replace(make_state(), master=None)
    path = tmp_path / "state_00000100_00000.bin"
    llm_c_optimizer_state.write(state, CONFIG, path)
    assert path.read_bytes() == reference_bytes(state)
    found = llm_c_optimizer_state.read(path, CONFIG)
    assert found.step == 100
    assert (found.master is not None) == has_master
    for expected, arrays in ((state.m, found.m), (state.v, found.v), (state.master, found.master)):
        if expected is not None and arrays is not None:
            assert arrays.keys() == expected.keys()
            assert all(np.array_equal(arrays[name], expected[name]) for name in expected)


def test_the_order_of_the_data_may_follow(tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    path.write_bytes(reference_bytes(make_state()) + bytes(2500))
    assert llm_c_optimizer_state.read(path, CONFIG).step == 100


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    whole = reference_bytes(make_state())
    for data, message in (
        (whole[:-4], "expected .* for this model: it is truncated"),
        (struct.pack("<2i", 20240326, 3) + whole[8:], "not an optimizer state of llm.c"),
        (whole[:1000], "the header"),
    ):
        path.write_bytes(data)
        with pytest.raises(WeightsError, match=message):
            llm_c_optimizer_state.read(path, CONFIG)
    relu = replace(CONFIG, activation_function="relu")
    with pytest.raises(ConfigError, match=r"llm\.c supports only"):
        llm_c_optimizer_state.write(make_state(), relu, path)
