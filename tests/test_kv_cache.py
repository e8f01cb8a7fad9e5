"""The KV cache: positions, growth, rows, and files that any backend reads."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from gptx.backends import get_backend
from gptx.errors import DataError, GptxError, NotFoundError, ParameterError, StorageError
from gptx.generation.text_model import Model
from gptx.kv_cache import KVCache
from gptx.logits import next_token_logits, pad
from gptx.random_weights import random_weights
from tests.support.backends import BACKENDS, make_backend
from tests.support.models import make_model
from tests.support.random_models import CASES, random_ids

CONFIG = CASES["tiny"]


def filled(model: Model, prompts: list[list[int]], capacity: int) -> KVCache:
    cache = KVCache(model.config, model.backend, len(prompts), capacity)
    with model.backend.scope():
        next_token_logits(model.gpt2, prompts, cache)
    return cache


def next_logits(model: Model, cache: KVCache, ids: list[list[int]]) -> np.ndarray:
    with model.backend.scope():
        return model.backend.to_numpy(next_token_logits(model.gpt2, ids, cache))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=3), min_size=1, max_size=4))
def test_positions_continue_at_the_lengths(steps: list[list[int]]) -> None:
    cache = KVCache(CONFIG, get_backend("numpy"), 3, 40)
    lengths = [0, 0, 0]
    for counts in steps:
        positions = cache.extend(counts)
        T = max(counts)
        assert positions.index.shape == (3, T)
        for b, n in enumerate(counts):
            expected = [lengths[b] + min(t, n - 1) for t in range(T)]
            assert positions.index[b].tolist() == expected
            lengths[b] += n
        assert cache.lengths.tolist() == lengths
        assert positions.stop == max(lengths)
        assert positions.aligned == (len(set(lengths)) == 1 and len(set(counts)) == 1)


def test_a_full_cache_is_an_error() -> None:
    cache = KVCache(CONFIG, get_backend("numpy"), 1, 5)
    cache.extend([5])
    with pytest.raises(ParameterError, match=r"6 tokens exceed the cache's capacity of 5"):
        cache.extend([1])


@pytest.mark.parametrize("capacity", [0, -1, 65])
def test_capacity_is_checked(capacity: int) -> None:
    with pytest.raises(ParameterError, match=r"capacity is .*1 to 64"):
        KVCache(CONFIG, get_backend("numpy"), 1, capacity)


def test_a_cache_without_sequences_is_an_error() -> None:
    with pytest.raises(ParameterError, match="the cache has 0 sequences"):
        KVCache(CONFIG, get_backend("numpy"), 0, 4)


def test_the_buffers_of_all_layers_are_one_array(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, shapes = get_backend("numpy"), []
    real = backend.zeros

    def zeros(shape: tuple[int, ...], dtype: str) -> Any:
        shapes.append(shape)
        return real(shape, dtype)

    monkeypatch.setattr(backend, "zeros", zeros)
    KVCache(CASES["124M"], backend, 2, 5)
    assert shapes == [(2 * 4, 2, 12, 5, 8)]


def test_padding_repeats_the_last_token() -> None:
    assert pad([[1, 2, 3], [7], [4, 5]]).tolist() == [[1, 2, 3], [7, 7, 7], [4, 5, 5]]


def test_a_pass_takes_some_slots_in_any_order(small: Model) -> None:
    prompts = [random_ids(small.config, 1, n, n)[0].tolist() for n in (4, 9, 6)]
    cache = filled(small, prompts, 20)
    ids = small.backend.asarray(np.array([[3], [5]]))
    with small.backend.scope():
        logits = small.gpt2.forward(ids, cache.extend([1, 1], [2, 0]), cache)
        got = small.backend.to_numpy(logits[:, -1, :])
    assert cache.lengths.tolist() == [5, 9, 7]
    for row, (prompt, new) in enumerate(((prompts[2], 3), (prompts[0], 5))):
        single = next_logits(small, filled(small, [prompt], 20), [[new]])
        np.testing.assert_allclose(got[row], single[0], rtol=0, atol=5e-5)


def test_prefix_is_a_copy(small: Model) -> None:
    ids = random_ids(small.config, 1, 9, 0)[0].tolist()
    cache = filled(small, [ids], 9)
    with small.backend.scope():
        part = cache.prefix(6, 30)
    got = next_logits(small, part, [[1, 2]])
    expected = next_logits(small, filled(small, [ids[:6]], 30), [[1, 2]])
    np.testing.assert_allclose(got, expected, rtol=0, atol=5e-5)
    with small.backend.scope():
        again = cache.prefix(9, 10)
    expected = next_logits(small, filled(small, [ids], 30), [[3]])
    np.testing.assert_allclose(next_logits(small, again, [[3]]), expected, rtol=0, atol=5e-5)


# Each backend writes a file once and reads a file of another one; NumPy does so with each.
NAMES = [name for name in BACKENDS if "generic" not in name]
PAIRS = [("numpy", name) for name in NAMES[1:]] + [(name, "numpy") for name in NAMES[1:]]
PAIRS += [("mlx", "strict"), ("strict", "mlx"), ("mlx", "cupy"), ("cupy", "mlx")]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_cache_saved_on_one_backend_continues_on_another(
    source: str, target: str, tmp_path: Path
) -> None:
    config = replace(CASES["124M"], n_layer=2, n_head=3)
    one, other = (make_model(config, make_backend(name)) for name in (source, target))
    prompt = random_ids(config, 1, 12, 4)[0].tolist()
    one.prefill(prompt).save(tmp_path / "cache")
    cache = other.load_cache(tmp_path / "cache")
    assert cache.tokens == [prompt]
    options: Any = {"max_tokens": 5, "ignore_eos": True}
    continued = other.generate([*prompt, 1, 2, 3], cache=cache, **options)
    assert continued.tokens == one.generate([*prompt, 1, 2, 3], **options).tokens


def test_shared_tokens_are_not_computed_again() -> None:
    model = make_model(CASES["124M"], get_backend("numpy"))
    computed = []
    real = model.gpt2.forward

    def forward(ids: Any, *args: Any, **options: Any) -> Any:
        computed.append(ids.shape[1])
        return real(ids, *args, **options)

    cache = model.prefill([5, 6, 7, 8])
    vars(model.gpt2)["forward"] = forward
    for prompt, new in ([5, 6, 7, 8, 9, 10], 2), ([5, 6, 7, 8], 1), ([5, 6, 1], 1), ([4], 1):
        computed.clear()
        result = model.generate(prompt, cache=cache, max_tokens=3, ignore_eos=True)
        assert computed == [new, 1, 1]
        assert result.tokens == model.generate(prompt, max_tokens=3, ignore_eos=True).tokens


def test_a_saved_ragged_cache(small: Model, tmp_path: Path) -> None:
    prompts = [random_ids(small.config, 1, n, n)[0].tolist() for n in (4, 9, 1)]
    cache = filled(small, prompts, 12)
    cache.save(tmp_path / "cache")
    with small.backend.scope():
        loaded = KVCache.load(tmp_path / "cache", small.config, small.backend)
    assert loaded.lengths.tolist() == [4, 9, 1]
    more = [[3], [5, 6], [7]]
    expected = next_logits(small, cache, more)
    np.testing.assert_allclose(next_logits(small, loaded, more), expected, rtol=0, atol=2e-5)


def test_a_16_bit_cache_loads_as_float32(tmp_path: Path) -> None:
    half = make_model(CASES["124M"], make_backend("mlx", dtype="bfloat16"))
    half.prefill([1, 2, 3]).save(tmp_path / "cache")
    full = make_model(CASES["124M"], get_backend("numpy"))
    k = full.load_cache(tmp_path / "cache").keys[0]
    np.testing.assert_allclose(k, full.prefill([1, 2, 3]).prefix(3, 64).keys[0], atol=0.1)


def test_a_cache_of_another_model_is_an_error(tmp_path: Path) -> None:
    models = [make_model(CASES[name], get_backend("numpy")) for name in ("124M", "tiny")]
    models[0].prefill([1, 2]).save(tmp_path / "cache")
    with pytest.raises(DataError, match=r"another model: expected 1 layers"):
        models[1].load_cache(tmp_path / "cache")
    with pytest.raises(ParameterError, match="another model"):
        models[1].generate([1, 2], cache=models[0].prefill([1, 2]))


@pytest.mark.parametrize("path", [5, None, b"cache"])
def test_a_path_of_another_type_is_an_error(path: Any) -> None:
    model = make_model(CONFIG, get_backend("numpy"))
    for call in (model.prefill([1]).save, model.load_cache):
        with pytest.raises(ParameterError, match=f"cache is {path!r}, expected a string or a Path"):
            call(path)


def test_a_cache_of_another_backend_is_an_error() -> None:
    one, other = (make_model(CONFIG, get_backend("numpy", generic=g)) for g in (False, True))
    with pytest.raises(ParameterError, match="another model or backend: save it"):
        other.generate([1, 2], cache=one.prefill([1, 2]), max_tokens=1)


def test_a_cache_of_other_weights_is_an_error(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    backend = get_backend("numpy")
    one = make_model(CONFIG, backend, weights)
    name = "h.0.attn.c_attn.weight"  # a LoRA changes matrices only
    other = make_model(CONFIG, backend, {**weights, name: weights[name] * 1.5})
    cache = one.prefill([1, 2, 3])
    with pytest.raises(ParameterError, match="another model"):
        other.generate([1, 2, 3], cache=cache, max_tokens=1)
    cache.save(tmp_path / "cache")
    with pytest.raises(DataError, match="other weights"):
        other.load_cache(tmp_path / "cache")
    assert one.load_cache(tmp_path / "cache").tokens == [[1, 2, 3]]


def test_a_cache_with_several_prompts_is_an_error() -> None:
    model = make_model(CONFIG, get_backend("numpy"))
    cache = model.prefill([1, 2, 3])
    with pytest.raises(ParameterError, match="one prompt"):
        model.generate([[1, 2], [1, 2, 3]], cache=cache, max_tokens=1)


def test_capacity_of_a_loaded_cache(tmp_path: Path) -> None:
    model = make_model(CONFIG, get_backend("numpy"))
    model.prefill([1, 2, 3]).save(tmp_path / "cache")
    load = partial(KVCache.load, tmp_path / "cache", CONFIG, model.backend)
    assert (load().capacity, load(capacity=3).capacity) == (64, 3)
    for capacity in (2, 0, 65):
        with pytest.raises(ParameterError, match=f"capacity is {capacity}"):
            load(capacity=capacity)


def test_damaged_and_missing_caches(tmp_path: Path) -> None:
    model = make_model(CONFIG, get_backend("numpy"))
    with pytest.raises(NotFoundError):
        model.load_cache(tmp_path / "none")
    path = tmp_path / "cache"
    model.prefill([1, 2, 3]).save(path)
    data = path.read_bytes()
    for damaged in (b"", data[:50], data[:-1], data.replace(b"gptx-kv-cache", b"gptx-xx-cache")):
        path.write_bytes(damaged)
        with pytest.raises(DataError):
            model.load_cache(path)
    for at in range(0, len(data), 7):  # a flipped byte is an error or changes a number
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        try:
            cache = model.load_cache(path)
        except GptxError:
            continue
        assert cache.lengths.tolist() == [3]


def test_a_failed_save_leaves_no_file(tmp_path: Path) -> None:
    cache = make_model(CONFIG, get_backend("numpy")).prefill([1, 2, 3])
    with pytest.raises(StorageError, match="nowhere"):
        cache.save(tmp_path / "nowhere" / "cache")
    assert list(tmp_path.iterdir()) == []


def test_saving_a_cache_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    cache = make_model(CONFIG, get_backend("numpy")).prefill([1, 2, 3])
    saved = []
    for i in range(4):
        cache.save(tmp_path / str(i))
        saved.append((tmp_path / str(i)).read_bytes())
    assert len(set(saved)) == 1
    size = int.from_bytes(saved[0][:8], "little")
    header = json.loads(saved[0][8 : 8 + size])
    assert list(header) == ["__metadata__", "lengths", "h.0.k", "h.0.v"]
    assert header["__metadata__"]["tokens"] == "[[1, 2, 3]]"
    assert header["h.0.v"]["shape"] == [1, 1, 3, 8]
    assert header["h.0.v"]["data_offsets"] == [8 + 96, 8 + 192]
    assert (8 + size) % 8 == 0
    np.testing.assert_array_equal(load_file(tmp_path / "0")["h.0.v"], cache.values[0])


CONTENT: dict[str, Any] = {
    "lengths": np.array([3, 2]),
    "h.0.k": np.ones((2, 1, 3, 8), np.float32),
    "h.0.v": np.ones((2, 1, 3, 8), np.float32),
}
METADATA = {"format": "gptx-kv-cache", "fingerprint": "abc", "tokens": "[[1, 2, 3], [4, 5]]"}


def stored(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> KVCache:
    """Write a cache, with these changes, and load it."""
    changed = {name: x for name, x in {**CONTENT, **tensors}.items() if x is not None}
    path.write_bytes(save(changed, {**METADATA, **(metadata or {})}))
    return KVCache.load(path, CONFIG, get_backend("numpy"))


def long_cache(n: int) -> dict[str, Any]:
    """Return the tensors of a cache of n tokens."""
    tensor = np.ones((1, 1, n, 8), np.float32)
    return {"lengths": np.array([n]), "h.0.k": tensor, "h.0.v": tensor}


def test_a_stored_cache_is_loaded_as_it_is(tmp_path: Path) -> None:
    cache = stored(tmp_path / "cache", {"h.0.k": np.full((2, 1, 3, 8), 2, np.float16)})
    assert (cache.lengths.tolist(), cache.tokens) == ([3, 2], [[1, 2, 3], [4, 5]])
    assert (cache.fingerprint, cache.capacity) == ("abc", 64)
    assert cache.lengths.dtype == np.int64
    np.testing.assert_array_equal(cache.keys[0][:, :, :3, :], np.full((2, 1, 3, 8), 2))
    np.testing.assert_array_equal(cache.values[0][:, :, :3, :], CONTENT["h.0.v"])
    assert stored(tmp_path / "cache", {}, {"tokens": "null"}).tokens is None
    full = stored(tmp_path / "cache", long_cache(64), {"tokens": "null"})
    assert full.lengths.tolist() == [64]
    one = stored(tmp_path / "cache", long_cache(1), {"tokens": "[[7]]"})
    assert (one.lengths.tolist(), one.tokens) == ([1], [[7]])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lengths": None}, "is not a KV cache"),
        ({"lengths": np.array([3.0, 2.0])}, "is not a KV cache"),
        ({"lengths": np.array([[3], [2]])}, r"sequences of \[\[3\], \[2\]\] tokens"),
        ({"lengths": np.array([3, 0])}, r"sequences of \[3, 0\] tokens, expected 1 to 64"),
        ({"lengths": np.array([3, -1])}, r"sequences of \[3, -1\] tokens"),
        ({"lengths": np.array([2, 2])}, "another model"),
        ({"lengths": np.array([3])}, "another model"),
        ({"h.0.k": None}, "another model"),
        ({"h.1.k": CONTENT["h.0.k"]}, "another model"),
        ({"h.0.k": CONTENT["h.0.k"][:, :, :, :4]}, "another model"),
        ({"h.0.v": CONTENT["h.0.k"].astype(int)}, "another model: expected 1 layers"),
        (long_cache(65), r"sequences of \[65\] tokens, expected 1 to 64"),
    ],
)
def test_a_file_with_other_tensors(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        stored(tmp_path / "cache", tensors, {"tokens": "null"})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "pt"}, "is not a KV cache"),
        ({"tokens": "[[1, 2, 3]]"}, r"token ids do not match its \[3, 2\] positions"),
        ({"tokens": "[[1, 2, 3], [4]]"}, "token ids do not match"),
        ({"tokens": "[[1, 2, 3], 4]"}, "token ids do not match"),
        ({"tokens": "5"}, "token ids do not match"),
        ({"tokens": "["}, "token ids do not match"),
    ],
)
def test_a_file_with_other_metadata(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        stored(tmp_path / "cache", {}, metadata)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a FIFO")
def test_a_fifo_is_not_replaced_by_a_cache(small: Model, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(StorageError, match="is a FIFO, expected a regular file"):
        small.prefill([1, 2, 3]).save(tmp_path / "fifo")
    assert (tmp_path / "fifo").is_fifo()
