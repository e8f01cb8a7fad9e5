"""Hosts by which a server is called, and origins of the pages that call it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gptx.generation.text_model import Model
from gptx.server.settings import Settings
from tests.support.serving import Served, serving

PATH = "/v1/completions"
BODY = {"prompt": "a", "max_tokens": 1}


@pytest.fixture(scope="module")
def local(shakespeare: Model) -> Iterator[Served]:
    """A server as it is on loopback without a key, with one more host and one origin."""
    settings = Settings(hosts=("127.0.0.1", "Gptx.example"), cors=("https://example.org",))
    with serving(shakespeare, settings) as served:
        yield served


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8000", "127.0.0.1", "127.0.0.2:80", "[::1]", "[::1]:8000",
     "LOCALHOST", "gptx.example", "gptx.example:443"],
)  # fmt: skip
def test_known_hosts_are_answered(local: Served, host: str) -> None:
    assert local.post(PATH, BODY, headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example",
     "192.168.0.1", "[::2]", "evil.example/127.0.0.1", ""],
)  # fmt: skip
def test_a_name_that_resolves_to_loopback_is_421(local: Served, host: str) -> None:
    for answer in (
        local.client.get("/v1/models", headers={"Host": host}),
        local.post(PATH, BODY, headers={"Host": host, "Origin": f"http://{host}"}),
    ):
        assert answer.status_code == 421
        error = answer.json()["error"]
        assert error["code"] == "host_not_allowed"
        assert "expected localhost or 127.0.0.1 or Gptx.example" in error["message"]
        assert "\n" not in error["message"]


def test_an_open_server_has_any_host(served: Served) -> None:
    assert served.post(PATH, BODY, headers={"Host": "gptx.example"}).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PATCH", "DELETE", "PUT"])
def test_a_page_of_another_origin_changes_nothing(local: Served, method: str) -> None:
    for origin in ("https://evil.example", "null", "", f"{local.url}0", "http://127.0.0.1"):
        answer = local.client.request(method, "/models/m/setup", headers={"Origin": origin})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_not_allowed")


def test_pages_of_the_server_and_of_given_origins_are_answered(local: Served) -> None:
    for origin in (local.url, "https://example.org"):
        assert local.post(PATH, BODY, headers={"Origin": origin}).status_code == 200
    answer = local.client.get("/v1/models", headers={"Origin": "https://evil.example"})
    assert answer.status_code == 200  # which the page cannot read
    assert "access-control-allow-origin" not in answer.headers


def test_cors_for_all_origins(shakespeare: Model) -> None:
    with serving(shakespeare, Settings(cors=("*",))) as served:
        answer = served.post(PATH, BODY, headers={"Origin": "https://example.org"})
        assert answer.status_code == 200
