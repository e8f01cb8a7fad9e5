"""Models by name: loading, errors, a store."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import gptx
from gptx.errors import NotFoundError
from gptx.generation.text_model import Model
from gptx.server.app import make_app
from gptx.server.errors import ApiError, Unavailable
from gptx.server.models import Models
from tests.support.serving import PATIENCE_SECONDS, Served, Settings, wait_until


class Store:
    """A store of one model."""

    def names(self) -> list[str]:
        return ["stored"]

    def path(self, name: str) -> Path | None:
        return Path("folder") if name == "stored" else None


def test_health_is_503_while_the_model_is_loaded(shakespeare: Model) -> None:
    go = threading.Event()

    def load() -> Model:
        go.wait(PATIENCE_SECONDS)
        return shakespeare

    models = Models()
    models.add("shakespeare", load)
    served = Served(models, Settings(), preload=True)
    try:
        answer = served.client.get("/health")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
        assert served.error(prompt="a")["code"] == "loading"
        go.set()
        wait_until(lambda: served.client.get("/health").status_code == 200)
        assert served.complete(max_tokens=1)
    finally:
        go.set()
        served.close()


def test_a_model_that_cannot_be_loaded_is_reported() -> None:
    def load() -> Model:
        raise NotFoundError("no weights")

    failures: list[Exception] = []
    models = Models()
    models.add("x", load)
    make_app(models, preload=True, on_failure=failures.append)
    with pytest.raises(NotFoundError):
        models.setup()
    with pytest.raises(Unavailable, match="no weights"):
        models.get()


def test_a_model_of_the_store_is_loaded_at_its_first_request(shakespeare: Model) -> None:
    loaded = []

    def load(path: Path) -> Model:
        loaded.append(path)
        return gptx.load("shakespeare")

    models = Models(store=Store(), load=load)
    models.add("shakespeare", shakespeare)
    assert models.names() == ["shakespeare", "stored"]
    served = Served(models, Settings())
    try:
        facts = served.client.get("/v1/models").json()["data"]
        assert [one["loaded"] for one in facts] == [True, False]
        for _ in range(2):
            served.complete(max_tokens=1, model="stored")
        assert loaded == [Path("folder")]
        assert "stored" in models.loaded
        models.drop("stored")
        assert "stored" not in models.loaded
    finally:
        served.close()


def test_an_unknown_name_is_404(shakespeare: Model) -> None:
    models = Models()
    with pytest.raises(ApiError, match="none yet"):
        models.get()
    models.add("shakespeare", shakespeare)
    with pytest.raises(ApiError, match="expected one of: shakespeare"):
        models.get("other")
    assert models.get().model is shakespeare
    models.close()
