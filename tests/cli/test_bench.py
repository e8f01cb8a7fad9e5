"""`gptx bench`: output, errors, plots, progress and exit codes."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptx.bench import grid, plots, total, worker
from gptx.bench.worker import Events
from tests.cli.test_exit_codes import DISK_FULL, closed_pipe, full_disk, needs_dev_full
from tests.emulator import cupy_stand_in
from tests.support.bench import BOTH, READ, parse, parse_table, run_in_process
from tests.support.cli import error_lines, posix, run, run_into, start


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path]) -> str:
    """The folder of a tiny model; tasks run in this process."""
    run_in_process(monkeypatch)
    return str(folder())


def test_the_grid_as_a_table(tiny: str) -> None:
    args = ("-m", tiny, *BOTH, "--batch", "1,2", "--dtype", "float32,float64", "--wide")
    done = run("bench", *args)
    assert (done.code, done.err) == (0, "")
    rows = parse_table(done.out)
    assert [(row["dtype"], row["batch"], row["test"]) for row in rows] == [
        (dtype, batch, test)
        for dtype in ("float32", "float64")
        for batch in "12"
        for test in ("pp3", "tg2")
    ]
    assert {row["backend"] for row in rows} == {"numpy, generic"}
    assert re.search(r"^memory read at [\d.]+ GB/s \(numpy, 1 thread\)$", done.out, re.MULTILINE)


@pytest.mark.parametrize("columns", [80, 100])
def test_the_table_fits_a_terminal(
    tiny: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    done = run("bench", "-m", tiny, *BOTH, "--dtype", "float32,float64")
    table = [line for line in done.out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4
    assert {len(line) for line in table} <= set(range(columns + 1))
    assert len(run("bench", "-m", tiny, *BOTH, "--wide").out.splitlines()[0]) > 150


@pytest.mark.parametrize("output_format", ["csv", "json", "jsonl"])
def test_the_grid_in_other_formats(tiny: str, output_format: str) -> None:
    done = run("bench", "-m", tiny, *BOTH, "-r", "2", "-d", "0,4", "-o", output_format)
    assert (done.code, done.err) == (0, "")
    records = parse(done.out, output_format)
    assert [record["test"] for record in records] == ["pp3", "tg2", "pp3 @ d4", "tg2 @ d4"]
    for record in records:
        assert len(record["samples"]) == 2
        assert record["generic"] is True
        assert record["tokens_per_second"] > 0
        for name in ("date", "cpu", "gptx", "python", "numpy", "library"):
            assert record[name]


def test_lists_and_repeated_options_are_the_same(tiny: str) -> None:
    lists = run("bench", "-m", tiny, *READ, "--batch", "2,1,2", "-o", "csv")
    repeated = run("bench", "-m", tiny, *READ, "--batch", "2", "--batch", "1", "-o", "csv")
    batches = [[r["batch"] for r in parse(done.out, "csv")] for done in (lists, repeated)]
    assert batches == [[2, 1], [2, 1]]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("-p", "many"), 2, "'many' is not a list of whole numbers of at least 0"),
        (("-p", "-1"), 2, "'-1' is not a list"),
        (("-p", "9" * 5000), 2, "is not a list"),
        (("-p", "1,,2"), 2, "'1,,2' is not a list"),
        (("-p", "300"), 2, "pp300 needs 300 tokens of context, shakespeare has 256"),
        (("-n", "256"), 2, "tg256 needs 257 tokens of context"),
        (("-p", "0", "-n", "0"), 2, "nothing to measure"),
        (("-n", "10", "-d", "0,250"), 2, "tg10 @ d250 needs 261 tokens"),
        (("-d", "256"), 2, "a depth of 256 needs 257 tokens"),
        (("-t", "0"), 2, "'0' is not a list of whole numbers of at least 1"),
        (("-t", "9999999999"), 2, "threads is 9999999999"),
        (("--batch", "0"), 2, "'0' is not a list of whole numbers of at least 1"),
        (("-r", "0"), 2, "0 is not in the range"),
        (("-b", "jax"), 2, "backend is 'jax', expected 'numpy', 'cupy', 'mlx'"),
        (("-b", "numpy,"), 2, "'numpy,' has an empty name"),
        (("--dtype", "int7"), 2, "dtype is 'int7'"),
        (("--dtype", "float32,float16"), 2, "dtype is 'float16', the numpy backend computes in"),
        (("--dtype", "int8/float16"), 2, "dtype is 'float16', the numpy backend computes in"),
        (("--dtype", "float32/float64"), 2, "dtype is 'float32/float64': before the slash"),
        (("-m", "./no-such-folder"), 66, "does not exist"),
        (("-m", "random:9M"), 2, "model is 'random:9M', expected one of random:124M"),
        (("-m", "random:"), 2, "model is 'random:'"),
        (("--wide", "-o", "csv"), 2, "--wide does not apply to -o csv: leave it out"),
        (("-o", "xml"), 2, "'xml' is not one of 'md', 'csv', 'json', 'jsonl'"),
        (("--preset", "speed"), 2, "'speed' is not one of 'ablation', 'threads'"),
        (("--budget", "1"), 2, "--budget does not apply to the grid: leave it out"),
        (("--preset", "ablation", "-b", "mlx"), 2, "--backend does not apply to --preset ablation"),
        (
            ("--preset", "ablation", "-p", "1,2"),
            2,
            "-p/--n-prompt is 1,2, this preset expects one number",
        ),
        (("--preset", "ablation", "-p", "0"), 2, "this preset expects one number of at least 1"),
        (("--preset", "ablation", "-p", "250"), 2, "250 + 20 tokens needs 269 tokens of context"),
        (("--preset", "ablation", "-n", "250"), 2, "19 + 250 tokens needs 268 tokens of context"),
        (("--preset", "threads", "-t", "1"), 2, "--threads does not apply to --preset threads"),
        (("--preset", "budget", "--generic"), 2, "--generic does not apply to --preset budget"),
        (("--preset", "budget", "-n", "3"), 2, "--n-gen does not apply to --preset budget"),
        (("--preset", "budget", "--budget", "0"), 2, "--budget is 0.0, expected more than 0"),
        (("--preset", "budget", "--budget", "nan"), 2, "--budget is nan"),
        (("--preset", "budget", "--budget", "inf"), 2, "--budget is inf"),
        (("--preset", "budget", "-p", "0"), 2, "-p/--n-prompt has 0"),
        (("--preset", "budget", "-p", "19,257"), 2, "an input of 257 tokens needs 257 tokens"),
        (("--preset", "total", "--plot", "x"), 2, "--plot does not apply to --preset total"),
        (("--preset", "total", "-n", "0"), 2, "-n/--n-gen is 0, this preset expects one number"),
        (("--nonsense",), 2, "--nonsense"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_bad_options(args: tuple[str, ...], code: int, message: str) -> None:
    done = run("bench", *args)
    assert (done.code, done.out) == (code, "")
    [line] = done.err.splitlines()
    assert line.startswith("Error: ")
    assert message in line


def test_a_damaged_model_after_finished_rows(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in_process(monkeypatch)
    good, bad = folder("tiny", "good"), folder("tiny", "bad")
    (bad / "model.safetensors").write_bytes(b"damaged")
    done = run("bench", "-m", f"{good},{bad}", *BOTH)
    assert done.code == 65
    assert [row["test"] for row in parse_table(done.out)] == ["pp3", "tg2"]
    assert str(good) in done.out
    [line] = done.err.splitlines()
    assert "is truncated or not a valid safetensors file" in line


@pytest.mark.parametrize(
    ("preset", "args", "column", "cells"),
    [
        ("ablation", "-t 1 -p 2 -n 2", "reused", ["no cache", "+ keys and values"]),
        ("threads", "-p 2 -n 0 --generic", "threads", ["1", "2", "3"]),
        ("budget", "-t 1 -p 2,60 --budget 0.02 --dtype float64", "cache", ["yes", "no", "yes"]),
        ("total", "-t 1 -p 2 -n 2 --generic", "test", ["2 + 2"]),
    ],
)
def test_each_preset_ends_in_a_table(
    preset: str,
    args: str,
    column: str,
    cells: list[str],
    tiny: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grid, "count_cores", lambda: 3)
    seconds = dict.fromkeys(("total", *total.PARTS), 1.0)
    monkeypatch.setattr(total, "run_once", lambda *_: seconds)
    command = ("bench", "-m", tiny, "--preset", preset, "-r", "1", *args.split())
    done = run(*command, "--wide")
    assert (done.code, done.err) == (0, "")
    rows = parse_table(done.out)
    assert {row["model"] for row in rows} == {tiny}
    assert [row[column] for row in rows][: len(cells)] == cells
    if preset == "budget":
        assert {"outputs for 2 inputs", "outputs for 60 inputs"} <= set(rows[0])


def test_plots(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plots, "PLOTS", plots.PLOTS[:1])
    monkeypatch.setattr(plots, "PNG_DPI", 60)
    drawn = tmp_path / "new" / "drawn"
    done = run("bench", "-m", tiny, *READ, "-t", "2", "-o", "jsonl", "--plot", str(drawn))
    assert done.code == 0
    assert len(parse(done.out, "jsonl")) == 2
    files = [f"{plot.file}.{ending}" for plot in plots.PLOTS for ending in ("png", "svg")]
    assert done.err.splitlines() == [f"wrote {drawn / file}" for file in files]
    assert sorted(os.listdir(drawn)) == sorted(files)


def test_a_plot_that_is_not_drawn(tiny: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run("bench", "-m", tiny, *READ, "--plot", str(tmp_path / "drawn"))
    assert done.code == 0
    assert [line.partition(":")[0] for line in done.err.splitlines()] == [
        f"{plot.file} is not drawn" for plot in plots.PLOTS
    ]
    assert not list((tmp_path / "drawn").iterdir())


def test_an_invalid_folder_for_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    done = run("bench", "--plot", str(tmp_path / "file"))
    assert (done.code, done.out) == (74, "")
    assert "file" in done.err


def test_without_matplotlib_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("bench", "--plot", str(tmp_path / "new"))
    assert (done.code, done.out) == (2, "")
    [line] = done.err.splitlines()
    assert line.startswith("Error: --plot needs matplotlib")
    assert "`pip install '.[plot]'` in a checkout of gptx" in line
    assert not (tmp_path / "new").exists()


def test_progress_is_for_terminals(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["gptx.cli.bench"]
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(module, "sys", SimpleNamespace(stderr=terminal))
    monkeypatch.setattr("click.utils.should_strip_ansi", lambda *_: False)
    monkeypatch.setenv("COLUMNS", "200")
    done = run("bench", "-m", tiny, *READ)
    title = f"[1/1] {tiny} numpy generic float32 1 thread: "
    texts = [title + step for step in ("loading", "pp3, warm-up", "pp3, round 1 of 1")]
    assert done.err == "".join(module.CLEAR_LINE + text for text in [*texts, ""])


@pytest.mark.parametrize("output_format", ["md", "csv"])
def test_ctrl_c_prints_the_finished_rows(
    output_format: str, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = worker.run_task

    def interrupted(task: str, **arguments: Any) -> Events:
        if arguments["setup"]["batch"] == 2:
            raise KeyboardInterrupt
        yield from real(task, **arguments)

    monkeypatch.setattr(worker, "run_task", interrupted)
    wide = ["--wide"] if output_format == "md" else []
    done = run("bench", "-m", tiny, *READ, "--batch", "1,2,3", "-o", output_format, *wide)
    assert done.code == 130
    rows = parse_table(done.out) if output_format == "md" else parse(done.out, "csv")
    assert [str(row["batch"]) for row in rows] == ["1"]
    assert done.err.strip() == "Interrupted"  # click ends the line that shows ^C


def test_a_worker_measures(folder: Callable[..., Path]) -> None:
    done = run("bench", "-m", str(folder()), *READ, "-o", "json")
    assert done.code == 0
    [record] = parse(done.out, "json")
    assert record["test"] == "pp3"


# Measures in the process of the command, which saves time, and waits before the second setup.
IN_ONE_PROCESS = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from gptx.bench import grid, worker
def run_task(task, **arguments):
    for event in grid.measure(**arguments):
        if arguments["setup"]["batch"] == 2:
            signal.pause()
        yield event
worker.run_task = run_task
from gptx.cli import main
main()
"""


@posix
def test_a_line_of_jsonl_comes_at_once_and_ctrl_c_ends_the_command(
    folder: Callable[..., Path],
) -> None:
    args = ("bench", "-m", str(folder()), *READ, "--batch", "1,2", "-o", "jsonl")
    with start(*args, program=IN_ONE_PROCESS) as process:
        assert process.stdout is not None
        [record] = parse(process.stdout.readline().decode(), "jsonl")
        assert record["batch"] == 1
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, b"")
    assert error_lines(err) == [b"Interrupted"]


@posix
def test_a_closed_pipe(tiny: str) -> None:
    assert run_into(closed_pipe(), "bench", "-m", tiny, *READ).code == 141


@needs_dev_full
def test_a_full_disk(tiny: str) -> None:
    done = run_into(full_disk(), "bench", "-m", tiny, *READ)
    assert done == (74, "", f"{DISK_FULL}\n")


def test_the_mlx_backend(tiny: str) -> None:
    pytest.importorskip("mlx.core")
    done = run("bench", "-m", tiny, "-b", "mlx", "-p", "2", "-n", "2", "-r", "1", "--wide")
    assert (done.code, done.err) == (0, "")
    assert {(row["backend"], row["threads"]) for row in parse_table(done.out)} == {("mlx", "–")}


def test_the_cupy_backend(tiny: str) -> None:
    """The table names the device and counts the kernels."""
    with cupy_stand_in.installed():
        done = run("bench", "-m", tiny, "-b", "cupy", "-p", "0", "-n", "1", "-r", "1", "--wide")
    assert (done.code, done.err) == (0, "")
    [row] = parse_table(done.out)
    assert (row["backend"], row["threads"], row["test"]) == ("cupy", "–", "tg1")
    assert int(row["kernels a token"]) > 0
    assert "\na stand-in, number 0, " in done.out
    assert re.search(r"^memory read at [\d.]+ GB/s \(cupy\)$", done.out, re.MULTILINE)
