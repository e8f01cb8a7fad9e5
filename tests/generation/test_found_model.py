"""gptx.load of every format that gptx reads: the same model as its Hugging Face folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import save_file

import gptx
from gptx import conversions, weights
from gptx.errors import (
    ConfigError,
    GptxError,
    ModelWarning,
    NotFoundError,
    ParameterError,
    StorageError,
    TokenizerError,
    WeightsError,
)
from gptx.generation.found_model import find_model
from gptx.generation.text_model import Model
from gptx.random_weights import random_weights
from gptx.tokenization.pipeline import PipelineTokenizer
from tests.support.cli import raises_error, run
from tests.support.conversions import BOTH_WAYS, to_format
from tests.support.embedded_tokenizer import CONFIG, copy_tokenizer
from tests.support.files.burn_bytes import write_burn
from tests.support.files.tensor_bundle_bytes import write_openai
from tests.support.files.torch_files import nanogpt, state_dict, write_folder, zip_bytes
from tests.support.permissions import folder_of_another_user, unprivileged
from tests.support.random_models import write_model

WEIGHTS = random_weights(CONFIG)
TEXT = "ROMEO: what"
IDS = [5, 700, 3, 3, 1023]


def write_source(folder: Path) -> Path:
    return copy_tokenizer(write_model(folder, CONFIG, WEIGHTS))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "folder")


@pytest.fixture(scope="module")
def expected(source: Path) -> Model:
    return gptx.load(source, compile=False)


def torch_folder(source: Path, folder: Path) -> Path:
    return copy_tokenizer(write_folder(folder, CONFIG, zip_bytes(state_dict(WEIGHTS))))


def torch_file(source: Path, folder: Path) -> Path:
    write_folder(folder, CONFIG, zip_bytes(state_dict(WEIGHTS)))
    return folder / "pytorch_model.bin"


def nanogpt_file(source: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "ckpt.pt").write_bytes(zip_bytes(nanogpt(CONFIG, WEIGHTS)))
    return folder / "ckpt.pt"


def openai_folder(source: Path, folder: Path) -> Path:
    return write_openai(folder, CONFIG, WEIGHTS, PipelineTokenizer.of_folder(source))


def openai_prefix(source: Path, folder: Path) -> Path:
    return openai_folder(source, folder) / "model.ckpt"


def safetensors_file(source: Path, folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    shutil.copy(source / "model.safetensors", folder / "weights of mine.safetensors")
    return folder / "weights of mine.safetensors"


def written(format: str) -> Callable[[Path, Path], Path]:
    def write(source: Path, folder: Path) -> Path:
        folder.mkdir()
        return to_format(format, source, folder)

    return write


OTHERS = (torch_folder, torch_file, nanogpt_file, openai_folder, openai_prefix, safetensors_file)
MAKERS = {name: written(name) for name in BOTH_WAYS} | {make.__name__: make for make in OTHERS}
# Without a tokenizer; without the end of text, the number of heads or the form of GELU.
NO_TOKENIZER = {"llm.c", "json", "torch_file", "nanogpt_file", "safetensors_file"}
INCOMPLETE = {"llm.c", "staticgrad", "json", "nanogpt_file"}


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that writes the model in a form of `MAKERS`, to be read only."""
    paths: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in paths:
            paths[name] = MAKERS[name](source, tmp_path_factory.mktemp("made") / "model")
        return paths[name]

    return make


def load(path: Path, name: str, source: Path, **options: Any) -> Model:
    config = source / "config.json" if name in INCOMPLETE else None
    return gptx.load(path, compile=False, config=config, **options)


def test_every_readable_format_is_among_them() -> None:
    readable = {name for name, row in conversions.FORMATS.items() if row.reads}
    assert readable - set(BOTH_WAYS) == {"pytorch", "nanogpt", "openai", "gpt-burn"}


@pytest.mark.parametrize("name", MAKERS)
def test_a_model_of_any_format_computes_the_same(
    name: str, made: Callable[[str], Path], source: Path, expected: Model
) -> None:
    path = made(name)
    model = load(path, name, source)
    # OpenBLAS's kernels for AVX-512 round in another order if an array begins elsewhere.
    np.testing.assert_allclose(model.logits(IDS), expected.logits(IDS), rtol=0, atol=2e-5)
    greedy = {"max_tokens": 20, "ignore_eos": True}
    assert model.generate(IDS, **greedy).tokens == expected.generate(IDS, **greedy).tokens
    assert model.fingerprint == expected.fingerprint
    assert (model.name, model.config) == (str(path), expected.config)
    if name in NO_TOKENIZER:
        with raises_error(TokenizerError, "has no tokenizer", str(path), "give tokenizer"):
            model.generate(TEXT)
        model = load(path, name, source, tokenizer="shakespeare")
    assert model.generate(TEXT, max_tokens=9).text == expected.generate(TEXT, max_tokens=9).text


def test_a_model_of_gpt_burn(tmp_path: Path) -> None:
    write_burn(tmp_path / "burn", replace(CONFIG, vocab_size=50))
    conversions.convert(tmp_path / "burn", tmp_path / "folder")
    with pytest.warns(ModelWarning, match="layer norm"):
        model = gptx.load(tmp_path / "burn", compile=False)
    expected = gptx.load(tmp_path / "folder", compile=False)
    logits = model.logits([5, 7]), expected.logits([5, 7])
    np.testing.assert_allclose(*logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["gguf", "nanogpt_file", "openai_folder"])
def test_quantized_while_loading(name: str, made: Callable[[str], Path], source: Path) -> None:
    options: dict[str, Any] = {"quantize": "int8", "group_size": 32, "generic": True}
    model = load(made(name), name, source, **options)
    other = gptx.load(source, compile=False, **options)
    assert str(model.config.quantization) == "int8 in groups of 32"
    np.testing.assert_allclose(model.logits(IDS), other.logits(IDS), rtol=0, atol=2e-6)
    assert model.fingerprint == other.fingerprint


def test_on_mlx(made: Callable[[str], Path], expected: Model) -> None:
    pytest.importorskip("mlx.core")
    model = gptx.load(made("gguf"), backend="mlx")
    np.testing.assert_allclose(model.logits(IDS), expected.logits(IDS), rtol=0, atol=2e-5)


def test_a_cache_of_one_format_belongs_to_the_model_of_another(
    made: Callable[[str], Path], expected: Model, tmp_path: Path
) -> None:
    expected.prefill(IDS).save(tmp_path / "cache")
    model = gptx.load(made("gguf"), compile=False)
    cache = model.load_cache(tmp_path / "cache")
    result = model.generate([*IDS, 7], cache=cache, max_tokens=3, ignore_eos=True)
    assert result.tokens == expected.generate([*IDS, 7], max_tokens=3, ignore_eos=True).tokens


def test_tensors_are_read_one_by_one(made: Callable[[str], Path]) -> None:
    """Each tensor is on the backend before the next one is read."""
    from gptx.conversions.checkpoint import LazyTensors, StoredTensor

    events: list[str] = []
    opened = find_model(made("gguf")).open()

    def reader(name: str, tensor: StoredTensor) -> StoredTensor:
        def read() -> Any:
            events.append(f"read {name}")
            return tensor.read()

        return replace(tensor, read=read)

    arrays = LazyTensors({name: reader(name, x) for name, x in opened.tensors.items()})

    def bring(name: str, tensor: Any, backend: Any) -> Any:
        events.append(f"bring {name}")
        return tensor

    with mock.patch("gptx.weights._on_backend", bring):
        weights.load(arrays, opened.config, gptx.get_backend("numpy", generic=True))
    assert events == [f"{verb} {name}" for name in WEIGHTS for verb in ("read", "bring")]


def test_files_of_a_folder_with_pytorch_model_bin(made: Callable[[str], Path]) -> None:
    path = made("torch_folder")
    found = find_model(path)
    assert found.info.files.weights == (path / "pytorch_model.bin",)
    assert (found.info.files.config, found.fetch()) == (path / "config.json", path)


class TestNotes:
    """Assumptions of a reader: in Python a warning, on the command line a line of its own."""

    def test_python(self, made: Callable[[str], Path]) -> None:
        with pytest.warns(ModelWarning, match=r"no number of heads: 1 of width 64") as caught:
            model = gptx.load(made("staticgrad"), compile=False)
        assert caught[0].filename == __file__
        [note] = model.notes
        assert str(caught[0].message) == f"{model.name}: {note}"
        with pytest.warns(ModelWarning) as caught:
            gptx.generate([1], model=made("staticgrad"), max_tokens=1)
        assert caught[0].filename == __file__

    def test_command_line(self, made: Callable[[str], Path]) -> None:
        path = str(made("staticgrad"))
        done = run("generate", "-m", path, "--tokenizer", "shakespeare", "-q", "-n", "3", TEXT)
        assert done.code == 0
        assert done.err.startswith(f"Note: {path}: the file has no number of heads")
        assert done.err.count("\n") == 1

    def test_a_tokenizer_beside_the_file(
        self, made: Callable[[str], Path], tmp_path: Path, source: Path
    ) -> None:
        path = shutil.copy(made("llm.c"), tmp_path / "model.bin")
        assert not find_model(path).info.has_tokenizer
        copy_tokenizer(tmp_path, "tokenizer.json")
        with pytest.warns(ModelWarning, match=r"the tokenizer in the folder of model\.bin is used"):
            assert gptx.load(path, compile=False).encode(TEXT)
        shutil.copy(source / "config.json", tmp_path)
        model = gptx.load(path, compile=False)  # the folder is that of the model: no warning
        assert (model.notes, model.info.has_tokenizer) == ((), True)

    def test_a_larger_tokenizer_beside_the_file_is_not_used(
        self, source: Path, tmp_path: Path
    ) -> None:
        config = replace(CONFIG, vocab_size=1023, bos_token_id=None, eos_token_id=None)
        folder = write_model(tmp_path, config, random_weights(config))
        path = to_format("llm.c", folder, tmp_path)
        shutil.copy(source / "tokenizer.json", tmp_path)
        assert not find_model(path).info.has_tokenizer


class TestGivenFiles:
    """The options config and tokenizer."""

    def test_config_as_an_object_or_a_file(self, made: Callable[[str], Path], source: Path) -> None:
        for config in (CONFIG, source / "config.json", str(source / "config.json")):
            assert gptx.load(made("staticgrad"), config=config, compile=False).config == CONFIG

    def test_config_replaces_that_of_a_folder(self, source: Path, tmp_path: Path) -> None:
        config = replace(CONFIG, layer_norm_epsilon=0.1)
        assert gptx.load(source, config=config, compile=False).config == config

    @pytest.mark.parametrize("name", ["config", "tokenizer"])
    @pytest.mark.parametrize("value", [5, {"n_layer": 1}, b"path"])
    def test_values_of_other_types(self, name: str, value: Any) -> None:
        with raises_error(ParameterError, f"{name} is {value!r}, expected a"):
            gptx.load("shakespeare", **{name: value})

    def test_a_config_of_another_model(self, made: Callable[[str], Path]) -> None:
        with pytest.raises(ConfigError, match="n_layer is 2"):
            gptx.load(made("llm.c"), config=replace(CONFIG, n_layer=3))

    @pytest.mark.parametrize("form", ["folder", "file", "gguf", "embedded"])
    def test_sources_of_a_tokenizer(
        self, form: str, made: Callable[[str], Path], source: Path, expected: Model
    ) -> None:
        sources = {"folder": source, "gguf": made("gguf"), "embedded": "shakespeare"}
        sources["file"] = source / "merges.txt"
        model = gptx.load(made("llm.c"), tokenizer=sources[form], compile=False)
        assert model.encode(TEXT) == expected.encode(TEXT)

    def test_a_tokenizer_replaces_that_of_a_folder(self, source: Path, tmp_path: Path) -> None:
        facts = json.loads((source / "tokenizer.json").read_text())
        facts["model"]["merges"] = []
        (tmp_path / "tokenizer.json").write_text(json.dumps(facts))
        model = gptx.load(source, tokenizer=tmp_path, compile=False)
        assert len(model.encode(TEXT)) == len(TEXT)

    def test_a_source_without_a_tokenizer(
        self, made: Callable[[str], Path], tmp_path: Path
    ) -> None:
        for path in (tmp_path, made("llm.c")):
            with raises_error(NotFoundError, f"{path} has no tokenizer"):
                gptx.load(made("llm.c"), tokenizer=path)
        with raises_error(NotFoundError, "tokenizer: ", "./nowhere"):
            gptx.load(made("llm.c"), tokenizer="./nowhere")

    @pytest.mark.parametrize("name", ["", " "])
    def test_an_empty_name_of_a_tokenizer(self, name: str, made: Callable[[str], Path]) -> None:
        with raises_error(ParameterError, f"tokenizer is {name!r}, expected a folder, or a model"):
            gptx.load(made("llm.c"), tokenizer=name)

    def test_a_tokenizer_of_a_larger_model(self, source: Path, tmp_path: Path) -> None:
        config = replace(CONFIG, vocab_size=1023, bos_token_id=None, eos_token_id=None)
        folder = write_model(tmp_path / "small", config, random_weights(config))
        for path in (folder, to_format("llm.c", folder, tmp_path)):
            with raises_error(TokenizerError, "has 1024 tokens, the model 1023"):
                gptx.load(path, tokenizer=source)


class TestNames:
    """Ways to write a path, and names that are paths and something else."""

    @pytest.mark.parametrize(
        "name", ["m.gguf", "a model.gguf", "模型.gguf", "no suffix", "-m.gguf", "a.b/model"]
    )
    def test_names_of_files(
        self, name: str, made: Callable[[str], Path], tmp_path: Path, monkeypatch: Any
    ) -> None:
        (tmp_path / "a.b").mkdir()
        shutil.copy(made("gguf"), tmp_path / name)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        for given in (name, f"./{name}", f"~/{name}", tmp_path / name):
            found = find_model(given)
            assert found.info.name == str(given)
            assert found.info.files.weights == (tmp_path / name,)
            assert found.fetch() == tmp_path / name

    def test_a_link_and_a_slash_at_the_end(
        self, made: Callable[[str], Path], tmp_path: Path, source: Path
    ) -> None:
        (tmp_path / "file").symlink_to(made("gguf"))
        (tmp_path / "folder").symlink_to(made("staticgrad"))
        assert find_model(tmp_path / "file").info.config == CONFIG
        for name in (f"{tmp_path}/folder", f"{tmp_path}/folder/"):
            assert find_model(name, config=CONFIG).info.config == CONFIG
        assert find_model(f"{source}/").info.config == CONFIG

    def test_an_alias_is_not_the_file_of_that_name(
        self, made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        for name in ("gpt2", "shakespeare"):
            shutil.copy(made("gguf"), tmp_path / name)
            assert find_model(f"./{name}").info.config == CONFIG
            assert find_model(Path(name)).info.config == CONFIG
        assert find_model("shakespeare").info.config.n_layer == 6
        with pytest.raises(NotFoundError, match="openai-community/gpt2"):
            find_model("gpt2", offline=True)

    @pytest.mark.parametrize("name", ["", " ", "a\0b", None, 5, b"shakespeare"])
    def test_no_names(self, name: Any) -> None:
        with raises_error(ParameterError, "model is ", "expected an embedded name"):
            find_model(name)

    def test_a_revision_of_a_file(self, made: Callable[[str], Path]) -> None:
        with raises_error(ParameterError, "revision is 'v1'", "is not from the Hub"):
            gptx.load(made("gguf"), revision="v1")


class TestRefusals:
    """Files that are no model: one line that names the file and the fault."""

    @pytest.mark.parametrize(
        ("name", "mode", "kind"),
        [
            ("model.gguf", 0o000, StorageError),
            ("folder", 0o000, StorageError),
            ("folder", 0o400, StorageError),  # it can be listed, its files cannot be opened
            ("folder", 0o100, NotFoundError),  # the other way round: config.json is missing
        ],
    )
    def test_no_permission(
        self, name: str, mode: int, kind: type[GptxError], made: Callable[[str], Path]
    ) -> None:
        content = made("gguf").read_bytes()
        with folder_of_another_user() as folder, unprivileged():
            path = folder / name
            if name == "folder":
                path.mkdir()
            else:
                path.write_bytes(content)
            path.chmod(mode)
            with raises_error(kind, str(path)):
                find_model(path)
            path.chmod(0o700)

    @pytest.mark.parametrize("content", [b"", b"hello", bytes(10**6), b"\x80\x02." * 99, b"{}"])
    def test_other_files(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(content)
        with raises_error(WeightsError, str(tmp_path / "file")):
            gptx.load(tmp_path / "file")

    def test_a_pipe_is_not_opened(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with raises_error(WeightsError, "neither a file nor a folder", "to a file first"):
            gptx.load(tmp_path / "pipe")

    @pytest.mark.parametrize(
        ("file", "words"),
        [
            ("model.onnx", ("writes and does not read", "converted from")),
            ("tf_model.h5", ("TensorFlow", "from_tf=True")),
            ("flax_model.msgpack", ("Flax", "from_flax=True")),
            ("adapter_config.json", ("an adapter (such as LoRA)", "merge_and_unload")),
        ],
    )
    def test_formats_that_gptx_does_not_read(
        self, file: str, words: tuple[str, ...], tmp_path: Path
    ) -> None:
        (tmp_path / file).write_bytes(b"\x08\x07 some bytes")
        with raises_error(WeightsError, *words):
            gptx.load(tmp_path / file)
        (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
        with raises_error(WeightsError, *words):
            gptx.load(tmp_path)

    @pytest.mark.parametrize(
        "name",
        [
            *("config.json", "tokenizer.json", "merges.txt", "generation_config.json"),
            *("model.safetensors.index.json", "model-00001-of-00002.safetensors"),
        ],
    )
    def test_one_file_of_a_folder(self, name: str, tmp_path: Path) -> None:
        tensors = {"wte.weight": WEIGHTS["wte.weight"]}
        if name.endswith(".safetensors"):
            save_file(tensors, tmp_path / name)
        else:
            (tmp_path / name).write_text("{}")
        with raises_error(WeightsError, f"{tmp_path / name} is one", "the folder", str(tmp_path)):
            gptx.load(tmp_path / name)

    def test_a_relative_path_to_a_file_is_not_called_a_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "org").mkdir()
        (tmp_path / "org/model").write_bytes(b"text")
        with pytest.raises(WeightsError, match=r"^org/model is in no supported format.*--list$"):
            gptx.load("org/model")

    @pytest.mark.parametrize("name", ["m.gguf", "ckpt_2000.pt", "weights.safetensors"])
    def test_a_folder_with_a_file_of_a_model(self, name: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(b"model")
        (tmp_path / "notes.txt").write_bytes(b"text")
        with raises_error(
            WeightsError, f"a folder with {name}: give the path", str(tmp_path / name)
        ):
            gptx.load(tmp_path)
        (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"shard")
        (tmp_path / "z.gguf").write_bytes(b"model")
        with raises_error(WeightsError, f"{name} (and 1 more)"):
            gptx.load(tmp_path)

    def test_the_state_of_a_trainer_is_no_model(self, tmp_path: Path) -> None:
        (tmp_path / "optimizer.pt").write_bytes(b"state")
        (tmp_path / "training_args.bin").write_bytes(b"state")
        with raises_error(NotFoundError, "config.json is missing"):
            gptx.load(tmp_path)

    def test_a_folder_without_a_model(self, tmp_path: Path) -> None:
        with raises_error(NotFoundError, "config.json is missing"):
            gptx.load(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
        with raises_error(NotFoundError, "model.safetensors is missing"):
            gptx.load(tmp_path)


def test_a_hugging_face_folder_imports_no_conversions(source: Path) -> None:
    code = (
        "import sys, gptx; gptx.load(sys.argv[1]); gptx.load('shakespeare');"
        "print([name for name in sys.modules if 'conversions' in name])"
    )
    command = [sys.executable, "-c", code, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
