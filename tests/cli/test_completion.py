"""Completion in the shell: commands, options, models, choices and files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gptx.cli.app import COMMANDS
from tests.support.cli import run

SIZES = ["124M", "355M", "774M", "1558M"]


def complete(monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    """Complete the last word as bash does; "file" stands for all files and folders."""
    monkeypatch.setenv("_GPTX_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", " ".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    done = run()
    assert (done.code, done.err) == (0, "")
    rows = [line.split(",", 1) for line in done.out.split()]
    return [value if kind == "plain" else kind for kind, value in rows]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("",), sorted(COMMANDS)),
        (("gen",), ["generate"]),
        (("convert", "--over"), ["--overwrite"]),
        (("generate", "--overflow", "s"), ["slide"]),
        (("generate", "-b", ""), ["numpy", "cupy", "mlx"]),
        (("generate", "--dtype", "b"), ["bfloat16"]),
        (("generate", "--cache-dtype", "float1"), ["float16"]),
        (("generate", "--quantize", ""), ["int8", "int4"]),
        (("generate", "-m", "shak"), ["file", "shakespeare"]),
        (("generate", "--model", "gpt2-"), ["file", "gpt2-medium", "gpt2-large", "gpt2-xl"]),
        (("generate", "--tokenizer", "distil"), ["file", "distilgpt2"]),
        (("generate", "--file", "x"), ["file"]),
        (("generate", "--prompt-cache", ""), ["file"]),
        (("generate", "--config", ""), ["file"]),
        (("info", "sha"), ["file", "shakespeare"]),
        (("verify", "sha"), ["file", "shakespeare"]),
        (("verify", "gpt2", "sha"), ["file", "shakespeare"]),
        (("download", "gpt2", "gpt2-x"), ["file", "gpt2-xl"]),
        (("convert", "sha"), ["file", "shakespeare"]),
        (("convert", "gpt2", "out"), ["file"]),
        (("convert", "--check", "sha"), ["file", "shakespeare"]),
        (("convert", "--to", "gg"), ["gguf"]),
        (("convert", "--dtype", "b"), ["bfloat16"]),
        (("convert", "--quantize", "int"), ["int8", "int4"]),
        (("convert", "--head", ""), ["logits", "argmax"]),
        (("bench", "-m", "shakespeare,sha"), ["shakespeare,shakespeare"]),
        (("bench", "-m", "random:1"), ["random:124M", "random:1558M"]),
        (("bench", "-b", "numpy,"), ["numpy,numpy", "numpy,cupy", "numpy,mlx"]),
        (("bench", "--dtype", "int"), ["int8", "int4"]),
        (("bench", "--preset", "t"), ["threads", "total"]),
        (("bench", "-o", "j"), ["json", "jsonl"]),
        (("bench", "--plot", ""), ["file"]),
        (("bench", "-t", ""), []),
    ],
    ids=" ".join,
)
def test_completion(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: tuple[str, ...], expected: list[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert complete(monkeypatch, "gptx", *words) == expected


def test_completion_of_cached_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The GPT-2s in the cache, of which a partial download has no config."""
    for name, text in (
        ("models--me--my-gpt2", '{"model_type": "gpt2"}'),
        ("models--me--other", '{"model_type": "bert"}'),
        ("models--me--binary", "\udcff"),
    ):
        folder = tmp_path / name / "snapshots" / "abc"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    (tmp_path / "models--me--my-partial" / "blobs").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert complete(monkeypatch, "gptx", "generate", "-m", "me/") == ["file", "me/my-gpt2"]


BASH = """
eval "$(_GPTX_COMPLETE=bash_source gptx)"
COMP_WORDS=(gptx generate -m shak); COMP_CWORD=3
_gptx_completion gptx shak -m 2>/dev/null
echo "${COMPREPLY[@]}"
"""


def test_completion_in_bash() -> None:
    bash, gptx = shutil.which("bash"), shutil.which("gptx", path=os.path.dirname(sys.executable))
    if bash is None or gptx is None:
        pytest.skip("needs bash, and the gptx command beside Python")
    path = os.pathsep.join([os.path.dirname(gptx), os.environ["PATH"]])
    done = subprocess.run(
        [bash, "--norc", "-c", BASH],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PATH": path},
    )
    assert done.stdout.split() == ["shakespeare"]
