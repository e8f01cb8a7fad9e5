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
        "params": "124 M",
        "backend": "numpy",
        "dtype": "float32",
        "threads": "1",
        "batch": "1",
        "test": "pp512",
        "t/s": "1052 ± 215",
        "first token": "500 ms",
        "a step (p99)": "–",
        "first run": "1.75 s",
        "load": "4.10 ms",
        "peak memory": "530 MB",
        "bandwidth": "–",
    }
    assert second["test"] == "tg128 @ d100"
    assert second["first token"] == "–"
    assert second["a step (p99)"] == "32.03 ms (32.81 ms)"
    assert second["bandwidth"] == "91 %"
    assert third["model"] == 'a\\|"b", c'
    assert (third["backend"], third["threads"], third["t/s"]) == ("numpy, generic", "2", "58.18")
    assert (fourth["backend"], fourth["threads"]) == ("mlx", "–")
    widths = {len(line) for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


SAME = [
    make_record(trial, 1.0, 1.1, threads=threads, dtype=dtype)
    for threads in (1, 2)
    for dtype in ("float32", "int8")
    for trial in (Trial(512, 0), Trial(0, 128, 900))
]
MAIN = ["model", "params", "backend", "dtype", "threads", "test", "t/s", "bandwidth"]


def test_the_narrow_table_has_the_main_columns() -> None:
    text = tables.narrow(SAME, grid.COLUMNS, 100)
    assert list(parse_table(text)[0]) == MAIN
    assert text.startswith("| model ")
    assert widest(text) <= 100
    assert tables.narrow(SAME, grid.COLUMNS, widest(text)) == text
    assert parse_table(text)[1] == {
        "model": "random:124M",
        "params": "124 M",
        "backend": "numpy",
        "dtype": "float32",
        "threads": "1",
        "test": "tg128 @ d900",
        "t/s": "122.2 ± 8.2",
        "bandwidth": "355 %",
    }


def test_a_narrow_table_has_columns_that_say_something() -> None:
    several = [make_record(Trial(4, 0), 1.0, threads=None, batch=batch) for batch in (1, 8)]
    text = tables.narrow(several, grid.COLUMNS, 100)
    assert list(parse_table(text)[0]) == [
        "model",
        "params",
        "backend",
        "dtype",
        "batch",
        "test",
        "t/s",
    ]


def test_what_all_rows_share_moves_above_a_narrow_table() -> None:
    text = tables.narrow(SAME, grid.COLUMNS, 80)
    above, empty, header, *_ = text.splitlines()
    assert (above, empty) == ("model: random:124M; backend: numpy", "")
    assert list(parse_table(text)[0]) == [name for name in MAIN if name not in ("model", "backend")]
    assert widest(text) == len(header) <= 80
    one = tables.narrow(SAME[:1], grid.COLUMNS, 1)
    assert list(parse_table(one)[0]) == ["t/s"]


def test_names_of_models_are_shortened_at_their_start() -> None:
    names = [f"/home/user/models/a-folder-with-a-long-name/run-{i}" for i in (1, 2)]
    several = [
        make_record(Trial(4, 0), 1.0 + i, model=name, backend=backend, dtype=dtype)
        for i, name in enumerate(names)
        for backend in ("numpy", "mlx")
        for dtype in ("float32", "int4/bfloat16")
    ]
    for width in (60, 80):
        text = tables.narrow(several, grid.COLUMNS, width)
        assert widest(text) == width
        first = parse_table(text)[0]["model"]
        assert first.startswith("…")
        assert names[0].endswith(first[1:])
    assert {len(row["model"]) for row in parse_table(tables.narrow(several, grid.COLUMNS, 1))} == {
        tables.SHORTEST_NAME
    }


def widest(text: str) -> int:
    return max(map(len, text.splitlines()))


@pytest.mark.parametrize(
    ("rate", "sd", "text"),
    [
        (0.1234, 0.0567, "0.12 ± 0.06"),
        (9.876, None, "9.88"),
        (99.4, 1.0, "99.40 ± 1.00"),
        (100.0, 0.25, "100.0 ± 0.2"),
        (1052.44, 214.75, "1052 ± 215"),
    ],
)
def test_rates(rate: float, sd: float | None, text: str) -> None:
    assert tables.token_rate({"tokens_per_second": rate, "tokens_per_second_sd": sd}) == text


def test_numbers_of_parameters() -> None:
    numbers = (4992, 999_999, 1_000_000, 2_920_000, 81_912_576, 124_439_808, 1_557_611_200)
    texts = ["4.99 K", "1,000 K", "1.00 M", "2.92 M", "81.9 M", "124 M", "1,558 M"]
    assert [tables.parameters(n) for n in numbers] == texts


def test_the_footer_names_software_machine_and_bandwidth() -> None:
    text = tables.render(RECORDS, grid.COLUMNS, "md")
    assert text.splitlines()[-6:] == [
        "",
        "gptx 0.1.0, Python 3.11.7, numpy 2.4.6, mlx 0.32.4, openblas 0.3.31 SkylakeX",
        "A processor, of some kind, 8 cores; 2026-11-20",
        "memory read at 17.0 GB/s (numpy, 1 thread)",
        "memory read at 34.0 GB/s (numpy, 2 threads)",
        "memory read at 17.0 GB/s (mlx)",
    ]


def test_the_footer_has_notes_once() -> None:
    notes = ["its head is not tied"]
    same = [make_record(Trial(4, 0, depth), 1.0, notes=notes) for depth in (0, 8)]
    text = tables.render([*same, make_record(Trial(4, 0), 1.0, notes=[])], grid.COLUMNS, "md")
    assert text.splitlines()[-1] == "random:124M, float32: its head is not tied"
    assert text.count("its head is not tied") == 1


def test_a_device_and_its_kernels_are_shown() -> None:
    gpu = make_record(
        Trial(0, 4), 1.0, backend="cupy", threads=None, kernels=63, device="NVIDIA H200"
    )
    both = [RECORDS[0], gpu]
    text = tables.render(both, grid.columns(both), "md")
    assert [row["kernels a token"] for row in parse_table(text)] == ["–", "63"]
    assert "\nNVIDIA H200, A processor, of some kind, 8 cores; 2026-11-20" in text
    assert grid.columns(RECORDS) == grid.COLUMNS


def test_durations() -> None:
    seconds = (0.000158, 0.00123, 0.0999, 0.1, 1.256)
    texts = ["158 µs", "1.23 ms", "99.90 ms", "100 ms", "1.26 s"]
    assert [tables.duration(x) for x in seconds] == texts


@pytest.mark.parametrize("output_format", ["json", "jsonl"])
def test_json_is_ascii(output_format: str) -> None:
    """It is exact in every encoding of standard output."""
    text = tables.render([{"model": "naïve 漢 🙂"}], (), output_format)
    assert text.isascii()
    assert parse(text, output_format) == [{"model": "naïve 漢 🙂"}]
