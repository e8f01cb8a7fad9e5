"""gptx.conversions.formats.pytorch_folder: pytorch_model.bin of old and new PyTorch."""

from __future__ import annotations

import itertools
import json
import random as rnd
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptx
from gptx.config import GPT2Config
from gptx.conversions import convert, detect, read
from gptx.conversions.checkpoint import Checkpoint
from gptx.conversions.containers import torch_file
from gptx.conversions.formats import pytorch_folder
from gptx.errors import ConfigError, NotFoundError, WeightsError
from gptx.model_files import MAX_INDEX_BYTES
from gptx.random_weights import random_weights
from gptx.stored_weights import OWN_HEAD_NOTE, is_linear_weight
from tests.support import embedded_tokenizer
from tests.support.files.torch_files import (
    CONTAINERS,
    Pickle,
    Raw,
    View,
    legacy_bytes,
    state_dict,
    view,
    write_folder,
    zip_bytes,
    zip_of,
)
from tests.support.fuzz import MUTATIONS, accepted, damaged_copies, fuzz, refuse_every_prefix
from tests.support.models import EXACT, make_model
from tests.support.random_models import CASES, random_ids, to_bfloat16

GOLDEN = Path(__file__).parents[2] / "golden" / "torch"
GOLDEN_CONFIG = GPT2Config(
    vocab_size=19, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=None,
    eos_token_id=None,
)  # fmt: skip
CONFIG = CASES["tiny"]
WEIGHTS = random_weights(CONFIG)
SMALL = random_weights(GOLDEN_CONFIG)  # smaller, for damaged files


@pytest.fixture(params=list(CONTAINERS))
def container(request: pytest.FixtureRequest) -> Any:
    return CONTAINERS[request.param]


def bits_of(array: np.ndarray, dtype: str) -> bytes:
    """Convert float32 to the bytes of another type."""
    return to_bfloat16(array).tobytes() if dtype == "bfloat16" else array.astype(dtype).tobytes()


def assert_contains(checkpoint: Checkpoint, weights: dict[str, np.ndarray], dtype: str) -> None:
    assert list(checkpoint.tensors) == list(weights)
    for name, tensor in checkpoint.tensors.items():
        assert isinstance(tensor, np.ndarray)
        assert tensor.shape == weights[name].shape
        assert tensor.tobytes() == bits_of(weights[name], dtype), name


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.bin")), ids=lambda file: file.stem)
def test_files_of_pytorch_are_read_bit_for_bit(file: Path) -> None:
    assert detect(file) == "pytorch"
    dtype = file.name.partition("-")[0]
    checkpoint = read(file, config=GOLDEN_CONFIG)[1]
    assert_contains(checkpoint, random_weights(GOLDEN_CONFIG), dtype)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *zip(CASES, itertools.cycle(["float32", "float16", "bfloat16", "float64"])),
        *(("tiny", dtype) for dtype in ("float32", "float16", "bfloat16")),
    ],
)
def test_every_model_and_type_is_read_bit_for_bit(
    case: str, dtype: str, container: Any, tmp_path: Path
) -> None:
    config, weights = CASES[case], random_weights(CASES[case])
    folder = write_folder(tmp_path / "m", config, container(state_dict(weights, dtype)))
    checkpoint = read(folder)[1]
    assert checkpoint.config == config
    assert_contains(checkpoint, weights, dtype)


def test_a_converted_folder_computes_the_same(container: Any, tmp_path: Path) -> None:
    config, tokenizer = embedded_tokenizer.CONFIG, embedded_tokenizer.load_tokenizer()
    weights = random_weights(config)
    source = write_folder(tmp_path / "bin", config, container(state_dict(weights)))
    embedded_tokenizer.copy_tokenizer(source)
    convert(source, tmp_path / "out")
    ids = random_ids(config, 1, 20).tolist()[0]
    expected = make_model(config, EXACT, weights).logits(ids)
    for folder in (source, tmp_path / "out"):
        loaded = gptx.load(folder, backend=EXACT)
        assert (loaded.logits(ids) == expected).all()
        assert loaded.encode("All's well") == tokenizer.encode("All's well")


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_shards_are_read_by_their_index(prefix: str, container: Any, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    found = state_dict(WEIGHTS, prefix=prefix)
    names, parts = list(found), {}
    for i, some in enumerate((names[:7], names[7:]), start=1):
        file = f"pytorch_model-{i:05d}-of-00002.bin"
        write_folder(folder, CONFIG, container({name: found[name] for name in some}), file)
        parts |= dict.fromkeys(some, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": parts}))
    assert detect(folder) == "pytorch"
    assert_contains(read(folder)[1], WEIGHTS, "float32")
    (folder / file).unlink()
    with pytest.raises(NotFoundError, match=f"{file} is missing"):
        read(folder)


def test_equal_storage_keys_of_two_shards_are_distinct(container: Any, tmp_path: Path) -> None:
    """Each shard numbers its storages from 0."""
    config = replace(CASES["355M"], n_head=1, tie_word_embeddings=False, bos_token_id=None)
    config = replace(config, eos_token_id=None)
    weights = random_weights(config)
    head = {"lm_head.weight": view(weights["lm_head.weight"])}
    rest = {name: view(array) for name, array in weights.items() if name not in head}
    folder = tmp_path / "m"
    write_folder(folder, config, container(rest), "a.bin")
    write_folder(folder, config, container(head), "b.bin")
    (folder / "config.json").unlink()
    index = {"weight_map": {"wte.weight": "a.bin", "lm_head.weight": "b.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    checkpoint = read(folder)[1]
    assert checkpoint.config == config
    assert_contains(checkpoint, weights, "float32")


def test_without_a_config_a_shared_head_is_tied(container: Any, tmp_path: Path) -> None:
    config = replace(CASES["355M"], n_head=1, bos_token_id=None, eos_token_id=None)
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(container(state_dict(random_weights(config))))
    checkpoint = read(file)[1]
    assert checkpoint.config == config
    assert checkpoint.notes == (
        "the file has no number of heads: 1 of width 64 are assumed, with the activation gelu_new, "
        "as in OpenAI's models (if that is wrong, give the model's config.json)",
    )
    file.write_bytes(container(state_dict(WEIGHTS)))
    with pytest.raises(ConfigError, match=r"the width 8 is.*config\.json"):
        read(file)


def test_views_are_read_with_their_strides(container: Any, tmp_path: Path) -> None:
    base = np.arange(400, dtype=np.float32)
    w = WEIGHTS["h.0.attn.c_proj.weight"]
    found = state_dict(WEIGHTS, prefix="")
    found["h.0.attn.c_proj.weight"] = View(w.T.ravel(), 0, (8, 8), (1, 8))
    found["h.0.mlp.c_fc.weight"] = View(base, 5, (8, 32), (40, 1))
    found["ln_f.weight"] = View(base, 1, (8,), (50,))
    expected = WEIGHTS | {
        "h.0.mlp.c_fc.weight": base.reshape(10, 40)[:8, 5:37],
        "ln_f.weight": base[1::50],
    }
    folder = write_folder(tmp_path / "m", CONFIG, container(found))
    assert_contains(read(folder)[1], expected, "float32")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_file_of_a_big_endian_machine_is_read(dtype: str, tmp_path: Path) -> None:
    data = zip_bytes(state_dict(WEIGHTS, dtype), order="big")
    assert_contains(read(write_folder(tmp_path / "m", CONFIG, data))[1], WEIGHTS, dtype)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([1, 2], "has no dict of tensors"),
        ({}, "has no tensor, expected the tensors of a GPT-2"),
        (
            {"state_dict": {}, "epoch\n": 3},
            r"has no state_dict of a GPT-2: found the keys state_dict, epoch\\n$",
        ),
        (
            dict.fromkeys(map(str, range(10))),
            "no state_dict of a GPT-2: found the keys 0, .*, 7 and 2 more$",
        ),
        ({"bert.w": view(np.ones(3))}, "it has bert.w, expected the tensors of a GPT-2"),
        ({"wte.weight\n": view(np.ones(3))}, "an invalid name"),
        ({"ln_f.weight": View(np.ones(3, "<f4"), 1, (3,), (1,))}, "is not within its storage"),
        ({"ln_f.weight": View(np.ones(3, "<f4"), 0, (3,), (-1,))}, "is not within its storage"),
        ({"ln_f.weight": View(np.ones(3, "<f4"), 0, (10**9,), (0,))}, "overlaps itself"),
        (state_dict(WEIGHTS) | {"ln_f.weight": view(WEIGHTS["ln_f.weight"])}, "duplicate tensor"),
        (state_dict(WEIGHTS) | {"x.weight": view(np.ones(3))}, "x.weight is unknown"),
        (
            state_dict(WEIGHTS) | {"transformer.ln_f.bias": View(np.ones(8, "<i8"), 0, (8,), (1,))},
            "ln_f.bias is of type int64",
        ),
    ],
)
def test_invalid_models_are_refused(
    found: Any, message: str, container: Any, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "m", CONFIG, container(found))
    with pytest.raises(WeightsError, match=message):
        read(folder)


# Checkpoints of trainers

STATE = state_dict(WEIGHTS)
MOMENTS = {"wte.weight": view(np.ones((101, 8))), "h.0.ln_1.bias": view(np.ones(8))}
SCRIPT_CONFIG = Raw(b"c__main__\nGPTConfig\n)\x81}X\x05\0\0\0n_embK\x08sb")  # an object of a class
REST = {"epoch": 3, "optimizer": {"state": {"0": {"exp_avg": view(np.ones(8))}}, "lr": 1e-3}}
TRAINERS: dict[str, Any] = {
    "model_state_dict": {"model_state_dict": STATE, **REST},
    "Lightning": {"state_dict": {f"model.{name}": x for name, x in STATE.items()}, **REST},
    "a script with its config": {"model": STATE, "config": SCRIPT_CONFIG, **REST},
    "DeepSpeed": {"module": {f"module.{name}": x for name, x in STATE.items()}, **REST},
    "an unusual key": {**REST, "step_9": {"policy": STATE}},
    "moments under names": {"optimizer": {"exp_avg": MOMENTS}, "model": STATE},
    "numbers beside the tensors": {**STATE, "epoch": 3, "best": None},
    "torch.compile, then DDP": {f"module._orig_mod.{name}": x for name, x in STATE.items()},
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_checkpoint_of_a_trainer(trainer: str, container: Any, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", CONFIG, container(TRAINERS[trainer]), "last.ckpt")
    name, checkpoint = read(folder / "last.ckpt")
    assert name == "pytorch"
    assert checkpoint.config == CONFIG
    assert_contains(checkpoint, WEIGHTS, "float32")
    several = trainer == "moments under names"
    assert checkpoint.notes == (
        ("the file has several models: model is read, not optimizer.exp_avg",) if several else ()
    )


def test_empty_tensors_of_a_partitioned_model_are_named(container: Any, tmp_path: Path) -> None:
    empty = {f"module.{name}": view(np.ones(0)) for name in STATE if "attn.bias" not in name}
    folder = write_folder(tmp_path / "m", CONFIG, container({"module": empty, **REST}), "a.pt")
    with pytest.raises(WeightsError, match=r"a\.pt has empty tensors only.*zero_to_fp32\.py"):
        read(folder / "a.pt")


def test_matrices_of_linear_modules_are_transposed(container: Any, tmp_path: Path) -> None:
    """A script's own model, as in build-nanogpt: [out, in], without a config.json."""
    config = replace(CASES["355M"], n_head=1, bos_token_id=None, eos_token_id=None)
    weights = random_weights(config)
    found = {
        name: view(array.T if is_linear_weight(name) else array) for name, array in weights.items()
    }
    file = tmp_path / "model_00100.pt"
    file.write_bytes(container({"model": found, "config": SCRIPT_CONFIG}))
    checkpoint = read(file)[1]
    assert checkpoint.config == config
    assert_contains(checkpoint, weights, "float32")


def test_layers_may_share_weights_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a small file could fill the memory."""
    config = replace(CONFIG, n_layer=40)
    layer = {name: x for name, x in STATE.items() if name.startswith("transformer.h.0.")}
    shared = STATE | {
        name.replace("h.0.", f"h.{i}."): x for i in range(40) for name, x in layer.items()
    }
    folder = write_folder(tmp_path / "m", config, zip_bytes(shared))
    assert read(folder)[1].config == config
    size = (folder / "pytorch_model.bin").stat().st_size
    sharing = 4 * config.n_parameters / size
    assert sharing > 1
    monkeypatch.setattr(pytorch_folder, "MAX_SHARING", sharing + 0.01)
    assert read(folder)[1].config == config
    monkeypatch.setattr(pytorch_folder, "MAX_SHARING", sharing - 0.01)
    with pytest.raises(WeightsError, match=rf"have \d+ bytes, the file {size}: it is damaged"):
        read(folder)


def test_several_models_of_unusual_keys_are_refused(container: Any, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", CONFIG, container({"policy": STATE, "ref": STATE | {}}))
    with pytest.raises(WeightsError, match=r"has several models \(policy, ref\): save one of them"):
        read(folder)


def test_a_dict_below_many_keys_is_not_searched(tmp_path: Path) -> None:
    for depth, is_found in ((3, True), (4, False)):
        value: Any = STATE
        for _ in range(depth):
            value = {"a": value}
        folder = write_folder(tmp_path / f"{depth}", CONFIG, zip_bytes(value))
        if is_found:
            assert_contains(read(folder)[1], WEIGHTS, "float32")
        else:
            with pytest.raises(
                WeightsError, match=r"has no state_dict of a GPT-2: found the keys a$"
            ):
                read(folder)


def test_unknown_tensors_are_left_out_on_request(container: Any, tmp_path: Path) -> None:
    extra = {"clip.weight": view(np.ones(3)), "transformer.h.1.ln_1.bias": view(np.ones(8))}
    folder = write_folder(tmp_path / "m", CONFIG, container(STATE | extra))
    with pytest.raises(WeightsError, match=r"tensor clip\.weight is unknown"):
        read(folder)
    checkpoint = read(folder, ignore_unknown=True)[1]
    assert_contains(checkpoint, WEIGHTS, "float32")
    assert checkpoint.notes == (
        "tensor clip.weight is unknown: left out",
        "tensor h.1.ln_1.bias is unknown: left out",
    )


def test_a_head_that_differs_is_used(container: Any, tmp_path: Path) -> None:
    head = WEIGHTS["wte.weight"].copy()
    head[100, 7] += 1
    folder = write_folder(tmp_path / "m", CONFIG, container(STATE | {"lm_head.weight": view(head)}))
    checkpoint = read(folder)[1]
    assert checkpoint.config == replace(CONFIG, tie_word_embeddings=False)
    assert checkpoint.notes == (OWN_HEAD_NOTE,)
    assert_contains(checkpoint, WEIGHTS | {"lm_head.weight": head}, "float32")
    equal = state_dict(WEIGHTS) | {"lm_head.weight": view(WEIGHTS["wte.weight"])}
    folder = write_folder(tmp_path / "equal", CONFIG, container(equal))
    assert read(folder)[1].config == CONFIG
    only = state_dict(WEIGHTS)
    only["lm_head.weight"] = only.pop("transformer.wte.weight")
    folder = write_folder(tmp_path / "only", CONFIG, container(only))
    assert_contains(read(folder)[1], WEIGHTS, "float32")


@pytest.mark.parametrize("table", ["float16", "transposed"])
def test_an_equal_head_of_another_form_is_tied(table: str, container: Any, tmp_path: Path) -> None:
    w = WEIGHTS["wte.weight"].astype(np.float16).astype(np.float32)
    head = view(w)
    stored = view(w, "float16") if table == "float16" else View(w.T.ravel(), 0, w.shape, (1, 101))
    found = state_dict(WEIGHTS, prefix="") | {"wte.weight": stored, "lm_head.weight": head}
    checkpoint = read(write_folder(tmp_path / "m", CONFIG, container(found)))[1]
    assert checkpoint.config == CONFIG
    assert checkpoint.notes == ()
    np.testing.assert_array_equal(checkpoint.tensors["wte.weight"], w)


def test_checksum_of_an_archive_detects_a_changed_number(tmp_path: Path) -> None:
    part = View(np.arange(400, dtype=np.float32), 5, (8,), (1,))
    for name, value in (("wte.weight", view(WEIGHTS["wte.weight"])), ("ln_f.weight", part)):
        found = state_dict(WEIGHTS, prefix="") | {name: value}
        data = bytearray(zip_bytes(found))
        data[data.index(value.storage.tobytes()) + 4 * value.storage.size - 1] ^= 1
        folder = write_folder(tmp_path / "m", CONFIG, bytes(data))
        with pytest.raises(WeightsError, match=f"{name} is damaged .its CRC-32 differs"):
            read(folder)[1].tensors[name]


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", CONFIG, zip_bytes(state_dict(WEIGHTS)))
    packed = tmp_path / "packed.bin"
    with (
        zipfile.ZipFile(folder / "pytorch_model.bin") as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(WeightsError, match="compressed or encrypted"):
        read(packed, config=CONFIG)


def test_other_files_are_not_detected(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("word/document.xml", "text")
    (tmp_path / "pickle.bin").write_bytes(b"\x80\x02}.")
    (tmp_path / "empty.bin").write_bytes(b"")
    for file in tmp_path.iterdir():
        assert not pytorch_folder.detect(file)


@pytest.mark.parametrize("extra", [b"\0", b"PK\5\6" + bytes(18)])
def test_bytes_after_the_end_are_refused(extra: bytes, container: Any, tmp_path: Path) -> None:
    data = container(state_dict(WEIGHTS))
    folder = write_folder(tmp_path / "m", CONFIG, data + extra)
    with pytest.raises(WeightsError):
        read(folder)


def use_of(folder: Path) -> Any:
    """Return a function that reads every number."""

    def use() -> None:
        for tensor in pytorch_folder.read(folder).tensors.values():
            assert tensor is not None

    return use


@damaged_copies
def test_damaged_files_are_refused_in_one_line(copies: int, container: Any, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", GOLDEN_CONFIG, container(state_dict(SMALL)))
    assert fuzz(folder / "pytorch_model.bin", use_of(folder), copies=copies) > copies // 2


@damaged_copies
def test_damaged_pickles_are_refused_in_one_line(
    copies: int, container: Any, tmp_path: Path
) -> None:
    """Valid checksums let the damage reach the unpickler."""
    pickle = Pickle(state_dict(SMALL), legacy=container is legacy_bytes)

    def damage(data: bytes, rng: rnd.Random) -> bytes:
        code = rng.choice(MUTATIONS)(pickle.code, rng)
        if container is legacy_bytes:
            return data.replace(pickle.code, code)
        return zip_of(code, pickle.storages)

    folder = write_folder(tmp_path / "m", GOLDEN_CONFIG, container(state_dict(SMALL)))
    file = folder / "pytorch_model.bin"
    refused = fuzz(file, use_of(folder), mutations=[damage] * 9, copies=copies)
    assert refused > copies // 2


@damaged_copies
def test_a_damaged_archive_of_64_bits_is_refused(copies: int, tmp_path: Path) -> None:
    """Only the directory of a file that PyTorch wrote has 64-bit numbers."""
    file = tmp_path / "m.bin"
    file.write_bytes((GOLDEN / "float32-zip.bin").read_bytes())

    def use() -> None:
        for tensor in pytorch_folder.read(file, GOLDEN_CONFIG).tensors.values():
            assert tensor is not None

    assert fuzz(file, use, copies=copies) > copies // 2


@damaged_copies
def test_every_prefix_is_refused(copies: int, container: Any, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", GOLDEN_CONFIG, container(state_dict(SMALL)))
    file = folder / "pytorch_model.bin"
    refuse_every_prefix(file, use_of(folder), copies=copies, step=5)


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    index = tmp_path / "pytorch_model.bin.index.json"
    for text in ("", "[]", '{"weight_map": {"a": "../b.bin"}}', '{"weight_map": {}}'):
        index.write_text(text)
        assert not accepted(lambda: pytorch_folder.read(tmp_path), text)
    index.write_text('{"weight_map": {"a": "b.bin"}}' + " " * MAX_INDEX_BYTES)
    with pytest.raises(WeightsError, match=f"of at most {MAX_INDEX_BYTES} bytes"):
        pytorch_folder.read(tmp_path)


def test_tensors_are_read_on_request(
    container: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "m", CONFIG, container(state_dict(WEIGHTS)))
    taken: list[str] = []
    map_array = torch_file.BinaryFile.map

    def counted(self: Any, offset: int, shape: Any, dtype: Any, label: str) -> Any:
        taken.append(label)
        return map_array(self, offset, shape, dtype, label)

    monkeypatch.setattr(torch_file.BinaryFile, "map", counted)
    checkpoint = read(folder)[1]
    assert not taken
    checkpoint.tensors["ln_f.weight"]
    assert taken == ["tensor ln_f.weight"]
