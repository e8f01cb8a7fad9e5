"""Messages that say how to install something: the package index has another project named gptx."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("gptx", "backends", "conversions", "benchmarks")
TEXTS = [
    *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")),
    *(path for path in ROOT.rglob("*.md") if "golden" not in path.parts),
]
BY_NAME = re.compile(r"\bgptx\[\w|pip3? install [^\n`&;|]*\bgptx(?![\w.-])")
EXTRAS = re.compile(r"'\.\[([\w,]+)\]'")


def test_pattern() -> None:
    assert BY_NAME.search("pip install 'gptx[fast]'")
    assert BY_NAME.search("pip install --upgrade gptx")
    assert not BY_NAME.search("pip install . && gptx generate")
    assert not BY_NAME.search("run `pip install '.[fast]'` in a checkout of gptx")
    assert not BY_NAME.search("gptx-bench, gptx.load()[0]")


def test_extras_are_installed_from_a_checkout() -> None:
    found = {path: BY_NAME.findall(path.read_text("utf-8")) for path in TEXTS}
    assert not {path: matches for path, matches in found.items() if matches}


def test_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    known = set(project["optional-dependencies"])
    for path in TEXTS:
        for match in EXTRAS.findall(path.read_text("utf-8")):
            assert set(match.split(",")) <= known, path
