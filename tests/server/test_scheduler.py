"""The scheduler: order, limits, cancellation in each phase, errors of the engine, its end."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from gptx.errors import NonFiniteError, ParameterError
from gptx.generation.options import Options, check_options
from gptx.generation.request import Request
from gptx.generation.results import Chunk, Result
from gptx.generation.text_model import Model
from gptx.server.errors import QueueFull, Unavailable
from gptx.server.scheduler import Pace, Paused, Scheduler, Ticket
from tests.support.serving import PATIENCE_SECONDS, held, wait_until

ENDLESS = Options(max_tokens=10**6, overflow="slide", ignore_eos=True)


@pytest.fixture
def scheduler(shakespeare: Model) -> Iterator[Scheduler]:
    one = Scheduler(shakespeare, max_queue=3)
    yield one
    one.close()


class Listener:
    """The events of a request."""

    def __init__(self) -> None:
        self.events: list[Chunk | Exception] = []
        self.results: dict[int, Result] = {}
        self._changed = threading.Condition()

    def __call__(self, event: Chunk | Exception) -> None:
        with self._changed:
            self.events.append(event)
            if isinstance(event, Chunk) and event.result is not None:
                self.results[event.sequence] = event.result
            self._changed.notify()

    def wait(self, n_results: int = 1) -> Listener:
        """Wait for the results, or for an error."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: self.error is not None or len(self.results) >= n_results, PATIENCE_SECONDS
            )
        return self

    def wait_for_chunks(self, n: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.events) >= n, PATIENCE_SECONDS)

    @property
    def error(self) -> Exception | None:
        return next((one for one in self.events if isinstance(one, Exception)), None)


def submit(
    scheduler: Scheduler, prompt: Any = "ROMEO:", budget: float | None = None, **options: Any
) -> tuple[Ticket, Listener]:
    listener = Listener()
    prompts = prompt if isinstance(prompt, list) else [prompt]
    request = Request(prompts, check_options(Options(**options)))  # type: ignore[typeddict-item]
    return scheduler.submit(request, listener, budget=budget), listener


def test_results_are_those_of_the_model(scheduler: Scheduler, shakespeare: Model) -> None:
    options: Any = {"n": 2, "max_tokens": 9, "temperature": 1, "seed": 2, "logprobs": 1}
    prompts = ["ROMEO:", "What", "First Citizen:\nWe"]
    ticket, listener = submit(scheduler, prompts, prompt_logprobs=2, **options)
    results = listener.wait(6).results
    expected = shakespeare.generate(prompts, prompt_logprobs=2, **options)
    for i, one in enumerate(expected):
        assert results[i].tokens == one.tokens
        assert results[i].logprobs == pytest.approx(one.logprobs, abs=1e-5)
        known = ticket.prompt_logprobs[i].logprobs
        assert known == pytest.approx((one.prompt_logprobs or [])[1:], abs=1e-5)


def test_prompt_logprobs_are_there_at_the_first_chunk(scheduler: Scheduler) -> None:
    found = []
    request = Request(["ROMEO:"], check_options({"prompt_logprobs": 1, "max_tokens": 2}))
    ended = threading.Event()

    def listen(event: Chunk | Exception) -> None:
        found.append(dict(ticket.prompt_logprobs))
        if isinstance(event, Exception) or event.result is not None:
            ended.set()

    with held(scheduler):
        ticket = scheduler.submit(request, listen)
    assert ended.wait(PATIENCE_SECONDS)
    assert list(found[0]) == [0]


def test_the_queue_has_a_limit(scheduler: Scheduler) -> None:
    """ollama #7758, #4124: the limit was ignored, or answered with 500."""
    with held(scheduler):
        listeners = [submit(scheduler, max_tokens=2)[1] for _ in range(3)]
        with pytest.raises(QueueFull) as caught:
            submit(scheduler)
        assert caught.value.status == 429
        assert caught.value.headers["Retry-After"] == "1"
        assert scheduler.waiting == 3
    for listener in listeners:
        assert listener.wait().error is None


def test_the_calls_have_a_limit_too(scheduler: Scheduler) -> None:
    with held(scheduler):
        calls = [scheduler.call(lambda model: model.name) for _ in range(3)]
        with pytest.raises(QueueFull):
            scheduler.call(lambda model: None)
    assert {call.result(PATIENCE_SECONDS) for call in calls} == {"shakespeare"}


def test_an_error_of_a_call_is_its_own(scheduler: Scheduler) -> None:
    def fail(model: Model) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        scheduler.call(fail).result(PATIENCE_SECONDS)
    assert submit(scheduler, max_tokens=2)[1].wait().error is None


def test_a_canceled_request_of_the_queue_never_runs(scheduler: Scheduler) -> None:
    """llama.cpp #13262: queued requests of clients that had gone were computed."""
    with held(scheduler):
        ticket, listener = submit(scheduler)
        _, other = submit(scheduler, max_tokens=2)
        ticket.cancel()
        assert scheduler.waiting == 1
    other.wait()
    assert listener.events == []
    assert ticket.outputs == {}


def test_cancellation_frees_the_place_of_a_running_request(scheduler: Scheduler) -> None:
    """llama.cpp #24496: generation ran to the end of the context."""
    ticket, listener = submit(scheduler, **ENDLESS)
    listener.wait_for_chunks(3)
    with held(scheduler):
        ticket.cancel()
        n = len(listener.events)
    wait_until(lambda: scheduler.running == 0)
    assert len(listener.events) == n
    assert submit(scheduler, max_tokens=2)[1].wait().error is None


def test_cancellation_before_the_prompt_is_read(scheduler: Scheduler) -> None:
    """llama.cpp #7418, ik_llama.cpp #1020: no cancellation while a prompt was read."""
    with held(scheduler):
        ticket, listener = submit(scheduler, [[5] * 200] * 2, max_tokens=1)
        _, other = submit(scheduler, max_tokens=1)
        ticket.cancel()
    other.wait()
    assert listener.events == []


def test_a_canceled_request_can_be_canceled_again(scheduler: Scheduler) -> None:
    ticket, listener = submit(scheduler, max_tokens=2)
    listener.wait()
    wait_until(lambda: scheduler.idle)
    ticket.cancel()
    ticket.cancel()
    assert submit(scheduler, max_tokens=2)[1].wait().error is None


def fail(*args: Any, **options: Any) -> Any:
    raise RuntimeError("injected")


def test_an_error_in_the_engine_ends_the_requests_in_flight(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mlx-lm #1672, PR #1513, #1129: the engine ended, and requests waited forever."""
    _, listener = submit(scheduler, **ENDLESS)
    listener.wait_for_chunks(2)
    with monkeypatch.context() as patch:
        patch.setattr(type(scheduler.model.backend), "read_tokens", fail)
        assert isinstance(listener.wait().error, RuntimeError)
    assert scheduler.healthy
    assert submit(scheduler, max_tokens=2)[1].wait().error is None


def test_a_request_that_no_token_is_left_for_ends_alone(scheduler: Scheduler) -> None:
    bans = dict.fromkeys(range(5, 1024), -math.inf)
    _, listener = submit(scheduler, no_repeat_ngram_size=1, logit_bias=bans, **ENDLESS)
    assert isinstance(listener.wait().error, ParameterError)
    assert submit(scheduler, max_tokens=2)[1].wait().error is None


def test_a_function_that_fails_cancels_its_request(scheduler: Scheduler) -> None:
    request = Request(["ROMEO:"], check_options(ENDLESS))
    scheduler.submit(request, fail)
    wait_until(lambda: scheduler.idle)
    assert scheduler.healthy


def test_the_end_of_the_engine_is_known(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mlx-lm #1672: /v1/models still answered 200."""
    with held(scheduler):
        _, listener = submit(scheduler)
        monkeypatch.setattr(scheduler, "_admit", fail)
    assert isinstance(listener.wait().error, Unavailable)
    assert not scheduler.healthy
    with pytest.raises(Unavailable, match="the engine has ended"):
        submit(scheduler)


def test_the_end_answers_all_requests(shakespeare: Model) -> None:
    scheduler = Scheduler(shakespeare)
    running, waiting = submit(scheduler, **ENDLESS)[1], submit(scheduler)[1]
    running.wait_for_chunks(1)
    scheduler.close()
    assert running.error is not None or running.results
    assert waiting.error is not None or waiting.results
    assert not scheduler.healthy


def test_draining_refuses_new_requests_only(scheduler: Scheduler) -> None:
    with held(scheduler):
        _, listener = submit(scheduler, max_tokens=3)
        scheduler.drain()
        with pytest.raises(Unavailable, match="the server ends"):
            submit(scheduler)
    assert len(listener.wait().results[0].tokens) == 3
    wait_until(lambda: scheduler.idle)


def test_a_long_prompt_is_read_between_the_steps_of_others(shakespeare: Model) -> None:
    """llama.cpp #4216, #10054: one long prompt stopped the output of everybody."""
    scheduler = Scheduler(shakespeare, chunk_tokens=16)
    try:
        _, short = submit(scheduler, **ENDLESS)
        short.wait_for_chunks(1)
        long = Listener()
        tokens_before: list[int] = []

        def listen(event: Chunk | Exception) -> None:
            tokens_before.append(len(short.events))
            long(event)

        with held(scheduler):
            n = len(short.events)
            request = Request([list(range(5, 245))], check_options({"max_tokens": 1}))
            scheduler.submit(request, listen)
        long.wait()
        assert tokens_before[0] - n >= 240 // 16 - 1  # a step of it after each chunk
    finally:
        scheduler.close()


def test_a_request_with_more_copies_than_places(shakespeare: Model) -> None:
    scheduler = Scheduler(shakespeare, max_running=2)
    try:
        options: dict[str, Any] = {"n": 5, "max_tokens": 6, "temperature": 1, "seed": 3}
        results = submit(scheduler, **options)[1].wait(5).results
        expected = shakespeare.generate("ROMEO:", **options)
        assert [results[i].tokens for i in range(5)] == [one.tokens for one in expected]
    finally:
        scheduler.close()


@pytest.mark.parametrize("overflow", ["slide", "truncate"])
def test_a_paused_request_slides_as_without_a_pause(
    scheduler: Scheduler, shakespeare: Model, overflow: str
) -> None:
    """A pause after each part of an output that is longer than the context."""
    options: dict[str, Any] = {
        "max_tokens": 300, "overflow": overflow, "ignore_eos": True, "temperature": 1, "seed": 1,
    }  # fmt: skip
    expected = shakespeare.generate("ROMEO:", **options)
    ticket, listener = submit(scheduler, **options)
    for n in (50, 200, 254, 255, 256, 290):
        if overflow == "truncate" and n > 250:
            break
        listener.wait_for_chunks(n)
        with held(scheduler):
            ticket.deadline = 0.0
        listener.wait()
        assert isinstance(listener.events.pop(), Paused)
        scheduler.resume(ticket, listener)
    assert listener.wait().results[0].tokens == expected.tokens


SAMPLED: list[dict[str, Any]] = [
    {},
    {"temperature": 1, "seed": 6},
    {"temperature": 1, "seed": 6, "n": 3, "presence_penalty": 1.0},
    {"temperature": 1, "seed": 6, "dry_multiplier": 1.0, "no_repeat_ngram_size": 3},
    {"temperature": 1, "seed": 6, "min_tokens": 20, "stop": ["th"]},
    {"temperature": 30, "seed": 6, "logprobs": 2},
]


@pytest.mark.parametrize("options", SAMPLED, ids=range(len(SAMPLED)))
def test_a_paused_request_continues_with_the_same_tokens(
    scheduler: Scheduler, shakespeare: Model, options: dict[str, Any]
) -> None:
    options = {"max_tokens": 30, **options}
    expected = shakespeare.generate("ROMEO:", **{"n": 1, **options})
    n = len(expected)
    ticket, listener = submit(scheduler, budget=0.03, **options)
    pauses = 0
    while isinstance(listener.wait(n).error, Paused):
        pauses += 1
        assert pauses < 1000
        listener.events = [x for x in listener.events if isinstance(x, Chunk)]
        other = submit(scheduler, "First Citizen:", max_tokens=3)[1]
        scheduler.resume(ticket, listener, budget=0.03)
        other.wait()
    assert pauses > 0
    for i, result in enumerate(expected):
        assert listener.results[i].tokens == result.tokens
        assert listener.results[i].text == result.text
        assert listener.results[i].finish_reason == result.finish_reason


def test_a_request_pauses_in_the_queue(scheduler: Scheduler) -> None:
    submit(scheduler, max_tokens=2)[1].wait()
    with held(scheduler):
        ticket, listener = submit(scheduler, budget=1e-9, max_tokens=4)
    assert isinstance(listener.wait().error, Paused)
    listener.events.clear()
    scheduler.resume(ticket, listener)
    assert len(listener.wait().results[0].tokens) == 4


def test_the_least_budget_follows_the_length_of_the_prompt(scheduler: Scheduler) -> None:
    for n in (4, 100):
        submit(scheduler, [[5] * n], max_tokens=3)[1].wait()
    options = check_options(Options(max_tokens=1))
    least = [scheduler.least_budget(Request([[5] * n], options)) for n in (4, 100)]
    assert 0 < least[0] < least[1]


def test_the_pace_takes_the_nearest_steps() -> None:
    pace = Pace()
    assert pace.expect(5) == 0
    pace.add(1, 0.010)
    pace.add(100, 0.200)
    assert pace.expect(1) == pytest.approx(0.010)
    assert pace.expect(120) == pytest.approx(0.240)
    assert pace.expect(1000) == pytest.approx(2.0)
    pace.add(1, 0.030)
    pace.add(1, 0.010)
    assert 0.020 < pace.expect(1) < 0.030  # a slow step counts for longer
    pace.relax()
    assert pace.expect(120) == pytest.approx(0.216)
    pace.clear()
    assert pace.expect(1) == 0


def test_numbers_that_are_not_finite_are_an_error(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_finite(*args: Any) -> Any:
        raise NonFiniteError("a NaN")

    with monkeypatch.context() as patch:
        patch.setattr(type(scheduler.model.backend), "read_tokens", not_finite)
        assert isinstance(submit(scheduler)[1].wait().error, NonFiniteError)
    assert submit(scheduler, max_tokens=2)[1].wait().error is None
