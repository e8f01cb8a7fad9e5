"""The run of a batch: claims, results, progress, failures of the engine."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from gptx.cluster.in_process import Response
from gptx.cluster.items import WHOLE, Item, Shard
from gptx.cluster.results import ResultFile
from gptx.cluster.runner import Answer, Batch, Progress
from gptx.errors import DataError, HubUnavailableError

USAGE = {"prompt_tokens": 2, "completion_tokens": 3}
Reports = list[tuple[int, str | None]]


async def echo(url: str, body: Any) -> Response:
    return Response(200, {"id": "cmpl-1", "text": body["prompt"], "usage": USAGE})


def write_source(tmp_path: Path, *prompts: str) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f"{json.dumps({'prompt': prompt})}\n" for prompt in prompts))
    return path


def run(
    tmp_path: Path, answer: Answer = echo, *, in_flight: int = 2, shard: Shard = WHOLE
) -> tuple[list[Any], Progress, Reports]:
    """Run a batch; return the results in the output, the counts and the reports."""
    reports: Reports = []

    def report(item: Item, error: str | None) -> None:
        reports.append((item.line, error))

    output = tmp_path / "out.jsonl"
    with ResultFile(output) as results:
        batch = Batch(tmp_path / "in.jsonl", results, shard=shard)
        progress = batch.begin()
        asyncio.run(batch.run(answer, progress, report, in_flight))
    return [json.loads(line) for line in output.read_text().splitlines()], progress, reports


def test_each_line_has_one_result(tmp_path: Path) -> None:
    write_source(tmp_path, "a", "b", "c")
    results, progress, reports = run(tmp_path)
    assert [result["response"]["body"]["text"] for result in results] == ["a", "b", "c"]
    assert [result["response"]["request_id"] for result in results] == ["cmpl-1"] * 3
    assert (progress.n_lines, progress.n_done, progress.completed) == (3, 3, 3)
    assert (progress.prompt_tokens, progress.new_tokens) == (6, 9)
    assert reports == [(1, None), (2, None), (3, None)]


def test_results_are_in_the_order_in_which_they_finish(tmp_path: Path) -> None:
    write_source(tmp_path, "slow", "b", "c", "d")
    others = 0

    async def answer(url: str, body: Any) -> Response:
        nonlocal others
        others += body["prompt"] != "slow"
        while body["prompt"] == "slow" and others < 3:
            await asyncio.sleep(0)
        return await echo(url, body)

    results, _, _ = run(tmp_path, answer)
    assert [result["line"] for result in results] == [2, 3, 4, 1]


def test_no_more_items_are_in_flight_than_asked_for(tmp_path: Path) -> None:
    write_source(tmp_path, *map(str, range(10)))
    running, most = 0, 0

    async def answer(url: str, body: Any) -> Response:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return await echo(url, body)

    run(tmp_path, answer, in_flight=3)
    assert most == 3


def test_a_refused_request_does_not_stop_the_others(tmp_path: Path) -> None:
    write_source(tmp_path, "a", "bad", "c")

    async def answer(url: str, body: Any) -> Response:
        if body["prompt"] == "bad":
            error = {"message": "no", "type": "invalid_request_error", "param": "prompt"}
            return Response(400, {"error": error})
        return await echo(url, body)

    results, progress, reports = run(tmp_path, answer)
    assert (progress.completed, progress.failed) == (2, 1)
    assert reports == [(1, None), (2, "no"), (3, None)]
    assert results[1]["response"]["status_code"] == 400
    assert results[1]["error"]["message"] == "no"
    _, progress, reports = run(tmp_path, answer)  # it is not asked again
    assert (progress.n_done, progress.failed, reports) == (3, 0, [])


def test_a_request_on_which_the_engine_fails_has_no_result(tmp_path: Path) -> None:
    write_source(tmp_path, "a", "b", "c")

    async def answer(url: str, body: Any) -> Response:
        if body["prompt"] == "b":
            return Response(500, {"error": {"message": "NaN"}})
        return await echo(url, body)

    results, progress, reports = run(tmp_path, answer)
    assert [result["line"] for result in results] == [1, 3]
    assert (progress.completed, progress.unanswered, progress.n_done) == (2, 1, 2)
    assert (2, "NaN") in reports
    results, _, _ = run(tmp_path)
    assert [result["line"] for result in results] == [1, 3, 2]


def test_the_end_of_the_engine_ends_the_run(tmp_path: Path) -> None:
    write_source(tmp_path, "a", "b", "c", "d")

    async def answer(url: str, body: Any) -> Response:
        if body["prompt"] != "a":
            return Response(503, {"error": {"message": "the engine has ended"}})
        return await echo(url, body)

    with pytest.raises(HubUnavailableError, match="the engine has ended: run the command again"):
        run(tmp_path, answer)
    results, _, _ = run(tmp_path)
    assert sorted(result["line"] for result in results) == [1, 2, 3, 4]


def test_a_duplicate_custom_id_is_an_error_in_each_run(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"custom_id": "a", "prompt": "x"}\n' * 2)
    results, progress, _ = run(tmp_path)
    assert results[0]["custom_id"] == results[1]["custom_id"] == "a"
    failed = next(result for result in results if result["line"] == 2)
    assert failed["error"]["code"] == "duplicate_custom_id"
    assert (progress.completed, progress.failed) == (1, 1)
    output = tmp_path / "out.jsonl"
    output.write_text("".join(f"{json.dumps(x)}\n" for x in results if x["line"] == 1))
    results, progress, _ = run(tmp_path)
    assert (progress.completed, progress.failed) == (0, 1)


def test_lines_can_be_appended_to_the_input(tmp_path: Path) -> None:
    write_source(tmp_path, "a")
    run(tmp_path)
    write_source(tmp_path, "a", "b")
    results, progress, _ = run(tmp_path)
    assert [result["line"] for result in results] == [1, 2]
    assert progress.completed == 1


def test_results_of_another_input_are_an_error(tmp_path: Path) -> None:
    write_source(tmp_path, "a", "b")
    run(tmp_path)
    write_source(tmp_path, "b", "a")
    with pytest.raises(DataError, match="has 2 results of other lines than those of"):
        run(tmp_path)


def test_the_shards_of_machines_are_the_whole(tmp_path: Path) -> None:
    write_source(tmp_path, *"abcde")
    texts = []
    for number in (1, 2):
        results, _, _ = run(tmp_path, shard=Shard(number, 2))
        texts += [result["response"]["body"]["text"] for result in results]
        (tmp_path / "out.jsonl").unlink()
    assert texts == ["a", "c", "e", "b", "d"]
