"""gptx.conversions.formats.gguf, the reader: files of other programs, and invalid files."""

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
from gptx.conversions import detect, read
from gptx.conversions.checkpoint import Checkpoint
from gptx.conversions.containers import gguf as gguf_container
from gptx.conversions.formats import gguf as gguf_file
from gptx.conversions.formats.gguf import gguf_name, write
from gptx.errors import ConfigError, TokenizerError, WeightsError
from gptx.random_weights import random_weights
from gptx.safetensors_file import BFLOAT16, widen_bfloat16
from tests.support.byte_tokenizers import LETTERS, byte_tokenizer, small_tokenizer
from tests.support.embedded_tokenizer import load_tokenizer
from tests.support.files.gguf import TYPES, checkpoint, written
from tests.support.fuzz import damaged_copies, fuzz, refuse_every_prefix
from tests.support.random_models import CASES

CONFIG = CASES["124M"]
SMALL = GPT2Config(300, 8, 32, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=256)


def numbers(model: Checkpoint) -> dict[str, np.ndarray]:
    """Return all tensors in float32."""
    found = {}
    for name, tensor in model.tensors.items():
        assert isinstance(tensor, np.ndarray)
        found[name] = widen_bfloat16(tensor).astype(np.float32)
    return found


def package_file(path: Path, **changes: Any) -> Path:
    """Write a file with the package `gguf`, as llama.cpp's converter does, with changes."""
    package = pytest.importorskip("gguf")
    weights = {
        gguf_name(name): np.ascontiguousarray(w.T if name.startswith("h.") else w)
        for name, w in random_weights(CONFIG).items()
    }
    weights |= changes.pop("weights", {})
    writer = package.GGUFWriter(path, changes.pop("arch", "gpt2"))
    if "alignment" in changes:
        writer.add_custom_alignment(changes.pop("alignment"))
    writer.add_name("Übung")
    writer.add_array("general.tags", ["a", "b"])
    writer.add_array("gpt2.something", [1.5, 2.5])
    writer.add_bool("gpt2.is_it", True)
    writer.add_uint64("gpt2.big", 2**63)
    writer.add_context_length(CONFIG.n_positions)
    writer.add_embedding_length(CONFIG.n_embd)
    writer.add_block_count(CONFIG.n_layer)
    writer.add_feed_forward_length(CONFIG.mlp_dim)
    writer.add_head_count(CONFIG.n_head)
    writer.add_layer_norm_eps(1e-5)
    for key, value in changes.pop("strings", {}).items():
        writer.add_string(key, value)
    for key, value in changes.pop("numbers", {}).items():
        writer.add_uint32(key, value)
    kinds = changes.pop("types", {})
    assert not changes
    for name, w in weights.items():
        kind = kinds.get(name, package.GGMLQuantizationType.F32)
        writer.add_tensor(name, package.quantize(w, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Valid files


@pytest.mark.parametrize("type", TYPES)
def test_the_gguf_package_reads_the_same_numbers(tmp_path: Path, type: str) -> None:
    package = pytest.importorskip("gguf")
    written(tmp_path, CONFIG, type=type)
    ours = numbers(read(tmp_path / "model.gguf")[1])
    theirs = {t.name: t for t in package.GGUFReader(tmp_path / "model.gguf").tensors}
    for name, found in ours.items():
        tensor = theirs[gguf_name(name)]
        expected = package.dequantize(tensor.data, tensor.tensor_type)
        found = found.T if name.startswith("h.") else found
        assert np.ascontiguousarray(found).tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0"])
def test_blocks_are_read_in_chunks(
    tmp_path: Path, type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, CONFIG, type=type)
    expected = numbers(read(tmp_path / "model.gguf")[1])
    monkeypatch.setattr(gguf_container, "CHUNK_NUMBERS", 1000)
    np.testing.assert_equal(numbers(read(tmp_path / "model.gguf")[1]), expected)


@pytest.mark.parametrize("alignment", [None, 8, 128])
def test_files_of_the_gguf_package(tmp_path: Path, alignment: int | None) -> None:
    changes = {} if alignment is None else {"alignment": alignment}
    name, model = read(package_file(tmp_path / "model.gguf", **changes))
    assert name == "gguf"
    assert model.config == replace(CONFIG, bos_token_id=None, eos_token_id=None)
    assert model.tokenizer is None
    np.testing.assert_equal(numbers(model), random_weights(CONFIG))


@pytest.mark.parametrize("case", ["n-inner", "untied", "epsilon", "tiny"])
def test_config_round_trips(tmp_path: Path, case: str) -> None:
    written(tmp_path, CASES[case])
    _, model = read(tmp_path / "model.gguf")
    assert model.config == CASES[case]
    assert repr(model.config.layer_norm_epsilon) == repr(CASES[case].layer_norm_epsilon)
    np.testing.assert_equal(numbers(model), random_weights(CASES[case]))


def test_given_config_replaces_that_of_the_file(tmp_path: Path) -> None:
    written(tmp_path, CONFIG)
    given = replace(CONFIG, n_head=4, activation_function="gelu")
    assert read(tmp_path / "model.gguf", config=given)[1].config == given


@pytest.mark.parametrize("type", TYPES)
def test_types_of_the_tensors(tmp_path: Path, type: str) -> None:
    written(tmp_path, CONFIG, type=type)
    stored = read(tmp_path / "model.gguf")[1].stored
    expected = {"F16": np.dtype(np.float16), "BF16": BFLOAT16}.get(type, np.dtype(np.float32))
    assert stored["h.0.mlp.c_fc.weight"].dtype == expected
    assert stored["wpe.weight"].dtype == np.float32


@pytest.mark.parametrize("type", ["Q4_1", "Q5_0", "Q5_1"])
def test_types_that_are_only_read(tmp_path: Path, type: str) -> None:
    package = pytest.importorskip("gguf")
    kind = package.GGMLQuantizationType[type]
    path = package_file(tmp_path / "model.gguf", types={"blk.1.ffn_up.weight": kind})
    source = np.ascontiguousarray(random_weights(CONFIG)["h.1.mlp.c_fc.weight"].T)
    expected = package.dequantize(package.quantize(source, kind), kind)
    np.testing.assert_array_equal(numbers(read(path)[1])["h.1.mlp.c_fc.weight"], expected.T)


@pytest.mark.parametrize("type", ["F32", "F16", "BF16"])
def test_floats_are_mapped(tmp_path: Path, type: str) -> None:
    written(tmp_path, CONFIG, type=type)
    for name, tensor in read(tmp_path / "model.gguf")[1].tensors.items():
        assert isinstance(tensor, np.ndarray)
        assert not tensor.flags.owndata, name
        assert not tensor.flags.writeable, name


def test_a_duplicate_head_is_tied(tmp_path: Path) -> None:
    head = random_weights(CONFIG)["wte.weight"]
    path = package_file(tmp_path / "model.gguf", weights={"output.weight": head})
    assert read(path)[1].config.tie_word_embeddings


def test_a_head_of_other_numbers_is_not_tied(tmp_path: Path) -> None:
    head = random_weights(CONFIG)["wte.weight"].copy()
    head[-1, -1] += 1
    path = package_file(tmp_path / "model.gguf", weights={"output.weight": head})
    _, model = read(path)
    assert not model.config.tie_word_embeddings
    np.testing.assert_array_equal(numbers(model)["lm_head.weight"], head)


def test_a_duplicate_head_of_another_type_is_tied(tmp_path: Path) -> None:
    package = pytest.importorskip("gguf")
    table = random_weights(CONFIG)["wte.weight"].astype(np.float16)
    types = {"token_embd.weight": package.GGMLQuantizationType.F16}
    weights = {"token_embd.weight": table, "output.weight": table.astype(np.float32)}
    _, model = read(package_file(tmp_path / "model.gguf", weights=weights, types=types))
    assert model.config.tie_word_embeddings


def test_a_given_config_that_ties_a_head_of_other_numbers(tmp_path: Path) -> None:
    head = random_weights(CONFIG)["wte.weight"] * 2
    path = package_file(tmp_path / "model.gguf", weights={"output.weight": head})
    _, model = read(path, config=CONFIG)
    assert not model.config.tie_word_embeddings
    assert len(model.notes) == 1
    np.testing.assert_array_equal(numbers(model)["lm_head.weight"], head)


def test_a_head_of_another_type_is_not_tied(tmp_path: Path) -> None:
    package = pytest.importorskip("gguf")
    head = random_weights(CONFIG)["wte.weight"]
    types = {"output.weight": package.GGMLQuantizationType.Q8_0}
    path = package_file(tmp_path / "model.gguf", weights={"output.weight": head}, types=types)
    assert not read(path)[1].config.tie_word_embeddings


def test_version_2_is_the_same(tmp_path: Path) -> None:
    written(tmp_path, CONFIG)
    path = tmp_path / "model.gguf"
    data = path.read_bytes()
    path.write_bytes(data[:4] + struct.pack("<I", 2) + data[8:])
    np.testing.assert_equal(numbers(read(path)[1]), random_weights(CONFIG))


def test_the_tokenizer_round_trips(tmp_path: Path) -> None:
    source = load_tokenizer()
    config = replace(CONFIG, vocab_size=1027, bos_token_id=0, eos_token_id=0)
    written(tmp_path, config, tokenizer=source)
    _, model = read(tmp_path / "model.gguf")
    assert model.config == config
    assert model.tokenizer is not None
    before, after = (t.definition()["model"] for t in (source, model.tokenizer))
    assert (after["vocab"], after["merges"]) == (before["vocab"], before["merges"])
    text = "But soft! — café <|endoftext|> 日本\n\n x "
    for special in (False, True):
        expected = source.encode(text, allow_special=special)
        assert model.tokenizer.encode(text, allow_special=special) == expected


def test_tokens_that_were_added(tmp_path: Path) -> None:
    written(tmp_path, SMALL, tokenizer=small_tokenizer())
    tokenizer = read(tmp_path / "model.gguf")[1].tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode("th<br><|endoftext|>")
    assert ids[:2] == [257, 258]
    assert 256 not in ids
    assert tokenizer.encode("<|endoftext|>", allow_special=True) == [256]


def test_a_tokenizer_without_merges_round_trips(tmp_path: Path) -> None:
    config = replace(SMALL, vocab_size=256, eos_token_id=None)
    written(tmp_path, config, tokenizer=byte_tokenizer())
    tokenizer = read(tmp_path / "model.gguf")[1].tokenizer
    assert tokenizer is not None
    model = tokenizer.definition()["model"]
    assert (model["vocab"], model["merges"]) == (LETTERS, [])


# Invalid files


@pytest.mark.parametrize(
    "key", ["general.architecture", "split.count", "tokenizer.ggml.model", "tokenizer.ggml.pre"]
)
def test_lists_instead_of_single_values(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = gguf_container.encode_header
    monkeypatch.setattr(
        gguf_file, "encode_header", lambda data, infos: encode(data | {key: [1, 2]}, infos)
    )
    written(tmp_path, SMALL, tokenizer=small_tokenizer())
    with pytest.raises(WeightsError, match=f"{key} is a list of 2, expected one number or string"):
        read(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"arch": "llama"},
            ConfigError,
            "has the architecture 'llama', expected 'gpt2'",
        ),
        (
            {"arch": "clip", "strings": {"general.type": "mmproj"}},
            WeightsError,
            "is a GGUF of the type 'mmproj', expected 'model'",
        ),
        (
            {"strings": {"general.type": "adapter", "adapter.type": "lora"}},
            WeightsError,
            r"is an adapter \('lora'\), not a model",
        ),
        (
            {"strings": {"tokenizer.ggml.model": "bert"}},
            TokenizerError,
            "the tokenizer 'bert', None",
        ),
        (
            {"strings": {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe"}},
            TokenizerError,
            "the tokenizer 'gpt2', 'llama-bpe'",
        ),
        (
            {"strings": {"tokenizer.ggml.model": "gpt2"}},
            TokenizerError,
            "without lists of tokens and merges",
        ),
        ({"numbers": {"split.count": 3}}, WeightsError, "is one of 3 parts of a split model"),
        ({"numbers": {"general.alignment": 48}}, WeightsError, "is 48, expected a power of two"),
        (
            {"weights": {"wte.weight": np.ones((4, 4), np.float32)}},
            WeightsError,
            "a tensor under the names of llama.cpp and of the Hub",
        ),
        (
            {"weights": {"rope_freqs.weight": np.ones(4, np.float32)}},
            WeightsError,
            r"tensor rope_freqs\.weight is unknown",
        ),
    ],
)
def test_other_models_are_refused(tmp_path: Path, changes: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        read(package_file(tmp_path / "model.gguf", **changes))


@pytest.mark.parametrize(
    ("version", "message"),
    [(1, "GGUF version 1, expected 2 or 3"), (3 << 24, "is a GGUF of a big-endian machine")],
)
def test_other_versions(tmp_path: Path, version: int, message: str) -> None:
    written(tmp_path, CONFIG)
    path = tmp_path / "model.gguf"
    data = path.read_bytes()
    path.write_bytes(data[:4] + struct.pack("<I", version) + data[8:])
    with pytest.raises(WeightsError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gpt2.block_count", b"\4\0\0\0\x0f\x27\0\0", "block_count is 9999, expected 1 by"),
        ("gpt2.embedding_length", b"\6\0\0\0\0\0\0\x42", "embedding_length is 32.0, expected a n"),
        ("gpt2.context_length", b"\4\0\0\0\x63\0\0\0", r"wpe\.weight has shape \[8, 32\], exp"),
        ("gpt2.attention.head_count", b"\4\0\0\0\5\0\0\0", "32 is not a multiple of n_head 5"),
        ("gpt2.vocab_size", b"\x0d\0\0\0\0\0\0\0", "'gpt2.vocab_size' has unknown type 13"),
        (
            "gpt2.vocab_size",
            b"\x09\0\0\0\x09\0\0\0",
            "'gpt2.vocab_size' is an array of unknown type 9",
        ),
        (
            "general.file_type",
            b"\x09\0\0\0\4\0\0\0" + b"\xff" * 8,
            "expected the metadata 'general.file_type' in bytes",
        ),
        ("general.file_type", b"\x09\0\0\0\x08\0\0\0" + b"\xff" * 8, r"has the length \d+, longer"),
    ],
)
def test_metadata_that_is_damaged(tmp_path: Path, old: str, new: bytes, message: str) -> None:
    data = written(tmp_path, SMALL).data
    after = data.index(old.encode()) + len(old)
    path = tmp_path / "model.gguf"
    path.write_bytes(data[:after] + new + data[after + len(new) :])
    with pytest.raises((ConfigError, WeightsError), match=message):
        read(path)


def test_ggml_files_from_before_gguf_are_named(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"tjgg" + bytes(100))
    with pytest.raises(WeightsError, match="is a ggml file from before GGUF"):
        read(tmp_path / "model.bin")


@pytest.mark.parametrize("n_padding", [0, 7])
def test_a_vocabulary_without_tensors_is_named(tmp_path: Path, n_padding: int) -> None:
    package = pytest.importorskip("gguf")
    writer = package.GGUFWriter(tmp_path / "vocab.gguf", "gpt2")
    writer.add_block_count(12)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with open(tmp_path / "vocab.gguf", "ab") as file:
        file.write(bytes(n_padding))
    with pytest.raises(WeightsError, match="has a vocabulary and no tensors"):
        read(tmp_path / "vocab.gguf")


def test_later_parts_of_a_split_model_have_no_architecture(tmp_path: Path) -> None:
    header = gguf_container.encode_header({"split.no": 1, "split.count": 3}, [])
    (tmp_path / "model-00002-of-00003.gguf").write_bytes(header)
    with pytest.raises(WeightsError, match="is one of 3 parts of a split model"):
        read(tmp_path / "model-00002-of-00003.gguf")


def test_bytes_after_the_end(tmp_path: Path) -> None:
    data = written(tmp_path, SMALL).data
    (tmp_path / "model.gguf").write_bytes(data + bytes(32))
    with pytest.raises(WeightsError, match=r"damaged: it has .* bytes, expected \d+ by its header"):
        read(tmp_path / "model.gguf")


# Damaged files


@pytest.fixture
def seed(tmp_path: Path) -> Path:
    """Write a small file with a tokenizer and with blocks."""
    config = GPT2Config(264, 4, 32, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=256)
    path = tmp_path / "seed.gguf"
    write(checkpoint(config, None, small_tokenizer()), path, **TYPES["Q4_0"])
    return path


def use(path: Path) -> Callable[[], None]:
    """Return a function that opens the model and reads all of it."""

    def read_all() -> None:
        _, model = read(path)
        for tensor in model.tensors.values():
            assert tensor is not None
        assert model.tokenizer is None or model.tokenizer.encode("the thing") is not None

    return read_all


def in_a_string(data: bytes, rng: random.Random) -> bytes:
    """Replace a length or a type in the metadata or in the list of tensors."""
    names = [b"gpt2.", b"tokenizer.", b"general.", b"blk.0.", b"token_embd", b"output_norm"]
    places = [at for name in names if (at := data.find(name, rng.randrange(len(data)))) > 8]
    first = rng.choice(places) - 8 if places else 24
    end = first + 8 + int.from_bytes(data[first : first + 8], "little")
    at = rng.choice([first, end, end + 4, end + 8, end + 12])
    number = rng.choice([0, 1, 2, 5, 9, 32, 33, 255, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
    size = rng.choice([4, 8])
    return data[:at] + (number % 2 ** (8 * size)).to_bytes(size, "little") + data[at + size :]


def strings_change_places(data: bytes, rng: random.Random) -> bytes:
    """Exchange the names of two tensors or keys of the same length."""
    words = [b"attn_norm.weight", b"ffn_norm.weight\0", b"bos", b"eos", b"ffn_norm.bias", b"tokens"]
    a, b = rng.sample(words, 2)
    return data.replace(a, b"\0").replace(b, a).replace(b"\0", b, 1)


@damaged_copies
def test_damaged_files_are_refused(seed: Path, copies: int) -> None:
    assert detect(seed) == "gguf"
    mutations = [in_a_string, strings_change_places]
    assert fuzz(seed, use(seed), mutations=mutations, copies=copies) > 0


@damaged_copies
def test_every_prefix_is_refused(seed: Path, copies: int) -> None:
    refuse_every_prefix(seed, use(seed), copies=copies, step=37)
