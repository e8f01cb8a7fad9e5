"""gptx.conversions.formats.gpt_burn: records of Burn, and the logits of gpt-burn."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptx.backends import get_backend
from gptx.config import GPT2Config
from gptx.conversions import convert
from gptx.conversions import read as read_any
from gptx.conversions.checkpoint import Checkpoint, float_array
from gptx.conversions.containers import messagepack
from gptx.conversions.formats import gpt_burn
from gptx.errors import ConfigError, NotFoundError, WeightsError
from tests.support.cli import run
from tests.support.files.burn_bytes import (
    Raw,
    burn_weights,
    narrow,
    numbers,
    pack,
    record,
    write_burn,
)
from tests.support.fuzz import accepted, damaged_copies, fuzz, refuse_every_prefix
from tests.support.models import make_model
from tests.support.random_models import CASES

GOLDEN = Path(__file__).parents[2] / "golden" / "gpt-burn-tiny"
BROAD = replace(CASES["tiny"], vocab_size=7)  # a vocabulary smaller than the width, 8
SMALL = replace(BROAD, vocab_size=3, n_positions=2, n_embd=4, n_inner=4)


def logits(config: GPT2Config, weights: Any, ids: list[int], layer_norm: Any = None) -> np.ndarray:
    backend = get_backend("numpy", generic=True)
    if layer_norm is not None:
        backend.layer_norm = layer_norm
    floats = {name: np.asarray(x, np.float32) for name, x in weights.items()}
    return np.asarray(make_model(config, backend, floats).logits(ids))


def logits_of(checkpoint: Checkpoint, ids: list[int], layer_norm: Any = None) -> np.ndarray:
    weights = {name: float_array(x) for name, x in checkpoint.tensors.items()}
    return logits(checkpoint.config, weights, ids, layer_norm)


def burns_layer_norm(x: np.ndarray, w: np.ndarray, b: np.ndarray, eps: float) -> np.ndarray:
    """Normalize as Burn 0.13, which adds 1e-5 to the square root."""
    y = x - x.mean(axis=-1, keepdims=True)
    return y / (np.sqrt((y * y).mean(axis=-1, keepdims=True)) + 1e-5) * w + b


def load_all(folder: Path) -> None:
    for tensor in gpt_burn.read(folder).stored.values():
        tensor.read()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Write a folder of 2 kB, for tests that read it many times."""
    write_burn(tmp_path / "small", SMALL, kind="half::binary16::f16")
    return tmp_path / "small"


@pytest.fixture
def burn(tmp_path: Path) -> Path:
    """Copy a folder that gpt-burn wrote."""
    return shutil.copytree(GOLDEN / "wide", tmp_path / "model")


@pytest.fixture(scope="module")
def characters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder with a vocabulary of gpt-burn's characters, as `model_83M` has."""
    folder = tmp_path_factory.mktemp("model_83M")
    write_burn(folder, replace(CASES["tiny"], vocab_size=104), kind="half::binary16::f16")
    return folder


class TestLogits:
    @pytest.mark.parametrize("name", ["wide", "folded"])
    def test_equal_those_of_gpt_burn_except_for_the_layer_norm(self, name: str) -> None:
        golden = json.loads((GOLDEN / name / "logits.json").read_text())
        checkpoint = gpt_burn.read(GOLDEN / name)
        expected = np.reshape(golden["logits"], (len(golden["ids"]), -1))
        found = logits_of(checkpoint, golden["ids"], burns_layer_norm)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
        found = logits_of(checkpoint, golden["ids"])
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-4)

    def test_notes_list_the_differences(self) -> None:
        wide, folded = (gpt_burn.read(GOLDEN / name).notes for name in ("wide", "folded"))
        assert "layer norm" in folded[0]
        assert wide == (
            *folded,
            "the model is 16 wide instead of 8, to contain the bias of its head",
        )

    @pytest.mark.parametrize("case", ["124M", "355M", "n-inner", "tiny"])
    def test_of_a_doubled_model_include_the_bias(
        self, tmp_path: Path, case: str, random: np.random.Generator
    ) -> None:
        config = replace(CASES[case], vocab_size=CASES[case].n_embd + 5)
        bias = random.normal(size=config.vocab_size)
        weights = write_burn(tmp_path, config, bias)
        wide = gpt_burn.read(tmp_path)
        assert (wide.config.n_embd, wide.config.head_dim) == (2 * config.n_embd, config.head_dim)
        ids = [3, 1, 4, 1, 5]
        expected = logits(narrow(config), weights, ids) + bias.astype(np.float32)
        np.testing.assert_allclose(logits_of(wide, ids), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("case", ["124M", "355M"])
    def test_of_a_folded_model_include_the_bias(
        self, tmp_path: Path, case: str, random: np.random.Generator
    ) -> None:
        config = replace(CASES[case], vocab_size=CASES[case].n_embd // 2)
        bias = random.normal(size=config.vocab_size)
        weights = write_burn(tmp_path, config, bias)
        folded = gpt_burn.read(tmp_path)
        assert folded.config == narrow(config)
        ids = [3, 1, 4, 1, 5]
        expected = logits(narrow(config), weights, ids) + bias.astype(np.float32)
        np.testing.assert_allclose(logits_of(folded, ids), expected, rtol=1e-4, atol=1e-4)

    def test_a_bias_that_cannot_be_folded_doubles_the_width(self, tmp_path: Path) -> None:
        weights = burn_weights(BROAD)
        weights["lm_head.weight"][1] = weights["lm_head.weight"][0]  # only the bias differs
        for value, width in ((0.0, 8), (0.5, 16), (np.inf, 16)):
            bias = np.zeros(7, np.float32)
            bias[1] = value
            write_burn(tmp_path, BROAD)
            (tmp_path / "model.mpk").write_bytes(pack(record(weights, bias, 1, "f32")))
            assert gpt_burn.read(tmp_path).config.n_embd == width


class TestTensors:
    @pytest.mark.parametrize(
        ("case", "kind"),
        [("124M", "half::binary16::f16"), ("355M", "f32"), ("774M", "f64")],
    )
    def test_are_read_bit_for_bit(self, tmp_path: Path, case: str, kind: str) -> None:
        config = replace(CASES[case], vocab_size=50)
        weights = write_burn(tmp_path, config, kind=kind)
        checkpoint = gpt_burn.read(tmp_path)
        assert checkpoint.config == narrow(config)
        for name, found in checkpoint.tensors.items():
            assert isinstance(found, np.ndarray)
            np.testing.assert_array_equal(found, weights[name], name)
            if name != "ln_f.bias":  # whose changed values are float32
                assert found.dtype == weights[name].dtype == checkpoint.stored[name].dtype

    def test_convert_to_another_format(self, burn: Path, tmp_path: Path) -> None:
        convert(burn, tmp_path / "folder", "safetensors", dtype="float32")
        name, copy = read_any(tmp_path / "folder")
        assert name == "safetensors"
        original = gpt_burn.read(burn)
        assert copy.config == original.config
        for name, found in copy.tensors.items():
            np.testing.assert_array_equal(found, original.tensors[name])

    def test_the_file_or_the_folder_can_be_given(self, burn: Path) -> None:
        assert read_any(burn)[0] == read_any(burn / "model.mpk")[0] == "gpt-burn"

    def test_reading_one_needs_its_memory_only(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_burn(tmp_path, replace(CASES["tiny"], vocab_size=8_000), kind="half::binary16::f16")
        size = 2 * 8_000 * 8
        monkeypatch.setattr(messagepack, "CHUNK_NUMBERS", 2048)
        monkeypatch.setattr(messagepack, "WINDOW_BYTES", 1024)
        gpt_burn.read(tmp_path)  # imports are not measured
        tracemalloc.start()
        try:
            checkpoint = gpt_burn.read(tmp_path)
            opened = tracemalloc.get_traced_memory()[1]
            tracemalloc.reset_peak()
            checkpoint.stored["lm_head.weight"].read()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert opened < size / 2
        assert size < peak < 4.5 * size  # a tensor of twice the width, padded from the narrow one


# The example in the README of gpt-burn, with the ids of its characters.
GERMAN = (
    "Albert Einstein war ein schweizerisch-US-amerikanischer theoretischer Physiker deutscher "
    "Herkunft."
)
IDS = [28, 13, 3, 6, 19, 21, 1, 32, 10, 15, 20, 21, 6, 10, 15, 1, 24, 2, 19, 1, 6, 10, 15, 1, 20]
IDS += [4, 9, 24, 6, 10, 27, 6, 19, 10, 20, 4, 9, 66, 48, 46, 66, 2, 14, 6, 19, 10, 12, 2, 15, 10]
IDS += [20, 4, 9, 6, 19, 1, 21, 9, 6, 16, 19, 6, 21, 10, 20, 4, 9, 6, 19, 1, 43, 9, 26, 20, 10, 12]
IDS += [6, 19, 1, 5, 6, 22, 21, 20, 4, 9, 6, 19, 1, 35, 6, 19, 12, 22, 15, 7, 21, 67]


class TestCharacters:
    """The tokenizer that is part of the program."""

    def test_the_ids_of_gpt_burn(self, characters: Path) -> None:
        tokenizer = gpt_burn.read(characters).tokenizer
        assert tokenizer is not None
        assert tokenizer.encode(GERMAN) == IDS
        assert tokenizer.decode(IDS) == GERMAN
        assert tokenizer.encode("\näß") == [0, 96, 102]
        assert tokenizer.encode("é<?>😀") == [103, 71, 74, 73, 103]  # 103 is `<?>`
        assert tokenizer.decode([2, 103]) == "a<?>"
        assert tokenizer.vocab_size == 104

    def test_a_converted_model_generates_text(self, characters: Path, tmp_path: Path) -> None:
        convert(characters, tmp_path / "model")
        options = ("-q", "-n", "5", "-s", "1", "Albert")
        converted = run("generate", "-m", str(tmp_path / "model"), *options)
        assert (converted.code, converted.err) == (0, "")
        assert len(converted.out) == 6  # 5 characters and the line end
        assert run("generate", "-m", str(characters), *options).out == converted.out

    def test_it_is_the_tokenizer_of_a_text(self, characters: Path) -> None:
        done = run("tokenize", "ab", "--tokenizer", str(characters))
        assert done.out == '2 "a"  3 "b"\n'

    @pytest.mark.parametrize("size", [103, 105])
    def test_a_model_of_another_vocabulary_has_none(self, tmp_path: Path, size: int) -> None:
        write_burn(tmp_path, replace(CASES["tiny"], vocab_size=size))
        assert gpt_burn.read(tmp_path).tokenizer is None

    def test_a_model_of_vowel_pieces_has_none(self, characters: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(characters, tmp_path / "model")
        (folder / "tokenizer.bin").write_bytes(b"")
        assert gpt_burn.read(folder).tokenizer is None


class TestInvalidFolders:
    def test_other_files_are_not_detected(self, tmp_path: Path) -> None:
        (tmp_path / "x.mpk").write_bytes(b"\x82\xa8metadata")
        for path in (tmp_path, tmp_path / "x.mpk", tmp_path / "absent", GOLDEN):
            assert not gpt_burn.detect(path)

    def test_a_pipe_is_not_opened(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "model.mpk")
        ends = os.open(tmp_path / "model.mpk", os.O_RDWR)  # reading does not wait then
        try:
            os.write(ends, b"\x83\xa8metadata")
            assert not gpt_burn.detect(tmp_path)
        finally:
            os.close(ends)

    def test_a_second_config_is_refused(self, burn: Path) -> None:
        with pytest.raises(ConfigError, match="leave out the other config"):
            gpt_burn.read(burn, CASES["tiny"])

    def test_a_missing_config_is_refused(self, burn: Path) -> None:
        (burn / "config.json").unlink()
        with pytest.raises(NotFoundError, match=r"config\.json is missing"):
            gpt_burn.read(burn)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"n_heads": 3}, "d_model 8 is not a multiple of n_heads 3"),
            ({"n_layers": 3}, "has 2 blocks, expected 3 by its config.json"),
            ({"context_length": 9}, r"positional_embedding.weight has shape \[8, 8\].* \[9, 8\]"),
            ({"d_hidden": 31}, r"pwff.linear_1.weight has shape \[8, 32\].* \[8, 31\]"),
            ({"d_model": 10**30}, "d_model is '1000.*expected an integer > 0"),
            ({"vocab_size": True}, "vocab_size is 'True'"),
            ({"vocab_size": None}, "vocab_size is 'None'"),
        ],
    )
    def test_a_config_of_another_model_is_refused(
        self, burn: Path, change: dict[str, Any], message: str
    ) -> None:
        data = json.loads((burn / "config.json").read_text())
        data["model"] |= change
        (burn / "config.json").write_text(json.dumps(data))
        with pytest.raises((ConfigError, WeightsError), match=message):
            gpt_burn.read(burn)

    @pytest.mark.parametrize("text", ["", "[]", '{"model": 3}', "{", "[" * 100_000])
    def test_an_invalid_config_is_refused(self, burn: Path, text: str) -> None:
        (burn / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"config\.json"):
            gpt_burn.read(burn)


def edited(change: Callable[[Any], object]) -> bytes:
    """Encode a tiny model after one change."""
    data = record(burn_weights(BROAD), np.zeros(7, np.float32), 1, "f32")
    change(data)
    return pack(data)


def deep(levels: int) -> Raw:
    return Raw(b"\x81\xa1x" * levels + b"\xc0")


def tensor(**parts: Any) -> Any:
    parts = {"value": Raw(numbers(np.ones(8, np.float32))), "shape": [8]} | parts
    return {"id": "9bd1", "param": parts}


EDITS: dict[str, tuple[Callable[[Any], object], str]] = {
    "no such field": (
        lambda x: x["item"].update(norm={"eps": None, "gamma": None, "beta": None}),
        "item.norm is not a struct of gamma, beta, epsilon, each once",
    ),
    "a field is missing": (lambda x: x["item"].pop("norm"), "item is not a struct of token_emb"),
    "a bias of the queries": (
        lambda x: x["item"]["blocks"][0]["multi_head"]["query"].update(bias=np.ones(8)),
        r"item\.blocks\.0\.multi_head\.query\.bias is not nil, which Burn",
    ),
    "no bias of the head": (
        lambda x: x["item"]["linear"].update(bias=None),
        r"item\.linear\.bias is not a struct",
    ),
    "the tensors of a later Burn": (
        lambda x: x["item"]["norm"].update(
            gamma={"id": "9bd1", "param": {"bytes": "", "shape": [8], "dtype": "F32"}}
        ),
        r"item\.norm\.gamma\.param is not a struct of value, shape",
    ),
    "another type": (
        lambda x: x["metadata"].update(float="half::bfloat::bf16"),
        "is of type 'half::bfloat::bf16', expected one of half::binary16::f16, f32, f64",
    ),
    "a type that differs from the metadata": (
        lambda x: x["metadata"].update(float="f64"),
        "not of type float64",
    ),
    "a deep structure": (
        lambda x: x["item"].update(dropout=deep(100_000)),
        r"item\.dropout is not nil",
    ),
    "more blocks than there can be": (
        lambda x: x["item"].update(blocks=Raw(b"\xdd\xff\xff\xff\xff")),
        r"item\.blocks is not a list of at most 10000",
    ),
    "a long name": (
        lambda x: x["metadata"].update(version=Raw(b"\xdb\x7f\xff\xff\xff")),
        r"metadata\.version is not a text of at most 1024",
    ),
    "more numbers than the file has bytes": (
        lambda x: x["item"]["norm"].update(gamma=tensor(value=Raw(b"\xdd\xff\xff\xff\xff\xca"))),
        r"item\.norm\.gamma is not complete",
    ),
    "more integers than the file has bytes": (
        lambda x: x["item"]["norm"].update(gamma=tensor(value=Raw(b"\xdd\xff\xff\xff\xff\x00"))),
        r"item\.norm\.gamma is not a complete list of numbers",
    ),
    "no numbers": (
        lambda x: x["item"]["norm"].update(gamma=tensor(value=[], shape=[0])),
        r"item\.norm\.gamma is not a tensor with numbers",
    ),
    "a shape of other numbers": (
        lambda x: x["item"]["norm"].update(gamma=tensor(shape=[4])),
        r"item\.norm\.gamma is not a tensor of shape \[4\]: it has 8 numbers",
    ),
    "a shape of many sizes": (
        lambda x: x["item"]["norm"].update(gamma=tensor(shape=[1] * 8 + [8])),
        "a list of at most 8 sizes",
    ),
    "a huge shape": (
        lambda x: x["item"]["norm"].update(gamma=tensor(shape=Raw(b"\x91\xcf" + b"\xff" * 8))),
        "is not a tensor of shape",
    ),
    "an item of the empty list": (
        lambda x: x.update(_b=[1]),
        "_b is not a list of at mo",
    ),
}


class TestDamage:
    @pytest.mark.parametrize("edit", EDITS)
    def test_of_the_structure_is_named(self, tmp_path: Path, edit: str) -> None:
        change, message = EDITS[edit]
        write_burn(tmp_path, BROAD)
        assert edited(lambda data: None) == (tmp_path / "model.mpk").read_bytes()
        (tmp_path / "model.mpk").write_bytes(edited(change))
        with pytest.raises(WeightsError, match=message):
            gpt_burn.read(tmp_path)
        assert not accepted(lambda: load_all(tmp_path), edit)

    def test_of_a_duplicate_field(self, tmp_path: Path) -> None:
        write_burn(tmp_path, BROAD)
        data = (tmp_path / "model.mpk").read_bytes()
        (tmp_path / "model.mpk").write_bytes(data.replace(b"\xa4beta", b"\xa5gamma", 1))
        with pytest.raises(WeightsError, match="each once and no others"):
            gpt_burn.read(tmp_path)

    def test_bytes_after_the_end_are_refused(self, burn: Path) -> None:
        with open(burn / "model.mpk", "ab") as file:
            file.write(b"\xc0")
        with pytest.raises(WeightsError, match="has 8640 bytes, expected 8639 by its record"):
            gpt_burn.read(burn)

    @damaged_copies
    def test_every_prefix_is_refused(self, copies: int, small: Path) -> None:
        refuse_every_prefix(small / "model.mpk", lambda: load_all(small), copies=copies)

    @damaged_copies
    def test_of_any_kind_is_refused_or_without_effect(self, copies: int, small: Path) -> None:
        file, use = small / "model.mpk", lambda: load_all(small)
        assert fuzz(file, use, mutations=[other_marker], copies=copies) > copies // 2

    @damaged_copies
    def test_of_the_config_is_refused_or_without_effect(self, copies: int, small: Path) -> None:
        file, use = small / "config.json", lambda: load_all(small)
        assert fuzz(file, use, copies=copies) > copies // 4


def other_marker(data: bytes, rng: Any) -> bytes:
    """Replace a marker of MessagePack and the number after it."""
    out = bytearray(data)
    places = [i for i, byte in enumerate(data) if byte >= 0x80]
    place = rng.choice(places)
    number = rng.choice([0, 1, 2**15, 2**16 - 1, 2**31, 2**32 - 1])
    out[place : place + 5] = struct.pack(">BI", rng.randrange(0x80, 0x100), number)
    return bytes(out)
