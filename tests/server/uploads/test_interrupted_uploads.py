"""Uploads with cut connections, restarts and killed processes at seeded points.

Each run has one interruption. At its end the store has the model, byte for byte; at most one chunk
was sent twice; and at no time did the store show a part of a model.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from gptx.server.uploads.store import UPLOADS
from tests.support.cli import posix
from tests.support.store_processes import CHUNK_BYTES, start_client, start_server
from tests.support.store_server import CuttingProxy, free_port, model_files, visible

pytestmark = posix

INTERRUPTIONS = ("kill server", "stop server", "cut request", "cut answer", "kill client")
RUNS = int(os.environ.get("GPTX_UPLOAD_RUNS", 200))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of several chunks."""
    folder = tmp_path_factory.mktemp("source") / "m"
    model_files(folder, "tiny")
    return folder


@pytest.fixture(scope="module")
def source(model: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(model.iterdir())}


@pytest.fixture(scope="module")
def n_points(model: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """The number of operations of a server during a whole upload."""
    root, port = tmp_path_factory.mktemp("points") / "store", free_port()
    with server_until_end(root, port, 0, signal.SIGKILL):
        client = start_client(model, f"http://127.0.0.1:{port}")
        client.join()
        assert client.exitcode == 0
    return int((root.parent / "points").read_text())


@contextmanager
def server_until_end(root: Path, port: int, at: int, number: int) -> Iterator[list[BaseProcess]]:
    """Run a server, and start it again each time it ends; yield its processes."""
    processes = [start_server(root, port, at, number)]
    done = threading.Event()

    def restart() -> None:
        while True:
            processes[-1].join()
            if done.is_set():
                return
            processes.append(start_server(root, port))

    thread = threading.Thread(target=restart, daemon=True)
    thread.start()
    try:
        yield processes
    finally:
        done.set()
        processes[-1].terminate()
        thread.join()


@contextmanager
def watching(root: Path, source: dict[str, bytes]) -> Iterator[None]:
    """Look at the store all the time: it shows nothing, or the whole model."""
    done = threading.Event()
    wrong: list[dict[str, dict[str, bytes]]] = []

    def watch() -> None:
        while not done.is_set():
            if root.is_dir() and (shown := visible(root)) not in ({}, {"m": source}):
                wrong.append(shown)
            time.sleep(0.001)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert not wrong


def run_interrupted(
    number: int, folder: Path, model: Path, source: dict[str, bytes], n_points: int
) -> bool:
    """Upload a model with one interruption; False if the upload ended before it."""
    kind = INTERRUPTIONS[number % len(INTERRUPTIONS)]
    chance = random.Random(number)
    length = sum(map(len, source.values()))
    n_answers = 4 + sum(-(-len(data) // CHUNK_BYTES) + 1 for data in source.values())
    root, port, at = folder / "store", free_port(), 0
    end = signal.SIGKILL if kind == "kill server" else signal.SIGTERM
    if kind in ("kill server", "stop server"):
        at = 1 + chance.randrange(n_points)
    clients: list[BaseProcess] = []

    def interrupt(proxy: CuttingProxy) -> None:
        if kind == "kill client":
            clients[0].kill()
        elif kind.startswith("cut"):
            proxy.cut()

    count = "answers" if kind == "cut answer" else "bytes"
    point = 1 + chance.randrange(n_answers if count == "answers" else length)
    proxy = CuttingProxy(port, point, interrupt, count)
    with server_until_end(root, port, at, end) as servers, watching(root, source):
        url = f"http://127.0.0.1:{proxy.port}"
        clients.append(start_client(model, url))
        clients[0].join()
        if kind == "kill client":
            assert clients[0].exitcode == -signal.SIGKILL
            clients.append(start_client(model, url))
            clients[1].join()
        assert clients[-1].exitcode == 0
        assert visible(root) == {"m": source}
    proxy.close()
    assert not [path for path in (root / UPLOADS).iterdir() if path.name != ".lock"]
    assert length <= proxy.content_bytes <= length + CHUNK_BYTES
    return proxy.acted or len(servers) > 1


@pytest.mark.parametrize("number", range(len(INTERRUPTIONS)), ids=INTERRUPTIONS)
def test_one_interruption(
    number: int, tmp_path: Path, model: Path, source: dict[str, bytes], n_points: int
) -> None:
    run_interrupted(number, tmp_path, model, source, n_points)


@pytest.mark.kill
@pytest.mark.parametrize("number", range(len(INTERRUPTIONS)), ids=INTERRUPTIONS)
def test_200_interruptions(
    number: int, tmp_path: Path, model: Path, source: dict[str, bytes], n_points: int
) -> None:
    """40 of each kind."""
    done = 0
    while done < RUNS // len(INTERRUPTIONS):
        number += len(INTERRUPTIONS)
        done += run_interrupted(number, tmp_path / str(number), model, source, n_points)
