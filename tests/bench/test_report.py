"""Records in every format, and as pictures."""

from __future__ import annotations

import builtins
import itertools
import struct
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from gptx.bench import plots, report
from gptx.bench.grid import with_bandwidth
from gptx.bench.plan import Trial
from gptx.bench.process import Event
from gptx.bench.speed import record
from gptx.errors import ParameterError
from tests.support.bench import parsed, table
from tests.support.refusals import refused

FACTS = {
    "date": "2026-11-20T12:00:00+0000",
    "device": None,
    "cpu": "A processor, of some kind",
    "cores": 8,
    "gptx": "0.1.0",
    "python": "3.11.7",
    "numpy": "2.4.6",
    "library": "numpy 2.4.6",
    "blas": "openblas 0.3.31 SkylakeX",
}


def made(trial: Trial, *samples: float, **facts: Any) -> Event:
    """A record as the grid yields it."""
    shared = {
        "model": "random:124M",
        "backend": "numpy",
        "generic": False,
        "dtype": "float32",
        "threads": 1,
        "batch": 1,
        "parameters": 124_439_808,
        "size": 497_759_232,
        "read": 494_613_504,
        "load_time": 0.0041,
        "peak_memory": 530_000_000,
        "kernels": None,
    }
    steps = [[s / (trial.output or 1)] * (trial.output or 1) for s in samples]
    whole = shared | record(trial, 1, [1.75], steps) | FACTS | facts
    return with_bandwidth(whole, 17.0e9 * (whole["threads"] or 1))


RECORDS = [
    made(Trial(512, 0), 0.5, 0.6, 0.4),
    made(Trial(0, 128, 100), 4.0, 4.2),
    made(Trial(0, 128, 100), 2.2, threads=2, generic=True, model='a "b", c'),
    made(Trial(0, 128), 1.1, 1.0, threads=None, backend="mlx", library="mlx 0.32.4"),
]


@pytest.mark.parametrize("output_format", ["csv", "json", "jsonl"])
def test_machine_readable_formats_keep_everything(output_format: str) -> None:
    assert parsed(report.render(RECORDS, (), output_format), output_format) == RECORDS


def test_the_table_for_people() -> None:
    text = report.render(RECORDS, report.GRID, "md")
    first, second, third, fourth = table(text)
    assert first == {
        "model": "random:124M",
        "size": "498 MB",
        "params": "124.44 M",
        "backend": "numpy",
        "dtype": "float32",
        "threads": "1",
        "batch": "1",
        "test": "pp512",
        "t/s": "1052.44 ± 214.75",
        "first token": "500 ms",
        "a step (p99)": "–",
        "first run": "1.75 s",
        "load": "4.10 ms",
        "peak memory": "530 MB",
        "of bandwidth": "–",
    }
    assert second["test"] == "tg128 @ d100"
    assert second["first token"] == "–"
    assert second["a step (p99)"] == "32.03 ms (32.81 ms)"
    assert second["of bandwidth"] == "0.91"
    assert (third["backend"], third["threads"], third["t/s"]) == ("numpy, generic", "2", "58.18")
    assert (fourth["backend"], fourth["threads"]) == ("mlx", "–")
    widths = {len(line) for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_below_the_table_is_what_it_was_made_with() -> None:
    text = report.render(RECORDS, report.GRID, "md")
    assert text.splitlines()[-4:] == [
        "gptx 0.1.0, Python 3.11.7, numpy 2.4.6, mlx 0.32.4, openblas 0.3.31 SkylakeX; "
        "A processor, of some kind, 8 cores; 2026-11-20",
        "memory read at 17.0 GB/s (numpy, 1 thread)",
        "memory read at 34.0 GB/s (numpy, 2 threads)",
        "memory read at 17.0 GB/s (mlx)",
    ]


def test_a_device_and_its_kernels_are_shown() -> None:
    gpu = made(Trial(0, 4), 1.0, backend="cupy", threads=None, kernels=63, device="NVIDIA H200")
    both = [RECORDS[0], gpu]
    text = report.render(both, report.grid_columns(both), "md")
    assert [row["kernels a token"] for row in table(text)] == ["–", "63"]
    assert "; NVIDIA H200, A processor, of some kind, 8 cores; 2026-11-20" in text
    assert report.grid_columns(RECORDS) == report.GRID


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0.000158, "158 µs"),
        (0.00123, "1.23 ms"),
        (0.0999, "99.90 ms"),
        (0.1, "100 ms"),
        (1.256, "1.26 s"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert report.duration(seconds) == text


def test_a_bar_in_a_name_does_not_break_the_table() -> None:
    text = report.render([made(Trial(2, 0), 1.0, model="a|b")], report.GRID, "md")
    assert "| a\\|b " in text


# Pictures


def many(threads: tuple[int, ...] = (1, 2, 4), depths: tuple[int, ...] = (0, 512)) -> list[Event]:
    return [
        made(Trial(p, n, depth), 1.0 / t, 1.1 / t, threads=t, dtype=dtype)
        for t, depth, dtype in itertools.product(threads, depths, ("float32", "int4"))
        for p, n in ((256, 0), (0, 64))
    ]


def check(path: Path) -> None:
    """A PNG of the size it promises, or an SVG with text in it."""
    data = path.read_bytes()
    if path.suffix == ".png":
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert data[-8:-4] == b"IEND"
        assert min(struct.unpack(">II", data[16:24])) > 500
    else:
        root = ElementTree.fromstring(data)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert any(node.text for node in root.iter("{http://www.w3.org/2000/svg}text"))


def texts(path: Path) -> set[str]:
    """What an SVG says."""
    found = ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")
    return {"".join(node.itertext()).strip() for node in found}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every picture of `many`."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("pictures")
    written = plots.draw(many(), folder)
    names = [f"{plot.file}.{ending}" for plot in plots.PLOTS for ending in ("png", "svg")]
    assert [path.name for path in written] == names
    return folder


def test_pictures_are_valid(pictures: Path) -> None:
    files = list(pictures.iterdir())
    assert len(files) == 8
    for path in files:
        check(path)


def test_pictures_say_what_they_show(pictures: Path) -> None:
    said = texts(pictures / "speedup-by-threads.svg")
    assert {"Speedup by number of threads", "threads", "times as fast", "ideal"} <= said
    assert {"reading a prompt, 256 tokens", "generating, 64 tokens", "1", "2", "4"} <= said
    assert "random:124M · numpy · A processor, of some kind · 2026-11-20" in said
    assert "tokens per second" in texts(pictures / "tokens-per-second-by-threads.svg")
    assert "milliseconds per token" in texts(pictures / "seconds-per-token-by-threads.svg")


def test_lines_are_told_apart_by_what_differs(pictures: Path) -> None:
    said = texts(pictures / "tokens-per-second-by-context.svg")
    assert {"float32, 1 thread", "int4, 4 threads", "tokens in the cache before"} <= said
    said = texts(pictures / "tokens-per-second-by-threads.svg")
    assert {"float32, after 0 tokens", "int4, after 512 tokens"} <= said


def test_a_single_point_is_a_picture_too(tmp_path: Path) -> None:
    """Of the context alone, where there are no threads; the same for the same record."""
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        written = plots.draw([made(Trial(4, 0), 1.0, threads=None)], tmp_path / name)
        assert {path.stem for path in written} == {"tokens-per-second-by-context"}
        contents.append([path.read_bytes() for path in written])
    assert contents[0] == contents[1]
    assert dict(matplotlib.rcParams) == before


def test_numbers_on_an_axis_are_apart() -> None:
    assert plots._apart([1]) == [1]
    assert plots._apart([1, 2, 4, 8]) == [8, 4, 2, 1]
    assert plots._apart([1, 2, 4, 8, 16, 32, 64, 96, 128]) == [128, 96, 64, 32, 16, 8]


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with refused(ParameterError, "--plot needs matplotlib", "pip install 'gptx[plot]'"):
        plots.plotting_into(str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
