"""`gptx batch`: results, errors of lines, a run that continues, exit codes."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from gptx.generation.text_model import Model
from tests.support.cli import error_lines, posix, run, start

BATCH = ("batch", "-m", "shakespeare")


def write(path: Path, *lines: object) -> str:
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return str(path)


def test_results_are_those_of_the_model(tmp_path: Path, shakespeare: Model) -> None:
    prompts = ["ROMEO:", "JULIET:"]
    source = write(
        tmp_path / "in.jsonl",
        *({"prompt": p, "max_tokens": 8, "temperature": 0, "custom_id": p} for p in prompts),
    )
    output = tmp_path / "out.jsonl"
    done = run(*BATCH, source, str(output))
    assert (done.code, done.out) == (0, "")
    assert done.err.startswith("[lines: 2, 2 completed, 0 failed, 0 done before | prompt: 4 tokens")
    results = {x["custom_id"]: x for x in map(json.loads, output.read_text("utf-8").splitlines())}
    for prompt in prompts:
        choice = results[prompt]["response"]["body"]["choices"][0]
        assert choice["text"] == shakespeare.generate(prompt, max_tokens=8).text


def test_invalid_lines_are_reported_and_the_others_computed(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", "nonsense", {"prompt": "a", "max_tokens": 1}, {"n": 1})
    output = tmp_path / "out.jsonl"
    done = run(*BATCH, "-q", source, str(output))
    assert (done.code, done.out) == (65, "")
    lines = done.err.splitlines()
    assert lines[0].startswith("Line 1: the line is no JSON")
    assert lines[1].startswith("Line 3: the line has no prompt, messages or input")
    assert lines[2] == (f"Error: 2 of 3 lines are no valid requests: {output} has their errors")
    errors = [json.loads(line)["error"] for line in output.read_text().splitlines()]
    assert sorted(error["line"] for error in errors if error) == [1, 3]


def test_a_finished_batch_loads_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "a", "max_tokens": 1})
    output = tmp_path / "out.jsonl"
    assert run(*BATCH, source, str(output)).code == 0
    data = output.read_bytes()
    monkeypatch.setattr("gptx.cli.batch.load_once", None)
    done = run(*BATCH, source, str(output))
    assert (done.code, output.read_bytes()) == (0, data)
    assert "0 completed, 0 failed, 1 done before" in done.err


def test_results_of_another_model_are_an_error(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", *[{"prompt": "a", "max_tokens": 1}] * 2)
    output = tmp_path / "out.jsonl"
    assert run(*BATCH, source, str(output)).code == 0
    first, _ = output.read_text().splitlines()
    fingerprint = json.loads(first)["response"]["body"]["system_fingerprint"]
    output.write_text(f"{first.replace(fingerprint, 'fp_0')}\n")
    done = run(*BATCH, source, str(output))
    assert done.code == 65
    assert "has results of other weights than those of shakespeare" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nothing.jsonl", "out.jsonl"), 66, "nothing.jsonl does not exist"),
        (("in.jsonl", "nothing/out.jsonl"), 74, "nothing/out.jsonl cannot be written"),
        (("in.jsonl", "in.jsonl"), 65, "in.jsonl has no result of a batch in line 1"),
        (("in.jsonl", "out.jsonl", "--shard", "3/2"), 2, "--shard is '3/2', expected I/N"),
        (("in.jsonl", "out.jsonl", "--in-flight", "0"), 2, "--in-flight"),
    ],
)
def test_errors(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", {"prompt": "a"})
    done = run(*BATCH, *arguments)
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert not (tmp_path / "out.jsonl").exists() or code == 65


@posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_and_the_next_one_continues(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    short = {"prompt": "a", "max_tokens": 1}
    long = {"prompt": "a", "max_tokens": 100, "ignore_eos": True}
    source = write(tmp_path / "in.jsonl", short, *[long] * 200)
    output = tmp_path / "out.jsonl"
    process = start(*BATCH, "-q", source, str(output))
    while not output.exists() or not output.stat().st_size:
        assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == code
    assert error_lines(err) == ([b"Interrupted"] if code == 130 else [])
    done = output.read_bytes()
    assert done.endswith(b"\n")
    write(tmp_path / "in.jsonl", *[short] + [long] * done.count(b"\n"))
    assert run(*BATCH, "-q", source, str(output)).code == 0
    assert output.read_bytes().startswith(done)
