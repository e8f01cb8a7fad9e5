"""Processes of a server and of a client of a model store, which end at a chosen point.

They are forked from a process without threads that has imported all modules, so that a start takes
milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from gptx.server.uploads import client as upload_client
from gptx.server.uploads.client import Upload, find_files, model_address, read_files
from gptx.server.uploads.store import Store
from tests.support.store_server import FakeModels, check_here, make_server

OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
CHUNK_BYTES = 1024

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__])


class Points:
    """A counter of the operations on the files of a store, in this process.

    Each open, rename, deletion and flush counts; a write counts before, in its middle, and after.

    Parameters
    ----------
    root
        Folder of the store.
    at
        Number of the operation at which the process gets a signal; 0 for none.
    number
        The signal.
    """

    def __init__(self, root: Path, at: int, number: int) -> None:
        self.root, self.at, self.number, self.count = f"{root}{os.sep}", at, number, 0
        self._write, self._fsync = os.write, os.fsync
        self._lock = threading.Lock()
        sys.addaudithook(self._hook)
        os.write = self._counted_write  # type: ignore[assignment]
        os.fsync = self._counted_fsync  # type: ignore[assignment]

    def add(self) -> None:
        """Count one operation."""
        with self._lock:
            self.count += 1
            reached = self.count == self.at
        if reached:
            os.kill(os.getpid(), self.number)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS and str(arguments[0]).startswith(self.root):
            self.add()

    def _counted_write(self, descriptor: int, data: Any) -> int:
        if len(data) < 64:  # of asyncio, to wake its loop
            return self._write(descriptor, data)
        self.add()
        half = self._write(descriptor, data[: len(data) // 2])
        self.add()
        rest = self._write(descriptor, data[half:])
        self.add()
        return half + rest

    def _counted_fsync(self, file: int) -> None:
        self.add()


def serve(root: Path, port: int, at: int = 0, number: int = signal.SIGKILL) -> None:
    """Serve a store until SIGTERM; at the n-th operation, this process gets a signal.

    The number of operations is in the file `points` beside the store.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())  # uvicorn calls it at its end
    points = Points(root, at, number)
    try:
        store = Store(root, check=check_here)
        make_server(store, FakeModels(), port).run()
    finally:
        (root.parent / "points").write_text(str(points.count))


def send(model: Path, url: str) -> None:
    """Run `gptx upload` with short waits; the exit code is 0 if the server has the model."""
    upload_client.FIRST_WAIT_SECONDS = 0.005
    upload_client.MAX_WAIT_SECONDS = 0.05
    upload_client.MAX_FAILURES = 1000
    files = read_files(find_files(model))
    Upload(model_address(url, model), files, chunk_bytes=CHUNK_BYTES).run()


def start_server(root: Path, port: int, at: int = 0, number: int = signal.SIGKILL) -> BaseProcess:
    """Start `serve` in a process."""
    process = _context.Process(target=serve, args=(root, port, at, number), daemon=True)
    process.start()
    return process


def start_client(model: Path, url: str) -> BaseProcess:
    """Start `send` in a process."""
    process = _context.Process(target=send, args=(model, url), daemon=True)
    process.start()
    return process
