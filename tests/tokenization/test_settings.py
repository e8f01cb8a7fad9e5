"""gptx.tokenization.settings: added tokens and options from files of any age; damaged files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from gptx.errors import StorageError, TokenizerError
from gptx.tokenization.pipeline import PipelineTokenizer
from gptx.tokenization.settings import AddedToken, TokenizerSettings, read_settings
from tests.support.golden_tokenizers import folder_of


def read(folder: Path, **files: Any) -> TokenizerSettings:
    """Write files into a folder, with a dot in place of `__`, and read the settings."""
    found = {}
    for key, content in files.items():
        path = folder / key.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        found[path.name] = path
    return read_settings(found)


def test_no_files_are_gpt2(tmp_path: Path) -> None:
    settings = read(tmp_path)
    assert settings == TokenizerSettings("GPT2Tokenizer", {}, {})
    assert not settings.add_prefix_space
    assert settings.named_tokens() == {}


@pytest.mark.parametrize("value", [True, False, "true", 1, None])
def test_only_true_is_a_prefix_space(tmp_path: Path, value: object) -> None:
    settings = read(tmp_path, tokenizer_config__json={"add_prefix_space": value})
    assert settings.add_prefix_space is (value is True)


def test_tokens_of_older_files(tmp_path: Path) -> None:
    settings = read(
        tmp_path,
        tokenizer_config__json={"sep_token": "s"},
        added_tokens__json={"<pad>": 7, "word": 9, "s": 8, "x": 10},
        special_tokens_map__json={
            "pad_token": {"content": "<pad>", "lstrip": True},
            "additional_special_tokens": ["x", {"content": "y", "rstrip": True}],
        },
    )
    assert settings.added == {
        7: AddedToken("<pad>", special=True, normalized=False),  # the flags are not used, as there
        9: AddedToken("word", special=False, normalized=True),
        8: AddedToken("s", special=True, normalized=False),
        10: AddedToken("x", special=True, normalized=False),
    }
    assert settings.named_tokens() == {"pad_token": "<pad>", "sep_token": "s"}
    assert list(settings.special_tokens()) == [
        AddedToken("s", special=True, normalized=False),
        AddedToken("<pad>", special=True, normalized=False, lstrip=True),
        AddedToken("x", special=True, normalized=False),
        AddedToken("y", special=True, normalized=False, rstrip=True),
    ]


@pytest.mark.parametrize(
    "key",
    ["additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"],
)
@pytest.mark.parametrize(
    "group", [["<i>", {"content": "<j>"}], {"x": "<i>", "y": {"content": "<j>"}}]
)
def test_groups_of_special_tokens(tmp_path: Path, key: str, group: object) -> None:
    settings = read(tmp_path, tokenizer_config__json={key: group})
    assert [token.content for token in settings.special_tokens()] == ["<i>", "<j>"]
    assert settings.named_tokens() == {}


def test_a_token_of_an_object_is_special(tmp_path: Path) -> None:
    """The object of versions 4.47 to 5; `tokenizer.json` does not mark its tokens."""
    definition = json.loads((folder_of("lower") / "tokenizer.json").read_text())
    definition["added_tokens"][3]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    settings = {"extra_special_tokens": {"mark": definition["added_tokens"][3]["content"]}}
    for options, special in (({}, False), (settings, True)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
        tokenizer = PipelineTokenizer.of_folder(tmp_path)
        assert tokenizer is not None
        assert tokenizer.definition()["added_tokens"][3]["special"] == special


def test_tokens_that_tokenizer_config_lists(tmp_path: Path) -> None:
    settings = read(
        tmp_path,
        tokenizer_config__json={
            "added_tokens_decoder": {
                "5": {"content": "a", "special": True, "lstrip": True, "normalized": True},
                "6": {"content": "b", "single_word": True},
            }
        },
        added_tokens__json={"c": 9},
        special_tokens_map__json={"pad_token": "c"},
    )
    assert settings.added == {
        5: AddedToken("a", special=True, lstrip=True, normalized=True),
        6: AddedToken("b", special=False, single_word=True, normalized=True),
    }
    assert settings.named_tokens() == {}


NOT_OBJECTS = ["", "[]", "3", "{", "null", "[" * 100_000, "\udcff"]


@pytest.mark.parametrize("name", ["tokenizer_config", "added_tokens", "special_tokens_map"])
@pytest.mark.parametrize("content", NOT_OBJECTS)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / f"{name}.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(TokenizerError, match="expected a JSON object") as error:
        read_settings({path.name: path})
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer_config", "added_tokens", "special_tokens_map"])
def test_settings_of_any_size_are_not_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.json"
    path.write_text("{}" + " " * (2**24 - 2))
    assert read_settings({path.name: path}).options == {}
    with path.open("a") as file:
        file.write(" ")
    with pytest.raises(TokenizerError, match="at most 16777216 bytes"):
        read_settings({path.name: path})


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"])
def test_vocabularies_of_any_size_are_not_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.touch()
    os.truncate(path, 2**28 + 1)  # without blocks on the disk
    with pytest.raises(TokenizerError, match=r"has 268435457 bytes, expected at most 268435456"):
        PipelineTokenizer({name: path})


def test_the_largest_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder_of("lower") / "tokenizer.json"
    size = path.stat().st_size
    monkeypatch.setattr("gptx.tokenization.files.MAX_VOCABULARY_BYTES", size)
    assert PipelineTokenizer({path.name: path}).vocab_size == 324
    monkeypatch.setattr("gptx.tokenization.files.MAX_VOCABULARY_BYTES", size - 1)
    with pytest.raises(TokenizerError, match=f"has {size} bytes, expected at most {size - 1}"):
        PipelineTokenizer({path.name: path})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").mkdir()
    with pytest.raises(StorageError, match=r"tokenizer_config\.json cannot be read"):
        read_settings({"tokenizer_config.json": tmp_path / "tokenizer_config.json"})


@pytest.mark.parametrize(
    "added", [{"a": "7"}, {"a": -1}, {"a": 2**31}, {"a": True}, {"a": 1.5}, {"": 7}, {"a": None}]
)
def test_added_tokens_without_a_valid_id(tmp_path: Path, added: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError, match=r"added_tokens\.json has '.*a token and its id"):
        read(tmp_path, added_tokens__json=added)


@pytest.mark.parametrize(
    "listed",
    [
        *([], "x", {"a": {"content": "b"}}, {"-1": {"content": "b"}}, {"7": {}}, {"7": None}),
        *({"7": {"content": ""}}, {"7": {"content": 3}}, {str(2**31): {"content": "b"}}),
        *({"\u0665": {"content": "b"}}, {"1" * 5000: {"content": "b"}}),
        *({"10000000000": {"content": "b"}}, {"7\n": {"content": "b"}}),
    ],
)
def test_listed_tokens_that_are_damaged(tmp_path: Path, listed: object) -> None:
    with pytest.raises(TokenizerError, match='"added_tokens_decoder" has') as error:
        read(tmp_path, tokenizer_config__json={"added_tokens_decoder": listed})
    assert len(str(error.value)) < 400


def test_the_largest_id(tmp_path: Path) -> None:
    settings = read(tmp_path, added_tokens__json={"a": 2**31 - 1, "b": 0})
    assert list(settings.added) == [2**31 - 1, 0]
    listed = {str(2**31 - 1): {"content": "a"}, "0": {"content": "b"}}
    settings = read(tmp_path, tokenizer_config__json={"added_tokens_decoder": listed})
    assert list(settings.added) == [2**31 - 1, 0]


@pytest.mark.parametrize("value", [3, ["a"], {}, {"content": 5}, ""])
def test_values_that_are_no_tokens_are_ignored(tmp_path: Path, value: object) -> None:
    options = {"pad_token": value, "additional_special_tokens": value}
    settings = read(tmp_path, tokenizer_config__json=options)
    assert settings.named_tokens() == {}
    contents = [token.content for token in settings.special_tokens()]
    assert contents == (["a"] if value == ["a"] else [])


def test_added_tokens_after_a_gap_keep_their_ids(tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(folder_of("added_tokens") / name, tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<a>": 325, "<b>": 330, "low": 331}')
    tokenizer = PipelineTokenizer.of_folder(tmp_path)
    assert tokenizer is not None
    assert [i for i in tokenizer.encode("x<b><a>low") if i > 324] == [330, 325]
    assert tokenizer.token_id("low") == tokenizer.encode("low")[0] < 320  # the vocabulary has it
    assert tokenizer.decode([325, 326, 330]) == "<a><b>"


@pytest.mark.parametrize("added", [{"<a>": 5}, {"<a>": 319}])
def test_two_tokens_of_one_id(tmp_path: Path, added: dict[str, int]) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(folder_of("added_tokens") / name, tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(TokenizerError, match=r"'<a>' has the id \d+ of another token"):
        PipelineTokenizer.of_folder(tmp_path)


def test_a_named_token_without_an_id_gets_none(tmp_path: Path) -> None:
    shutil.copy(folder_of("prefix_of_json") / "tokenizer.json", tmp_path)
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<new>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    tokenizer = PipelineTokenizer.of_folder(tmp_path)
    assert tokenizer is not None
    assert tokenizer.token_id("<new>") is None
    assert tokenizer.vocab_size == 320


def test_a_named_token_is_special_and_keeps_its_other_flags(tmp_path: Path) -> None:
    definition = json.loads((folder_of("lower") / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    options = {"pad_token": "[X]", "sep_token": "low"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    tokenizer = PipelineTokenizer.of_folder(tmp_path)
    assert tokenizer is not None
    added = {token["content"]: token for token in tokenizer.definition()["added_tokens"]}
    assert added["[X]"] == {**definition["added_tokens"][3], "special": True}
    assert added["low"]["special"]  # a token of the vocabulary
