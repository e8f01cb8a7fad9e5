"""Hostile pickles in a separate process: loaded by Python, and read by gptx.

python pickle_child.py load FOLDER COUNT SEED
    Load pickles with `pickle`; print the number of those that ran code in FOLDER.
python pickle_child.py read FOLDER
    Read each file of FOLDER with gptx; print as JSON the number of refused ones, and all events of
    CPython's audit hooks except reads of the file itself.
"""

from __future__ import annotations

import contextlib
import copyreg
import json
import os
import pickle
import random
import sys
from pathlib import Path
from typing import Any

from gptx.conversions.formats import nanogpt, pytorch_folder
from gptx.errors import WeightsError
from tests.support.files.hostile_pickles import EXTENSION, plain


def load(folder: str, count: int, seed: int) -> int:
    """Load `count` pickles; return the number of those that ran code."""
    os.chdir(folder)
    copyreg.add_extension("os", "mkdir", EXTENSION)
    rng = random.Random(seed)
    for i in range(count):
        with contextlib.suppress(Exception):
            pickle.loads(plain(f"m{i}", rng))
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    return len({entry.partition(".")[0] for entry in os.listdir()})


def read(folder: str) -> dict[str, Any]:
    """Read the files; return the results and the audit events."""
    os.chdir(folder)
    copyreg.add_extension("os", "mkdir", EXTENSION)
    files = sorted(Path().iterdir())
    refused(files[0])  # imports on first use are no events then
    events: list[str] = []
    watched = ""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        reads = event == "open" and str(arguments[0]) == watched and arguments[1] in ("r", "rb")
        if watched and not reads:
            events.append(f"{watched}: {event} {arguments!r:.200}")

    sys.addaudithook(hook)
    count = 0
    for file in files:
        watched = str(file)
        count += refused(file)
    watched = ""
    return {"refused": count, "files": len(files), "events": events, "left": sorted(os.listdir())}


def refused(file: Path) -> bool:
    """Return True if both readers refuse a file in one line."""
    count = 0
    for module in (nanogpt, pytorch_folder):
        module.detect(file)
        try:
            list(module.read(file).tensors.values())
        except WeightsError as error:
            count += "\n" not in str(error)
    return count == 2


if __name__ == "__main__":
    if sys.argv[1] == "load":
        print(load(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
    else:
        print(json.dumps(read(sys.argv[2])))
