"""Tables of records in every format."""

from __future__ import annotations

from typing import Any

import pytest

from gptx.bench import grid, tables
from gptx.bench.grid import Trial, add_bandwidth, trial_figures
from gptx.bench.worker import Event
from tests.support.bench import parse, parse_table

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


def make_record(trial: Trial, *samples: float, **facts: Any) -> Event:
    """Make a record of the grid."""
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
    whole = shared | trial_figures(trial, 1, [1.75], steps) | FACTS | facts
    return add_bandwidth(whole, 17.0e9 * (whole["threads"] or 1))


RECORDS = [
    make_record(Trial(512, 0), 0.5, 0.6, 0.4),
    make_record(Trial(0, 128, 100), 4.0, 4.2),
    make_record(Trial(0, 128, 100), 2.2, threads=2, generic=True, model='a|"b", c'),
    make_record(Trial(0, 128), 1.1, 1.0, threads=None, backend="mlx", library="mlx 0.32.4"),
]


@pytest.mark.parametrize("output_format", ["csv", "json", "jsonl"])
def test_machine_readable_formats_keep_everything(output_format: str) -> None:
    assert parse(tables.render(RECORDS, (), output_format), output_format) == RECORDS


def test_the_markdown_table() -> None:
    text = tables.render(RECORDS, grid.COLUMNS, "md")
    first, second, third, fourth = parse_table(text)
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
    assert third["model"] == 'a\\|"b", c'
    assert (third["backend"], third["threads"], third["t/s"]) == ("numpy, generic", "2", "58.18")
    assert (fourth["backend"], fourth["threads"]) == ("mlx", "–")
    widths = {len(line) for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_the_footer_names_software_machine_and_bandwidth() -> None:
    text = tables.render(RECORDS, grid.COLUMNS, "md")
    assert text.splitlines()[-4:] == [
        "gptx 0.1.0, Python 3.11.7, numpy 2.4.6, mlx 0.32.4, openblas 0.3.31 SkylakeX; "
        "A processor, of some kind, 8 cores; 2026-11-20",
        "memory read at 17.0 GB/s (numpy, 1 thread)",
        "memory read at 34.0 GB/s (numpy, 2 threads)",
        "memory read at 17.0 GB/s (mlx)",
    ]


def test_a_device_and_its_kernels_are_shown() -> None:
    gpu = make_record(
        Trial(0, 4), 1.0, backend="cupy", threads=None, kernels=63, device="NVIDIA H200"
    )
    both = [RECORDS[0], gpu]
    text = tables.render(both, grid.columns(both), "md")
    assert [row["kernels a token"] for row in parse_table(text)] == ["–", "63"]
    assert "; NVIDIA H200, A processor, of some kind, 8 cores; 2026-11-20" in text
    assert grid.columns(RECORDS) == grid.COLUMNS


def test_durations() -> None:
    seconds = (0.000158, 0.00123, 0.0999, 0.1, 1.256)
    texts = ["158 µs", "1.23 ms", "99.90 ms", "100 ms", "1.26 s"]
    assert [tables.duration(x) for x in seconds] == texts
