"""An asynchronous device computes the next step while the engine reads the tokens of this one."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptx.backends import Backend
from gptx.backends.cpu.backend import NumpyBackend
from gptx.errors import NonFiniteError
from gptx.generation.engine import TokenGenerator
from gptx.generation.params import SamplingParams
from gptx.generation.results import Token
from gptx.generation.text_model import Model
from gptx.random_weights import random_weights
from tests.support.backends import make_backend
from tests.support.models import make_model
from tests.support.random_models import CASES

N_CONTEXT, EOS = 24, 3
SMALL = replace(CASES["untied"], n_positions=N_CONTEXT, vocab_size=23, n_layer=1)
WEIGHTS = random_weights(SMALL)
PARAMS = {
    "greedy": SamplingParams(),
    "penalties": SamplingParams(presence_penalty=0.7, frequency_penalty=0.2, logit_bias={EOS: 2.0}),
    "drawn": SamplingParams(temperature=1.0, top_p=0.95, seed=5),
    "history": SamplingParams(
        temperature=1.0, no_repeat_ngram_size=2, dry_multiplier=1.0, min_tokens=3, seed=5
    ),
    "everything": SamplingParams(
        temperature=0.9, top_k=15, min_p=0.01, repetition_penalty=1.3, presence_penalty=0.2, seed=7
    ),
}


class Started(NamedTuple):
    """An array that the device has started to copy to the host."""

    x: Any


class Asynchronous(NumpyBackend):
    """NumPy in the role of an asynchronous device; `events` is the order of passes and reads."""

    asynchronous = True

    def __init__(self) -> None:
        super().__init__(compile=False)
        self.events: list[str] = []

    def embed(self, ids: Any, table: Any) -> Any:
        if len(table) == SMALL.vocab_size:
            self.events.append("forward")
        return super().embed(ids, table)

    def copy_to_host_async(self, x: Any) -> Any:
        return Started(x.copy())

    def to_numpy(self, x: Any) -> Any:
        assert isinstance(x, Started), "a read of an array whose copy was not started"
        self.events.append("read")
        return x.x


def steps_of(model: Model, finish: dict[int, int], prompts: Any, **options: Any) -> Any:
    """Return all steps of a run; the caller finishes sequence `finish[step]` after a step."""
    params = options.pop("params")
    run = TokenGenerator(model.gpt2, prompts, params, **options)
    steps = []
    for n, step in enumerate(run):
        steps.append(step)
        if finish.get(n, len(run.sequences)) < len(run.sequences):
            run.finish(finish[n])
    return steps


def model_on(backend: Backend) -> Model:
    return make_model(SMALL, backend, WEIGHTS)


AHEAD, BEHIND = model_on(Asynchronous()), model_on(make_backend("numpy-ops"))


def assert_equal_steps(found: list[list[Token]], expected: list[list[Token]]) -> None:
    """Compare tokens, and log-probabilities up to rounding: the order of a sum may differ."""
    plain = [
        [[t._replace(logprob=None, top_logprobs=None) for t in step] for step in run]
        for run in (found, expected)
    ]
    assert plain[0] == plain[1]
    numbers = [[t.logprob for step in run for t in step] for run in (found, expected)]
    assert numbers[0] == [x if x is None else pytest.approx(x, abs=1e-5) for x in numbers[1]]
    tops = [[t.top_logprobs for step in run for t in step] for run in (found, expected)]
    assert tops[0] == [x if x is None else pytest.approx(x, abs=1e-5) for x in tops[1]]


@given(
    prompts=st.lists(st.lists(st.integers(0, 22), min_size=1, max_size=9), min_size=1, max_size=4),
    params=st.sampled_from(list(PARAMS)),
    overflow=st.sampled_from(["error", "truncate", "slide"]),
    max_tokens=st.integers(1, 16) | st.sampled_from([30, None]),
    eos_ids=st.sampled_from([(), (EOS,), (EOS, 5)]),
    logprobs=st.booleans(),
    top_logprobs=st.sampled_from([0, 2]),
    copies=st.sampled_from([1, 3]),
    finish=st.dictionaries(st.integers(0, 12), st.integers(0, 3), max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_steps_are_equal_to_those_of_a_synchronous_backend(
    params: str, overflow: Any, max_tokens: int | None, finish: dict[int, int], **options: Any
) -> None:
    if overflow == "slide":
        max_tokens = max_tokens or 40
    elif overflow == "error" and max_tokens is not None:
        max_tokens = min(max_tokens, 16)
    options |= {"params": PARAMS[params], "overflow": overflow, "max_tokens": max_tokens}
    assert_equal_steps(steps_of(AHEAD, finish, **options), steps_of(BEHIND, finish, **options))


@pytest.mark.parametrize("name", ["mlx", "cupy", "cupy-cpu"])
def test_steps_of_asynchronous_backends(name: str) -> None:
    backend = make_backend(name)
    assert backend.asynchronous
    model = model_on(backend)
    prompts = [[1, 2], [5], [9] * (N_CONTEXT - 9)]
    options = {
        "params": PARAMS["everything"],
        "max_tokens": 14,
        "overflow": "slide",
        "logprobs": True,
    }
    ahead = steps_of(model, {4: 1}, prompts, **options)
    backend.asynchronous = False
    assert_equal_steps(ahead, steps_of(model, {4: 1}, prompts, **options))


def events_of(model: Model, finish: dict[int, int], **options: Any) -> str:
    """Return the events of a run: f for a forward pass, r for a read of tokens."""
    model.backend.events.clear()  # type: ignore[attr-defined]
    steps_of(model, finish, params=PARAMS["greedy"], **options)
    return "".join(event[0] for event in model.backend.events)  # type: ignore[attr-defined]


def test_the_next_step_starts_before_the_tokens_are_read() -> None:
    # No step delays the first tokens; no step follows the last ones.
    assert events_of(AHEAD, {}, prompts=[[1], [2, 3]], max_tokens=6) == "fr" + "f" + "fr" * 4 + "r"


def test_no_step_starts_if_the_counts_show_that_a_sequence_ends() -> None:
    # The second prompt leaves three tokens; the first one continues without it.
    prompts = [[1] * (N_CONTEXT - 14), [2] * (N_CONTEXT - 2)]
    found = events_of(AHEAD, {}, prompts=prompts, max_tokens=None, overflow="truncate")
    assert found == "fr" + "f" + "fr" + "r" + "f" + "fr" * 11 + "r"
    # With its 13th token the context is full: its newer half is computed again.
    found = events_of(AHEAD, {}, prompts=prompts[1:], max_tokens=14, overflow="slide")
    assert found == "fr" + "f" + "fr" * 11 + "r" + "f" + "r"


def test_a_step_that_depends_on_the_tokens_starts_after_they_are_read() -> None:
    model = AHEAD
    model.backend.events.clear()  # type: ignore[attr-defined]
    steps_of(model, {}, [[1], [2, 3]], params=PARAMS["history"], max_tokens=6)
    assert "".join(event[0] for event in model.backend.events) == "fr" * 6  # type: ignore[attr-defined]


def test_one_step_is_dropped_when_the_caller_finishes_all() -> None:
    assert events_of(AHEAD, {2: 0}, prompts=[[1]], max_tokens=9) == "fr" + "f" + "fr" * 2


def test_a_synchronous_device_does_not_run_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Asynchronous, "asynchronous", False)
    assert events_of(AHEAD, {}, prompts=[[1], [2, 3]], max_tokens=4) == "fr" * 4


@pytest.mark.parametrize("name", [None, "mlx", "cupy", "cupy-cpu"])
def test_a_number_that_is_not_finite_is_an_error_of_its_step(name: str | None) -> None:
    weights = {name: x.copy() for name, x in WEIGHTS.items()}
    weights["wpe.weight"][5] = np.nan
    model = make_model(SMALL, make_backend(name) if name else Asynchronous(), weights)
    run = TokenGenerator(model.gpt2, [[1, 2, 3]], PARAMS["drawn"], max_tokens=9)
    steps = []
    with pytest.raises(NonFiniteError):
        steps.extend(run)
    assert len(steps) == 3  # the pass at position 5, which makes the fourth token, fails


def test_an_interrupt_keeps_the_tokens_read_before() -> None:
    class Interrupted(Asynchronous):
        def to_numpy(self, x: Any) -> Any:
            if self.events.count("read") == 3:
                raise KeyboardInterrupt
            return super().to_numpy(x)

    run = TokenGenerator(model_on(Interrupted()).gpt2, [[1, 2]], PARAMS["greedy"], max_tokens=9)
    steps = []
    with pytest.raises(KeyboardInterrupt):
        steps.extend(run)
    assert len(steps) == 3


def test_prefill_seconds_end_before_the_second_step_starts() -> None:
    run = TokenGenerator(AHEAD.gpt2, [[1, 2]], PARAMS["greedy"], max_tokens=9)
    AHEAD.backend.events.clear()  # type: ignore[attr-defined]
    start = time.perf_counter()
    next(iter(run))
    assert AHEAD.backend.events == ["forward", "read"]  # type: ignore[attr-defined]
    assert 0 < run.sequences[0].prefill_seconds < time.perf_counter() - start


def test_a_copy_to_the_host(backend: Backend) -> None:
    x = backend.asarray(np.arange(3))
    assert np.asarray(backend.to_numpy(backend.copy_to_host_async(x + x))).tolist() == [0, 2, 4]
