"""Python threads that compute the parts of an op, one set for all backends of a process.

BLAS, NumPy and the compiled row functions release the global interpreter lock. A worker that waits
for a part uses no processor.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue


class Workers:
    """Daemon threads that run the tasks of a queue; they start when they are first needed."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._count = 0

    def run(self, function: Callable[[int], None], parts: int, threads: int) -> None:
        """Call function(0), ..., function(parts - 1), on the calling thread and `threads` - 1 more.

        A thread takes the next part when it has computed one. The calling thread computes all parts
        that no worker takes, so a system that starts no thread only makes it slower.

        Raises
        ------
        BaseException
            The first error of a part, after all parts have ended.
        """
        if threads == 1 or parts == 1:
            for part in range(parts):
                function(part)
            return
        numbers = iter(range(parts))
        ended: SimpleQueue[BaseException | None] = SimpleQueue()

        def compute_parts() -> None:
            for part in numbers:
                error: BaseException | None = None
                try:
                    function(part)
                except BaseException as e:  # an interrupt, too: others still write to the arrays
                    error = e
                ended.put(error)

        helpers = min(threads, parts) - 1
        self._start(helpers)
        for _ in range(helpers):
            self._tasks.put(compute_parts)
        compute_parts()
        errors = [error for _ in range(parts) if (error := ended.get())]
        if errors:
            raise errors[0]

    def _start(self, count: int) -> None:
        """Start threads until there are `count`, or the system refuses."""
        while self._count < count:
            worker = threading.Thread(target=self._work, name="gptx", daemon=True)
            try:
                worker.start()
            except RuntimeError:
                return
            self._count += 1

    def _work(self) -> None:
        tasks = self._tasks  # a forked child replaces it
        while True:
            tasks.get()()


WORKERS = Workers()

if hasattr(os, "register_at_fork"):
    # A forked child has none of the threads.
    os.register_at_fork(after_in_child=WORKERS.__init__)  # type: ignore[misc]
