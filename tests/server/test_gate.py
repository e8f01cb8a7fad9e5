"""The gate: keys, public paths, CORS, the log and the metrics."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from gptx.errors import NotFoundError, ParameterError
from gptx.generation.text_model import Model
from gptx.server.keys import Keys, read_keys
from gptx.server.settings import Settings
from tests.support.serving import NAME, Served, serving, wait_until

KEYS = ("first-key", "second")


async def page(request: Request) -> Response:
    return PlainTextResponse("page")


async def fail(request: Request) -> Response:
    raise NotFoundError("no such thing")


async def broken(request: Request) -> Response:
    raise ValueError("/secret/path")


@pytest.fixture(scope="module")
def locked(shakespeare: Model) -> Iterator[Served]:
    """A server with keys, an origin, and routes of another module."""
    settings = Settings(keys=KEYS, cors=("https://example.org",))
    routes = [
        Route("/", page),
        Route("/page/app.js", page),
        Route("/fail", fail),
        Route("/broken", broken),
    ]
    with serving(shakespeare, settings, extra_routes=routes) as served:
        yield served


PRIVATE = [
    ("GET", "/v1/models"), ("GET", "/v1/models/shakespeare"), ("GET", "/metrics"),
    ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/tokenizer_info"), ("GET", "/nope"),
    ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/v1/embeddings"),
    ("POST", "/tokenize"), ("POST", "/detokenize"), ("POST", "/model_inference"), ("POST", "/"),
    ("POST", "/health"), ("GET", "/page/../metrics"), ("GET", "/page"), ("GET", "//health"),
]  # fmt: skip
WRONG = [
    None, "", "Bearer", "Bearer ", "Bearer first-ke", "Bearer first-key2", "Bearer FIRST-KEY",
    "Basic first-key", "first-key", "Bearer second,first-key", "Bearer " + "x" * 8000,
    "Bearer \xe9",
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), PRIVATE)
def test_only_health_and_the_page_are_public(locked: Served, method: str, path: str) -> None:
    with locked.connect() as connection:
        connection.sendall(
            f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode()
        )
        assert connection.recv(12) == b"HTTP/1.1 401"
    for public in ("/health", "/", "/page/app.js"):
        assert locked.client.get(public, headers={"Authorization": ""}).status_code == 200


@pytest.mark.parametrize("value", WRONG, ids=range(len(WRONG)))
def test_a_wrong_key_is_401(locked: Served, value: str | None) -> None:
    with locked.connect() as connection:
        header = "" if value is None else f"Authorization: {value}\r\n"
        request = f"GET /v1/models HTTP/1.1\r\nHost: x\r\n{header}\r\n"
        connection.sendall(request.encode("latin-1"))
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 401")
    assert b"www-authenticate: Bearer" in answer


@pytest.mark.parametrize("value", [f"Bearer {key}" for key in KEYS] + ["bearer second"])
def test_each_key_is_let_in(locked: Served, value: str) -> None:
    answer = locked.client.get("/v1/models", headers={"Authorization": value})
    assert [one["id"] for one in answer.json()["data"]] == [NAME]


def test_callers_have_salts_of_their_own() -> None:
    keys = Keys(KEYS)
    salts = {keys.salt(f"Bearer {key}") for key in KEYS}
    assert len(salts) == 2
    assert None not in salts
    assert Keys(()).salt(None) == ""


def test_errors_of_other_modules_have_the_same_form(locked: Served) -> None:
    answer = locked.client.get("/fail")
    assert (answer.status_code, answer.json()["error"]["message"]) == (404, "no such thing")
    answer = locked.client.get("/broken")
    assert answer.status_code == 500
    assert "secret" not in answer.text


def test_cors_is_for_the_given_origin_only(locked: Served, served: Served) -> None:
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "X-A"}
    for origin, allowed in (("https://example.org", True), ("https://evil.example", False)):
        answer = locked.client.options("/v1/completions", headers={**ask, "Origin": origin})
        assert ("access-control-allow-origin" in answer.headers) == allowed
    answer = served.client.get("/v1/models", headers={"Origin": "https://example.org"})
    assert "access-control-allow-origin" not in answer.headers


def test_keys_of_options_and_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# mine\nalpha\n\n  beta \n")
    assert read_keys(("first",), str(file)) == ("first", "alpha", "beta")
    assert read_keys((), None) == ()
    file.write_text("# none\n")
    with pytest.raises(ParameterError, match="has no key"):
        read_keys((), str(file))
    with pytest.raises(ParameterError, match="is empty"):
        read_keys((" ",), None)
    with pytest.raises(NotFoundError):
        read_keys((), str(tmp_path / "absent"))


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("log_prompts", [False, True])
def test_a_request_is_a_line_of_the_log(
    shakespeare: Model, caplog: pytest.LogCaptureFixture, log_format: str, log_prompts: bool
) -> None:
    caplog.set_level(logging.INFO, "gptx.server.requests")
    settings = Settings(log_format=log_format, log_prompts=log_prompts)
    with serving(shakespeare, settings) as served:
        served.complete("Some secret prompt", max_tokens=3)
        wait_until(lambda: served.gate.active == 0)  # the line follows the answer
        served.error(prompt="another secret", n=0)
        wait_until(lambda: served.gate.active == 0)
    lines = [one.getMessage() for one in caplog.records if one.name == "gptx.server.requests"]
    assert len(lines) == 2
    assert ("Some secret prompt" in lines[0]) == log_prompts
    assert "another secret" not in lines[1]
    if log_format == "json":
        facts = json.loads(lines[0])
        assert (facts["status"], facts["completion_tokens"]) == (200, 3)
        assert facts["path"] == "/v1/completions"
        assert "n is 0" in json.loads(lines[1])["error"]
    else:
        assert lines[0].startswith("127.0.0.1 POST /v1/completions 200 seconds=")
        assert "completion_tokens=3" in lines[0]


def test_metrics_count_requests_and_tokens(shakespeare: Model) -> None:
    with serving(shakespeare) as served:
        served.complete("ROMEO:", max_tokens=3, ignore_eos=True)
        served.error(prompt="a", n=0)
        served.client.get("/some/unknown/path")
        wait_until(lambda: served.gate.active == 0)
        text = served.client.get("/metrics").text
    for line in (
        'gptx_requests_total{path="/v1/completions",status="200"} 1.0',
        'gptx_requests_total{path="/v1/completions",status="400"} 1.0',
        'gptx_requests_total{path="other",status="404"} 1.0',
        "gptx_prompt_tokens_total 2.0",
        "gptx_generated_tokens_total 3.0",
        "gptx_requests_running 0.0",
        "gptx_requests_waiting 0.0",
        "gptx_time_to_first_token_seconds_count 1.0",
    ):
        assert line in text.splitlines()


def test_health_tells_what_is_missing(shakespeare: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm PR #1513, #1129: /health was 200 after the engine had ended."""
    with serving(shakespeare) as served:
        assert served.client.get("/health").json() == {"status": "ok"}

        def fail() -> None:
            raise RuntimeError("injected")

        monkeypatch.setattr(served.scheduler, "_admit", fail)
        assert served.post("/v1/completions", {"prompt": "a"}).status_code == 503
        answer = served.client.get("/health")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_gone")
        assert served.post("/v1/completions", {"prompt": "a"}).status_code == 503
