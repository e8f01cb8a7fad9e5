"""Fields: each kind's check and its JSON schema agree, and the document has all fields."""

from __future__ import annotations

from typing import Any

import pytest

from gptx.server.api.fields import (
    BODY,
    Biases,
    Choice,
    Either,
    Field,
    Flag,
    Kind,
    Many,
    Number,
    Prompts,
    Record,
    Text,
    Whole,
    parse,
)
from gptx.server.api.openapi import docs_page, openapi
from gptx.server.app import Api
from gptx.server.errors import ApiError
from gptx.server.metrics import Metrics
from gptx.server.models import Models
from gptx.server.settings import Settings

KINDS: list[tuple[Kind, list[Any], list[Any]]] = [
    (Whole(0, 5), [0, 5, 2.0], [-1, 6, 1.5, "1", True, None, [], 10**30]),
    (Number(0, 2), [0, 2, 1.5], [-0.1, 2.1, "1", False, None]),
    (Number(0, 2, exclusive=True), [0.1, 2], [0, -1]),
    (Flag(), [True, False], [0, 1, "true"]),
    (Text(), ["", "a"], [1, None, ["a"]]),
    (Text(1), ["a"], [""]),
    (Choice(("a", "b")), ["a"], ["c", "", 1]),
    (Many(Whole(0, 1), 2, 1), [[0], [0, 1]], [[], [0, 1, 0], [2], 0, "01"]),
    (Either((Text(1), Many(Text(1), 2))), ["a", ["a"], []], ["", [""], 1]),
    (Prompts(2), ["a", [1], ["a", "b"], [[1, 2], [3]]], ["", [], [[]], [""], ["a"] * 3, [1.5]]),
    (Biases(1.0), [{}, {"5": 0.5}], [{"a": 1}, {"5": 2}, {"-5": 0}, {"5": "x"}, [], 1]),
    (Record((Field("a", Whole(0, 1), "A.", required=True),)), [{"a": 1}], [{}, {"b": 1}, {"a": 2}]),
]


@pytest.mark.parametrize(("kind", "good", "bad"), KINDS, ids=lambda one: type(one).__name__)
def test_the_check_of_a_kind(kind: Kind, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        kind.read("x", value)
    for value in bad:
        with pytest.raises(ApiError) as caught:
            kind.read("x", value)
        assert (caught.value.param or "").startswith("x")
        assert caught.value.status == 400


@pytest.mark.clients
@pytest.mark.parametrize(("kind", "good", "bad"), KINDS, ids=lambda one: type(one).__name__)
def test_the_schema_of_a_kind_says_the_same(kind: Kind, good: list[Any], bad: list[Any]) -> None:
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    validator = jsonschema_rs.validator_for(kind.schema)
    assert all(validator.is_valid(value) for value in good)
    assert not any(validator.is_valid(value) for value in bad if value != 10**30)


def test_null_is_absent_and_defaults_are_apart() -> None:
    record = Record((Field("a", Whole(0, 5), "A.", 3), Field("b", Text(), "B.")))
    assert record.read(BODY, {"a": None, "zzz": None}) == {}
    assert record.defaults == {"a": 3}
    assert {"type": "null"} in record.schema["properties"]["a"]["anyOf"]


def test_numbers_of_json_are_finite() -> None:
    for text in (b"NaN", b"[Infinity]", b"-Infinity", b"1e999", b"\xff", b"", b"[" * 10**5):
        with pytest.raises(ApiError):
            parse(text)
    assert parse(b'{"a": 1e5}') == {"a": 1e5}


def test_the_document_and_the_page_have_each_field() -> None:
    models = Models()
    endpoints = Api(models, Settings(), Metrics(models)).endpoints
    document, page = openapi(endpoints), docs_page(endpoints)
    for one in endpoints:
        content = document["paths"][one.path]["post"]["requestBody"]["content"]
        schema = content["application/json"]["schema"]
        assert list(schema["properties"]) == [field.name for field in one.fields.fields]
        assert schema["additionalProperties"] is False
        for field in one.fields.fields:
            assert f"<code>{field.name}</code>" in page
    names = {field.name for field in endpoints[0].fields.fields}
    assert {"prompt", "n", "best_of", "echo", "stop", "seed", "budget", "state"} <= names
