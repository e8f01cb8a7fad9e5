"""gptx.conversions.formats.openai_tensorflow: files of OpenAI, of TensorFlow, and damaged ones."""

from __future__ import annotations

import json
import random as python_random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptx
from gptx.config import GPT2Config
from gptx.conversions import convert, detect, read
from gptx.conversions.containers.crc32c import crc32c
from gptx.conversions.formats.openai_tensorflow import detect as is_openai
from gptx.conversions.verify import compare
from gptx.embedded import EMBEDDED
from gptx.errors import ConfigError, NotFoundError, TokenizerError, WeightsError
from gptx.random_weights import random_weights
from gptx.safetensors_file import BFLOAT16
from tests.support.byte_tokenizers import byte_tokenizer
from tests.support.files.tensor_bundle_bytes import (
    slow_crc32c,
    variables,
    write_bundle,
    write_openai,
)
from tests.support.fuzz import (
    EXTREMES,
    MUTATIONS,
    accepted,
    damaged_copies,
    fuzz,
    refuse_every_prefix,
)
from tests.support.random_models import CASES, to_bfloat16
from tests.support.shared_files import shared

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "tf-tiny"
TINY = CASES["tiny"]


def read_all(path: Path) -> dict[str, np.ndarray]:
    return dict(read(path)[1].tensors)


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


class TestReference:
    @pytest.mark.parametrize(
        "path", [".", "model.ckpt", "model.ckpt.index", "sharded.ckpt", "sharded.ckpt.index"]
    )
    def test_files_of_tensorflow(self, path: str) -> None:
        name, checkpoint = read(GOLDEN / path)
        assert (name, checkpoint.config, checkpoint.notes) == ("openai", TINY, ())
        assert_equal(dict(checkpoint.tensors), random_weights(TINY))

    def test_index_of_openai(self, tmp_path: Path) -> None:
        """The shared folder has the complete index, and the first part of the data."""
        source = shared("fixtures/tf-124M")
        with pytest.raises(WeightsError, match=r"is truncated.* 3145728 bytes, expected 497759232"):
            read(source)
        folder = tmp_path / "124M"
        shutil.copytree(source, folder, copy_function=shutil.copyfile)
        folder.chmod(0o755)
        with open(folder / "model.ckpt.data-00000-of-00001", "r+b") as file:
            file.truncate(497759232)
        checkpoint = read(folder)[1]
        assert checkpoint.config == GPT2Config.of_size("124M")
        assert checkpoint.tokenizer is None
        found = checkpoint.tensors["h.0.attn.c_attn.bias"]
        assert found.shape == (3 * 768,)
        assert 0.1 < found.std() < 0.5
        with pytest.raises(WeightsError, match=r"checksum of model/ln_f/g differs"):
            checkpoint.tensors["ln_f.weight"]


class TestModels:
    @pytest.mark.parametrize("case", ["124M", "355M", "tiny"])
    def test_random_models_are_read_bit_for_bit(self, tmp_path: Path, case: str) -> None:
        config, weights = CASES[case], random_weights(CASES[case])
        source = write_openai(tmp_path / "source", config, weights, shards=2, per_block=5)
        given = convert(source, tmp_path / "model").config
        assert given == replace(config, bos_token_id=None, eos_token_id=None)
        assert_equal(read_all(tmp_path / "model"), weights)

    def test_the_embedded_model_computes_the_same(self, tmp_path: Path) -> None:
        embedded = read("shakespeare")[1]
        source = write_openai(
            tmp_path / "source",
            embedded.config,
            embedded.tensors,
            embedded.tokenizer,
            checksum=crc32c,  # the textbook's algorithm is slow for a model of this size
        )
        found = compare(embedded, read(source)[1])
        assert found.identical
        assert found.logits == 0
        assert found.tokenizer
        convert(source, tmp_path / "model")
        a, b = (gptx.load(m, compile=False) for m in ("shakespeare", str(tmp_path / "model")))
        assert (
            b.generate("To be", max_tokens=5, seed=3).text
            == a.generate("To be", max_tokens=5, seed=3).text
        )
        text = "Öde <|endoftext|> \n\t 123 're"
        for special in (False, True):
            ids = a.tokenizer.encode(text, allow_special=special)
            assert b.tokenizer.encode(text, allow_special=special) == ids

    @pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
    def test_other_types(self, tmp_path: Path, dtype: str) -> None:
        weights = random_weights(TINY)
        stored = {
            name: to_bfloat16(w) if dtype == "bfloat16" else w.astype(dtype)
            for name, w in weights.items()
        }
        found = read(write_openai(tmp_path / "model", TINY, stored))[1].tensors
        for name, array in stored.items():
            assert found[name].dtype == (BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype))
            assert found[name].tobytes() == array.tobytes()


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes the tiny model with some options."""

    def write(**options: Any) -> Path:
        return write_openai(tmp_path / "model", TINY, random_weights(TINY), **options)

    return write


class TestSelection:
    def test_the_newest_of_several(self, tiny: Callable[..., Path]) -> None:
        folder = tiny()
        newer = {name: w + 1 for name, w in random_weights(TINY).items()}
        write_bundle(folder / "model-200", variables(newer))
        assert_equal(read_all(folder), random_weights(TINY))
        for path in ("model-200", "/home/user/run/model-200"):
            (folder / "checkpoint").write_text(f'model_checkpoint_path: "{path}"\n')
            assert_equal(read_all(folder), newer)
        assert_equal(read_all(folder / "model.ckpt"), random_weights(TINY))

    def test_without_the_state_file_there_must_be_one(self, tiny: Callable[..., Path]) -> None:
        folder = tiny()
        (folder / "checkpoint").unlink()
        assert_equal(read_all(folder), random_weights(TINY))
        (folder / "faiss.index").write_bytes(b"another index")
        assert_equal(read_all(folder), random_weights(TINY))
        write_bundle(folder / "model-200", {})
        with pytest.raises(WeightsError, match=r"2 checkpoints: .*model-200\.index, model\.ckpt\."):
            read(folder)

    def test_the_state_file_names_a_missing_checkpoint(self, tiny: Callable[..., Path]) -> None:
        folder = tiny()
        (folder / "checkpoint").write_text('model_checkpoint_path: "../model-300"\n')
        assert_equal(read_all(folder), random_weights(TINY))

    def test_missing_data(self, tiny: Callable[..., Path]) -> None:
        folder = tiny()
        (folder / "model.ckpt.data-00000-of-00001").unlink()
        with pytest.raises(NotFoundError, match="data-00000-of-00001 is missing"):
            read(folder)

    def test_other_folders(self, tmp_path: Path, tiny: Callable[..., Path]) -> None:
        assert not is_openai(EMBEDDED["shakespeare"])
        assert not is_openai(tmp_path)
        assert not is_openai(tmp_path / "nothing")
        assert not is_openai(tiny() / "model.ckpt.data-00000-of-00001")
        assert detect(tiny()) == "openai"
        with pytest.raises(NotFoundError):
            read(tmp_path / "model" / "other.ckpt")


class TestVariables:
    def write(self, folder: Path, **changes: np.ndarray | None) -> Path:
        found = variables(random_weights(TINY)) | changes
        write_openai(folder, TINY, {})
        write_bundle(folder / "model.ckpt", {n: w for n, w in found.items() if w is not None})
        return folder

    def test_variables_of_an_optimizer_are_ignored(self, tmp_path: Path) -> None:
        more = {
            "beta1_power": np.array(0.9, "<f4"),
            "global_step": np.array(3, "<i8"),
            "model/wte/Adam": np.zeros((101, 8), "<f4"),
            "model/h0/attn/c_attn/w/Adam_1": np.zeros((1, 8, 24), "<f4"),
        }
        assert_equal(read_all(self.write(tmp_path / "m", **more)), random_weights(TINY))

    @pytest.mark.parametrize(
        ("name", "value", "words"),
        [
            ("model/h1/ln_1/g", np.zeros(8, "<f4"), "model/h1/ln_1/g is unknown"),
            ("model/value/w", np.zeros(8, "<f4"), "model/value/w is unknown"),
            ("model/wpe", None, r"wpe\.weight is missing"),
            ("model/h0/ln_2/b", None, r"h\.0\.ln_2\.bias is missing"),
            ("model/wte", np.zeros((100, 8), "<f4"), r"wte\.weight has shape \[100, 8\]"),
            ("model/h0/mlp/c_fc/w", np.zeros((2, 8, 16), "<f4"), r"shape \[2, 8, 16\]"),
            ("model/wpe", np.zeros((64, 8), "<i8"), "model/wpe is of TensorFlow's type 9"),
        ],
    )
    def test_other_models(
        self, tmp_path: Path, name: str, value: np.ndarray | None, words: str
    ) -> None:
        folder = self.write(tmp_path / "m", **{name: value})
        with pytest.raises(WeightsError, match=words):
            read(folder)


class TestSettings:
    def test_without_hparams(self, tmp_path: Path) -> None:
        config = CASES["124M"]
        config = replace(config, n_embd=128, n_head=2, bos_token_id=None, eos_token_id=None)
        folder = write_openai(tmp_path / "m", config, random_weights(config), checksum=crc32c)
        (folder / "hparams.json").unlink()
        checkpoint = read(folder)[1]
        assert checkpoint.config == config
        assert "2 of width 64" in checkpoint.notes[0]
        given = read(folder, config=replace(config, n_head=4))[1]
        assert (given.config.n_head, given.notes) == (4, ())

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", "not valid JSON"),
            ("[1]", "is a JSON list"),
            ("\xff", "not UTF-8"),
            ('{"n_vocab": 101}', "n_ctx is missing"),
            (None, "n_head 3"),
        ],
    )
    def test_damaged_hparams(self, tiny: Callable[..., Path], text: str | None, words: str) -> None:
        path = tiny() / "hparams.json"
        if text is None:
            text = json.dumps(json.loads(path.read_text()) | {"n_head": 3})
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ConfigError, match=rf"hparams\.json.*{words}"):
            read(path.parent)


class TestTokenizer:
    @pytest.fixture
    def folder(self, tiny: Callable[..., Path]) -> Path:
        merges = {"t h": 256, "th e": 257, "Ġ the": 258, "Ġ th": 259}
        return tiny(tokenizer=byte_tokenizer({"<|endoftext|>": 260}, merges))

    def test_is_read(self, folder: Path) -> None:
        checkpoint = read(folder)[1]
        assert checkpoint.tokenizer is not None
        assert [
            checkpoint.tokenizer.token_bytes(id)
            for id in checkpoint.tokenizer.encode("the that them")
        ] == [b"the", b" th", b"a", b"t", b" the", b"m"]
        assert checkpoint.config.eos_token_id == checkpoint.tokenizer.end_of_text_id == 260

    @pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])
    def test_one_file_is_missing(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        with pytest.raises(TokenizerError, match=f"{name} is missing"):
            read(folder)

    @pytest.mark.parametrize("ids", [{"a": 1}, {"a": "0"}, {"a": True}, {"a": 0, "b": 0}, {}])
    def test_invalid_ids(self, folder: Path, ids: dict[str, object]) -> None:
        (folder / "encoder.json").write_text(json.dumps(ids))
        with pytest.raises(TokenizerError, match="expected the ids 0, 1, 2"):
            read(folder)

    @damaged_copies
    def test_every_prefix_is_refused(self, folder: Path, copies: int) -> None:
        path = folder / "vocab.bpe"
        path.write_bytes(path.read_bytes().rstrip(b"\n"))
        refuse_every_prefix(path, lambda: read(folder), copies=copies)
        file = folder / "encoder.json"
        refuse_every_prefix(file, lambda: read(folder), copies=copies, step=7)

    @damaged_copies
    @pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])
    def test_damaged(self, folder: Path, name: str, copies: int) -> None:
        assert fuzz(folder / name, lambda: read(folder), copies=copies) > copies // 10


class TestDamage:
    @damaged_copies
    def test_index(self, tiny: Callable[..., Path], copies: int) -> None:
        folder = tiny(per_block=4)
        index = folder / "model.ckpt.index"
        data = dict(variables(random_weights(TINY)))
        checksums = {w.tobytes(): slow_crc32c(w.tobytes()) for w in data.values()}

        def rewritten(rng: python_random.Random, **options: Any) -> bytes:
            other = index.parent.parent / "other"
            options["checksum"] = checksums.__getitem__
            return write_bundle(other, data, per_block=4, **options).read_bytes()

        def other_blocks(_: bytes, rng: python_random.Random) -> bytes:
            """Damage a block and store a valid checksum."""
            hit = rng.randrange(8)
            kind = rng.choice(MUTATIONS)
            count = iter(range(100))
            return rewritten(rng, damage=lambda b: kind(b, rng) if next(count) == hit else b)

        def other_fields(_: bytes, rng: python_random.Random) -> bytes:
            """Change a field of an entry."""
            hit = rng.choice(["", *data])
            number = rng.randrange(1, 8)
            values = [*EXTREMES, -1, b"", rng.randbytes(5), (rng.choice([0, 2**32 - 1]),)]
            value = rng.choice(values)

            def change(name: str, fields: dict[int, Any]) -> None:
                if name == hit:
                    fields[number] = value

            return rewritten(rng, change=change)

        mutations = [other_blocks, other_fields]
        refused = fuzz(index, lambda: read_all(folder), mutations=mutations, copies=copies)
        assert refused > copies // 2
        refuse_every_prefix(index, lambda: read_all(folder), copies=copies)

    @damaged_copies
    def test_data(self, tiny: Callable[..., Path], copies: int) -> None:
        folder = tiny()
        file = folder / "model.ckpt.data-00000-of-00001"
        assert fuzz(file, lambda: read_all(folder), copies=copies) > copies // 2
        refuse_every_prefix(file, lambda: read_all(folder), copies=copies, step=37)
        file.write_bytes(file.read_bytes() + b"\0")
        assert not accepted(lambda: read_all(folder), "one byte more")

    @damaged_copies
    def test_hparams(self, tiny: Callable[..., Path], copies: int) -> None:
        folder = tiny()
        path = folder / "hparams.json"
        assert fuzz(path, lambda: read(folder), copies=copies) > copies // 3
        refuse_every_prefix(path, lambda: read(folder), copies=copies)

    @damaged_copies
    def test_state_file(self, tiny: Callable[..., Path], copies: int) -> None:
        folder = tiny()
        write_bundle(folder / "model-200", {})
        assert fuzz(folder / "checkpoint", lambda: read(folder), copies=copies) > copies // 8
