"""Data opened by their kind: folders, patterns, examples, tokenizers."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from gptx.errors import DataError, NotFoundError, ParameterError
from gptx.tokenization.characters import character_tokenizer
from gptx.training.data.examples import Examples
from gptx.training.data.opening import find_split, is_text, open_data
from gptx.training.data.windows import TokenData
from tests.support.byte_tokenizers import byte_tokenizer
from tests.support.cli import raises_error

SIZES = {"context": 4, "batch_size": 2}


def tokens(folder: Path, *names: str, n: int = 20) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.bin").write_bytes(np.arange(n, dtype="<u2").tobytes())


def sizes(data: object) -> tuple[int, int]:
    assert isinstance(data, TokenData)
    return data.train.n_tokens, data.validation.n_tokens if data.validation else 0


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val"),
        ("train_000000", "train_000001", "val_000000"),
        ("tiny_shakespeare_train", "tiny_shakespeare_val"),
        ("fineweb_val_000000", "fineweb_train_000001", "fineweb_train_000002"),
    ],
    ids=lambda names: names[0],
)
def test_names_of_token_files(names: tuple[str, ...], tmp_path: Path) -> None:
    tokens(tmp_path / "data", *names)
    n_train = sum("train" in name for name in names)
    assert sizes(open_data(tmp_path / "data", **SIZES)) == (20 * n_train, 20)


# llm.c takes tiny Shakespeare or else tiny stories, whichever it finds: llm.c #77.
def test_a_folder_with_several_corpora_is_refused(tmp_path: Path) -> None:
    tokens(tmp_path, "tiny_shakespeare_train", "tiny_stories_train", "tiny_stories_val")
    with raises_error(ParameterError, "several corpora", "tiny_shakespeare_train.bin and "):
        open_data(tmp_path, **SIZES)
    assert sizes(open_data(tmp_path / "tiny_stories_train.bin", **SIZES)) == (18, 2)
    (tmp_path / "new").mkdir()
    tokens(tmp_path / "new", "train", "train_000000")
    with raises_error(ParameterError, "several corpora"):
        find_split(tmp_path / "new", ("train",))


def test_a_missing_file_is_never_replaced_by_another(tmp_path: Path) -> None:
    tokens(tmp_path, "train", "val")
    with raises_error(NotFoundError, "other.bin does not exist"):
        open_data(tmp_path / "other.bin", **SIZES)
    with raises_error(NotFoundError, "has no train.bin and no train.jsonl"):
        (tmp_path / "empty").mkdir()
        open_data(tmp_path / "empty", **SIZES)


def test_patterns(tmp_path: Path) -> None:
    tokens(tmp_path, "a_0", "a_1", "b_0")
    found = open_data(f"{tmp_path}/a_*.bin", validation=f"{tmp_path}/b_*.bin", **SIZES)
    assert sizes(found) == (40, 20)


def test_a_part_of_the_tokens_for_validation(tmp_path: Path) -> None:
    """The last ones, also of several files; and of a folder only on request."""
    tokens(tmp_path / "data", "train_0", "train_1")
    pattern = f"{tmp_path}/data/train_*.bin"
    for fraction, expected in ((None, (36, 4)), (0.75, (10, 30)), (0, (40, 0)), (0.001, (38, 2))):
        data = open_data(pattern, validation=fraction, **SIZES)
        assert sizes(data) == expected
        assert isinstance(data, TokenData)
        parts = [data.train, *([data.validation] if data.validation else [])]
        read = np.concatenate([part.read(0, part.n_tokens) for part in parts])
        assert read.tolist() == [*range(20), *range(20)]
    assert sizes(open_data(tmp_path / "data", **SIZES)) == (40, 0)
    assert sizes(open_data(tmp_path / "data", validation=0.5, **SIZES)) == (20, 20)
    with raises_error(ParameterError, "validation is 1.0"):
        open_data(pattern, validation=1.0, **SIZES)
    tokens(tmp_path, "short", n=2)
    with raises_error(DataError, "too few for training and validation"):
        open_data(tmp_path / "short.bin", **SIZES)


def test_the_tokenizer_of_the_folder(tmp_path: Path) -> None:
    tokens(tmp_path, "train")
    assert open_data(tmp_path, **SIZES).tokenizer is None
    meta = {"vocab_size": 2, "itos": {0: "b", 1: "a"}, "stoi": {"b": 0, "a": 1}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    found = open_data(tmp_path / "train.bin", **SIZES).tokenizer
    assert found is not None
    assert found.encode("ab") == [1, 0]
    character_tokenizer("xyz").save(tmp_path)
    found = open_data(tmp_path, **SIZES).tokenizer
    assert found is not None
    assert found.encode("zx") == [2, 0]
    with raises_error(DataError, "the data have the id 0 for 'x'"):
        open_data(tmp_path, **SIZES, tokenizer=byte_tokenizer())
    same = character_tokenizer("xyz")
    assert open_data(tmp_path, **SIZES, tokenizer=same).tokenizer is same


def examples(path: Path, n: int) -> Path:
    path.write_text("\n".join(json.dumps({"text": "abc"}) for _ in range(n)))
    return path


def test_examples(tmp_path: Path) -> None:
    path = examples(tmp_path / "train.jsonl", 20)
    tokenizer = byte_tokenizer({"<|endoftext|>": 256})

    def split(source: object, **options: float) -> tuple[int, int]:
        data = open_data(source, **SIZES, tokenizer=tokenizer, **options)  # type: ignore[arg-type]
        assert isinstance(data, Examples)
        return data.train.n, data.validation.n if data.validation else 0

    assert split(path) == split(tmp_path) == (18, 2)
    assert split(path, validation=0.5) == (10, 10)
    examples(tmp_path / "valid.jsonl", 7)
    assert split(tmp_path) == (20, 7)
    with raises_error(ParameterError, "there is no tokenizer: give tokenizer='gpt2'"):
        open_data(path, **SIZES)
    with raises_error(ParameterError, "data has .bin and .jsonl files"):
        open_data([path, tmp_path / "train.bin"], **SIZES)


def test_text_is_told_from_other_data(tmp_path: Path) -> None:
    assert is_text("corpus.txt")
    assert is_text([tmp_path / "missing", "-"])
    for other in (tmp_path, "a.bin", "a_*.bin", "a.JSONL", ["a.txt", "b.bin"]):
        assert not is_text(other)
