"""gptx.tokenization.saving: files carried over, and files derived.

The ids of transformers for a result are those of tests/golden/tokenizers: for it, the files of the
result say the same as those of the source (`make_tokenizers.py ids SOURCE RESULT`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptx.conversions.checkpoint import CARRIED_FILES
from gptx.conversions.registry import FORMATS
from gptx.errors import StorageError
from gptx.tokenization.files import FILES
from gptx.tokenization.pipeline import PipelineTokenizer
from gptx.tokenization.saving import (
    UNREAD_FILES,
    copy_file,
    save_tokenizer,
    write_unread_tokenizer,
)
from tests.support.golden_tokenizers import NAMES, TEXTS, expected, folder_of, load

OF_MODEL = {"config.json", "generation_config.json"}
GPT2_KINDS = {name for name in NAMES if name.startswith(("added", "prefix"))}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., PipelineTokenizer]:
    """Copy a folder of tests/golden/tokenizers, and write further files into it."""

    def make(name: str, **files: Any) -> PipelineTokenizer:
        folder = tmp_path / "source"
        shutil.copytree(folder_of(name), folder)
        for key, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / key.replace("__", ".")).write_text(text)
        tokenizer = PipelineTokenizer.of_folder(folder)
        assert tokenizer is not None
        return tokenizer

    return make


def settings_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "tokenizer_config.json").read_text()))


@pytest.mark.parametrize("name", NAMES)
def test_the_result_has_the_ids_of_the_source(name: str, out: Path) -> None:
    save_tokenizer(load(name), out, context=64)
    found = PipelineTokenizer.of_folder(out)
    assert found is not None
    assert [found.encode(t, allow_special=True) for t in TEXTS] == expected(name)["ids"]
    assert [found.encode(t) for t in TEXTS] == [load(name).encode(t) for t in TEXTS]


@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizer_without_files_has_the_same_ids(name: str, out: Path) -> None:
    definition = json.dumps(load(name).definition())
    save_tokenizer(PipelineTokenizer({}, definition=definition), out, context=64)
    found = PipelineTokenizer.of_folder(out)
    assert found is not None
    assert [found.encode(t, allow_special=True) for t in TEXTS] == expected(name)["ids"]
    cls = "GPT2Tokenizer" if name in GPT2_KINDS else "PreTrainedTokenizerFast"
    assert settings_of(out)["tokenizer_class"] == cls


@pytest.mark.parametrize("name", NAMES)
def test_files_are_carried_over(name: str, out: Path) -> None:
    save_tokenizer(load(name), out, context=64)
    for path in folder_of(name).iterdir():
        if path.name == "tokenizer_config.json":
            given = json.loads(path.read_text())
            assert settings_of(out) == given
        elif path.name not in OF_MODEL:
            assert (out / path.name).read_bytes() == path.read_bytes()
    assert (out / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_vocab_and_merges_are_written_where_they_represent_the_tokenizer(
    name: str, out: Path
) -> None:
    save_tokenizer(load(name), out, context=64)
    assert (out / "vocab.json").is_file() == (name in GPT2_KINDS)
    assert (out / "merges.txt").is_file() == (name in GPT2_KINDS)
    if name in GPT2_KINDS:
        (out / "tokenizer.json").unlink()
        found = PipelineTokenizer.of_folder(out)
        assert found is not None
        texts = [text for text in TEXTS if "<" not in text]  # added tokens are in tokenizer.json
        assert [found.encode(t) for t in texts] == [load(name).encode(t) for t in texts]


def test_settings_of_a_source_without_any(out: Path) -> None:
    save_tokenizer(load("added_beside_json"), out, context=64)
    assert settings_of(out) == {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": 64,
        "add_prefix_space": False,
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<pad>",
        "sep_token": "low",
    }


def test_the_class_of_config_json_is_kept(out: Path) -> None:
    save_tokenizer(load("word_list"), out, context=64)
    assert settings_of(out) == {"tokenizer_class": "BertTokenizer", "model_max_length": 64}


def test_special_tokens_of_the_config(source: Callable[..., PipelineTokenizer], out: Path) -> None:
    tokenizer = source("metaspace")
    (tokenizer.files["tokenizer_config.json"]).unlink()
    tokenizer = PipelineTokenizer({"tokenizer.json": tokenizer.files["tokenizer.json"]})
    save_tokenizer(tokenizer, out, context=64, bos_id=0, eos_ids=(500, 1))
    assert settings_of(out) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 64,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
    }


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ({"tokenizer_class": "TokenizersBackend"}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ({"eos_token": "</s>"}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ({"tokenizer_class": "T5TokenizerFast"}, {"tokenizer_class": "T5TokenizerFast"}),
        (
            {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}},
            {"tokenizer_class": "PreTrainedTokenizerFast"},
        ),
        ({"tokenizer_class": "Mine", "name_or_path": "/home/me", "vocab_file": "/etc/passwd"}, {}),
        ({"extra_special_tokens": ["<s>"]}, {"additional_special_tokens": ["<s>"]}),
        (
            {"extra_special_tokens": {"a_token": "<s>"}},
            {"extra_special_tokens": {"a_token": "<s>"}},
        ),
    ],
)
def test_settings_for_both_versions_of_transformers(
    source: Callable[..., PipelineTokenizer],
    out: Path,
    given: dict[str, Any],
    written: dict[str, Any],
) -> None:
    save_tokenizer(source("metaspace", tokenizer_config__json=given), out, context=64)
    found = settings_of(out)
    assert found == found | written
    assert not found.keys() & {"auto_map", "name_or_path", "vocab_file"}
    assert ("extra_special_tokens" in found) == ("extra_special_tokens" in written)


def test_a_class_with_gpt2_in_its_settings_stays(
    source: Callable[..., PipelineTokenizer], out: Path
) -> None:
    options = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    save_tokenizer(source("lower", tokenizer_config__json=options), out, context=64)
    assert settings_of(out) == options


def test_the_prefix_space_of_gpt2_stays_when_the_class_changes(
    source: Callable[..., PipelineTokenizer], out: Path
) -> None:
    definition = load("lower").definition()
    definition["pre_tokenizer"]["add_prefix_space"] = True
    tokenizer = source("prefix_without_config", tokenizer__json=definition)
    save_tokenizer(tokenizer, out, context=64)
    assert settings_of(out)["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings_of(out)["add_prefix_space"] is False
    found = PipelineTokenizer.of_folder(out)
    assert found is not None
    assert [found.encode(t) for t in TEXTS] == [load("lower").encode(t) for t in TEXTS]


def test_chat_templates(source: Callable[..., PipelineTokenizer], out: Path) -> None:
    tokenizer = source("metaspace", chat_template__jinja="{{ 1 }}", chat_template__json={"a": 1})
    save_tokenizer(tokenizer, out, context=64)
    assert (out / "chat_template.jinja").read_text() == "{{ 1 }}"
    assert (out / "chat_template.json").read_text() == '{"a": 1}'
    assert settings_of(out)["chat_template"] == "{{ 1 }}"


def test_a_sentencepiece_model_beside_the_tokenizer(
    source: Callable[..., PipelineTokenizer], out: Path
) -> None:
    save_tokenizer(source("unigram", spiece__model="a model"), out, context=64)
    assert (out / "spiece.model").read_text() == "a model"


def test_settings_that_are_not_unicode(source: Callable[..., PipelineTokenizer], out: Path) -> None:
    tokenizer = source("metaspace", tokenizer_config__json='{"chat_template": "\\ud800 é"}')
    save_tokenizer(tokenizer, out, context=64)
    assert settings_of(out)["chat_template"] == "\ud800 é"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"absent cannot be read"):
        copy_file(tmp_path / "absent", tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_tokenizer_that_is_not_read(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "spiece.model"
    path.write_bytes(b"\x00model")
    (tmp_path / "config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text('{"do_lower_case": true, "auto_map": {}}')
    files = {path.name: path, settings.name: settings}
    write_unread_tokenizer(files, out)
    assert (out / "spiece.model").read_bytes() == b"\x00model"
    assert settings_of(out) == {"tokenizer_class": "T5Tokenizer", "do_lower_case": True}


def test_settings_without_a_vocabulary_are_not_written(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text("{}")
    write_unread_tokenizer({path.name: path}, out)
    assert list(out.iterdir()) == []


def test_the_table_of_formats_names_all_files() -> None:
    names = {*FILES, *UNREAD_FILES, *CARRIED_FILES}
    for format in ("safetensors", "mlx", "onnx"):
        assert names <= set(FORMATS[format].files)
