"""`transformers serve`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.serving_peers.base import Server


class TransformersServer(Server):
    """transformers on PyTorch, with continuous batching if it runs on this device."""

    package = "fastapi"
    ready_path = "/health"

    def __init__(self, name: str, folder: Path, *rest: Any, **options: Any) -> None:
        self.model = str(folder)
        super().__init__(name, folder, *rest, **options)

    def command(self) -> list[str]:
        options = ["--device", "cpu", "--dtype", "float32"]
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        program = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
        return [*program, self.model, *options, *address]
