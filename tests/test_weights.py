"""gptx.weights: the tensors of a model, read from its files and put into its tree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptx.backends import Backend
from gptx.config import GPT2Config
from gptx.errors import DataError, StorageError, WeightsError
from gptx.random_weights import random_weights
from gptx.safetensors_file import read_safetensors, widen_bfloat16
from gptx.stored_weights import check_weights, read_weights
from gptx.weights import to_backend
from tests.support.backends import make_backend
from tests.support.random_models import CASES, to_bfloat16, write_model
from tests.support.safetensors_bytes import MICRO, weights_path

# Types, with and without a copy


def test_float32_is_mapped_and_not_copied(tmp_path: Path) -> None:
    expected = random_weights(MICRO)
    found = read_weights([weights_path(tmp_path)], MICRO)
    assert list(found) == list(expected)
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])
        assert array.dtype == np.float32
        assert not array.flags.owndata
        assert not array.flags.writeable


def test_float32_reaches_numpy_without_a_copy(tmp_path: Path) -> None:
    found = read_weights([weights_path(tmp_path)], MICRO)
    tree = to_backend(found, make_backend("numpy"))
    assert np.shares_memory(tree.wte.weight, found["wte.weight"])


def test_float16_is_kept(tmp_path: Path) -> None:
    expected = random_weights(MICRO)
    for name, array in read_weights([weights_path(tmp_path, dtype="float16")], MICRO).items():
        assert array.dtype == np.float16
        np.testing.assert_array_equal(array, expected[name].astype(np.float16))
        assert not array.flags.owndata


def test_bfloat16_model(tmp_path: Path) -> None:
    found = read_weights([weights_path(tmp_path, dtype="bfloat16")], MICRO)
    for name, array in random_weights(MICRO).items():
        wide = widen_bfloat16(found[name])
        np.testing.assert_array_equal(to_bfloat16(wide), to_bfloat16(array))
        np.testing.assert_allclose(wide, array, rtol=2**-8)
        assert not found[name].flags.owndata


# The tensors of a model


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_prefix_and_shards(tmp_path: Path, prefix: str, shards: int) -> None:
    config = CASES["untied"]
    expected = random_weights(config)
    write_model(tmp_path, config, expected, prefix=prefix, shards=shards)
    paths = sorted(tmp_path.glob("*.safetensors"))
    assert len(paths) == shards
    found = read_weights(paths, config)
    assert set(found) == set(expected)
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_mask_buffers_are_dropped(tmp_path: Path, prefix: str) -> None:
    masks = {
        "h.0.attn.bias": np.tril(np.ones((1, 1, 2, 2), np.float32)),
        "h.0.attn.masked_bias": np.array(-1e4, np.float32),
    }
    path = weights_path(tmp_path, random_weights(MICRO) | masks, prefix=prefix)
    assert set(read_safetensors(path)[0]) > {prefix + name for name in masks}
    assert set(read_weights([path], MICRO)) == set(MICRO.tensor_shapes())


def test_a_tied_head_that_is_stored_all_the_same_is_dropped(tmp_path: Path) -> None:
    weights = random_weights(MICRO)
    path = weights_path(tmp_path, weights | {"lm_head.weight": weights["wte.weight"]})
    assert "lm_head.weight" in read_safetensors(path)[0]
    assert "lm_head.weight" not in read_weights([path], MICRO)


def test_an_untied_head_is_required(tmp_path: Path) -> None:
    config = CASES["untied"]
    weights = random_weights(config)
    assert "lm_head.weight" in read_weights([weights_path(tmp_path, weights, config)], config)
    del weights["lm_head.weight"]
    path = weights_path(tmp_path, weights, config)
    with pytest.raises(WeightsError, match=r"^tensor lm_head\.weight is missing"):
        read_weights([path], config)


def test_missing_tensors_are_named() -> None:
    weights = random_weights(MICRO)
    del weights["h.0.mlp.c_fc.bias"]
    with pytest.raises(WeightsError, match=r"^tensor h\.0\.mlp\.c_fc\.bias is missing"):
        check_weights(weights, MICRO)
    del weights["ln_f.weight"]
    with pytest.raises(WeightsError, match=r"h\.0\.mlp\.c_fc\.bias, ln_f\.weight are missing"):
        check_weights(weights, MICRO)
    with pytest.raises(WeightsError, match=r"^tensors .*wte.* and 13 more are missing"):
        check_weights({}, MICRO)


def test_unknown_tensors_are_named() -> None:
    weights = random_weights(MICRO)
    extra = np.zeros(2, np.float32)
    with pytest.raises(WeightsError, match=r"^tensor h\.1\.ln_1\.bias is unknown"):
        check_weights(weights | {"h.1.ln_1.bias": extra}, MICRO)
    with pytest.raises(WeightsError, match=r"^tensors x, y are unknown"):
        check_weights(weights | {"x": extra, "y": extra}, MICRO)


@pytest.mark.parametrize("shape", [(2, 6, 1), (6, 2), (12,), (2, 5), ()])
def test_misshapen_tensors_are_named(shape: tuple[int, ...]) -> None:
    """(6, 2) is the layout of torch.nn.Linear, where the Hub has Conv1D."""
    weights = random_weights(MICRO) | {"h.0.attn.c_attn.weight": np.zeros(shape, np.float32)}
    with pytest.raises(WeightsError) as caught:
        check_weights(weights, MICRO)
    expected = f"h.0.attn.c_attn.weight has shape {list(shape)}, the config asks for [2, 6]"
    assert expected in str(caught.value)


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint8, np.bool_])
def test_weights_are_floats(dtype: Any) -> None:
    weights: Any = random_weights(MICRO) | {"ln_f.bias": np.zeros(2, dtype)}
    with pytest.raises(WeightsError, match=r"tensor ln_f\.bias is of type \w+, expected a float"):
        check_weights(weights, MICRO)


def test_integers_in_a_file(tmp_path: Path) -> None:
    path = weights_path(tmp_path)
    data = path.read_bytes()
    assert data.count(b'"dtype": "F32"') == 16
    path.write_bytes(data.replace(b'"dtype": "F32"', b'"dtype": "I32"', 1))
    with pytest.raises(WeightsError, match=r"wte\.weight is of type int32, expected a float"):
        read_weights([path], MICRO)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    one = weights_path(tmp_path / "one")
    two = weights_path(tmp_path / "two", {"ln_f.bias": np.zeros(2, np.float32)})
    with pytest.raises(WeightsError) as caught:
        read_weights([one, two], MICRO)
    assert "tensor ln_f.bias is there twice" in str(caught.value)
    assert str(two) in str(caught.value)


def test_a_tensor_with_and_without_the_prefix(tmp_path: Path) -> None:
    weights = random_weights(MICRO)
    both = weights | {"transformer.ln_f.bias": weights["ln_f.bias"]}
    with pytest.raises(WeightsError, match=r"tensor ln_f\.bias is there twice"):
        read_weights([weights_path(tmp_path, both)], MICRO)


def test_a_missing_shard_is_missing_tensors(tmp_path: Path) -> None:
    write_model(tmp_path, MICRO, random_weights(MICRO), shards=2)
    first, _ = sorted(tmp_path.glob("*.safetensors"))
    with pytest.raises(WeightsError, match=r"ln_f\.bias|and \d+ more are missing"):
        read_weights([first], MICRO)


def test_the_tree_has_the_names_as_attributes(backend: Backend) -> None:
    weights = random_weights(CASES["untied"])
    with backend.scope():
        tree = to_backend(weights, backend)
        assert len(tree.h) == 3
        for name, expected in weights.items():
            node: Any = tree
            for part in name.split("."):
                node = node[int(part)] if part.isdigit() else getattr(node, part)
            np.testing.assert_array_equal(backend.to_numpy(node), expected)


def test_layers_are_in_order_beyond_nine() -> None:
    config = GPT2Config(vocab_size=3, n_positions=2, n_embd=2, n_layer=12, n_head=1)
    weights = random_weights(config)
    backwards = dict(reversed(weights.items()))
    tree = to_backend(backwards, make_backend("numpy"))
    for layer in range(12):
        assert np.shares_memory(tree.h[layer].ln_1.bias, weights[f"h.{layer}.ln_1.bias"])


# Damaged files


WHOLE: list[bytes] = []


@pytest.fixture(scope="module")
def mutant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("mutants")
    WHOLE.append(weights_path(folder).read_bytes())
    yield folder / "mutant.safetensors"
    WHOLE.clear()


# Where, from 0 to 1 of the file; what comes in; how many bytes go, or None for as many.
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.one_of(
            st.sampled_from([b"0", b"1", b"2", b"3", b"12", b"6", b"I", b"B", b"a", b".", b" "]),
            st.sampled_from([b"9" * 20, b"-", b"[", b"]", b"null", b'"', b",", b"16", b"64"]),
            st.binary(max_size=4),
        ),
        st.one_of(st.none(), st.integers(0, 8)),
    ),
    min_size=1,
    max_size=2,
)


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(edits=EDITS)
def test_a_mutant_is_read_or_refused(
    mutant: Path, edits: list[tuple[float, bytes, int | None]]
) -> None:
    data = WHOLE[0]
    for where, new, gone in edits:
        at = int(where * len(data))
        data = data[:at] + new + data[at + (len(new) if gone is None else gone) :]
    mutant.unlink(missing_ok=True)
    mutant.write_bytes(data)
    try:
        found = read_weights([mutant], MICRO)
    except (DataError, StorageError):
        return
    assert {name: array.shape for name, array in found.items()} == MICRO.tensor_shapes()
    assert sum(len(array.tobytes()) for array in found.values())  # each byte can be touched
