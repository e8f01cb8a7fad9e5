"""Plots of the grid's records."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gptx.bench import plots
from gptx.bench.grid import Trial
from gptx.bench.plots import PLOTS
from gptx.bench.worker import Event
from tests.bench.test_tables import make_record


def many(threads: tuple[int, ...] = (1, 2, 4), depths: tuple[int, ...] = (0, 512)) -> list[Event]:
    return [
        make_record(Trial(p, n, depth), 1.0 / t, 1.1 / t, threads=t, dtype=dtype)
        for t, depth, dtype in itertools.product(threads, depths, ("float32", "int4"))
        for p, n in ((256, 0), (0, 64))
    ]


def texts(path: Path) -> set[str]:
    """Return the texts of an SVG."""
    found = ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")
    return {"".join(node.itertext()).strip() for node in found}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw every plot of `many`; a folder."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("drawn")
    generating = [record for record in many() if record["output"]]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(plots, "PNG_DPI", 60)  # this and one panel instead of two save time
        monkeypatch.setattr(plots, "PLOTS", PLOTS[:2])
        written, omitted = plots.draw(generating, folder)
        monkeypatch.setattr(plots, "PLOTS", PLOTS[2:])
        more, none = plots.draw(many(), folder)
        written += more
    assert omitted == none == []
    names = [f"{plot.file}.{ending}" for plot in PLOTS for ending in ("png", "svg")]
    assert [path.name for path in written] == names
    return folder


def test_pictures_are_complete(drawn: Path) -> None:
    for path in drawn.glob("*.png"):
        data = path.read_bytes()
        assert (data[:8], data[-8:-4]) == (b"\x89PNG\r\n\x1a\n", b"IEND")
        assert min(struct.unpack(">II", data[16:24])) > 200
    assert all(texts(path) for path in drawn.glob("*.svg"))


def test_labels_and_titles(drawn: Path) -> None:
    found = texts(drawn / "speedup-by-threads.svg")
    assert {"Speedup by number of threads", "threads", "times as fast", "ideal"} <= found
    assert {"reading a prompt, 256 tokens", "generating, 64 tokens", "1", "2", "4"} <= found
    assert "random:124M · numpy · A processor, of some kind · 2026-11-20" in found
    assert "tokens per second" in texts(drawn / "tokens-per-second-by-threads.svg")
    assert "milliseconds per token" in texts(drawn / "seconds-per-token-by-threads.svg")


def test_labels_of_lines_name_what_differs(drawn: Path) -> None:
    found = texts(drawn / "tokens-per-second-by-context.svg")
    assert {"float32, 1 thread", "int4, 4 threads", "tokens in the cache before"} <= found
    found = texts(drawn / "tokens-per-second-by-threads.svg")
    assert {"float32, after 0 tokens", "int4, after 512 tokens"} <= found


def test_a_single_x_is_not_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    single = many(threads=(2,), depths=(512,))
    written, omitted = plots.draw(single, tmp_path)
    assert written == list(tmp_path.iterdir()) == []
    assert omitted == [
        "tokens-per-second-by-threads is not drawn: it needs results for at least two numbers of "
        "threads, such as -t 1,2",
        "seconds-per-token-by-threads is not drawn: it needs results for at least two numbers of "
        "threads, such as -t 1,2",
        "speedup-by-threads is not drawn: it needs results for at least two numbers of threads, "
        "such as -t 1,2",
        "tokens-per-second-by-context is not drawn: it needs results for at least two numbers of "
        "tokens in the cache before, such as -d 0,512",
    ]


def test_records_without_threads(tmp_path: Path) -> None:
    """Only the plot by context is drawn; equal records give equal files."""
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        several = [make_record(Trial(4, 0, depth), 1.0, threads=None) for depth in (0, 8)]
        written, _ = plots.draw(several, tmp_path / name)
        assert {path.stem for path in written} == {"tokens-per-second-by-context"}
        contents.append([path.read_bytes() for path in written])
    [png] = (data for data in contents[0] if data.startswith(b"\x89PNG"))
    assert min(struct.unpack(">II", png[16:24])) > 500
    assert contents[0] == contents[1]
    assert dict(matplotlib.rcParams) == before


def test_labels_of_ticks_do_not_overlap() -> None:
    assert plots._thin_out([1]) == [1]
    assert plots._thin_out([1, 2, 4, 8]) == [8, 4, 2, 1]
    assert plots._thin_out([1, 2, 4, 8, 16, 32, 64, 96, 128]) == [128, 96, 64, 32, 16, 8]
