"""Lines of a batch as items: OpenAI's format, bodies alone, and lines that are no request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptx.cluster.items import Shard, item_id, parse_item, parse_shard, read_lines
from gptx.errors import NotFoundError, ParameterError


def parse(value: Any, line: int = 1, seed: int = 0) -> Any:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return parse_item(line, data, seed)


def test_openai_format() -> None:
    body = {"prompt": "To be", "seed": 5}
    item = parse({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body})
    assert (item.custom_id, item.url, item.body, item.error) == ("a", "/v1/completions", body, None)


@pytest.mark.parametrize(
    ("field", "url"),
    [
        ("prompt", "/v1/completions"),
        ("messages", "/v1/chat/completions"),
        ("input", "/v1/embeddings"),
    ],
)
def test_the_field_of_a_body_alone_names_its_endpoint(field: str, url: str) -> None:
    item = parse({field: "To be", "custom_id": "a", "seed": 1})
    assert (item.custom_id, item.url, item.error) == ("a", url, None)
    assert item.body == {field: "To be", "seed": 1}


@pytest.mark.parametrize(
    ("line", "message", "param"),
    [
        (b"nonsense", "the line is no JSON", None),
        (b'{"prompt": "\xff"}', "the line is no JSON", None),
        (b'{"prompt": NaN}', "the line is no JSON", None),
        (b"[" * 100_000, "the line is nested too deeply", None),
        (["To be"], "the line is ['To be'], expected an object", None),
        ({}, "no prompt, messages or input", None),
        ({"prompt": "a", "custom_id": 7}, "custom_id is 7", "custom_id"),
        ({"prompt": "a", "custom_id": "\ud800"}, "custom_id is", "custom_id"),
        ({"prompt": "a", "stream": True}, "stream is true", "stream"),
        ({"url": "/v1/completions"}, "body is missing", "body"),
        ({"url": "/v1/completions", "body": "a"}, "body is 'a', expected an object", "body"),
        ({"url": "/v1/models", "body": {}}, "url is '/v1/models'", "url"),
        ({"url": "/v1/completions", "method": "GET", "body": {}}, "'GET'", "method"),
        ({"url": "/v1/completions", "body": {}, "prompt": "a"}, "prompt is not", "prompt"),
    ],
)
def test_a_line_that_is_no_request(line: Any, message: str, param: str | None) -> None:
    item = parse(line, 7)
    assert message in item.error.message
    assert item.error.param == param
    assert item.line == 7


def test_a_line_without_a_seed_has_one_of_its_own_in_each_run() -> None:
    line = {"prompt": "To be", "temperature": 1}
    seeds = [parse(line, number, key).body["seed"] for number in (1, 2) for key in (0, 0, 1)]
    assert seeds[0] == seeds[1]
    assert seeds[3] == seeds[4]
    assert len(set(seeds)) == 4
    assert max(seeds) < 2**53
    assert "seed" not in parse({"input": "To be"}).body


def test_lines_have_ids_and_blank_ones_have_none(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes('\ufeff{"a": 1}\r\n\n  \n{"a": 1}'.encode())
    lines = list(read_lines(path))
    assert lines == [(1, b'{"a": 1}'), (4, b'{"a": 1}')]
    assert item_id(*lines[0]).split("_")[3] == item_id(*lines[1]).split("_")[3]
    assert item_id(*lines[0]) != item_id(*lines[1])


def test_shards_share_the_lines(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f"{n}\n" for n in range(1, 12)))
    parts = [[line for line, _ in read_lines(path, Shard(i, 3))] for i in (1, 2, 3)]
    assert parts == [[1, 4, 7, 10], [2, 5, 8, 11], [3, 6, 9]]


def test_names_of_shards() -> None:
    assert parse_shard("2/4") == Shard(2, 4)
    for text in ("0/4", "5/4", "2", "2/", "/4", "-1/4", "1/0", "a/b", "²/4"):
        with pytest.raises(ParameterError, match=r"shard is .*, expected I/N"):
            parse_shard(text)


def test_a_missing_input(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        next(read_lines(tmp_path / "nothing"))
