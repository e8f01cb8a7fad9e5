"""gptx.conversions.formats.hugging_face and mlx_folder: what folders hold, and damaged ones."""

from __future__ import annotations

import json
import random as rnd
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gptx.conversions import convert, detect, read
from gptx.conversions.containers.binary import cast
from gptx.conversions.verify import compare
from gptx.errors import ConfigError, WeightsError
from gptx.quantization import Quantization
from gptx.random_weights import random_weights
from gptx.safetensors_file import read_safetensors
from gptx.stored_weights import check_weights, read_weights
from tests.support.conversions import numbers, read_all, source_of, with_header
from tests.support.fuzz import accepted, fuzz, refuse_every_prefix
from tests.support.random_models import CASES, write_model

CONFIG = CASES["tiny"]
WEIGHTS = random_weights(CONFIG)


def header_of(data: bytes) -> tuple[dict[str, object], bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_folder_of_the_hub_is_read(
    dtype: str, shards: int, prefix: str, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "m", CONFIG, WEIGHTS, dtype=dtype, shards=shards, prefix=prefix)
    assert detect(folder) == "safetensors"
    expected = read_weights(sorted(folder.glob("*.safetensors")), CONFIG)
    found = read(folder)[1].tensors
    for name, tensor in expected.items():
        stored = found[name]
        assert isinstance(stored, np.ndarray)
        assert stored.dtype == tensor.dtype
        assert stored.tobytes() == tensor.tobytes()


def test_masks_and_a_doubled_head_are_left_out(tmp_path: Path) -> None:
    mask = np.tril(np.ones((1, 1, 64, 64), np.float32))
    extra = {"h.0.attn.bias": mask, "lm_head.weight": WEIGHTS["wte.weight"]}
    folder = write_model(tmp_path / "m", CONFIG, WEIGHTS | extra)
    assert list(read(folder)[1].tensors) == list(CONFIG.tensor_shapes())


def test_what_is_written_is_in_the_hubs_form(tmp_path: Path) -> None:
    convert(source_of("shakespeare", tmp_path), tmp_path / "out")
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    header, rest = header_of(data)
    assert header.pop("__metadata__") == {"format": "pt"}
    assert list(header) == list(read("shakespeare")[1].config.tensor_shapes())
    assert (len(data) - len(rest)) % 64 == 0, "mapped floats are aligned"
    check_weights(*_weights_of(tmp_path / "out"))
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_bytes())
    assert settings["tokenizer_class"] == "GPT2Tokenizer"
    assert settings["model_max_length"] == 256
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["torch_dtype"] == "float32"


def _weights_of(folder: Path):  # type: ignore[no-untyped-def]
    config = read(folder)[1].config
    return read_weights([folder / "model.safetensors"], config), config


def test_a_file_alone_is_read_with_the_config_beside_it(tmp_path: Path) -> None:
    folder = source_of("gelu-erf", tmp_path)
    checkpoint = read(folder / "model.safetensors")[1]
    assert checkpoint.config == CASES["gelu-erf"]
    assert checkpoint.tokenizer is None


def test_a_file_alone_says_what_was_assumed(tmp_path: Path) -> None:
    config = replace(CASES["355M"], n_head=1)
    file = write_model(tmp_path / "m", config, random_weights(config)) / "model.safetensors"
    file.with_name("config.json").unlink()
    checkpoint = read(file)[1]
    assert checkpoint.config == replace(config, bos_token_id=None, eos_token_id=None)
    assert "does not say how many heads there are: 1 of 64" in checkpoint.notes[0]


def test_a_file_alone_of_another_width_asks_for_a_config(tmp_path: Path) -> None:
    file = source_of("tiny", tmp_path) / "model.safetensors"
    file.with_name("config.json").unlink()
    with pytest.raises(ConfigError, match=r"how many heads share a width of 8.*config\.json"):
        read(file)
    assert read(file, config=CONFIG)[1].config == CONFIG


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    file = source_of("tiny", tmp_path) / "model.safetensors"
    blob = file.rename(file.with_name("0123abcd"))
    assert detect(blob) == "safetensors"
    assert read(blob)[1].config == CONFIG


@pytest.mark.parametrize("shape", [[1] * 40, [0, 2**40]])
def test_codes_that_are_no_matrix_are_refused(shape: list[int], tmp_path: Path) -> None:
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
    assert not accepted(read_all(folder), "codes")


def test_a_tokenizer_of_another_kind_travels_as_it_is(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    folder = source_of("tiny", tmp_path)
    words = {f"w{i}": i for i in range(100)} | {"[UNK]": 100}
    Tokenizer(models.WordLevel(words, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    convert(folder, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out" / "merges.txt").exists()
    assert compare(read(folder)[1], read(tmp_path / "out")[1]).tokenizer is True


def test_a_config_of_other_shapes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"wte.weight has shape \[101, 8\].*\[102, 8\]"):
        read(source_of("tiny", tmp_path), config=replace(CONFIG, vocab_size=102))


def test_mlx_folders_are_told_apart_and_read(tmp_path: Path) -> None:
    source = source_of("124M", tmp_path)
    convert(source, tmp_path / "mlx", "mlx")
    assert detect(tmp_path / "mlx") == "mlx"
    tensors = read_safetensors(tmp_path / "mlx" / "model.safetensors")[0]
    w = tensors["model.h.0.attn.c_attn.weight"]
    assert w.shape == (288, 96)
    expected = random_weights(CASES["124M"])["h.0.attn.c_attn.weight"]
    assert (w == expected.T).all()
    assert compare(read(source)[1], read(tmp_path / "mlx")[1]).identical


@pytest.mark.parametrize("case", ["untied", "gelu-erf", "relu", "n-inner"])
def test_what_mlx_lm_does_not_have_is_refused_by_name(case: str, tmp_path: Path) -> None:
    name = {"untied": "tie_word_embeddings", "n-inner": "n_inner"}.get(case, "activation_function")
    with pytest.raises(ConfigError, match=f"{name} is .*mlx-lm"):
        convert(source_of(case, tmp_path), tmp_path / "out", "mlx")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["plain", "quantized"])
def test_damaged_files_are_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    folder = source_of("tiny", tmp_path)
    if kind == "quantized":
        folder = tmp_path / "q"
        config = replace(CONFIG, n_embd=32, n_head=1)
        convert(
            write_model(tmp_path / "f", config, random_weights(config)),
            folder,
            quantize="int4",
            group_size=32,
        )
    file = folder / "model.safetensors"
    assert fuzz(file, read_all(folder), mutations=[damage_header]) > 100


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


def test_no_prefix_of_a_file_is_read(tmp_path: Path) -> None:
    folder = source_of("tiny", tmp_path)
    refuse_every_prefix(folder / "model.safetensors", read_all(folder), step=7)


@pytest.mark.parametrize("name", ["a\nb", "x" * 5000, "\0"])
def test_a_name_that_would_spoil_a_message_is_not_repeated(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", CONFIG, WEIGHTS | {name: np.zeros(1, np.float32)})
    with pytest.raises(WeightsError, match="no readable name"):
        read(folder)


def test_a_damaged_config_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = source_of("tiny", tmp_path)
    assert fuzz(folder / "config.json", read_all(folder)) > 100


@pytest.mark.parametrize(
    "index",
    [b"", b"[]", b'{"weight_map": 3}', b'{"weight_map": {}}', b'{"weight_map": {"a": "../b"}}'],
)
def test_a_damaged_index_is_refused_in_one_line(index: bytes, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", CONFIG, WEIGHTS, shards=2)
    (folder / "model.safetensors.index.json").write_bytes(index)
    assert not accepted(read_all(folder), "the index")


def test_casting_rounds_to_nearest_even_and_refuses_what_does_not_fit() -> None:
    x = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -0.0, np.inf, np.nan, 3e38], np.float32)
    bits = cast(x, "bfloat16", "x").tolist()
    assert bits[:5] == [0x3F80, 0x3F80, 0x3F82, 0x8000, 0x7F80]
    assert bits[5] & 0x7F80 == 0x7F80
    assert bits[5] & 0x7F  # still no number
    for dtype, number in (("float16", 65520.0), ("bfloat16", np.float32(3.4e38))):
        with pytest.raises(WeightsError, match=f"x holds a number that is too large for {dtype}"):
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
