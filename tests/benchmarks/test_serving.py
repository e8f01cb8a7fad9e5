"""The comparison of servers: the load, the times of a stream, the tables."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.compare.engine_process import LeftOut
from benchmarks.serving import (
    Run,
    list_goals,
    measure_server,
    results_table,
    start,
    write_tokenizer,
)
from benchmarks.serving_load import (
    Job,
    Target,
    Timing,
    Traffic,
    complete,
    draw_text,
    percentiles,
    read_event,
    summarize,
)
from benchmarks.serving_peers import TABLE
from gptx.generation.found_model import find_model
from gptx.generation.text_model import Model
from gptx.random_weights import random_weights
from tests.support.bench import parse_table
from tests.support.cli import posix
from tests.support.random_models import CASES, write_model


def test_traffic_is_ragged_and_shares_prefixes(shakespeare: Model) -> None:
    traffic, tokenizer = Traffic(), shakespeare.tokenizer
    jobs = traffic.draw(tokenizer, 40, seed=1)
    assert jobs == traffic.draw(tokenizer, 40, seed=1)
    assert jobs != traffic.draw(tokenizer, 40, seed=2)
    lengths = [len(tokenizer.encode(job.prompt)) for job in jobs]
    longest = traffic.prefix_tokens + traffic.prompt_tokens[1]
    assert max(lengths) <= longest + 1
    assert len(set(lengths)) > 20
    assert {job.max_tokens for job in jobs} <= set(range(16, 65))
    starts = [job.prompt[:100] for job in jobs if len(job.prompt) > 100]
    assert max(map(starts.count, starts)) > 3


def test_texts_have_about_the_tokens_asked_for(shakespeare: Model) -> None:
    for n in (8, 100, 200):
        text = draw_text(shakespeare.tokenizer, n, np.random.default_rng(0))
        assert n - 4 <= len(shakespeare.tokenizer.encode(text)) <= n


def test_events_of_a_stream() -> None:
    timing = Timing(0.0)
    for line in (b": ping", b"", b"data: [DONE]", b'data: {"choices": [{"text": ""}]}'):
        read_event(line, timing)
    assert (timing.arrivals, timing.n_tokens) == ([], 0)
    read_event(b'data: {"choices": [{"text": "a"}], "usage": null}', timing)
    read_event(b'data: {"choices": [], "usage": {"completion_tokens": 5}}', timing)
    assert (len(timing.arrivals), timing.n_tokens) == (1, 5)
    with pytest.raises(RuntimeError, match="the stream has an error"):
        read_event(b'data: {"error": {"message": "no"}}', timing)


def test_figures() -> None:
    timings = [Timing(0.0, [1.0, 1.5, 2.0], 3), Timing(1.0, [4.0], 1)]
    found = summarize(timings, 2.0)
    assert (found["requests_per_second"], found["tokens_per_second"]) == (1.0, 2.0)
    assert found["first"]["p50"] == 2.0
    assert found["between"] == {"p50": 0.5, "p95": 0.5, "p99": 0.5}
    assert percentiles([]) == {"p50": None, "p95": None, "p99": None}


def test_tables_and_goals() -> None:
    run = Run({"instructions": "AVX2"})
    for server, clients, rate in (
        ("gptx int8", 1, 10.0), ("gptx int8", 8, 25.0), ("llama.cpp Q8_0", 8, 12.5),
    ):  # fmt: skip
        figures = summarize([Timing(0.0, [0.1, 0.3], 2)], 2 / rate)
        run.records.append({"server": server, "clients": clients, **figures})
    for beside, first in ((0, 0.1), (900, 0.5)):
        figures = summarize([Timing(0.0, [first, first + 0.2], 2)], 1.0)
        run.records.append({"server": "gptx int8", "beside": beside, **figures})
    loads, beside = results_table(run).split("\n\n")
    rows = [list(row.values()) for row in parse_table(loads)]
    assert rows[1] == [
        "gptx int8", "8", "12.50", "25.0", *["100 ms"] * 3, *["200 ms"] * 3,
    ]  # fmt: skip
    assert [row["long prompt"] for row in parse_table(beside)] == ["–", "900"]
    values = {goal.text: goal.value for goal in list_goals(run)}
    assert values["8 clients int8 / llama.cpp Q8_0"] == 2.0
    assert values["8 clients int8 / 1 client"] == 2.5
    delay = "delay by a long prompt, {} / 2 decode steps, 1 chunk"
    assert values[delay.format("int8")] == pytest.approx(1.0)  # 0.4 s later; two steps of 0.2 s
    assert values[delay.format("int4")] is None
    json.dumps(run.to_dict())


@posix
def test_a_server_is_measured(tmp_path: Path) -> None:
    """gptx with a random model, whose tokenizer has the vocabulary of the model."""
    config = replace(CASES["124M"], vocab_size=1100, n_positions=256)
    folder = tmp_path / "model"
    folder.mkdir()
    write_model(folder, config, random_weights(config))
    write_tokenizer(folder, config)
    tokenizer = find_model(str(folder)).info.tokenizer
    assert tokenizer.vocab_size == config.vocab_size
    server = start("gptx float32", folder, tmp_path, threads=1, slots=2)
    try:
        target = Target(server.port, server.model, server.extra)
        timing = asyncio.run(complete(target, Job("to be", 5)))
        assert timing.n_tokens == 5
        args = Namespace(clients=[2], requests=2, pause=0.001, no_long=True)
        [record] = measure_server("gptx float32", server, tokenizer, args, seed=0)
        assert record["requests"] == 4
        with pytest.raises(RuntimeError, match=r"status 400: .*max_tokens"):
            asyncio.run(complete(target, Job("to be", -1)))
    finally:
        server.close()
    assert server._process.poll() is not None


def test_a_missing_server_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_SERVER", str(tmp_path / "nothing"))
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "F32.gguf").touch()
    with pytest.raises(LeftOut, match=r"llama.cpp F32 is left out: LLAMA_SERVER is .*nothing'"):
        start("llama.cpp F32", folder, tmp_path, threads=1, slots=1)
    assert set(TABLE) >= {"mlx_lm float32", "transformers float32"}
