"""Several replicas behind one front process: answers, balance, failures, the end."""

from __future__ import annotations

import json
import random
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from gptx.generation.text_model import Model
from tests.support.cli import posix, run
from tests.support.replica_server import (
    ENDLESS,
    STREAM_END,
    ReplicaServer,
    is_alive,
    read_events,
    serving,
    wait_until,
)

pytestmark = posix

GONE = "the replica of the request has ended: send it again"
LONG_PROMPT = "To be, or not to be: that is the question: Whether 'tis nobler in the mind to"


@pytest.fixture(scope="module")
def server() -> Iterator[ReplicaServer]:
    """Two replicas that all tests of this file share."""
    with serving() as found:
        yield found
        wait_until(lambda: sum(one["requests"] for one in found.replicas()) == 0)


def test_answers_are_those_of_the_model(server: ReplicaServer, shakespeare: Model) -> None:
    for seed in range(4):
        options = {"max_tokens": 12, "temperature": 0.8, "seed": seed}
        expected = shakespeare.generate("ROMEO:", **options).text
        answer = server.complete(prompt="ROMEO:", **options)
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["text"] == expected
        with server.stream(prompt="ROMEO:", **options) as events:
            *chunks, last = events
        assert last == STREAM_END
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected


def test_other_paths_reach_a_replica(server: ReplicaServer) -> None:
    assert server.client.get("/v1/models").json()["data"][0]["id"] == "shakespeare"
    assert server.client.get("/docs").status_code == 200
    assert server.client.head("/docs").content == b""
    assert server.client.post("/tokenize", json={"prompt": "ROMEO:"}).json()["count"] == 2
    assert server.client.get("/nothing?a=1").status_code == 404


def test_errors_are_those_of_a_replica(server: ReplicaServer) -> None:
    answer = server.complete(prompt="a", max_tokenz=1)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_tokenz")
    headers = {"Content-Type": "application/json"}
    answer = server.client.post("/v1/completions", content=b"nonsense", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    answer = server.client.post("/v1/completions", content=b"{}", headers={"Content-Type": "a/b"})
    assert answer.status_code == 415


def test_the_front_process_checks_hosts_and_origins(server: ReplicaServer) -> None:
    """The replicas get its requests, whose hosts it knows."""
    body = {"prompt": "a", "max_tokens": 1}
    url = server.client.base_url
    for name, value, status in (
        ("Host", "evil.example", 421),
        ("Origin", "http://evil.example", 403),
        ("Host", "localhost", 200),
        ("Origin", f"http://{url.host}:{url.port}", 200),
    ):
        answer = server.client.post("/v1/completions", json=body, headers={name: value})
        assert answer.status_code == status


def test_requests_at_a_time_are_on_different_replicas(server: ReplicaServer) -> None:
    with server.stream(**ENDLESS) as first, server.stream(**ENDLESS) as second:
        next(first), next(second)
        assert [one["requests"] for one in server.replicas()] == [1, 1]
        running = server.metric("gptx_requests_running")
        assert running == {"0": 1.0, "1": 1.0}
        assert server.metric("gptx_replica_requests") == running


def test_a_client_that_hangs_up_frees_its_place(server: ReplicaServer) -> None:
    with server.stream(**ENDLESS) as events:
        next(events)
    wait_until(lambda: server.metric("gptx_requests_running") == {"0": 0.0, "1": 0.0})


def test_a_client_that_hangs_up_before_the_answer(server: ReplicaServer) -> None:
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/v1/completions", json=ENDLESS, timeout=0.5)
    wait_until(lambda: server.metric("gptx_requests_running") == {"0": 0.0, "1": 0.0})


def test_a_common_prefix_leads_to_the_same_replica(server: ReplicaServer) -> None:
    before = server.metric("gptx_generated_tokens_total")
    with server.stream(prompt="a", max_tokens=1) as events:  # the first replica is not the only one
        assert list(events)[-1] == STREAM_END
    for end in ("suffer", "sleep", "dream"):
        assert server.complete(prompt=f"{LONG_PROMPT} {end}", max_tokens=1).status_code == 200
    after = server.metric("gptx_generated_tokens_total")
    assert sorted(after[number] - before[number] for number in after) in ([0, 4], [1, 3])


def test_a_state_is_continued_where_it_is(server: ReplicaServer, shakespeare: Model) -> None:
    options = {"prompt": "ROMEO:", "max_tokens": 100, "temperature": 0, "ignore_eos": True}
    answer = server.complete(**options, budget=0.05).json()
    text = answer["choices"][0]["text"]
    while (state := answer.get("state")) is not None:
        answer = server.complete(state=state, budget=10).json()
        text += answer["choices"][0]["text"]
    assert text == shakespeare.generate("ROMEO:", max_tokens=100, ignore_eos=True).text
    assert server.complete(state="state-0").status_code == 404


def test_keys_are_checked_by_the_replicas() -> None:
    with serving("--api-key", "secret") as server:
        assert server.complete(prompt="a", max_tokens=1).status_code == 401
        assert server.client.get("/metrics").status_code == 401
        assert server.client.get("/health").status_code == 200
        server.client.headers["Authorization"] = "Bearer secret"
        assert server.complete(prompt="a", max_tokens=1).status_code == 200
        assert server.client.get("/metrics").status_code == 200


@contextmanager
def killed(server: ReplicaServer, number: int) -> Iterator[None]:
    """Kill a replica; wait at the end of the context until it answers again."""
    starts = [one["starts"] for one in server.replicas()]
    server.kill(number)
    starts[number] += 1
    try:
        yield
    finally:
        server.wait_for_start(number, starts[number])
    assert [one["starts"] for one in server.replicas()] == starts


def requests_of(server: ReplicaServer) -> list[int]:
    return [one["requests"] for one in server.replicas()]


def test_a_killed_replica_is_started_again_and_the_others_go_on(server: ReplicaServer) -> None:
    wait_until(lambda: requests_of(server) == [0, 0])
    with server.stream(**ENDLESS) as first, server.stream(**ENDLESS) as second:
        next(first), next(second)
        with killed(server, 0):
            *_, last = first
            assert last["error"]["message"] == GONE
            assert last["error"]["code"] == "replica_gone"
            for _ in range(20):
                assert next(second)["choices"]
            answer = server.complete(prompt="a", max_tokens=1)
            assert answer.status_code == 200, answer.text
    wait_until(lambda: requests_of(server) == [0, 0])
    with server.stream(**ENDLESS) as first, server.stream(**ENDLESS) as second:
        next(first), next(second)
        assert requests_of(server) == [1, 1]


def test_an_unanswered_request_of_a_killed_replica_is_answered_by_another(
    server: ReplicaServer,
) -> None:
    options = {"prompt": "ROMEO:", "max_tokens": 600, "temperature": 0, "ignore_eos": True}
    options["overflow"] = "slide"
    wait_until(lambda: requests_of(server) == [0, 0])
    with server.stream(**ENDLESS) as events:  # of the first replica
        next(events)
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(server.complete(**options)))
        thread.start()
        wait_until(lambda: requests_of(server) == [1, 1])
        with killed(server, 1):
            thread.join()
    assert answers[0].status_code == 200, answers[0].text
    assert answers[0].json()["usage"]["completion_tokens"] == 600


def test_sigterm_drains_all_replicas() -> None:
    with serving() as server:
        pids = [server.pid(number) for number in (0, 1)]
        options = {**ENDLESS, "max_tokens": 200}
        with server.stream(**options) as first, server.stream(**options) as second:
            next(first), next(second)
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: server.found("(ending: running requests)"))
            refused = server.complete(prompt="a", max_tokens=1)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert list(first)[-1] == list(second)[-1] == STREAM_END
        assert server.process.wait() == 0
        assert not any(map(is_alive, pids))


def test_replicas_end_with_the_front_process() -> None:
    with serving() as server:
        pids = [server.pid(number) for number in (0, 1)]
        server.process.kill()
        wait_until(lambda: not any(map(is_alive, pids)))


def test_a_replica_that_cannot_start_ends_the_server() -> None:
    server = ReplicaServer("--replicas", "2", "--dtype", "bfloat16")  # NumPy has none
    try:
        assert server.process.wait() == 2
    finally:
        server.close()
    assert any(line.startswith("Error: ") and "bfloat16" in line for line in server.lines)
    assert not any("Traceback" in line for line in server.lines)


def test_a_missing_model_starts_no_replica() -> None:
    done = run("serve", "-m", "./nothing", "--replicas", "2")
    assert (done.code, done.out) == (66, "")
    assert "./nothing" in done.err


def test_the_number_of_replicas_is_checked() -> None:
    assert run("serve", "-m", "shakespeare", "--replicas", "0").code == 2


@pytest.mark.kill
def test_replicas_that_are_killed_again_and_again_lose_no_request_silently() -> None:
    """Each request is answered in full, or has an error that says what to do."""
    draws = random.Random(0)
    kinds: Counter[str] = Counter()
    with serving() as server:
        ended = threading.Event()

        def client(number: int) -> None:
            while not ended.is_set():
                options = {**ENDLESS, "max_tokens": 40, "seed": number, "temperature": 0.8}
                if number % 2:
                    kinds[answer_of(server, options)] += 1
                else:
                    kinds[stream_of(server, options)] += 1

        clients = [threading.Thread(target=client, args=(number,)) for number in range(6)]
        for one in clients:
            one.start()
        try:
            starts = [1, 1]
            for _ in range(10):
                ended.wait(draws.random())
                number = draws.randrange(2)
                server.kill(number)
                starts[number] += 1
                server.wait_for_start(number, starts[number])
        finally:
            ended.set()
            for one in clients:
                one.join()
        assert sum(one["starts"] for one in server.replicas()) == 12
        assert server.complete(prompt="a", max_tokens=1).status_code == 200
    assert set(kinds) <= {"whole", "error"}
    assert kinds["whole"] > kinds["error"] > 0


def answer_of(server: ReplicaServer, options: dict[str, Any]) -> str:
    """The kind of an answer: "whole", or "error" for one that says that the replica has ended."""
    answer = server.complete(**options)
    if answer.status_code == 503:
        assert answer.json()["error"]["code"] in ("replica_gone", "loading")
        assert answer.headers["retry-after"]
        return "error"
    assert answer.status_code == 200
    return "whole" if answer.json()["usage"]["completion_tokens"] == 40 else "part"


def stream_of(server: ReplicaServer, options: dict[str, Any]) -> str:
    """The same of a stream."""
    body = {**options, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code == 503:
            assert json.loads(answer.read())["error"]["code"] in ("replica_gone", "loading")
            return "error"
        assert answer.status_code == 200
        events = list(read_events(answer))
    if events[-1] == STREAM_END:
        return "whole" if len(events) == 41 else "part"
    return "error" if events[-1]["error"]["code"] == "replica_gone" else "part"
