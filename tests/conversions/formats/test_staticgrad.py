"""gptx.conversions.formats.staticgrad: three files as its scripts write them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptx.config import GPT2Config
from gptx.conversions import convert, detect
from gptx.conversions.formats import staticgrad
from gptx.conversions.vocabularies.byte_tokens import tokenizer_from_bytes
from gptx.errors import ConfigError, TokenizerError, WeightsError
from gptx.random_weights import random_weights
from gptx.stored_weights import OWN_HEAD_NOTE
from gptx.tokenization.saving import save_tokenizer
from tests.support.fuzz import damaged_copies, fuzz, refuse_every_prefix
from tests.support.random_models import CASES, write_model

NAMES = ("gpt2_weights.bin", "gpt2_metadata.json", "gpt2_vocab.bin")
BYTES = [bytes([byte]) for byte in range(256)]
TOKENS = [*BYTES, b"th", b"the", b" the", b"<|endoftext|>"]
CONFIG = GPT2Config(
    vocab_size=len(TOKENS),
    n_positions=3,
    n_embd=1,
    n_layer=1,
    n_head=1,
    bos_token_id=259,
    eos_token_id=259,
)


def read_all(folder: Path, config: GPT2Config | None = CONFIG) -> None:
    for tensor in staticgrad.read(folder, config).tensors.values():
        assert tensor is not None


def vocabulary(tokens: list[bytes]) -> bytes:
    return b"".join(bytes([len(token)]) + token for token in tokens)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = write_model(tmp_path / "source", CONFIG, random_weights(CONFIG))
    tokenizer = tokenizer_from_bytes(TOKENS)
    assert tokenizer is not None
    save_tokenizer(tokenizer, path, context=CONFIG.n_positions)
    return path


@pytest.fixture
def written(source: Path, tmp_path: Path) -> Path:
    convert(source, tmp_path / "out", "staticgrad")
    return tmp_path / "out"


def test_files_equal_those_of_its_scripts(written: Path) -> None:
    weights = random_weights(CONFIG)
    assert sorted(path.name for path in written.iterdir()) == sorted(NAMES)
    assert detect(written) == "staticgrad"
    assert (written / NAMES[0]).read_bytes() == b"".join(w.tobytes() for w in weights.values())
    metadata = [
        {
            "name": f"transformer.{name}",
            "shape": w.shape,
            "size": w.size,
            "first two": w.flatten()[:2].tolist(),
        }
        for name, w in weights.items()
    ]
    assert (written / NAMES[1]).read_text() == json.dumps(metadata, indent=4)
    assert (written / NAMES[2]).read_bytes() == vocabulary(TOKENS)


def test_a_folder_is_read_with_its_tokenizer(written: Path) -> None:
    (written / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    found = staticgrad.read(written)
    assert found.config == CONFIG
    assert found.tokenizer is not None
    assert found.tokenizer.encode("the theth<") == [257, 258, 256, ord("<")]
    assert found.tokenizer.end_of_text_id == 259


@pytest.mark.parametrize("differs", [False, True])
def test_the_tensors_decide_if_the_head_is_tied(written: Path, differs: bool) -> None:
    head = random_weights(CONFIG)["wte.weight"] + differs
    with open(written / NAMES[0], "ab") as file:
        file.write(head.tobytes())
    metadata = json.loads((written / NAMES[1]).read_text())
    metadata.append({"name": "lm_head.weight", "shape": head.shape, "size": head.size})
    (written / NAMES[1]).write_text(json.dumps(metadata))
    found = staticgrad.read(written, CONFIG)
    assert found.config == replace(CONFIG, tie_word_embeddings=not differs)
    assert found.notes == ((OWN_HEAD_NOTE,) if differs else ())
    if differs:
        np.testing.assert_array_equal(found.tensors["lm_head.weight"], head)


def test_end_of_text_is_the_tokenizer_s_without_a_config(tmp_path: Path) -> None:
    convert("shakespeare", tmp_path / "out", "staticgrad")
    found = staticgrad.read(tmp_path / "out")
    assert found.config.eos_token_id == 0
    assert found.config.n_head == 3  # heads of width 64 are assumed; the model has 6
    assert "no number of heads" in found.notes[0]


def test_tokens_without_merges_give_a_note_and_no_tokenizer(written: Path) -> None:
    (written / NAMES[2]).write_bytes(vocabulary([*BYTES, b"the", b"th", b"he", b"<|endoftext|>"]))
    found = staticgrad.read(written, CONFIG)
    assert found.tokenizer is None
    assert "not those of a byte-level BPE" in found.notes[0]


def test_ids_without_a_token_have_no_bytes(source: Path, tmp_path: Path) -> None:
    config = CASES["124M"]
    model = write_model(tmp_path / "larger", CONFIG, random_weights(CONFIG))
    tokenizer = tokenizer_from_bytes([*TOKENS[:-2], TOKENS[-1]])
    assert tokenizer is not None
    save_tokenizer(tokenizer, model, context=CONFIG.n_positions)
    convert(model, tmp_path / "out", "staticgrad")
    expected = [*TOKENS[:-2], TOKENS[-1], b""]
    assert (tmp_path / "out" / NAMES[2]).read_bytes() == vocabulary(expected)
    assert staticgrad.read(tmp_path / "out", CONFIG).tokenizer is not None
    small = write_model(tmp_path / "small", config, random_weights(config))
    save_tokenizer(tokenizer, small, context=config.n_positions)
    with pytest.raises(TokenizerError, match="has the token id 258, the model 211 tokens"):
        convert(small, tmp_path / "no", "staticgrad")


def test_id_beyond_the_vocabulary_after_a_gap_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_from_bytes([*BYTES, b"", b"th", b"", b"the", b"<|endoftext|>"])
    assert tokenizer is not None
    assert tokenizer.vocab_size < CONFIG.vocab_size
    model = write_model(tmp_path / "source", CONFIG, random_weights(CONFIG))
    save_tokenizer(tokenizer, model, context=CONFIG.n_positions)
    with pytest.raises(TokenizerError, match="has the token id 260, the model 260 tokens"):
        convert(model, tmp_path / "out", "staticgrad")


def test_a_model_without_tokenizer_has_two_files(folder: Any, tmp_path: Path) -> None:
    convert(folder("124M"), tmp_path / "out", "staticgrad")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(NAMES[:2])
    found = staticgrad.read(tmp_path / "out", CASES["124M"])
    assert found.tokenizer is None
    for name, weight in random_weights(CASES["124M"]).items():
        assert np.asarray(found.tensors[name]).tobytes() == weight.tobytes()


@pytest.mark.parametrize("case", ["gelu-erf", "unscaled", "n-inner", "untied", "epsilon"])
def test_unsupported_settings_are_refused(case: str, folder: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="staticgrad supports only"):
        convert(folder(case), tmp_path / "out", "staticgrad")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.append(m[0]), "duplicate tensor wte.weight"),
        (lambda m: m.pop(3), "one of them is truncated, damaged or of another model"),
        (lambda m: m[0].update(name="transformer.wtf.weight"), "wte.weight is missing"),
        (lambda m: m[0].update(name="a\nb"), "entry 0 is invalid"),
        (lambda m: m[0].update(name=None), "entry 0 is invalid"),
        (lambda m: m[1].update(shape=[1, 3]), "wpe.weight has shape"),
        (lambda m: m[1].update(shape=[1, 2]), "entry 1 is invalid"),
        (lambda m: m[1].update(shape=[True, 3]), "entry 1 is invalid"),
        (lambda m: m[1].update(shape=[], size=1), "entry 1 is invalid"),
        (lambda m: m[1].update(shape=[2**60], size=2**60), "entry 1 is invalid"),
        (lambda m: m[1].update(shape=[2**40], size=2**40), "one of them is truncated"),
        (lambda m: m[1].pop("size"), "entry 1 is invalid"),
        (lambda m: m.insert(2, []), "entry 2 is invalid"),
    ],
)
def test_metadata_of_another_model_are_refused(
    edit: Callable[[Any], object], message: str, written: Path
) -> None:
    file = written / NAMES[1]
    metadata = json.loads(file.read_text())
    edit(metadata)
    file.write_text(json.dumps(metadata))
    with pytest.raises(WeightsError, match=message):
        staticgrad.read(written, CONFIG)


@pytest.mark.parametrize("text", ["", "{}", "1", "[" * 10**5, '"x"', "[1" + "0" * 5000 + "]"])
def test_metadata_without_a_list_of_tensors_are_refused(text: str, written: Path) -> None:
    (written / NAMES[1]).write_text(text)
    with pytest.raises(WeightsError, match=r"gpt2_metadata\.json"):
        staticgrad.read(written, CONFIG)


@pytest.mark.parametrize("change", [lambda d: d + b"\0", lambda d: d[:-1], lambda d: d[4:]])
def test_weights_of_another_length_are_refused(
    change: Callable[[bytes], bytes], written: Path
) -> None:
    file = written / NAMES[0]
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(WeightsError, match=r"has \d+ bytes, expected \d+ by"):
        staticgrad.read(written, CONFIG)


@pytest.mark.parametrize(
    "tokens", [TOKENS[:-1], [*TOKENS, b""], [*TOKENS, b"x" * 255]], ids=["fewer", "empty", "more"]
)
def test_another_number_of_tokens_is_refused(tokens: list[bytes], written: Path) -> None:
    (written / NAMES[2]).write_bytes(vocabulary(tokens))
    with pytest.raises(TokenizerError, match="expected 260 tokens"):
        staticgrad.read(written, CONFIG)


def other_lengths(data: bytes, rng: random.Random) -> bytes:
    """Replace the length of a token, or a digit."""
    out = bytearray(data)
    out[rng.randrange(len(out))] = rng.choice([0, 1, 2, 255, *b"0123456789[]{},-"])
    return bytes(out)


@damaged_copies
@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_refused_or_read(name: str, copies: int, written: Path) -> None:
    if name != NAMES[2]:
        (written / NAMES[2]).unlink()  # reading it takes most of the time
    file = written / name
    refused = fuzz(file, lambda: read_all(written), mutations=[other_lengths], copies=copies)
    assert refused > (0 if name == NAMES[0] else copies // 2)
    refuse_every_prefix(file, lambda: read_all(written), copies=copies)
