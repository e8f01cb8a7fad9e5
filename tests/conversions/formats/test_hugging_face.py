"""gptx.conversions.formats.hugging_face and mlx_lm: valid folders, and damaged ones."""

from __future__ import annotations

import json
import random as rnd
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptx
from gptx.conversions import convert, detect, read
from gptx.conversions.containers.binary import cast
from gptx.conversions.formats.hugging_face import write_folder
from gptx.conversions.verify import compare
from gptx.errors import ConfigError, GptxError, WeightsError
from gptx.quantization import Quantization
from gptx.random_weights import random_tensors, random_weights
from gptx.safetensors_file import read_safetensors
from gptx.safetensors_weights import open_weights
from gptx.stored_weights import check_weights
from tests.support.cli import run
from tests.support.conversions import numbers, read_all, source_of, with_header
from tests.support.fuzz import accepted, fuzz, refuse_every_prefix
from tests.support.random_models import CASES, write_model

CONFIG = CASES["tiny"]
WEIGHTS = random_weights(CONFIG)


def header_of(data: bytes) -> tuple[dict[str, object], bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


# Reading


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_folder_of_the_hub_is_read(
    dtype: str, shards: int, prefix: str, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "m", CONFIG, WEIGHTS, dtype=dtype, shards=shards, prefix=prefix)
    assert detect(folder) == "safetensors"
    expected = open_weights(sorted(folder.glob("*.safetensors")), CONFIG).map()
    found = read(folder)[1].tensors
    for name, tensor in expected.items():
        stored = found[name]
        assert isinstance(stored, np.ndarray)
        assert isinstance(tensor, np.ndarray)
        assert stored.dtype == tensor.dtype
        assert stored.tobytes() == tensor.tobytes()


def test_masks_and_the_duplicate_of_a_tied_head_are_dropped(tmp_path: Path) -> None:
    mask = np.tril(np.ones((1, 1, 64, 64), np.float32))
    extra = {"h.0.attn.bias": mask, "lm_head.weight": WEIGHTS["wte.weight"]}
    folder = write_model(tmp_path / "m", CONFIG, WEIGHTS | extra)
    assert list(read(folder)[1].tensors) == list(CONFIG.tensor_shapes())


def test_a_single_file_is_read_with_the_config_beside_it(tmp_path: Path) -> None:
    folder = source_of("gelu-erf", tmp_path)
    checkpoint = read(folder / "model.safetensors")[1]
    assert checkpoint.config == CASES["gelu-erf"]
    assert checkpoint.tokenizer is None


def test_the_assumptions_for_a_single_file_without_a_config(tmp_path: Path) -> None:
    config = replace(CASES["355M"], n_head=1)
    file = write_model(tmp_path / "m", config, random_weights(config)) / "model.safetensors"
    file.with_name("config.json").unlink()
    checkpoint = read(file)[1]
    assert checkpoint.config == replace(config, bos_token_id=None, eos_token_id=None)
    assert "no number of heads: 1 of width 64" in checkpoint.notes[0]


def test_a_single_file_of_another_width_needs_a_config(tmp_path: Path) -> None:
    file = source_of("tiny", tmp_path) / "model.safetensors"
    file.with_name("config.json").unlink()
    with pytest.raises(ConfigError, match=r"number of heads is missing.*width 8.*config\.json"):
        read(file)
    assert read(file, config=CONFIG)[1].config == CONFIG


def test_a_file_is_detected_by_its_content(tmp_path: Path) -> None:
    file = source_of("tiny", tmp_path) / "model.safetensors"
    blob = file.rename(file.with_name("0123abcd"))
    assert detect(blob) == "safetensors"
    assert read(blob)[1].config == CONFIG


def test_a_config_of_other_shapes(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"wte.weight has shape \[101, 8\].*\[102, 8\]"):
        read(source_of("tiny", tmp_path), config=replace(CONFIG, vocab_size=102))


def test_mlx_folders_are_detected_and_read(tmp_path: Path) -> None:
    source = source_of("124M", tmp_path)
    convert(source, tmp_path / "mlx", "mlx")
    assert detect(tmp_path / "mlx") == "mlx"
    tensors = read_safetensors(tmp_path / "mlx" / "model.safetensors")[0]
    w = tensors["model.h.0.attn.c_attn.weight"]
    assert w.shape == (288, 96)
    expected = random_weights(CASES["124M"])["h.0.attn.c_attn.weight"]
    assert (w == expected.T).all()
    assert compare(read(source)[1], read(tmp_path / "mlx")[1]).identical


# Writing


def test_a_written_folder_has_the_form_of_the_hub(tmp_path: Path) -> None:
    convert(source_of("shakespeare", tmp_path), tmp_path / "out")
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    header, rest = header_of(data)
    config = read("shakespeare")[1].config
    assert header.pop("__metadata__") == {"format": "pt"}
    assert list(header) == list(config.tensor_shapes())
    assert (len(data) - len(rest)) % 64 == 0, "mapped floats are aligned"
    check_weights(open_weights([tmp_path / "out" / "model.safetensors"], config).map(), config)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_bytes())
    assert settings["tokenizer_class"] == "GPT2Tokenizer"
    assert settings["model_max_length"] == 256
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["torch_dtype"] == "float32"


def test_tensors_one_by_one_make_the_same_folder(tmp_path: Path) -> None:
    convert(source_of("tiny", tmp_path), tmp_path / "converted", dtype="float16")
    (tmp_path / "written").mkdir()
    write_folder(tmp_path / "written", CONFIG, random_tensors(CONFIG), dtype="float16")
    for name in ("config.json", "model.safetensors"):
        written, converted = (tmp_path / f / name for f in ("written", "converted"))
        assert written.read_bytes() == converted.read_bytes()


def test_a_tokenizer_of_another_kind_is_copied_unchanged(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    folder = source_of("tiny", tmp_path)
    words = {f"w{i}": i for i in range(100)} | {"[UNK]": 100}
    Tokenizer(models.WordLevel(words, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    convert(folder, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out" / "merges.txt").exists()
    assert compare(read(folder)[1], read(tmp_path / "out")[1]).tokenizer is True


@pytest.mark.parametrize("case", ["untied", "gelu-erf", "relu", "n-inner"])
def test_a_setting_that_mlx_lm_does_not_support(case: str, tmp_path: Path) -> None:
    name = {"untied": "tie_word_embeddings", "n-inner": "n_inner"}.get(case, "activation_function")
    with pytest.raises(ConfigError, match=f"{name} is .*mlx-lm"):
        convert(source_of(case, tmp_path), tmp_path / "out", "mlx")
    assert not (tmp_path / "out").exists()


def test_casting_rounds_to_nearest_even_and_refuses_overflow() -> None:
    x = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -0.0, np.inf, np.nan, 3e38], np.float32)
    bits = cast(x, "bfloat16", "x").tolist()
    assert bits[:5] == [0x3F80, 0x3F80, 0x3F82, 0x8000, 0x7F80]
    assert bits[5] & 0x7F80 == 0x7F80
    assert bits[5] & 0x7F  # a NaN
    for dtype, number in (("float16", 65520.0), ("bfloat16", np.float32(3.4e38))):
        with pytest.raises(WeightsError, match=f"x .* too large for {dtype}"):
            cast(np.array([1, number], np.float32), dtype, "x")
    assert np.isinf(cast(np.array([np.inf], np.float32), "float16", "x")).all()


def test_float64_is_read_and_written_as_float32(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    folder = source_of("tiny", tmp_path)
    wide = {name: tensor.astype(np.float64) for name, tensor in WEIGHTS.items()}
    save_file(wide, folder / "model.safetensors")
    convert(folder, tmp_path / "out")
    for name, tensor in numbers(read(tmp_path / "out")[1]).items():
        assert tensor.dtype == np.float32
        assert (tensor == WEIGHTS[name]).all()


# One message for one fault


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_header(folder: Path, old: bytes, new: bytes) -> None:
    path = folder / "model.safetensors"
    assert len(old) == len(new)
    path.write_bytes(path.read_bytes().replace(old, new, 1))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


EXTRA = np.zeros(8, np.float32)
INT4 = {"group_size": 32, "bits": 4}

# Name -> changed tensors (None: missing), number of shards, damage, part of the message
FAULTS: dict[str, tuple[dict[str, Any], int, Callable[[Path], object], str]] = {
    "missing": ({"ln_f.bias": None}, 1, bool, "tensor ln_f.bias is missing"),
    "many missing": (dict.fromkeys(WEIGHTS), 1, bool, "and 12 more are missing"),
    "duplicate": ({"transformer.ln_f.bias": EXTRA}, 1, bool, "duplicate tensor ln_f.bias"),
    "unknown": ({"h.1.ln_1.bias": EXTRA}, 1, bool, "tensor h.1.ln_1.bias is unknown"),
    "other shape": (
        {},
        1,
        lambda folder: edit_config(folder, vocab_size=102),
        "tensor wte.weight has shape [101, 8], expected [102, 8]",
    ),
    "integers": (
        {},
        1,
        lambda folder: edit_header(folder, b'"F32"', b'"I32"'),
        "tensor wte.weight is of type int32, expected a float type",
    ),
    "type not supported": (
        {"x": np.zeros(1, np.float32)},
        1,
        lambda folder: edit_header(
            folder, b'"x": {"dtype": "F32", "shape": [1]', b'"x": {"dtype": "F4", "shape": [8] '
        ),
        "tensor x is of type F4, expected one of F64",
    ),
    "invalid name": ({"a\nb": EXTRA}, 1, bool, "a tensor with an invalid name"),
    "truncated": ({}, 1, lambda folder: truncate(folder / "model.safetensors"), "truncated"),
    "truncated shard": (
        {},
        2,
        lambda folder: truncate(folder / "model-00002-of-00002.safetensors"),
        "truncated",
    ),
    "missing in shards": ({"ln_f.bias": None}, 2, bool, "tensor ln_f.bias is missing"),
    "missing shard": (
        {},
        2,
        lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(),
        "model-00002-of-00002.safetensors is missing",
    ),
    "bad index": (
        {},
        2,
        lambda folder: (folder / "model.safetensors.index.json").write_text("{"),
        'expected JSON with an object "weight_map"',
    ),
    "empty index": (
        {},
        2,
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
        'has an empty "weight_map"',
    ),
    "invalid config": (
        {},
        1,
        lambda folder: edit_config(folder, n_head=3),
        "n_embd 8 is not a multiple of n_head 3",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_load_and_convert_have_the_same_message(fault: str, tmp_path: Path) -> None:
    changes, shards, damage, expected = FAULTS[fault]
    weights = {name: array for name, array in (WEIGHTS | changes).items() if array is not None}
    if not weights:
        weights = {"wte.weight": WEIGHTS["wte.weight"]}
    folder = write_model(tmp_path / "m", CONFIG, weights, shards=shards)
    damage(folder)
    with pytest.raises(GptxError) as loaded:
        gptx.load(folder)
    with pytest.raises(GptxError) as converted:
        convert(folder, tmp_path / "out")
    message = str(loaded.value)
    assert expected in message
    assert str(folder) in message
    assert "\n" not in message
    assert str(converted.value) == message
    assert type(converted.value) is type(loaded.value)
    checked = run("convert", "--check", str(folder))
    message = message.replace("ignore_unknown=True", "--ignore-unknown")
    assert checked.err == f"Error: {message}\n"
    assert checked.code == loaded.value.exit_code


def test_convert_reads_floats_whose_config_has_a_quantization(tmp_path: Path) -> None:
    config = replace(CASES["355M"], quantization=Quantization(64, 8))
    source = write_model(tmp_path / "s", config, random_weights(config))
    assert read(source)[1].notes == (
        "no tensor is int8 in groups of 64 as in the config: all are floats",
    )
    convert(source, tmp_path / "out", quantize="int8")
    assert read(tmp_path / "out")[1].stored["wte.weight"].quantization == Quantization(64, 8)


# Damaged files


@pytest.mark.parametrize("shape", [[1] * 40, [0, 2**40]])
def test_quantized_values_that_are_not_a_matrix(shape: list[int], tmp_path: Path) -> None:
    folder = source_of("tiny", tmp_path)
    config = replace(CONFIG, quantization=Quantization(32, 4)).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    n_bytes = 0 if 0 in shape else 4
    header = {
        f"model.wte.{part}": {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}
        for part, dtype in (("weight", "U32"), ("scales", "F32"), ("biases", "F32"))
    }
    for i, entry in enumerate(header.values()):
        entry["data_offsets"] = [i * n_bytes, (i + 1) * n_bytes]
    data = with_header(json.dumps(header).encode(), bytes(3 * n_bytes))
    (folder / "model.safetensors").write_bytes(data)
    assert not accepted(read_all(folder), "quantized values")


# More copies than `damaged_copies` has, for the format that gptx loads.
many_damaged_copies = pytest.mark.parametrize(
    "copies", [60, pytest.param(2000, marks=pytest.mark.fuzz)]
)


@many_damaged_copies
@pytest.mark.parametrize("kind", ["floats", "quantized"])
def test_damaged_files_are_refused_in_one_line(kind: str, copies: int, tmp_path: Path) -> None:
    folder = source_of("tiny", tmp_path)
    if kind == "quantized":
        folder = tmp_path / "q"
        config = replace(CONFIG, n_embd=32, n_head=1)
        floats = write_model(tmp_path / "f", config, random_weights(config))
        convert(floats, folder, quantize="int4", group_size=32)
    file = folder / "model.safetensors"
    damaged = fuzz(file, read_all(folder), mutations=[damage_header], copies=copies)
    assert damaged > copies // 2


def damage_header(data: bytes, rng: rnd.Random) -> bytes:
    """Change a value in the header, which stays JSON of the right length."""
    header, rest = header_of(data)
    name = rng.choice(list(header))
    entry = header[name]
    assert isinstance(entry, dict)
    kind = rng.randrange(5)
    if kind == 0:
        header[rng.choice(["", name + "x", "wte.weight", "model.wte.scales"])] = header.pop(name)
    elif kind == 1:
        entry["dtype"] = rng.choice(["F64", "U32", "BOOL", "F8_E4M3", "F16", "X", 3, None])
    elif kind == 2:
        entry["shape"] = rng.choice([[], [0], [-1], [2**63], [1] * 70, "x", [8, 8], None, [1e9]])
    elif kind == 3:
        offset = rng.choice([0, -1, 2**64, 1.5, 100])
        entry["data_offsets"] = rng.choice([[offset, 8], [8, offset], [0], "01", None])
    else:
        entry[rng.choice(["more", "shape"])] = [dict(entry)]
    return with_header(json.dumps(header).encode(), rest)


@many_damaged_copies
def test_a_damaged_config_is_refused_in_one_line(copies: int, tmp_path: Path) -> None:
    folder = source_of("tiny", tmp_path)
    assert fuzz(folder / "config.json", read_all(folder), copies=copies) > copies // 2


@pytest.mark.parametrize("step", [61, pytest.param(1, marks=pytest.mark.fuzz)])
def test_no_truncated_file_is_read(step: int, tmp_path: Path) -> None:
    folder = source_of("tiny", tmp_path)
    refuse_every_prefix(folder / "model.safetensors", read_all(folder), step=step)


@pytest.mark.parametrize(
    "index",
    [b"", b"[]", b'{"weight_map": 3}', b'{"weight_map": {}}', b'{"weight_map": {"a": "../b"}}'],
)
def test_a_damaged_index_is_refused_in_one_line(index: bytes, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", CONFIG, WEIGHTS, shards=2)
    (folder / "model.safetensors.index.json").write_bytes(index)
    assert not accepted(read_all(folder), "the index")
