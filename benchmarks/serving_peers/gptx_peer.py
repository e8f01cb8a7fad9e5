"""`gptx serve`."""

from __future__ import annotations

import sys

from benchmarks.serving_peers.base import Server, convert_once
from gptx.conversions import convert


class GptxServer(Server):
    """gptx with its CPU kernels; quantized weights as `gptx convert --quantize` writes them."""

    package = "starlette"
    ready_path = "/health"
    model = "model"
    extra = {"ignore_eos": True}  # noqa: RUF012

    def command(self) -> list[str]:
        model = self.folder
        if quantize := self.options.get("quantize"):
            model = convert_once(
                self.work / f"gptx-{quantize}",
                lambda path: convert(self.folder, path, "mlx", quantize=quantize),
            )
        return [
            sys.executable, "-m", "gptx", "serve", "-m", str(model), "--name", self.model,
            "--threads", str(self.threads), "--port", str(self.port),
        ]  # fmt: skip
