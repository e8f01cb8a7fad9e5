"""`gptx convert`: the table of formats, conversions, --check, errors and the progress bar."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptx.conversions import FORMATS
from gptx.random_weights import random_weights
from tests.support.cli import run
from tests.support.conversions import source_of
from tests.support.random_models import CASES, write_model


def test_list() -> None:
    done = run("convert", "--list")
    assert done.code == 0
    lines = done.out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(FORMATS)
    for line, row in zip(lines, FORMATS.values(), strict=True):
        assert line.split()[1:3] == ["yes" if x else "-" for x in (row.reads, row.writes)]
        assert line.endswith(row.title)


def test_the_summary_goes_to_standard_error(tmp_path: Path) -> None:
    done = run("convert", "shakespeare", str(tmp_path / "out"))
    assert (done.code, done.out) == (0, "")
    assert done.err == (
        f"{tmp_path / 'out'}: 2,915,328 parameters, layers 6, heads 6, width 192, context 256, "
        "vocabulary 1024\n"
    )
    assert run("generate", "-m", str(tmp_path / "out"), "ROMEO:", "-n", "3").code == 0


def test_quantize(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert run("convert", "shakespeare", out, "--quantize", "int4", "--group-size", "32").code == 0
    assert "matrices quantized: int4 in groups of 32" in run("info", out).out


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ((), 2, "missing SRC or DST: give both, or --list, or --check SRC"),
        (("shakespeare",), 2, "missing SRC or DST"),
        (("nowhere/at/all", "{out}"), 66, "nowhere/at/all"),
        (("shakespeare", "{out}", "--to", "x"), 2, "to is 'x', expected one of"),
        (("shakespeare", "{out}", "--dtype", "int3"), 2, "dtype is 'int3'"),
        (("shakespeare", "{out}", "--quantize", "int3"), 2, "quantize is 'int3'"),
        (("shakespeare", "{out}/a/b"), 74, "its folder does not exist"),
        (("shakespeare", "{out}", "--config", "/nowhere.json"), 66, "/nowhere.json does not"),
        (
            ("shakespeare", "{out}.gguf", "--head", "argmax"),
            2,
            "gguf has no option --head: leave it out",
        ),
        (("shakespeare", "{out}", "--tokenizer", "/nowhere"), 66, "tokenizer"),
        (("--check", "{empty}"), 65, "in no supported format"),
        (("shakespeare", "--check", "shakespeare"), 2, "leave out SRC and DST"),
        (("shakespeare", "{out}", "--private"), 2, "add --upload OWNER/NAME"),
    ],
)
def test_errors_are_one_line(
    args: tuple[str, ...], code: int, message: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"out": tmp_path / "out", "empty": tmp_path / "empty"}
    done = run("convert", *(arg.format(**places) for arg in args))
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_check_of_a_valid_model() -> None:
    done = run("convert", "--check", "shakespeare")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("shakespeare: Hugging Face folder, valid: 2,915,328 parameters")


def test_check_finds_a_number_that_is_not_finite(tmp_path: Path) -> None:
    weights = random_weights(CASES["tiny"])
    weights["ln_f.weight"][2] = np.nan
    folder = write_model(tmp_path / "m", CASES["tiny"], weights)
    done = run("convert", "--check", str(folder))
    assert (done.code, done.out) == (65, "")
    assert "tensor ln_f.weight has a number that is not finite" in done.err


def test_unknown_tensors_are_left_out_on_request(tmp_path: Path) -> None:
    weights = random_weights(CASES["tiny"]) | {"clip.weight": np.ones(2, np.float32)}
    folder = write_model(tmp_path / "m", CASES["tiny"], weights)
    for args in (("--check", str(folder)), (str(folder), str(tmp_path / "out"))):
        done = run("convert", *args)
        assert (done.code, done.out) == (65, "")
        assert "tensor clip.weight is unknown" in done.err
        assert "(--ignore-unknown leaves them out)" in done.err
        done = run("convert", *args, "--ignore-unknown")
        assert done.code == 0
        assert done.err.startswith("Note: tensor clip.weight is unknown: left out\n")
    assert run("convert", "--check", str(tmp_path / "out")).err == ""


def test_notes_of_a_reader_are_printed(tmp_path: Path) -> None:
    file = source_of("355M", tmp_path) / "model.safetensors"
    file.with_name("config.json").unlink()
    done = run("convert", "--check", str(file))
    assert done.err.startswith("Note: the file has no number of heads: 1 of width 64 are assumed")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
def test_a_terminal_gets_a_progress_bar(tmp_path: Path) -> None:
    reader, writer = os.openpty()
    code = "from gptx.cli import main; main()"
    command = [sys.executable, "-c", code, "convert", "shakespeare", str(tmp_path / "out")]
    subprocess.run(command, stderr=writer, check=True, env=os.environ | {"TERM": "xterm"})
    os.close(writer)
    shown = b""
    try:
        while piece := os.read(reader, 65536):
            shown += piece
    except OSError:  # the end of a pseudoterminal
        pass
    os.close(reader)
    assert b"100%" in shown
    assert b"[####" in shown


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a FIFO")
@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_a_fifo_is_refused_before_the_source_is_read(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    fifo = tmp_path / "fifo.gguf"
    os.mkfifo(fifo)
    done = run("convert", "./nowhere", str(fifo), *options)
    assert (done.code, done.out) == (74, "")
    assert "is a FIFO, expected a regular file: give another name" in done.err
    assert fifo.is_fifo()
