"""Programs of llm.c, built from a clone of https://github.com/karpathy/llm.c."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from gptx.errors import GptxError, NotFoundError

# As in llm.c's Makefile, and OpenMP for threads.
FLAGS = (
    "-Ofast",
    "-march=native",
    "-fopenmp",
    "-DOMP",
    "-Wno-unused-result",
    "-Wno-unknown-pragmas",
)


def build(clone: Path, source: Path, program: Path) -> None:
    """Compile a C file that includes files of the clone.

    Raises
    ------
    NotFoundError
        The clone or a compiler is missing.
    GptxError
        The compiler failed.
    """
    if not (clone / "train_gpt2.c").is_file():
        raise NotFoundError(f"{clone} has no train_gpt2.c: give a clone of karpathy/llm.c")
    compiler = os.environ.get("CC", "gcc")
    if shutil.which(compiler) is None:
        raise NotFoundError(f"{compiler} is not installed: install it, or set CC to a C compiler")
    command = [compiler, *FLAGS, "-I", str(clone), "-o", str(program), str(source), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise GptxError(f"{compiler} failed on {source}: {done.stderr.strip().splitlines()[-1]}")


def compiler_version() -> str:
    """Return the first line of the compiler's version."""
    command = [os.environ.get("CC", "gcc"), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
