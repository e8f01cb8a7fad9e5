"""A Hub on loopback, and a client of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub import Client, model
from tests.support.hub_server import HubServer


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer({"org/model": {"main": model()}}) as hub:
        yield hub


@pytest.fixture
def client(server: HubServer, tmp_path: Path) -> Client:
    return Client(server, tmp_path)
