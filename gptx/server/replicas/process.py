"""A replica: a process of `gptx serve` behind the front process, started again when it ends.

The front process holds the listening socket, so a replica has the same port after each start. A
replica ends with the front process: its standard input is a pipe that closes then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence

from gptx.process import environment
from gptx.server.replicas.balancing import Prefixes
from gptx.server.replicas.upstream import HOST, Broken, Unreachable, get

BACKLOG = 2048
POLL_SECONDS = 0.1  # between two looks at a replica that loads
CHECK_SECONDS = 5.0  # between two looks at one that is ready
ANSWER_SECONDS = 30.0  # for the answer to a look: a replica that needs longer is ended
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds before a start, if the last run was short
LONG_RUN_SECONDS = 60.0
CHECK_PATH = "/health"
LISTEN_VARIABLE = "GPTX_LISTEN_FD"  # the number of the socket that a replica inherits
logger = logging.getLogger("gptx.server")


class Replica:
    """A process that serves the model, and its place for the next process.

    Attributes
    ----------
    number
        Number of the replica, from 0.
    port
        Port of the replica on the loopback interface.
    ready
        True if it answers requests.
    active
        Number of its requests.
    prefixes
        Prefixes of the prompts that it has read.
    starts
        Number of processes so far.
    """

    def __init__(self, number: int, command: Sequence[str]) -> None:
        self.number = number
        self.ready = False
        self.active = 0
        self.prefixes = Prefixes()
        self.starts = 0
        self.process: asyncio.subprocess.Process | None = None
        self._command = command
        self._was_ready = False
        self._ending = asyncio.Event()
        self._socket = socket.create_server((HOST, 0), backlog=BACKLOG)
        self.port: int = self._socket.getsockname()[1]

    async def keep(self, on_failure: Callable[[int], None]) -> None:
        """Start the process, and start it again whenever it ends, until `end`.

        Parameters
        ----------
        on_failure
            Function that gets the exit code of a process that never was ready.
        """
        pause = FIRST_PAUSE
        while True:
            start = time.monotonic()
            code = await self._run()
            if self._ending.is_set():
                return
            if not self._was_ready:
                on_failure(code)
                return
            if time.monotonic() - start > LONG_RUN_SECONDS:
                pause = FIRST_PAUSE
            logger.error(
                "replica %d has ended with %d: it starts again in %g s", self.number, code, pause
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._ending.wait()
            if self._ending.is_set():
                return
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _run(self) -> int:
        """Run one process to its end, and return its exit code."""
        descriptor = self._socket.fileno()
        self.process = process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            pass_fds=(descriptor,),
            env=environment() | {LISTEN_VARIABLE: str(descriptor)},
            start_new_session=True,  # Ctrl-C reaches the front process only
        )
        self.starts += 1
        self.prefixes.clear()
        checks = asyncio.create_task(self._check(process))
        try:
            return await process.wait()
        finally:
            self.ready = False
            checks.cancel()

    async def _check(self, process: asyncio.subprocess.Process) -> None:
        """Look at the process: it may load, answer, or hang."""
        while True:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    status, body = await get(self.port, CHECK_PATH, [])
                is_gone = b"engine_gone" in body
            except (Broken, Unreachable):  # it has just ended
                status, is_gone = 0, False
            except TimeoutError:  # before it is ready it imports and loads, at any pace
                status, is_gone = 0, self._was_ready
            if status == 200 and not self.ready:
                logger.info("replica %d is ready, process %d", self.number, process.pid)
                self._was_ready = True
            self.ready = status == 200
            if is_gone:
                self._signal("SIGKILL")
            await asyncio.sleep(CHECK_SECONDS if self.ready else POLL_SECONDS)

    def fail(self) -> None:
        """Take the replica out of the choice until it answers again: a connection has broken."""
        self.ready = False

    def end(self) -> None:
        """Ask the process to end; it is not started again."""
        self._ending.set()
        self._signal("SIGTERM")

    def kill(self) -> None:
        """End the process at once."""
        self._signal("SIGKILL")

    def close(self) -> None:
        """Close the listening socket."""
        self._socket.close()

    def _signal(self, name: str) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(getattr(signal, name))


# In the replica


def inherited_sockets() -> list[socket.socket] | None:
    """Return the listening socket that a front process has opened for this one; None without one.

    A thread waits for the end of the front process, and ends this one then. The log leaves out the
    checks of the front process.
    """
    descriptor = os.environ.pop(LISTEN_VARIABLE, None)
    if descriptor is None:
        return None
    logging.getLogger("gptx.server.requests").addFilter(_is_no_check)
    threading.Thread(target=_end_with_front, daemon=True).start()
    return [socket.socket(fileno=int(descriptor))]


def _is_no_check(record: logging.LogRecord) -> bool:
    return CHECK_PATH not in record.getMessage()


def _end_with_front() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
