"""gptx.conversions.formats.nanogpt: ckpt.pt as nanoGPT's train.py saves it."""

from __future__ import annotations

import random as rnd
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptx
from gptx.config import GPT2Config
from gptx.conversions import convert, detect, read
from gptx.conversions.containers import torch_file
from gptx.conversions.formats import nanogpt as nanogpt_file
from gptx.errors import ConfigError, WeightsError
from gptx.random_weights import random_weights
from gptx.safetensors_file import widen_bfloat16
from gptx.stored_weights import OWN_HEAD_NOTE
from tests.support.files.torch_files import CONTAINERS, Pickle, nanogpt, view, write_folder, zip_of
from tests.support.fuzz import MUTATIONS, damaged_copies, fuzz, refuse_every_prefix
from tests.support.random_models import CASES

GOLDEN = Path(__file__).parents[2] / "golden" / "torch"
# nanoGPT's activation; its files have no token ids.
NANOGPT_SETTINGS = {"activation_function": "gelu", "bos_token_id": None, "eos_token_id": None}
CONFIG = replace(CASES["tiny"], n_positions=8, vocab_size=19, **NANOGPT_SETTINGS)
WEIGHTS = random_weights(CONFIG)


@pytest.fixture(params=list(CONTAINERS))
def container(request: pytest.FixtureRequest) -> Any:
    return CONTAINERS[request.param]


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.pt")), ids=lambda file: file.stem)
def test_nanogpts_files_give_its_logits(file: Path, tmp_path: Path) -> None:
    assert detect(file) == "nanogpt"
    convert(file, tmp_path / "out")
    golden = np.load(file.with_suffix(".npz"))
    logits = gptx.load(tmp_path / "out", compile=False).logits(golden["ids"][0].tolist())
    assert np.abs(logits - golden["logits"][0]).max() < 1e-5


@pytest.mark.parametrize(
    ("case", "prefix"),
    [("tiny", ""), ("124M", "_orig_mod."), ("355M", "module._orig_mod.")],
)
def test_every_model_is_read_bit_for_bit(
    case: str, prefix: str, container: Any, tmp_path: Path
) -> None:
    config = replace(CASES[case], **NANOGPT_SETTINGS)
    weights = random_weights(config)
    (tmp_path / "ckpt.pt").write_bytes(container(nanogpt(config, weights, prefix=prefix)))
    for path in (tmp_path, tmp_path / "ckpt.pt"):
        assert detect(path) == "nanogpt"
        checkpoint = read(path)[1]
        assert checkpoint.config == config
        for name, tensor in checkpoint.tensors.items():
            assert isinstance(tensor, np.ndarray)
            assert (tensor == weights[name]).all(), name
            assert tensor.dtype == np.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_without_biases_gets_zeros(dtype: str, container: Any, tmp_path: Path) -> None:
    saved = nanogpt(CONFIG, WEIGHTS, bias=False, dtype=dtype)
    (tmp_path / "ckpt.pt").write_bytes(container(saved))
    tensors = read(tmp_path)[1].tensors
    assert list(tensors) == list(CONFIG.tensor_shapes())
    for name, tensor in tensors.items():
        assert isinstance(tensor, np.ndarray)
        assert tensor.dtype == tensors["wte.weight"].dtype  # type: ignore[union-attr]
        assert widen_bfloat16(tensor).any() != name.endswith(".bias")


def test_padded_vocabulary_is_kept(container: Any, tmp_path: Path) -> None:
    config = replace(CONFIG, vocab_size=50304, n_embd=2)
    (tmp_path / "ckpt.pt").write_bytes(container(nanogpt(config, random_weights(config))))
    found = read(tmp_path)[1].config
    assert found == replace(config, bos_token_id=50256, eos_token_id=50256)


def test_a_head_with_the_numbers_of_the_table_is_tied(container: Any, tmp_path: Path) -> None:
    saved = nanogpt(CONFIG, WEIGHTS)
    saved["model"]["lm_head.weight"] = view(WEIGHTS["wte.weight"])
    (tmp_path / "ckpt.pt").write_bytes(container(saved))
    assert read(tmp_path)[1].config == CONFIG


def test_an_untied_head_is_kept(container: Any, tmp_path: Path) -> None:
    config = replace(CONFIG, tie_word_embeddings=False)
    weights = random_weights(config)
    (tmp_path / "ckpt.pt").write_bytes(container(nanogpt(config, weights)))
    checkpoint = read(tmp_path)[1]
    assert checkpoint.config == config
    head = checkpoint.tensors["lm_head.weight"]
    assert isinstance(head, np.ndarray)
    assert (head == weights["lm_head.weight"]).all()
    given = read(tmp_path, config=replace(config, tie_word_embeddings=True))[1]
    assert given.config == replace(config, tie_word_embeddings=False)
    assert OWN_HEAD_NOTE in given.notes


def test_notes_list_assumptions_and_a_config_replaces_them(tmp_path: Path) -> None:
    (tmp_path / "ckpt.pt").write_bytes(CONTAINERS["zip"](nanogpt(CONFIG, WEIGHTS)))
    activation, tokenizer = read(tmp_path)[1].notes
    assert 'a config.json with "gelu_new"' in activation
    assert "no tokenizer" in tokenizer
    older = replace(CONFIG, activation_function="gelu_new")
    checkpoint = read(tmp_path, config=older)[1]
    assert checkpoint.config == older
    assert checkpoint.notes == (tokenizer,)


def test_nothing_of_the_optimizer_is_read(
    container: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ckpt.pt").write_bytes(container(nanogpt(CONFIG, WEIGHTS)))
    taken: list[str] = []
    map_array = torch_file.BinaryFile.map

    def counted(self: Any, offset: int, shape: Any, dtype: Any, label: str) -> Any:
        taken.append(label.removeprefix("tensor "))
        return map_array(self, offset, shape, dtype, label)

    monkeypatch.setattr(torch_file.BinaryFile, "map", counted)
    checkpoint = read(tmp_path)[1]
    assert not taken
    list(checkpoint.tensors.values())
    assert taken == list(CONFIG.tensor_shapes())


def changed(**arguments: Any) -> dict[str, Any]:
    saved = nanogpt(CONFIG, WEIGHTS)
    saved["model_args"] |= arguments
    return saved


@pytest.mark.parametrize(
    ("saved", "error", "message"),
    [
        (changed(n_head=None), ConfigError, "n_head of its model_args is not an integer"),
        (changed(n_head=3), ConfigError, "n_embd 8 is not a multiple of n_head 3"),
        (changed(n_layer=True), ConfigError, "n_layer of its model_args is not an integer"),
        (changed(n_layer=9999), WeightsError, "tensors for 9999 layers"),
        (changed(n_layer=2), WeightsError, "tensors h.1.ln_1.weight, .* and 9 more are missing"),
        (changed(block_size=9), WeightsError, r"wpe.weight has shape \[8, 8\].*\[9, 8\]"),
        (nanogpt(CONFIG, WEIGHTS) | {"model_args": []}, ConfigError, "model_args is not a dict"),
        (
            nanogpt(CONFIG, WEIGHTS) | {"model": None},
            WeightsError,
            "no state_dict of a GPT-2: found the keys model, opt",
        ),
    ],
)
def test_invalid_models_are_refused(
    saved: Any, error: type[Exception], message: str, container: Any, tmp_path: Path
) -> None:
    (tmp_path / "ckpt.pt").write_bytes(container(saved))
    with pytest.raises(error, match=message):
        read(tmp_path)


def test_a_folder_with_another_ckpt_is_refused(container: Any, tmp_path: Path) -> None:
    write_folder(tmp_path, GPT2Config(), container({"epoch": 3}), "ckpt.pt")
    with pytest.raises(WeightsError, match="is not a file of nanoGPT"):
        read(tmp_path)


def use_of(folder: Path) -> Any:
    """Return a function that reads every number."""

    def use() -> None:
        for tensor in nanogpt_file.read(folder).tensors.values():
            assert tensor is not None

    return use


@damaged_copies
def test_damaged_files_are_refused_in_one_line(copies: int, container: Any, tmp_path: Path) -> None:
    saved = nanogpt(CONFIG, WEIGHTS, bias=False)
    pickle = Pickle(saved, legacy=container is not CONTAINERS["zip"])

    def damage(data: bytes, rng: rnd.Random) -> bytes:
        """Damage the pickle of an archive with valid checksums."""
        code = rng.choice(MUTATIONS)(pickle.code, rng)
        if container is CONTAINERS["zip"]:
            return zip_of(code, pickle.storages)
        return data.replace(pickle.code, code)

    file = tmp_path / "ckpt.pt"
    file.write_bytes(container(saved))
    assert fuzz(file, use_of(tmp_path), mutations=[damage] * 4, copies=copies) > copies // 2


@damaged_copies
def test_every_prefix_is_refused(copies: int, container: Any, tmp_path: Path) -> None:
    file = tmp_path / "ckpt.pt"
    file.write_bytes(container(nanogpt(CONFIG, WEIGHTS, bias=False)))
    refuse_every_prefix(file, use_of(tmp_path), copies=copies, step=5)
