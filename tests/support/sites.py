"""Static sites of `gptx page`, with a runtime that is none, and the files of their models."""

from __future__ import annotations

import json
from pathlib import Path

from gptx.server.sites import writer as site
from gptx.server.sites.onnx_runtime_web import FILES


def write_runtime(folder: Path) -> Path:
    """Write files with the names of onnxruntime-web's into a folder; return the folder."""
    for name in FILES:
        (folder / name).write_bytes(name.encode())
    return folder


def content(folder: Path, file: str) -> bytes:
    """Return a file of a site's model."""
    pieces = json.loads((folder / site.MANIFEST).read_bytes())["files"][file]
    parts = [(folder / "model" / piece["name"]).read_bytes() for piece in pieces]
    assert [len(part) for part in parts] == [piece["bytes"] for piece in pieces]
    return b"".join(parts)
