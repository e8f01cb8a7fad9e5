"""gptx.conversions.formats.fastgpt and fastgpt_dat: files of GPT-2 in Fortran."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptx.config import GPT2Config
from gptx.conversions import convert, detect, read
from gptx.conversions.checkpoint import Checkpoint
from gptx.conversions.containers import gguf as gguf_container
from gptx.conversions.formats import fastgpt, fastgpt_dat
from gptx.conversions.vocabularies.token_lists import tokenizer_from_lists
from gptx.embedded import EMBEDDED
from gptx.errors import ConfigError, TokenizerError, WeightsError
from gptx.random_weights import random_weights
from gptx.tokenization.byte_level import byte_of_letter
from gptx.tokenization.pipeline import PipelineTokenizer
from tests.support.files.gguf import checkpoint
from tests.support.fuzz import damaged_copies, fuzz, refuse_every_prefix
from tests.support.random_models import CASES

MODULES: dict[str, Any] = {"fastgpt": fastgpt, "fastgpt-dat": fastgpt_dat}
TOKENS = [*byte_of_letter(), "<|endoftext|>", "th", "Ġth"]
MERGES = ["t h", "Ġ th"]
SMALL = GPT2Config(260, 8, 8, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=256)


def tokenizer(*more: str) -> PipelineTokenizer:
    return tokenizer_from_lists([*TOKENS, *more], MERGES, (), "the test")


def written(folder: Path, format: str, model: Checkpoint | None = None) -> Path:
    """Write a model; by default a small one with a tokenizer."""
    path = folder / "converted"
    path.unlink(missing_ok=True)
    MODULES[format].write(model or checkpoint(SMALL, None, tokenizer()), path)
    return path


def by_fortran(data: bytes) -> dict[str, Any]:
    """Read version 2 step by step as load_model of fastGPT's driver.f90."""
    (at,) = struct.unpack_from("<i", data, 55)
    mark, version, V, S, C, L, H, *n = struct.unpack_from("<12i", data, at)
    assert (mark, version) == (262477463, 2)
    at += 48 + 16
    found: dict[str, Any] = {"sizes": (V, S, C, L, H)}

    def take(name: str, kind: str, *shape: int) -> None:
        nonlocal at
        found[name] = np.frombuffer(data, kind, int(np.prod(shape)), at).reshape(shape)
        at += found[name].nbytes

    for name, shape in {
        "wte": (V, C),
        "wpe": (S, C),
        "mlp_fc_w": (L, C, 4 * C),
        "mlp_fc_b": (L, 4 * C),
        "mlp_proj_w": (L, 4 * C, C),
        "mlp_proj_b": (L, C),
        "attn_w": (L, C, 3 * C),
        "attn_b": (L, 3 * C),
        "attn_proj_w": (L, C, C),
        "attn_proj_b": (L, C),
        "ln1_b": (L, C),
        "ln1_g": (L, C),
        "ln2_b": (L, C),
        "ln2_g": (L, C),
        "lnf_b": (C,),
        "lnf_g": (C,),
    }.items():
        take(name, "<f4", *shape)
    take("decoder_idx", "<i4", n[0])
    at += 32 - 4 * n[0] % 32  # 32 instead of 0 without padding
    take("decoder_txt", "S1", n[1])
    at += -n[1] % 32
    take("vocab_idx", "<i4", n[2])
    at += 32 - 4 * n[2] % 32
    take("vocab_txt", "S1", n[3])
    at += -n[3] % 32
    take("byte_encoder", "<i4", n[4])
    assert at == len(data)
    return found


def strings(found: dict[str, Any], name: str) -> list[str]:
    """Split a text into strings as word_idx of fastGPT's tokenizer.f90."""
    places, text = found[f"{name}_idx"], found[f"{name}_txt"].tobytes()
    return [text[places[i] : places[i + 1]].decode() for i in range(len(places) - 1)]


# Content of the files


def test_the_program_reads_the_model(tmp_path: Path) -> None:
    found = by_fortran(written(tmp_path, "fastgpt").read_bytes())
    weights = random_weights(SMALL)
    assert found["sizes"] == (260, 8, 8, 2, 2)
    np.testing.assert_array_equal(found["wte"], weights["wte.weight"])
    np.testing.assert_array_equal(found["lnf_g"], weights["ln_f.weight"])
    for theirs, ours in {
        "mlp_fc_w": "mlp.c_fc.weight",
        "mlp_proj_b": "mlp.c_proj.bias",
        "attn_w": "attn.c_attn.weight",
        "attn_proj_w": "attn.c_proj.weight",
        "ln1_b": "ln_1.bias",
        "ln2_g": "ln_2.weight",
    }.items():
        for layer in range(2):
            np.testing.assert_array_equal(found[theirs][layer], weights[f"h.{layer}.{ours}"])
    assert strings(found, "decoder") == [*TOKENS, "[PAD259]"]
    assert strings(found, "vocab") == [*MERGES, ""]
    letters = {int(code): byte for byte, code in enumerate(found["byte_encoder"])}
    assert letters == {ord(letter): byte for letter, byte in byte_of_letter().items()}


@pytest.mark.parametrize("vocab_size", range(260, 269))
def test_padding_that_the_program_skips_wrongly_is_avoided(tmp_path: Path, vocab_size: int) -> None:
    config = replace(SMALL, vocab_size=vocab_size)
    data = written(tmp_path, "fastgpt", checkpoint(config, None, tokenizer())).read_bytes()
    found = by_fortran(data)
    assert strings(found, "decoder")[:259] == TOKENS
    assert strings(found, "vocab")[:2] == MERGES
    assert read(tmp_path / "converted")[1].config == config


def test_old_file_has_the_same_data_without_padding(tmp_path: Path) -> None:
    found = by_fortran(written(tmp_path, "fastgpt").read_bytes())
    sizes = found.pop("sizes")
    counts = (found[f"{x}_{y}"].size for x in ("decoder", "vocab") for y in ("idx", "txt"))
    expected = struct.pack("<10i", *sizes, *counts, 256)
    expected += b"".join(array.tobytes() for array in found.values())
    assert written(tmp_path, "fastgpt-dat").read_bytes() == expected


# Reading


@pytest.mark.parametrize("format", MODULES)
@pytest.mark.parametrize("case", ["124M", "355M"])
def test_a_round_trip(tmp_path: Path, format: str, case: str) -> None:
    path = written(tmp_path, format, checkpoint(CASES[case]))
    name, model = read(path)
    assert name == detect(path) == format
    assert model.tokenizer is None
    assert model.config == replace(CASES[case], bos_token_id=None, eos_token_id=None)
    np.testing.assert_equal(dict(model.tensors), random_weights(CASES[case]))


@pytest.mark.parametrize("format", MODULES)
def test_the_embedded_model_with_its_tokenizer(tmp_path: Path, format: str) -> None:
    source = convert("shakespeare", tmp_path / "converted", format)
    _, model = read(tmp_path / "converted")
    assert model.config == source.config
    assert model.tokenizer is not None
    assert source.tokenizer is not None
    before, after = (t.definition()["model"] for t in (source.tokenizer, model.tokenizer))
    assert (after["vocab"], after["merges"]) == (before["vocab"], before["merges"])
    text = "But soft! <|endoftext|> 日本"
    for special in (False, True):
        expected = source.tokenizer.encode(text, allow_special=special)
        assert model.tokenizer.encode(text, allow_special=special) == expected


def test_version_1_has_a_mark_before_it(tmp_path: Path) -> None:
    path = written(tmp_path, "fastgpt-dat")
    expected = {name: np.array(array) for name, array in read(path)[1].tensors.items()}
    path.write_bytes(struct.pack("<2i", 0xFA51697, 1) + path.read_bytes())
    name, model = read(path)
    assert name == "fastgpt-dat"
    np.testing.assert_equal(dict(model.tensors), expected)


@pytest.mark.parametrize("format", MODULES)
def test_given_config_replaces_that_of_the_file(tmp_path: Path, format: str) -> None:
    given = replace(SMALL, n_head=4)
    assert read(written(tmp_path, format), config=given)[1].config == given


# Unsupported models


@pytest.mark.parametrize("format", MODULES)
@pytest.mark.parametrize("case", ["gelu-erf", "unscaled", "layer-scaled", "n-inner", "untied"])
def test_unsupported_settings_are_refused(tmp_path: Path, format: str, case: str) -> None:
    with pytest.raises(ConfigError, match=r"is .*, fastGPT supports only"):
        written(tmp_path, format, checkpoint(CASES[case]))
    assert not list(tmp_path.iterdir())


def test_a_width_that_needs_padding(tmp_path: Path) -> None:
    config = replace(SMALL, n_embd=12)
    with pytest.raises(ConfigError, match="n_embd is 12, expected a multiple of 8"):
        written(tmp_path, "fastgpt", checkpoint(config))
    written(tmp_path, "fastgpt-dat", checkpoint(config))


def test_a_token_with_a_space(tmp_path: Path) -> None:
    vocab = {token: id for id, token in enumerate([*TOKENS, "two words"])}
    other = PipelineTokenizer.of_vocabulary(vocab, [], {"two words": 259})
    with pytest.raises(TokenizerError, match="has the token 'two words', which is not byte-level"):
        written(tmp_path, "fastgpt", checkpoint(SMALL, None, other))


# Invalid files


def with_header(path: Path, at: int, **changes: int) -> None:
    """Change integers of the header at position `at`."""
    data = path.read_bytes()
    numbers = struct.unpack_from("<10i", data, at)
    header = astuple(replace(fastgpt.Header(*numbers), **changes))
    path.write_bytes(data[:at] + struct.pack("<10i", *header) + data[at + 40 :])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_vocab": 261}, r"bytes, expected \d+ by its"),
        ({"n_layer": 2**31 - 1}, r"bytes, expected \d+ by its"),
        ({"n_head": 3}, "n_embd 8 is not a multiple of n_head 3"),
        ({"n_ctx": 0}, "is damaged: its header is"),
        ({"n_tokens": -1}, "is damaged: its header is"),
        ({"n_byte_letters": 324}, "is damaged: its header is"),
    ],
)
def test_headers_that_are_damaged(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    path = written(tmp_path, "fastgpt-dat")
    with_header(path, 0, **changes)
    with pytest.raises((ConfigError, WeightsError), match=message):
        fastgpt_dat.read(path)


def test_a_header_of_other_tensors(tmp_path: Path) -> None:
    path = written(tmp_path, "fastgpt")
    (at,) = struct.unpack_from("<i", path.read_bytes(), 55)
    with_header(path, at + 8, n_layer=3)
    with pytest.raises(WeightsError, match="tensor mlp_fc_w is missing or does not fit the header"):
        read(path)


@pytest.mark.parametrize(("at", "message"), [(0, "mark 0x3 and"), (4, "and version 3, expected")])
def test_other_versions(tmp_path: Path, at: int, message: str) -> None:
    path = written(tmp_path, "fastgpt")
    data = bytearray(path.read_bytes())
    (start,) = struct.unpack_from("<i", data, 55)
    struct.pack_into("<i", data, start + at, 3)
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=message):
        read(path)


def test_a_wrong_offset_of_the_data(tmp_path: Path) -> None:
    path = written(tmp_path, "fastgpt")
    data = bytearray(path.read_bytes())
    data[55] ^= 32
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"general\.data_offset is not the offset of the header"):
        read(path)


def test_a_list_instead_of_the_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = gguf_container.encode_header
    monkeypatch.setattr(
        fastgpt, "encode_header", lambda _, infos: encode({fastgpt.OFFSET_KEY: [1, 2]}, infos)
    )
    with pytest.raises(WeightsError, match=r"general\.data_offset is a list of 2, expected one"):
        fastgpt.read(written(tmp_path, "fastgpt"))


@pytest.mark.parametrize("format", MODULES)
def test_more_tokens_than_the_model_has(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint(SMALL, None, tokenizer())
    larger = checkpoint(replace(SMALL, vocab_size=262), None, tokenizer())
    header, texts = fastgpt.make_header_and_texts(larger)
    changed = replace(header, n_vocab=SMALL.vocab_size), texts
    monkeypatch.setattr(MODULES[format], "make_header_and_texts", lambda checkpoint: changed)
    path = written(tmp_path, format, model)
    with pytest.raises(TokenizerError, match="has 262 tokens, expected 260 by its embedding"):
        read(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("thĠth", "thĠh\xff", "a token is not UTF-8"),
        ("thĠth", "abĠth", "the merge 't h' makes no token"),
        ("t hĠ th", "t\0hĠ th", "the merge .* makes no token"),
        ("abcdefg", "aacdefg", "has a duplicate token"),
        ("abcdefg", "a cdefg", "token 65 is ' ', not byte-level BPE"),
    ],
)
def test_tokens_that_are_damaged(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = written(tmp_path, "fastgpt-dat")
    data = path.read_bytes()
    now = new.encode().replace("\xff".encode(), b"\xff")
    assert data.count(old.encode()) == 1
    assert len(now) == len(old.encode())
    path.write_bytes(data.replace(old.encode(), now))
    with pytest.raises(TokenizerError, match=message):
        read(path)


def test_two_kinds_of_gguf_are_distinguished(tmp_path: Path) -> None:
    convert("shakespeare", tmp_path / "model.gguf")
    convert("shakespeare", tmp_path / "fortran.gguf", "fastgpt")
    assert detect(tmp_path / "model.gguf") == "gguf"
    assert detect(tmp_path / "fortran.gguf") == "fastgpt"
    with pytest.raises(WeightsError, match="its header of 12 integers is missing"):
        fastgpt.read(tmp_path / "model.gguf")


@pytest.mark.parametrize("format", MODULES)
def test_other_files_are_not_detected(tmp_path: Path, format: str) -> None:
    for name, data in {"none": b"", "text": b"a text " * 99, "zeros": bytes(999)}.items():
        (tmp_path / name).write_bytes(data)
        assert not MODULES[format].detect(tmp_path / name)
    for path in (tmp_path, tmp_path / "missing", EMBEDDED["shakespeare"] / "model.safetensors"):
        assert not MODULES[format].detect(path)


# Damaged files


def use(path: Path, format: str) -> Callable[[], None]:
    """Return a function that opens the model and reads all of it."""

    def read_all() -> None:
        model = MODULES[format].read(path)
        for tensor in model.tensors.values():
            assert tensor is not None
        assert model.tokenizer is None or model.tokenizer.encode(" the thing") is not None

    return read_all


def in_the_integers(data: bytes, rng: random.Random) -> bytes:
    """Change a size in the header, or an offset of a token."""
    start = struct.unpack_from("<i", data, 55)[0] if data[:4] == b"GGUF" else 0
    at = start + 4 * rng.randrange(12)
    if rng.random() < 0.5:
        at = data.rindex(bytes(4) + b"\1\0\0\0") + 4 * rng.randrange(8)
    (number,) = struct.unpack_from("<i", data, at)
    number += rng.choice([-1, 1, 8, -number, 2**16, -(2**31) - number, 2**31 - 1 - number])
    return data[:at] + struct.pack("<I", number % 2**32) + data[at + 4 :]


@pytest.mark.parametrize("format", MODULES)
@damaged_copies
def test_damaged_files_are_refused(tmp_path: Path, format: str, copies: int) -> None:
    path = written(tmp_path, format)
    assert fuzz(path, use(path, format), mutations=[in_the_integers], copies=copies) > 0


@pytest.mark.parametrize("format", MODULES)
@damaged_copies
def test_every_prefix_is_refused(tmp_path: Path, format: str, copies: int) -> None:
    path = written(tmp_path, format)
    refuse_every_prefix(path, use(path, format), copies=copies, step=97)
