"""llama.cpp: its own server, or that of llama-cpp-python, which runs one request at a time."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks.compare.engine_process import LeftOut
from benchmarks.serving_peers.base import Server, convert_once
from gptx.conversions import convert

VARIABLE = "LLAMA_SERVER"  # absolute path of llama-server
FLOATS = {"F32": "float32"}
BLOCKS = {"Q8_0": "int8", "Q4_0": "int4"}
CONTEXT = 1024  # tokens of a request


class LlamaServer(Server):
    """llama-server with a slot for each client, or `python -m llama_cpp.server`."""

    extra = {"ignore_eos": True}  # noqa: RUF012

    @property
    def program(self) -> str | None:
        """Path of llama-server; None if the server of llama-cpp-python runs."""
        path = os.environ.get(VARIABLE)
        if path is not None and not os.access(path, os.X_OK):
            raise LeftOut(f"{self.name} is left out: {VARIABLE} is {path!r}, expected a program")
        return path

    def command(self) -> list[str]:
        dtype = self.options["dtype"]
        choice = {"dtype": FLOATS[dtype]} if dtype in FLOATS else {"quantize": BLOCKS[dtype]}
        model = convert_once(
            self.work / f"{dtype}.gguf",
            lambda path: convert(self.folder, path, "gguf", **choice),
        )
        common = ["--host", "127.0.0.1", "--port", str(self.port), "--model", str(model)]
        threads, slots = str(self.threads), str(self.slots)
        if (program := self.program) is None:
            return [
                sys.executable, "-m", "llama_cpp.server", *common, "--n_threads", threads,
                "--n_threads_batch", threads, "--n_ctx", str(CONTEXT),
                "--interrupt_requests", "false",
            ]  # fmt: skip
        return [
            program, *common, "--threads", threads, "--threads-batch", threads,
            "--parallel", slots, "--ctx-size", str(CONTEXT * self.slots), "--cont-batching",
        ]  # fmt: skip

    def env(self) -> dict[str, str]:
        program = self.program
        libraries = str(Path(program).parent) if program is not None else ""
        return {"LD_LIBRARY_PATH": libraries}
