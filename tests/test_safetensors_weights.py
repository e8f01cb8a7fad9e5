"""gptx.safetensors_weights: the tensors of a model in its files, and errors of invalid files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptx.errors import DataError, StorageError, WeightsError
from gptx.random_weights import random_weights
from gptx.safetensors_file import read_safetensors, widen_bfloat16
from gptx.safetensors_weights import open_weights
from gptx.stored_weights import is_linear_weight
from tests.support.files.safetensors_bytes import MICRO, weights_path
from tests.support.random_models import CASES, to_bfloat16, write_model

# Types, with and without a copy


def test_float32_is_mapped_and_not_copied(tmp_path: Path) -> None:
    expected = random_weights(MICRO)
    found = open_weights([weights_path(tmp_path)], MICRO).map()
    assert list(found) == list(expected)
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])
        assert isinstance(array, np.ndarray)
        assert array.dtype == np.float32
        assert not array.flags.owndata
        assert not array.flags.writeable


def test_float16_stays_float16(tmp_path: Path) -> None:
    expected = random_weights(MICRO)
    for name, array in open_weights([weights_path(tmp_path, dtype="float16")], MICRO).map().items():
        assert isinstance(array, np.ndarray)
        assert array.dtype == np.float16
        np.testing.assert_array_equal(array, expected[name].astype(np.float16))
        assert not array.flags.owndata


def test_bfloat16(tmp_path: Path) -> None:
    found = open_weights([weights_path(tmp_path, dtype="bfloat16")], MICRO).map()
    for name, expected in random_weights(MICRO).items():
        array = found[name]
        assert isinstance(array, np.ndarray)
        assert not array.flags.owndata
        wide = widen_bfloat16(array)
        np.testing.assert_array_equal(to_bfloat16(wide), to_bfloat16(expected))
        np.testing.assert_allclose(wide, expected, rtol=2**-8)


def test_a_tensor_is_mapped_or_read(tmp_path: Path) -> None:
    for name, tensor in open_weights([weights_path(tmp_path)], MICRO).tensors.items():
        assert tensor.shape == MICRO.tensor_shapes()[name]
        mapped, copied = tensor.map(), tensor.read()
        assert isinstance(mapped, np.ndarray)
        assert isinstance(copied, np.ndarray)
        np.testing.assert_array_equal(mapped, copied)
        assert not mapped.flags.writeable
        assert copied.flags.writeable


# Names


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_prefix_and_shards(tmp_path: Path, prefix: str, shards: int) -> None:
    config = CASES["untied"]
    expected = random_weights(config)
    write_model(tmp_path, config, expected, prefix=prefix, shards=shards)
    paths = sorted(tmp_path.glob("*.safetensors"))
    assert len(paths) == shards
    found = open_weights(paths, config).map()
    assert set(found) == set(expected)
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("prefix", ["", "model.", "module.model.transformer."])
@pytest.mark.parametrize("out_in", [False, True])
def test_the_shapes_tell_the_layout(tmp_path: Path, prefix: str, out_in: bool) -> None:
    """The prefix `model.` is mlx-lm's, with [out, in], and Lightning's, with either layout."""
    config = CASES["355M"]
    expected = random_weights(config)
    stored = {
        prefix + name: np.ascontiguousarray(array.T if out_in and is_linear_weight(name) else array)
        for name, array in expected.items()
    }
    found = open_weights([weights_path(tmp_path, stored, config)], config)
    assert found.notes == ()
    for name, array in found.map().items():
        np.testing.assert_array_equal(array, expected[name])
        np.testing.assert_array_equal(found.tensors[name].read(), expected[name])


def test_unknown_tensors_of_a_file(tmp_path: Path) -> None:
    """Names of no GPT-2, and of a layer that the config does not have."""
    extra = {"clip.weight": np.ones(2, np.float32), "h.1.ln_1.bias": np.ones(2, np.float32)}
    path = weights_path(tmp_path, random_weights(MICRO) | extra)
    with pytest.raises(WeightsError, match=r"clip\.weight is unknown: .*ignore_unknown=True"):
        open_weights([path], MICRO)
    found = open_weights([path], MICRO, ignore_unknown=True)
    assert set(found.tensors) == set(MICRO.tensor_shapes())
    assert found.notes == (
        "tensor clip.weight is unknown: left out",
        "tensor h.1.ln_1.bias is unknown: left out",
    )


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_mask_buffers_are_dropped(tmp_path: Path, prefix: str) -> None:
    masks = {
        "h.0.attn.bias": np.tril(np.ones((1, 1, 2, 2), np.float32)),
        "h.0.attn.masked_bias": np.array(-1e4, np.float32),
    }
    path = weights_path(tmp_path, random_weights(MICRO) | masks, prefix=prefix)
    assert set(read_safetensors(path)[0]) > {prefix + name for name in masks}
    assert set(open_weights([path], MICRO).map()) == set(MICRO.tensor_shapes())
    assert set(open_weights([path], None).tensors) == set(MICRO.tensor_shapes())


# The head


def with_head(head: np.ndarray) -> dict[str, np.ndarray]:
    return random_weights(MICRO) | {"lm_head.weight": head}


def test_the_duplicate_of_a_tied_head_is_dropped(tmp_path: Path) -> None:
    path = weights_path(tmp_path, with_head(random_weights(MICRO)["wte.weight"]))
    assert "lm_head.weight" in read_safetensors(path)[0]
    for config in (MICRO, None):
        found = open_weights([path], config)
        assert set(found.tensors) == set(MICRO.tensor_shapes())
        assert (found.config, found.notes) == (config, ())


@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize("shards", [1, 4])
def test_a_head_that_differs_from_the_table_is_used(tmp_path: Path, row: int, shards: int) -> None:
    """Issue 15, 1: the config is wrong about it, and transformers 5 uses the head too."""
    head = random_weights(MICRO)["wte.weight"].copy()
    head[row, 1] += 1
    write_model(tmp_path, MICRO, with_head(head), prefix="transformer.", shards=shards)
    found = open_weights(sorted(tmp_path.glob("*.safetensors")), MICRO)
    assert found.config == replace(MICRO, tie_word_embeddings=False)
    np.testing.assert_array_equal(found.map()["lm_head.weight"], head)
    assert found.notes == (
        "the config has tie_word_embeddings: true, but lm_head.weight differs from wte.weight: "
        "the model's own head is used",
    )
    without_config = open_weights(sorted(tmp_path.glob("*.safetensors")), None)
    assert "lm_head.weight" in without_config.tensors
    assert (without_config.config, without_config.notes) == (None, ())


def test_an_untied_config_keeps_an_equal_head(tmp_path: Path) -> None:
    config = replace(MICRO, tie_word_embeddings=False)
    path = weights_path(tmp_path, with_head(random_weights(MICRO)["wte.weight"]), config)
    found = open_weights([path], config)
    assert (found.config, found.notes) == (config, ())
    assert "lm_head.weight" in found.tensors


def test_a_head_without_a_table_is_the_table(tmp_path: Path) -> None:
    weights = random_weights(MICRO)
    head = weights.pop("wte.weight")
    path = weights_path(tmp_path, weights | {"lm_head.weight": head})
    for config in (MICRO, None):
        found = open_weights([path], config)
        assert set(found.tensors) == set(MICRO.tensor_shapes())
        np.testing.assert_array_equal(found.map()["wte.weight"], head)
        assert (found.config, found.notes) == (config, ())
    with pytest.raises(WeightsError, match=r"wte\.weight is missing"):
        open_weights([path], replace(MICRO, tie_word_embeddings=False))


def test_a_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = weights_path(tmp_path, with_head(np.zeros((4, 2), np.float32)))
    expected = r"lm_head\.weight has shape \[4, 2\], expected \[3, 2\]"
    with pytest.raises(WeightsError, match=expected):
        open_weights([path], MICRO)


def test_a_bias_of_the_head_is_unknown(tmp_path: Path) -> None:
    path = weights_path(tmp_path, random_weights(MICRO) | {"lm_head.bias": np.ones(3, np.float32)})
    with pytest.raises(WeightsError, match=r"tensor lm_head\.bias is unknown"):
        open_weights([path], MICRO)


def test_an_untied_head_is_required(tmp_path: Path) -> None:
    config = CASES["untied"]
    weights = random_weights(config)
    path = weights_path(tmp_path, weights, config)
    assert "lm_head.weight" in open_weights([path], config).map()
    del weights["lm_head.weight"]
    path = weights_path(tmp_path, weights, config)
    expected = r": tensor lm_head\.weight is missing, but the config has tie_word_embeddings: false"
    with pytest.raises(WeightsError, match=expected) as caught:
        open_weights([path], config)
    assert str(caught.value).startswith(f"{path}: ")


# Tensors that do not fit the config


def test_integers_in_a_file(tmp_path: Path) -> None:
    path = weights_path(tmp_path)
    data = path.read_bytes()
    assert data.count(b'"dtype": "F32"') == 16
    path.write_bytes(data.replace(b'"dtype": "F32"', b'"dtype": "I32"', 1))
    with pytest.raises(WeightsError, match=r"wte\.weight is of type int32, expected a float"):
        open_weights([path], MICRO).map()


def test_a_duplicate_tensor_in_two_shards(tmp_path: Path) -> None:
    one = weights_path(tmp_path / "one")
    two = weights_path(tmp_path / "two", {"ln_f.bias": np.zeros(2, np.float32)})
    with pytest.raises(WeightsError) as caught:
        open_weights([one, two], MICRO).map()
    assert str(caught.value) == f"{two}: duplicate tensor ln_f.bias"


def test_a_tensor_with_and_without_the_prefix(tmp_path: Path) -> None:
    weights = random_weights(MICRO)
    both = weights | {"transformer.ln_f.bias": weights["ln_f.bias"]}
    with pytest.raises(WeightsError, match=r"duplicate tensor ln_f\.bias"):
        open_weights([weights_path(tmp_path, both)], MICRO).map()


def test_shards_of_many_tensors_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, MICRO, random_weights(MICRO), shards=3)
    paths = sorted(tmp_path.glob("*.safetensors"))
    monkeypatch.setattr("gptx.safetensors_weights.MAX_TENSORS", 16)
    assert len(open_weights(paths, MICRO).tensors) == 16
    monkeypatch.setattr("gptx.safetensors_weights.MAX_TENSORS", 15)
    with pytest.raises(WeightsError, match=f"{tmp_path} has over 15 tensors"):
        open_weights(paths, MICRO)


def test_the_tensors_of_a_missing_shard(tmp_path: Path) -> None:
    write_model(tmp_path, MICRO, random_weights(MICRO), shards=3)
    paths = sorted(tmp_path.glob("*.safetensors"))[:2]
    with pytest.raises(WeightsError, match=r"and \d+ more are missing") as caught:
        open_weights(paths, MICRO).map()
    assert str(caught.value).startswith(f"{tmp_path}: ")


# Damaged files

# Position, from 0 to 1 of the file; new bytes; number of bytes removed, None for as many.
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
Edits = list[tuple[float, bytes, int | None]]


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A path for damaged files, and the bytes of a valid file."""
    path = weights_path(tmp_path_factory.mktemp("damaged"))
    return path, path.read_bytes()


def read_or_refuse(path: Path, data: bytes, edits: Edits) -> None:
    """Damage a file; expect an error of gptx or a complete model."""
    for where, new, removed in edits:
        at = int(where * len(data))
        data = data[:at] + new + data[at + (len(new) if removed is None else removed) :]
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    try:
        found = open_weights([path], MICRO).map()
    except (DataError, StorageError):
        return
    assert {name: array.shape for name, array in found.items()} == MICRO.tensor_shapes()
    assert sum(len(np.asarray(array).tobytes()) for array in found.values())  # touch every byte


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(edits=EDITS)
def test_a_damaged_file_is_read_or_refused(micro: tuple[Path, bytes], edits: Edits) -> None:
    read_or_refuse(*micro, edits)


@pytest.mark.fuzz
@settings(max_examples=2000, deadline=None, database=None)
@given(edits=EDITS)
def test_many_damaged_files(micro: tuple[Path, bytes], edits: Edits) -> None:
    read_or_refuse(*micro, edits)
