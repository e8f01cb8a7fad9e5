"""Errors: OpenAI's form, the field in `param`, and no effect on other requests."""

from __future__ import annotations

from typing import Any

import pytest

from gptx.errors import (
    DeviceOutOfMemory,
    GptxError,
    NonFiniteError,
    NotFoundError,
    ParameterError,
    argument,
)
from gptx.server.errors import api_error
from tests.support.serving import Served, raw_request

# A field, and values of it that are refused.
BAD: list[tuple[str, list[Any]]] = [
    ("temperature", [-1, "1", True, [1], {}, 1e30]),
    ("top_p", [-0.1, 1.1, "x"]),
    ("top_k", [1.5, "5", -2, 2**40, True]),
    ("min_p", [2]),
    ("repetition_penalty", [0, -1]),
    ("logit_bias", [{"word": 1}, {"1": "x"}, {"1": 101}, {"-1": 1}, {"1.5": 1}, [], "x",
                    {"99999": 1}, {"1": True}, {"²": 1}]),
    ("stop", [5, [""], "", ["a"] * 17, [1], {}, "\ud800"]),
    ("stop_token_ids", [["a"], [1.5], [-1], [5000], 3]),
    ("max_tokens", [-1, 1.5, "5", True, 2**40]),
    ("max_completion_tokens", ["x"]),
    ("n", [0, 17, 1.5, "2"]),
    ("best_of", [0, 99]),
    ("logprobs", [-1, 101, True, "1"]),
    ("echo", [1, "true"]),
    ("seed", ["x", 1.5, 2**64, -(2**63) - 1]),
    ("stream", ["yes", 1]),
    ("stream_options", [True, [], {"include_usage": 1}]),
    ("min_tokens", [-1, 17]),
    ("overflow", ["drop", 1]),
    ("ban", [[""], 1, [["a"]]]),
    ("prompt", ["", [], [[]], [1.5], ["a", 1], {}, 5, [True], [-1], [1024], [[1], "\ud800"],
                "\ud800", ["a"] * 129]),
    ("model", [5]),
    ("budget", [0, -1, "1", 1e9]),
    ("state", [""]),
    ("suffix", ["x"]),
    ("no_such_field", [1]),
    ("temprature", [1]),
    ("__class__", [1]),
]  # fmt: skip
CASES = [(name, value) for name, values in BAD for value in values]


@pytest.mark.parametrize(("name", "value"), CASES, ids=lambda one: repr(one)[:30])
def test_a_bad_field_is_named(served: Served, name: str, value: Any) -> None:
    """vllm #5822, PR #16529, #3341, PR #55164; sendnn-inference #542: one ended the engine."""
    body = {"prompt": "ROMEO:", name: value}
    error = served.error(**body)
    assert error["status"] == 400
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").split(".")[0] == name
    assert error["message"]


def test_a_bad_request_does_not_affect_a_good_one(served: Served) -> None:
    expected = served.complete(max_tokens=8)["choices"]
    for name, value in CASES[::7]:
        served.error(prompt="ROMEO:", **{name: value} if name != "prompt" else {"n": 0})
    assert served.complete(max_tokens=8)["choices"] == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"min_tokens": 9, "max_tokens": 5}, "min_tokens"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"max_tokens": 400}, "prompt"),
        ({"max_tokens": 5, "stream_options": {"chunks": True}}, "stream_options.chunks"),
        ({"state": "x", "max_tokens": 5}, "prompt"),
    ],
)
def test_fields_that_contradict_each_other(
    served: Served, fields: dict[str, Any], param: str
) -> None:
    error = served.error(prompt="ROMEO:", **fields)
    assert (error["status"], error["param"]) == (400, param)


def test_a_close_name_is_suggested(served: Served) -> None:
    assert "do you mean temperature?" in served.error(prompt="a", temprature=1)["message"]


def test_a_missing_prompt_and_an_unknown_model(served: Served) -> None:
    assert served.error(max_tokens=3)["param"] == "prompt"
    error = served.error(prompt="a", model="gpt-5")
    assert (error["status"], error["code"], error["param"]) == (404, "model_not_found", "model")


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"nope", b"[1]", b"5", b'"x"', b"null", b"\xff\xfe{}", b'{"prompt": NaN}',
        b'{"temperature": 1e999, "prompt": "a"}', b'{"n": ' + b"9" * 5000 + b"}",
        b"[" * 100_000, b'{"a":' * 50_000, b'{"prompt": "\xff"}',
    ],
    ids=range(14),
)  # fmt: skip
def test_a_body_that_is_no_object_is_400(served: Served, data: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = served.client.post("/v1/completions", content=data, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_another_type_of_body_is_415(served: Served, kind: str | None) -> None:
    """A web page can send these types to a server of this machine without asking."""
    headers = {} if kind is None else {"Content-Type": kind}
    answer = served.client.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
    assert answer.status_code == 415


def test_a_body_above_the_limit_is_413(served: Served) -> None:
    answer = served.post("/v1/completions", {"prompt": "a" * (4 * 2**20)})
    assert answer.status_code == 413
    chunks = (b" " * 2**16 for _ in range(100))  # without a length
    headers = {"Content-Type": "application/json"}
    answer = served.client.post("/v1/completions", content=chunks, headers=headers)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


def test_an_unknown_path_and_method_are_json(served: Served) -> None:
    assert served.client.get("/nope").json()["error"]["type"] == "not_found_error"
    answer = served.client.get("/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["error"]["message"]


def test_a_malformed_request_ends_its_connection_only(served: Served) -> None:
    bad_length = raw_request("/v1/completions", {}).replace(b"Length:", b"Length: x")
    for data in (
        b"GET\r\n\r\n",
        b"\x16\x03\x01\r\n\r\n",
        b"POST / HTTP/1.1\r\nA B\r\n\r\n",
        bad_length,
    ):
        with served.connect() as connection:
            connection.sendall(data)
            assert connection.recv(4096).startswith(b"HTTP/1.1 400")
    assert served.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("error", "status", "param"),
    [
        (ParameterError(f"lower {argument('max_tokens')}"), 400, "max_tokens"),
        (NotFoundError("no file"), 404, None),
        (DeviceOutOfMemory("full"), 503, None),
        (NonFiniteError("a NaN"), 500, None),
        (GptxError("other"), 500, None),
        (ValueError("/secret/path"), 500, None),
    ],
)
def test_the_status_of_errors(error: Exception, status: int, param: str | None) -> None:
    answer = api_error(error)
    assert (answer.status, answer.param) == (status, param)
    assert "secret" not in answer.message
