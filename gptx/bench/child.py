"""What runs in the fresh process: one task, a line of JSON for each thing that it reports."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from gptx.bench import bandwidth, budget, ladder, speed
from gptx.bench.process import Events
from gptx.errors import DeviceOutOfMemory, GptxError

TASKS: Mapping[str, Callable[..., Events]] = {
    "speed": speed.measure,
    "bandwidth": bandwidth.measure,
    "ablation": ladder.measure,
    "budget": budget.measure,
}


def run(task: str, arguments: dict[str, Any], out: TextIO) -> int:
    """Run a task, and return the process's exit code."""
    try:
        for event in TASKS[task](**arguments):
            print(json.dumps(event), file=out, flush=True)
    except GptxError as error:
        _report(error, out)
    except MemoryError as error:
        _report(DeviceOutOfMemory(f"memory ran out ({error}): use a smaller model"), out)
    except BrokenPipeError:  # whoever wanted to know is gone
        return 1
    return 0


def _report(error: GptxError, out: TextIO) -> None:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}), file=out, flush=True)


def _end_with_parent() -> None:
    """Nobody waits for a measurement whose standard input was closed."""
    os.read(0, 1)
    os._exit(1)


def main() -> None:
    """Run the task that the command line names."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with contextlib.suppress(OSError):  # standard error is closed
        os.dup2(2, 1)  # what a library prints is no event
    code = run(sys.argv[1], json.loads(sys.argv[2]), out)
    sys.stdout = sys.stderr  # the last flush goes there too
    sys.exit(code)


if __name__ == "__main__":
    main()
