"""fastGPT (https://github.com/certik/fastGPT), a program that prints its tokens when it ends.

The environment variable FASTGPT is the absolute path of the program, built with OpenBLAS.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.compare.peers.base import Engine, Prompts, Tick

FILE = "model.gguf"
FIRST_LETTER = 0x21  # token 0 of GPT-2 is "!"


class FastGptEngine(Engine):
    """A process for each prompt.

    Parameters
    ----------
    kernels
        Kernels of OpenBLAS, "Haswell" for example; "" for its own selection.
    """

    @classmethod
    def prepare(cls, folder: Path, work: Path, **options: Any) -> None:
        """Convert the model with a tokenizer of single letters, which are tokens 0 to 93.

        Encoding a text takes less time than with GPT-2's own tokenizer.
        """
        program_path()
        from gptx.conversions.formats import fastgpt, hugging_face
        from gptx.conversions.vocabularies.token_lists import tokenizer_from_lists
        from gptx.tokenization.byte_level import byte_of_letter

        letters = tokenizer_from_lists([*byte_of_letter()], [], (), "fastGPT's")
        fastgpt.write(replace(hugging_face.read(folder), tokenizer=letters), work / FILE)

    def __init__(self, folder: Path, threads: int, work: Path, kernels: str = "") -> None:
        self.path = program_path()
        self.kernels = kernels
        self.work = work
        self.n_bytes = (work / FILE).stat().st_size

    def program(self, ids: list[int], n_tokens: int) -> tuple[list[str], Path]:
        text = "".join(chr(FIRST_LETTER + id) for id in ids)
        head = f"&input_fastGPT\nn_tokens_to_generate = {n_tokens}\n/\n"
        (self.work / "input").write_text(f"{head}{text}\n")
        kernels = [f"OPENBLAS_CORETYPE={self.kernels}"] if self.kernels else []
        return ["env", *kernels, self.path], self.work

    def generate(self, prompts: Prompts, n_tokens: int, tick: Tick, known: bool = False) -> None:
        for ids in prompts:
            command, folder = self.program(ids, n_tokens)
            done = subprocess.run(command, cwd=folder, capture_output=True, check=True)
            lines = done.stdout.decode(errors="replace").split("\n")
            if list(map(int, lines[lines.index("Input tokens:") + 1].split())) != ids:
                raise RuntimeError("the tokens that fastGPT read differ from the prompt")
            for token in lines[lines.index("Output tokens:") + 1].split():
                tick([int(token)])

    def logits(self, ids: list[int]) -> None:
        """Return None: the program does not print them."""


def program_path() -> str:
    """Return the path of the program; raise an error if it is missing."""
    path = os.environ.get("FASTGPT", "")
    if not (os.path.isabs(path) and os.path.isfile(path)):
        raise FileNotFoundError(
            f"FASTGPT is {path!r}, expected the absolute path of the program gpt2"
        )
    return path
