"""fastGPT (https://github.com/certik/fastGPT), a program that tells its tokens when it ends.

FASTGPT is its whole path, as built with OpenBLAS.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.compare.peers.base import Engine, Tick

FILE = "model.gguf"
FIRST = 0x21  # GPT-2's token 0 is this letter, "!"


class FastGptEngine(Engine):
    """A process for each prompt.

    Parameters
    ----------
    kernels
        Those of OpenBLAS; by default its own choice.
    """

    @classmethod
    def prepare(cls, folder: Path, work: Path, **options: Any) -> None:
        """Convert the model, with a tokenizer of single letters: their tokens are 0 to 93, and the
        way from text to tokens is shorter than with GPT-2's own."""
        installed()
        from gptx.conversions.formats import fastgpt, hugging_face
        from gptx.conversions.vocabularies.token_lists import tokenizer_of
        from gptx.tokenization.bpe import byte_of_letter

        letters = tokenizer_of([*byte_of_letter()], [], (), "fastGPT's")
        fastgpt.write(replace(hugging_face.read(folder), tokenizer=letters), work / FILE)

    def __init__(self, folder: Path, threads: int, work: Path, kernels: str = "") -> None:
        self.path = installed()
        self.kernels = kernels
        self.work = work
        self.n_bytes = (work / FILE).stat().st_size

    def program(self, ids: list[int], n_tokens: int) -> tuple[list[str], Path]:
        text = "".join(chr(FIRST + id) for id in ids)
        head = f"&input_fastGPT\nn_tokens_to_generate = {n_tokens}\n/\n"
        (self.work / "input").write_text(f"{head}{text}\n")
        kernels = [f"OPENBLAS_CORETYPE={self.kernels}"] if self.kernels else []
        return ["env", *kernels, self.path], self.work

    def generate(
        self, prompts: list[list[int]], n_tokens: int, tick: Tick, known: bool = False
    ) -> None:
        for ids in prompts:
            command, folder = self.program(ids, n_tokens)
            done = subprocess.run(command, cwd=folder, capture_output=True, check=True)
            lines = done.stdout.decode(errors="replace").split("\n")
            if list(map(int, lines[lines.index("Input tokens:") + 1].split())) != ids:
                raise RuntimeError("fastGPT read other tokens than it was given")
            for token in lines[lines.index("Output tokens:") + 1].split():
                tick([int(token)])

    def logits(self, ids: list[int]) -> None:
        """It tells none."""


def installed() -> str:
    """The program's path; ends this process, with a line that says why, if there is none."""
    path = os.environ.get("FASTGPT", "")
    if not (os.path.isabs(path) and os.path.isfile(path)):
        sys.exit(f"FASTGPT is {path!r}, expected the whole path of its program, gpt2")
    return path
