"""Examples of JSON lines: the counted tokens, padding, bad lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptx.errors import DataError, ModelWarning, NotFoundError, ParameterError
from gptx.tokenization.pipeline import PipelineTokenizer
from gptx.training.data.examples import Examples, ExampleSet, read_examples, split_examples
from tests.support.byte_tokenizers import byte_tokenizer
from tests.support.cli import raises_error
from tests.support.random_models import CASES

END = 256
TOKENIZER = byte_tokenizer({"<|endoftext|>": END})


def written(tmp_path: Path, *lines: Any, name: str = "x.jsonl") -> Path:
    """Write lines: text as it is, other values as JSON."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (tmp_path / name).write_text("\n".join(texts), encoding="utf-8")
    return tmp_path / name


def read(path: Path, context: int = 100, tokenizer: PipelineTokenizer = TOKENIZER) -> ExampleSet:
    return read_examples([path], tokenizer, context=context)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def counted(examples: ExampleSet, context: int = 100) -> list[list[int]]:
    """The targets of each example that the loss counts."""
    batch = examples.batch(range(examples.n), context)
    return [row[weights > 0].tolist() for row, weights in
            zip(batch.targets, batch.weights, strict=True)]  # fmt: skip


def test_the_loss_counts_a_text_and_its_end(tmp_path: Path) -> None:
    examples = read(written(tmp_path, {"text": "abc"}, "", {"text": "ö"}))
    assert counted(examples) == [[*ids("bc"), END], [ids("ö")[1], END]]


def test_the_loss_counts_the_completion_only(tmp_path: Path) -> None:
    path = written(
        tmp_path, {"prompt": "ab", "completion": " cd"}, {"prompt": "", "completion": "xy"}
    )
    assert counted(read(path)) == [[*ids(" cd"), END], [*ids("y"), END]]
    batch = read(path).batch([0], 100)
    assert batch.ids[0, :5].tolist() == ids("ab cd")


def test_the_end_of_text_in_a_text_is_plain(tmp_path: Path) -> None:
    """Data cannot end an example by the characters of the token."""
    [target] = counted(read(written(tmp_path, {"text": "a<|endoftext|>"})))
    assert target == [*ids("<|endoftext|>"), END]
    assert len(target) == 14


def test_padding_is_masked_and_at_the_right(tmp_path: Path) -> None:
    examples = read(written(tmp_path, {"text": "a" * 40}, {"text": "bc"}, {"text": "d"}))
    batch = examples.batch([1, 0], 100)
    assert batch.ids.shape == (2, 64)  # a multiple of 32
    assert batch.weights.sum(axis=1).tolist() == [2, 40]
    assert (np.diff(batch.weights, axis=1) <= 0).all()
    assert not batch.ids[0, 2:].any()
    assert examples.batch([1], 100).ids.shape == (1, 32)
    assert examples.batch([0], 50).ids.shape == (1, 50)  # at most the context


def test_an_example_that_is_too_long_is_truncated_with_a_note(tmp_path: Path) -> None:
    path = written(
        tmp_path, {"text": "abcdefgh"}, {"text": "abcd"}, {"prompt": "abcdef", "completion": "g"}
    )
    with pytest.warns(ModelWarning) as notes:
        examples = read(path, context=4)
    assert [str(note.message) for note in notes] == [
        "2 examples are longer than the context of 4 and are truncated",
        "1 examples without a token for the loss are left out",
    ]
    assert counted(examples, 4) == [ids("bcde"), [*ids("bcd"), END]]


def test_a_tokenizer_without_an_end(tmp_path: Path) -> None:
    with pytest.warns(ModelWarning, match="the examples have no end"):
        examples = read(written(tmp_path, {"text": "ab"}), tokenizer=byte_tokenizer())
    assert counted(examples) == [ids("b")]


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "is no JSON object (Expecting property name"),
        ("[" * 100_000, "is no JSON object (nested too deeply)"),
        ('["text"]', "is no JSON object"),
        ("{}", "has none of these keys"),
        ({"text": 1}, 'has no string as "text"'),
        ({"prompt": "a"}, 'has "prompt", expected {"text": ...}'),
        ({"text": "a", "prompt": "b"}, 'has "text" and "prompt"'),
        ({"messages": []}, 'has "messages", and a GPT-2 has no form for them'),
        ('{"text": "\\ud800"}', "lone surrogate"),
    ],
    ids=range(9),
)
def test_a_bad_line_is_named(line: Any, part: str, tmp_path: Path) -> None:
    path = written(tmp_path, {"text": "a"}, "", line)
    with raises_error(DataError, f"{path}, line 3", part):
        read(path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with raises_error(DataError, f"{path}, line 2 is not in UTF-8 (byte 10)"):
        read(path)


def test_files_without_examples(tmp_path: Path) -> None:
    with raises_error(DataError, "there is no example"):
        read(written(tmp_path, ""))
    with raises_error(NotFoundError, "y.jsonl does not exist"):
        read(tmp_path / "y.jsonl")


def many(tmp_path: Path, n: int = 10) -> ExampleSet:
    return read(written(tmp_path, *({"text": "a" * (3 + i)} for i in range(n))))


def test_each_example_is_used_once_an_epoch(tmp_path: Path) -> None:
    """In another order in each epoch, and not sorted by length."""
    data = Examples(many(tmp_path), context=100, batch_size=4, seed=3, tokenizer=TOKENIZER)
    assert data.sequences_per_epoch == 10
    lengths = np.concatenate([data.batch(step).weights.sum(axis=1) for step in range(5)])
    epochs = [lengths[:10].tolist(), lengths[10:].tolist()]
    for epoch in epochs:
        assert sorted(epoch) == list(range(3, 13))
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1]
    again = Examples(many(tmp_path), context=100, batch_size=4, seed=3, tokenizer=TOKENIZER)
    assert (again.batch(4).ids == data.batch(4).ids).all()


def test_describe_tells_examples_apart(tmp_path: Path) -> None:
    examples = many(tmp_path)
    train, validation = split_examples(examples, 0.25)
    sizes: dict[str, int] = {"context": 100, "batch_size": 2}
    described = [
        Examples(train, validation, **sizes, tokenizer=TOKENIZER).describe(),
        Examples(train, **sizes, tokenizer=TOKENIZER).describe(),
        Examples(examples, validation, **sizes, tokenizer=TOKENIZER).describe(),
        Examples(train, validation, **sizes, seed=1, tokenizer=TOKENIZER).describe(),
        Examples(train, validation, context=99, batch_size=2, tokenizer=TOKENIZER).describe(),
    ]
    assert len({json.dumps(x) for x in described}) == 5
    assert (described[1]["validation examples"], described[0]["train examples"]) == (0, 7)


def test_validation_examples(tmp_path: Path) -> None:
    train, validation = split_examples(many(tmp_path), 0.25)
    assert validation is not None
    assert (train.n, validation.n) == (7, 3)
    data = Examples(train, validation, context=100, batch_size=2, tokenizer=TOKENIZER)
    lengths = [batch.weights.sum(axis=1).tolist() for batch in data.validation_batches()]
    assert lengths == [[10, 11], [12]]
    assert len(list(data.validation_batches(1))) == 1
    assert split_examples(many(tmp_path), 0)[1] is None
    assert [part and part.n for part in split_examples(many(tmp_path, 2), 0.1)] == [1, 1]
    for fraction in (1.0, -0.1, float("nan")):
        with raises_error(ParameterError, f"validation is {fraction}"):
            split_examples(many(tmp_path), fraction)
    with raises_error(DataError, "there is one example"):
        split_examples(many(tmp_path, 1), 0.1)


def test_checks_before_the_first_step(tmp_path: Path) -> None:
    config = CASES["tiny"]
    data = Examples(many(tmp_path), context=config.n_positions, batch_size=2, tokenizer=TOKENIZER)
    with raises_error(DataError, f"the token id {END}, and the model has {config.vocab_size}"):
        data.check(config)
    data.context += 1
    with raises_error(ParameterError, f"context is {config.n_positions + 1}"):
        data.check(config)
