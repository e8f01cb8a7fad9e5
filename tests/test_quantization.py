"""gptx.quantization: settings, layout of the quantized values, and accuracy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gptx.config import GPT2Config
from gptx.errors import ConfigError, ParameterError, WeightsError
from gptx.quantization import (
    GROUP_SIZES,
    SMALL_FLOATS,
    Quantization,
    QuantizedTensor,
    dequantize,
    quantize,
    unpack,
)
from tests.support.cli import raises_error

KINDS = [(bits, group_size) for bits in (4, 8) for group_size in GROUP_SIZES]


# Settings


@pytest.mark.parametrize(
    ("group_size", "bits", "expected"),
    [
        (48, 4, "group_size is 48, expected 32, 64 or 128"),
        (256, 4, "group_size is 256"),
        (0, 4, "group_size is 0"),
        (64.0, 4, "group_size is 64.0"),
        (None, 4, "group_size is None"),
        ("64", 4, "group_size is '64'"),
        (64, 7, "bits is 7, expected 2, 3, 4, 5, 6 or 8"),
        (64, 16, "bits is 16"),
        (64, True, "bits is True"),
        (64, None, "bits is None"),
    ],
)
def test_invalid_settings(group_size: Any, bits: Any, expected: str) -> None:
    with raises_error(ParameterError, expected):
        Quantization(group_size, bits)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, None),
        ({"quantization": None, "quantization_config": {}}, None),
        ({"quantization": {"group_size": 64, "bits": 4}}, Quantization(64, 4)),
        ({"quantization": {"bits": 8, "group_size": 32, "mode": "affine"}}, Quantization(32, 8)),
        ({"quantization_config": {"group_size": 128, "bits": 4}}, Quantization(128, 4)),
        (
            {
                "quantization": {"group_size": 64, "bits": 4},
                "quantization_config": {"group_size": 64, "bits": 4, "mode": "affine"},
            },
            Quantization(64, 4),
        ),
    ],
)
def test_config_files_of_mlx(tmp_path: Path, data: Any, expected: Quantization | None) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    assert GPT2Config.from_file(path).quantization == expected


GOOD = {"group_size": 64, "bits": 4}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"quantization": {**GOOD, "bits": 7}}, "bits is 7, expected 2, 3, 4, 5, 6 or 8"),
        ({"quantization": {**GOOD, "group_size": 16}}, "group_size is 16, expected 32, 64 or 128"),
        ({"quantization": {"bits": 4}}, "group_size is None"),
        ({"quantization": {"group_size": 64}}, "bits is None"),
        ({"quantization": {**GOOD, "mode": "mxfp4"}}, "group_size is 64, expected 32"),
        ({"quantization": {**GOOD, "mode": "x"}}, "mode is 'x', expected 'affine', 'mxfp4', 'mx"),
        ({"quantization": {**GOOD, "mode": ["affine"]}}, "mode is ['affine'], expected 'affine'"),
        ({"quantization": {**GOOD, "model.wte": {**GOOD, "bits": 9}}}, "bits is 9"),
        ({"quantization": {**GOOD, "model.wte": {"bits": 8}}}, "group_size is None"),
        ({"quantization": {**GOOD, "model.wte": {**GOOD, "model.x": GOOD}}}, "has 'model.wte'"),
        ({"quantization": {**GOOD, "model.wte": 4}}, "has 'model.wte', which is not supported"),
        ({"quantization": {**GOOD, "symmetric": True}}, "has 'symmetric', which is not supported"),
        ({"quantization": 4}, "quantization is 4, expected {"),
        ({"quantization": [64, 4]}, "quantization is [64, 4], expected {"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantization_config has 'load_in_8bit'"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "quantization_config is of the method 'bitsandbytes', expected MLX's",
        ),
        (
            {"quantization": GOOD, "quantization_config": {**GOOD, "bits": 8}},
            "quantization and quantization_config differ",
        ),
    ],
)
def test_an_invalid_quantization_in_a_config(tmp_path: Path, data: Any, expected: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    with raises_error(ConfigError, str(path), expected):
        GPT2Config.from_file(path)


def test_layers_of_another_quantization() -> None:
    """A layer has its own object, false for floats, or true for the settings of all layers."""
    layers = {"model.wte": {"group_size": 32, "bits": 8}, "h.0.mlp.c_fc": False, "h.1.x": True}
    with raises_error(ConfigError, "has 'model.wteX', which"):
        Quantization.from_dict(GOOD | layers | {"model.wteX": 1})
    found = Quantization.from_dict(GOOD | layers)
    assert found.layers == (("wte", Quantization(32, 8)), ("h.0.mlp.c_fc", None))
    assert found.computed == Quantization(64, 4)
    written = {"model.wte": {"group_size": 32, "bits": 8}, "model.h.0.mlp.c_fc": False}
    assert found.to_dict() == GOOD | written


def test_the_quantization_of_a_written_config() -> None:
    written = GPT2Config(quantization=Quantization(64, 4)).to_dict()
    assert written["quantization"] == {"group_size": 64, "bits": 4}
    assert "quantization" not in GPT2Config().to_dict()


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_backends_do_not_compute_with_other_bits(bits: int) -> None:
    assert Quantization(32, bits).computed is None
    with raises_error(ParameterError, f"bits is {bits}, expected 8 or 4"):
        quantize(np.ones((1, 32), np.float32), bits, 32)
    with raises_error(ParameterError, f"bits is {bits}, expected 8 or 4"):
        QuantizedTensor(WORDS, PARTS, PARTS, 32, bits)


@pytest.mark.parametrize("kind", [*SMALL_FLOATS.items(), ("affine", (64, 3))], ids=str)
def test_a_quantization_of_a_file(kind: tuple[str, tuple[int, int]]) -> None:
    mode, (group_size, bits) = kind
    stored = Quantization(group_size, bits, mode)
    assert stored.computed is None
    assert Quantization.from_dict(stored.to_dict()) == stored
    assert str(stored) == f"{'int3' if mode == 'affine' else mode} in groups of {group_size}"


# Layout


def quantized(n_out: int, n_in: int, bits: int, group_size: int, seed: int = 0) -> QuantizedTensor:
    """Make a matrix of random words, scales and offsets."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2**32, (n_out, n_in * bits // 32), np.uint32)
    scales, offsets = rng.normal(size=(2, n_out, n_in // group_size)).astype(np.float32)
    return QuantizedTensor(words, scales, offsets, group_size, bits)


@pytest.mark.parametrize(("bits", "group_size"), KINDS)
def test_values_are_packed_along_the_input_lowest_bits_first(bits: int, group_size: int) -> None:
    q = quantized(3, 2 * group_size, bits, group_size)
    values, w = unpack(q), dequantize(q)
    assert (values.dtype, values.shape, q.shape) == (np.uint8, q.shape, (3, 2 * group_size))
    assert (w.dtype, w.shape) == (np.float32, q.shape)
    for o in range(3):
        for i in range(2 * group_size):
            word = int(q.weight[o, i * bits // 32])
            assert values[o, i] == word >> (i * bits % 32) & (2**bits - 1)
            group = o, i // group_size
            scale, offset = float(q.scales[group]), float(q.offsets[group])
            exact = scale * float(values[o, i]) + offset
            assert w[o, i] == pytest.approx(exact, rel=1e-6, abs=1e-6 * abs(offset))


@pytest.mark.parametrize(("bits", "group_size"), KINDS)
def test_number_of_bytes(bits: int, group_size: int) -> None:
    q = quantized(5, 3 * group_size, bits, group_size)
    assert q.nbytes == 5 * 3 * group_size * bits // 8 + 5 * 3 * 8


def test_rows_of_a_matrix() -> None:
    q = quantized(7, 64, 4, 32)
    np.testing.assert_array_equal(dequantize(q[2:5]), dequantize(q)[2:5])
    assert q[2:5].shape == (3, 64)


@pytest.mark.parametrize(("bits", "group_size"), KINDS)
def test_rows_are_independent(bits: int, group_size: int) -> None:
    w = np.random.default_rng(1).normal(size=(2500, 384)).astype(np.float32)  # four blocks
    q = quantize(w, bits, group_size)
    back = dequantize(q)
    for row in (0, 681, 682, 683, 2499):
        single = quantize(w[row : row + 1], bits, group_size)
        for part in ("weight", "scales", "offsets"):
            np.testing.assert_array_equal(getattr(q, part)[row], getattr(single, part)[0])
        np.testing.assert_array_equal(back[row], dequantize(single)[0])


WORDS = np.zeros((3, 8), np.uint32)
PARTS = np.zeros((3, 1), np.float32)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (
            (WORDS.astype(np.int32), PARTS, PARTS),
            "the quantized values are int32 [3, 8]",
        ),
        ((WORDS[0], PARTS, PARTS), "values are uint32 [8], expected a matrix of uint32"),
        ((WORDS, PARTS[:2], PARTS), "the scales are float32 [2, 1], expected float32 [3, 1]"),
        ((WORDS, PARTS, PARTS[:, :0]), "the offsets are float32 [3, 0], expected float32"),
        ((WORDS, PARTS.astype(np.int8), PARTS), "the scales are int8 [3, 1], expected float32"),
        ((WORDS[:, :6], PARTS, PARTS), "48 inputs do not divide into groups of 64"),
    ],
)
def test_parts_that_do_not_fit_each_other(parts: Any, expected: str) -> None:
    assert QuantizedTensor(WORDS, PARTS, PARTS, 64, 4).shape == (3, 64)
    with raises_error(WeightsError, expected):
        QuantizedTensor(*parts, 64, 4)


# Accuracy


@st.composite
def matrices(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """Draw a matrix of any range, even of equal numbers, with bits and a group size."""
    bits, group_size = draw(st.sampled_from(KINDS))
    shape = draw(st.integers(1, 3)), group_size * draw(st.integers(1, 2))
    largest = 10.0 ** draw(st.integers(-9, 9))
    elements = st.floats(-largest, largest) | st.sampled_from([0.0, largest, -largest])
    return draw(arrays(np.float64, shape, elements=elements)).astype(np.float32), bits, group_size


@settings(max_examples=40, deadline=None)
@given(matrices())
def test_the_error_is_half_a_step_at_most(given: tuple[np.ndarray, int, int]) -> None:
    """The error is half a step within the range of the quantized values, at most one beyond."""
    w, bits, group_size = given
    q = quantize(w, bits, group_size)
    scales, offsets = (np.repeat(x.astype(float), group_size, 1) for x in (q.scales, q.offsets))
    ends = np.stack([offsets, offsets + scales * (2**bits - 1)])
    reached = np.clip(w.astype(float), ends.min(0), ends.max(0))
    step = np.abs(scales)
    rounding = 2**-22 * np.abs(w).reshape(len(w), -1, group_size).max(-1).repeat(group_size, 1)
    assert (np.abs(reached - dequantize(q)) <= 0.5 * step + rounding).all()
    assert (np.abs(reached - w) <= step + rounding).all()


@settings(max_examples=40, deadline=None)
@given(matrices())
def test_the_far_end_and_zero_are_exact(given: tuple[np.ndarray, int, int]) -> None:
    w, bits, group_size = given
    w[:, 1] = 0
    back = dequantize(quantize(w, bits, group_size))
    for old, new in zip(w.reshape(-1, group_size), back.reshape(-1, group_size), strict=True):
        far = np.abs(old).max()
        if far >= 1e-7:  # below, the step is MLX's minimum
            assert far in np.abs(new[np.abs(old) == far])
        np.testing.assert_allclose(new[old == 0], 0, atol=2**-21 * far)


@settings(max_examples=40, deadline=None)
@given(matrices())
def test_values_are_those_of_the_definition(given: tuple[np.ndarray, int, int]) -> None:
    w, bits, group_size = given
    q = quantize(w, bits, group_size)
    scales, offsets = (np.repeat(x, group_size, 1) for x in (q.scales, q.offsets))
    expected = np.clip(np.rint((w - offsets) / scales), 0, 2**bits - 1)
    np.testing.assert_array_equal(unpack(q), expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_float_type_and_layout(dtype: Any) -> None:
    w = np.random.default_rng(2).normal(size=(64, 33)).astype(dtype)
    one, other = quantize(w.T, 4, 32), quantize(np.ascontiguousarray(w.T).astype(np.float32), 4, 32)
    for part in ("weight", "scales", "offsets"):
        np.testing.assert_array_equal(getattr(one, part), getattr(other, part))


@pytest.mark.parametrize(("bits", "group_size"), KINDS)
@pytest.mark.parametrize(
    "kind", ["normal", "positive", "negative", "zero", "constant", "tiny", "large"]
)
def test_numbers_equal_those_of_mlx(kind: str, bits: int, group_size: int) -> None:
    """Numbers are equal, except for few quantized values on a device with other rounding."""
    mx = pytest.importorskip("mlx.core")
    w = np.random.default_rng(3).normal(size=(33, 3 * group_size))
    w = {
        "normal": w,
        "positive": 3 + np.abs(w),
        "negative": -3 - np.abs(w),
        "zero": 0 * w,
        "constant": 0 * w + 0.7,
        "tiny": w * 1e-7,
        "large": w * 1e25,
    }[kind].astype(np.float32)
    q = quantize(w, bits, group_size)
    parts = mx.quantize(mx.array(w), group_size=group_size, bits=bits)
    theirs = QuantizedTensor(*map(np.array, parts), group_size, bits)
    np.testing.assert_allclose(q.scales, theirs.scales, rtol=1e-6)
    np.testing.assert_array_equal(q.offsets, theirs.offsets)
    off = np.abs(unpack(q).astype(int) - unpack(theirs))
    assert off.max() <= 1
    assert off.mean() < 1e-3
    floats = np.array(mx.dequantize(*parts, group_size=group_size, bits=bits))
    np.testing.assert_allclose(dequantize(theirs), floats, rtol=1e-6, atol=1e-6 * np.abs(w).max())


# Errors


@pytest.mark.parametrize(
    ("n_in", "group_size", "expected"),
    [
        (192, 128, "group_size is 128, but the head has 192 inputs: give 32 or 64"),
        (1600, 128, "but the head has 1600 inputs: give 32 or 64"),
        (96, 64, "but the head has 96 inputs: give 32"),
        (80, 32, "but the head has 80 inputs: expected a multiple of 32"),
        (128, 48, "group_size is 48, expected 32, 64 or 128"),
    ],
)
def test_inputs_that_do_not_divide(n_in: int, group_size: int, expected: str) -> None:
    with raises_error(ParameterError, expected):
        quantize(np.zeros((2, n_in)), 4, group_size, name="the head")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2e30, -1e300])
@pytest.mark.parametrize("at", [(0, 0), (2, 63), (1, 32)])
def test_weights_that_are_not_finite(value: float, at: tuple[int, int]) -> None:
    w = np.zeros((3, 64))
    w[at] = value
    with raises_error(WeightsError, "the head holds a NaN, an infinity or a number beyond 1e30"):
        quantize(w, 8, 32, name="the head")
