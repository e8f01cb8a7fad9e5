"""The base class of servers: a process that answers /v1/completions on loopback."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from benchmarks.compare.engine_process import THREAD_VARIABLES, LeftOut
from gptx.process import environment
from gptx.server.replicas.upstream import Broken, Unreachable, get

START_SECONDS = 300.0  # imports, loading and compilation
END_SECONDS = 10.0
HOST = "127.0.0.1"


class Server(ABC):
    """A server with a loaded model, in a process that ends with `close`.

    Parameters
    ----------
    folder
        Folder of the model in the Hub's format.
    work
        Folder for the log and the model in the server's format, which is converted if missing.
    threads
        Number of threads of the computation.
    slots
        Number of requests that are computed at a time, if the server has such an option.

    Attributes
    ----------
    port
        Port on the loopback interface.

    Raises
    ------
    LeftOut
        The server is not installed, or does not start.
    """

    package = ""  # that has to be installed
    ready_path = "/v1/models"
    model = "default"  # name of the model in a request
    extra: dict[str, Any] = {}  # noqa: RUF012  # fields of a request

    def __init__(
        self, name: str, folder: Path, work: Path, threads: int, slots: int, **options: Any
    ) -> None:
        if self.package and importlib.util.find_spec(self.package) is None:
            raise LeftOut(f"{name} is left out: {self.package} is not installed")
        self.name, self.folder, self.work = name, folder, work
        self.threads, self.slots, self.options = threads, slots, options
        with socket.create_server((HOST, 0)) as free:
            self.port = int(free.getsockname()[1])
        self.log = work / f"{name}.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment() | dict.fromkeys(THREAD_VARIABLES, str(threads)) | self.env(),
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def command(self) -> list[str]:
        """Return the command of the server; convert the model if necessary."""

    def env(self) -> dict[str, str]:
        """Return environment variables of the server."""
        return {}

    def _wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while True:
            if self._process.poll() is not None or time.monotonic() > end:
                raise LeftOut(f"{self.name} is left out: it does not start, see {self.log}")
            try:
                status, _ = asyncio.run(get(self.port, self.ready_path, []))
            except (Broken, Unreachable):
                status = 0
            if status == 200:
                return
            time.sleep(0.2)

    def close(self) -> None:
        """End the process, and those that it has started."""
        with_signal = [(signal.SIGTERM, END_SECONDS), (signal.SIGKILL, None)]
        for number, seconds in with_signal:
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(seconds)
                return
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                return


def convert_once(path: Path, convert: Any) -> Path:
    """Return a converted model, which `convert` writes if it is missing."""
    if not path.exists():
        part = path.with_name(f"{path.stem}.part{path.suffix}")
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)
        convert(part)
        part.rename(path)
    return path
