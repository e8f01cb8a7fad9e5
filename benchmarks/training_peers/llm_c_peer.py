"""llm.c's CPU program, with a main function that trains on one batch (`llm_c_steps.c`)."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.llm_c import FLAGS, build, compiler_version
from benchmarks.training_peers.base import (
    BETAS,
    EPSILON,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Step,
    TrainingEngine,
)
from gptx.conversions import convert
from gptx.errors import NotFoundError

VARIABLE = "LLM_C"
SOURCE = Path(__file__).with_name("llm_c_steps.c")


class LlmCTraining(TrainingEngine):
    """A process of the program; it ends with this process, which closes its standard input."""

    def __init__(self, folder: Path, threads: int, tokens: np.ndarray) -> None:
        clone = os.environ.get(VARIABLE)
        if clone is None:
            raise NotFoundError(f"{VARIABLE} is not set to the folder of a clone of karpathy/llm.c")
        with tempfile.TemporaryDirectory() as scratch:
            program, model = Path(scratch) / "llm_c_steps", Path(scratch) / "model.bin"
            build(Path(clone), SOURCE, program)
            convert(folder, model, "llm.c", dtype="float32")
            batch = Path(scratch) / "batch.bin"
            batch.write_bytes(
                tokens[:, :-1].astype("<i4").tobytes() + tokens[:, 1:].astype("<i4").tobytes()
            )
            sizes = [len(tokens), tokens.shape[1] - 1]
            numbers = [*sizes, LEARNING_RATE, *BETAS, EPSILON, WEIGHT_DECAY]
            self.process = subprocess.Popen(
                [program, model, batch, *map(str, numbers)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            )
            self._answer("ready")  # the files have been read
        self.version = f"llm.c, {compiler_version()} {' '.join(FLAGS[:2])}"

    def close(self) -> None:
        """End the process."""
        self.process.communicate()

    def step(self) -> float:
        return self.steps(1)[0].loss

    def steps(self, n: int) -> list[Step]:
        assert self.process.stdin is not None
        print(n, file=self.process.stdin, flush=True)
        return [Step(*map(float, self._answer("step").split())) for _ in range(n)]

    def _answer(self, word: str) -> str:
        """Return the rest of the next line that begins with a word; llm.c prints others."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            first, _, rest = line.partition(" ")
            if first.strip() == word:
                return rest
        raise RuntimeError(f"llm.c ended with {self.process.wait()}")

    def peak_memory(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text("utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
