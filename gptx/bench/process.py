"""A task in a fresh process.

What is measured runs in a process that does nothing else, since much of it belongs to a process and
not to a model: the time to load (with nothing of it in memory yet), the peak of the memory, the
threads of BLAS and of compiled code, and what earlier measurements left in the allocator. The task
reports in lines of JSON on its standard output; its standard error is the user's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Generator
from typing import Any

from gptx import errors
from gptx.errors import DeviceOutOfMemory, GptxError

KILLED = -9  # how POSIX reports the system's way to win memory back

# A record, or {"progress": what is being done}, which is for people who wait.
Event = dict[str, Any]
Events = Generator[Event, None, None]


def environment() -> dict[str, str]:
    """What a fresh process needs to import this gptx, and not one that lies in its folder."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        "PYTHONSAFEPATH": "1",
    }


def fresh(task: str, **arguments: Any) -> Events:
    """Run a task of `child.TASKS` in a fresh process, and yield what it reports.

    Raises
    ------
    GptxError
        The one that ended the task.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "gptx.bench.child", task, json.dumps(arguments)],
        stdin=subprocess.PIPE,  # which closes when this process ends, in whatever way
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env=environment(),
        start_new_session=True,  # so that Ctrl-C reaches this process alone
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                event = json.loads(line)
                if "error" in event:
                    raise getattr(errors, event["error"])(event["message"])
                yield event
            process.wait()  # before its standard input is closed
        except BaseException:
            process.kill()
            raise
    check(process.returncode, task)


def check(code: int, task: str) -> None:
    """Raise for a process that ended without a word."""
    if code == KILLED:
        raise DeviceOutOfMemory(
            f"the process that measured ({task}) was killed, probably because memory ran out: "
            "use a smaller model, batch or context"
        )
    if code:
        raise GptxError(f"the process that measured ({task}) ended with {code}: see above for why")
