"""`mlx_lm.server`."""

from __future__ import annotations

import sys

from benchmarks.serving_peers.base import Server


class MlxServer(Server):
    """mlx-lm on the model as it is."""

    package = "mlx_lm"
    ready_path = "/health"
    model = "default_model"

    def command(self) -> list[str]:
        return [
            sys.executable, "-m", "mlx_lm", "server", "--model", str(self.folder),
            "--host", "127.0.0.1", "--port", str(self.port),
        ]  # fmt: skip
