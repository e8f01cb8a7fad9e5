"""Workers: fresh Python processes that run benchmark tasks, and timed runs of whole processes.

Each measurement needs a fresh process: load time, peak memory, threads of BLAS and of compiled
code, and the state of the allocator belong to a process, not to a model.

A task is a generator function, named "module:function". The parent writes one line of JSON for each
call to the worker's standard input: {"task": ..., "arguments": {...}}. The worker writes one line
for each item: {"event": ...}. Its last line is {"done": true} or {"error": class, "message": text}.
Tracebacks go to the standard error. The end of the standard input ends the worker, also in a task.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from gptx import errors
from gptx.errors import DeviceOutOfMemory, GptxError, ModelWarning
from gptx.process import environment

KILLED = -9  # the return code of a POSIX process that the system killed to free memory

# A record of a measurement, or {"progress": text} for the terminal.
Event = dict[str, Any]
Events = Generator[Event, None, None]


class Worker:
    """A fresh process that runs tasks one after the other.

    As a context manager it closes the worker, or kills it after an exception.

    Parameters
    ----------
    log
        File for the standard error of the worker. By default it is that of this process.
    env
        Environment variables for the worker, besides those of this process.
    """

    def __init__(self, *, log: TextIO | None = None, env: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gptx.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            encoding="utf-8",
            env=environment() | dict(env or {}),
            start_new_session=True,  # Ctrl-C reaches the parent only; `kill` reaches children
        )

    def run(self, task: str, **arguments: Any) -> Events:
        """Run a task and yield its events.

        Raises
        ------
        GptxError
            The error that ended the task, or the worker ended without a result.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = json.dumps({"task": task, "arguments": arguments})
        with contextlib.suppress(BrokenPipeError):  # the return code is checked below
            print(request, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            answer = json.loads(line)
            if "error" in answer:
                raise make_error(answer["error"], answer["message"])
            if "done" in answer:
                return
            yield answer["event"]
        check_return_code(self.process.wait() or 1, task)

    def close(self) -> None:
        """End the worker and wait for its end."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def kill(self) -> None:
        """Kill the worker and the processes that it has started."""
        if self.process.poll() is None:
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:  # Windows
                self.process.kill()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.kill()
        self.close()


def run_task(task: str, **arguments: Any) -> Events:
    """Run one task in a worker that ends with it, and yield its events.

    Raises
    ------
    GptxError
        See `Worker.run`.
    """
    with Worker() as worker:
        yield from worker.run(task, **arguments)


def time_process(
    command: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Run a process from its start to its end.

    Returns
    -------
    seconds, done
        The time, and the return code and the captured output.
    """
    start = time.perf_counter()
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        cwd=cwd,
        env=environment() | dict(env or {}),
        check=False,
        start_new_session=True,
    )
    return time.perf_counter() - start, done


def make_error(name: str, message: str) -> GptxError:
    """Make the error of gptx with this name, or a GptxError that names another exception."""
    if hasattr(errors, name):
        error: GptxError = getattr(errors, name)(message)
        return error
    return GptxError(f"{name}: {message}")


def check_return_code(code: int, task: str) -> None:
    """Raise an error for a process that failed without a message."""
    if code == KILLED:
        raise DeviceOutOfMemory(
            f"the measuring process ({task}) was killed, probably out of memory: "
            "use a smaller model, batch or context"
        )
    if code:
        raise GptxError(
            f"the process that measured ({task}) ended with {code}: see its messages above"
        )


# In the worker


def call(task: str, arguments: dict[str, Any], out: TextIO) -> None:
    """Call a task and write its answers."""
    module, _, function = task.partition(":")
    try:
        for event in getattr(importlib.import_module(module), function)(**arguments):
            _write(out, event=event)
    except GptxError as error:
        _write(out, error=type(error).__name__, message=error.message)
    except MemoryError as error:
        message = f"out of memory ({error}): use a smaller model"
        _write(out, error=DeviceOutOfMemory.__name__, message=message)
    except Exception as error:
        traceback.print_exc()
        _write(out, error=type(error).__name__, message=str(error))
    else:
        _write(out, done=True)


def _write(out: TextIO, **answer: Any) -> None:
    print(json.dumps(answer, ensure_ascii=False), file=out, flush=True)


def main() -> None:
    """Serve the requests of the parent process until it closes the pipe."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with contextlib.suppress(OSError):  # standard error is closed
        os.dup2(2, 1)  # the output of a library is not an answer
    sys.stdout = sys.stderr
    warnings.simplefilter("ignore", ModelWarning)  # a note on a model, for each of its setups
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    while True:
        call(**json.loads(requests.get()), out=out)


def _read_requests(requests: queue.SimpleQueue[bytes]) -> None:
    """Queue the lines of the standard input, and end this process and its children after them."""
    # Unbuffered: a lock that this thread holds would stop the interpreter from ending.
    with open(0, "rb", buffering=0, closefd=False) as pipe:
        for line in pipe:
            requests.put(line)
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    main()
