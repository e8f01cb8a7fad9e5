"""Bounded calls: the state that continues one, and `/model_inference`."""

from __future__ import annotations

from typing import Any

import pytest

from gptx.generation.text_model import Model
from gptx.server.errors import ApiError
from gptx.server.settings import Settings
from gptx.server.states import States
from tests.support.serving import Served, serving, wait_until

PATH = "/v1/completions"
BODY: dict[str, Any] = {
    "prompt": "ROMEO:", "max_tokens": 40, "temperature": 1, "seed": 8, "logprobs": 2,
    "ignore_eos": True,
}  # fmt: skip
BUDGET = 0.1


def calls(served: Served, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers of a call, and of those that continue it."""
    answers = [served.post(path, {**body, "budget": BUDGET}).json()]
    while (state := answers[-1].get("state")) is not None:
        answer = served.post(path, {"state": state, "budget": BUDGET})
        if answer.status_code == 400:  # the machine is too busy for a step: the state is left
            assert answer.json()["error"]["code"] == "budget_too_small"
            answer = served.post(path, {"state": state})
        assert answer.status_code == 200, answer.text
        answers.append(answer.json())
    return answers


def test_calls_join_to_the_answer_of_one(served: Served) -> None:
    whole = served.post(PATH, BODY).json()["choices"][0]
    answers = calls(served, PATH, BODY)
    parts = [one["choices"][0] for one in answers]
    assert "".join(one["text"] for one in parts) == whole["text"]
    assert {one["finish_reason"] for one in parts} == {"length"}
    for name in ("tokens", "text_offset", "token_logprobs"):
        joined = [value for one in parts for value in one["logprobs"][name]]
        expected = whole["logprobs"][name]
        assert joined == (
            pytest.approx(expected, abs=1e-5) if name == "token_logprobs" else expected
        )
    counts = [one["usage"]["completion_tokens"] for one in answers]
    assert sum(counts) == 40


def test_a_stream_has_the_state_in_its_last_part(served: Served) -> None:
    events = served.events(PATH, **BODY | {"max_tokens": 250}, budget=BUDGET)
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert "state" in events[-2]
    text = "".join(one["choices"][0]["text"] for one in events[:-1])
    rest = served.post(PATH, {"state": events[-2]["state"]}).json()
    whole = served.post(PATH, BODY | {"max_tokens": 250}).json()
    assert text + rest["choices"][0]["text"] == whole["choices"][0]["text"]


def test_a_state_continues_once(served: Served) -> None:
    state = served.post(PATH, {**BODY, "max_tokens": 250, "budget": BUDGET}).json()["state"]
    assert served.post(PATH, {"state": state, "max_tokens": 5}).status_code == 400
    assert served.post(PATH, {"state": state}).status_code == 200
    error = served.error(state=state)
    assert (error["status"], error["code"]) == (404, "state_not_found")


def test_the_server_has_a_budget_for_all_calls(shakespeare: Model) -> None:
    with serving(shakespeare, Settings(budget=BUDGET)) as served:
        answer = served.complete(max_tokens=250, ignore_eos=True)
        assert answer["usage"]["completion_tokens"] < 250
        assert served.error(prompt="a", best_of=2)["param"] == "best_of"


def test_a_budget_in_which_no_step_fits_names_the_smallest(served: Served) -> None:
    served.complete(max_tokens=3)
    error = served.error(prompt="ROMEO:", budget=1e-6)
    assert (error["status"], error["code"], error["param"]) == (400, "budget_too_small", "budget")
    least = float(error["message"].split()[-2])
    assert 0 < least < 60
    answer = served.post("/model_inference", {"max_tokens": 1, "tokens": [5], "budget": 1e-6})
    assert answer.status_code == 400
    assert "the smallest that does is" in answer.json()["Err"]


def test_model_inference_returns_the_greedy_tokens(served: Served, shakespeare: Model) -> None:
    ids = shakespeare.encode("ROMEO:")
    answer = served.post("/model_inference", {"max_tokens": 14, "tokens": ids})
    assert answer.json() == {"Ok": shakespeare.generate(ids, max_tokens=14).tokens}


def test_model_inference_continues_with_a_state(served: Served, shakespeare: Model) -> None:
    ids = shakespeare.encode("ROMEO:")
    found, body = [], {"max_tokens": 60, "tokens": ids, "budget": BUDGET}
    while True:
        answer = served.post("/model_inference", body).json()
        found += answer["Ok"]
        if "state" not in answer:
            break
        body = {"state": answer["state"]}
    assert found == shakespeare.generate(ids, max_tokens=60).tokens


@pytest.mark.parametrize(
    "body",
    [
        {}, {"tokens": [5]}, {"max_tokens": 5}, {"max_tokens": 0, "tokens": [5]},
        {"max_tokens": 5, "tokens": []}, {"max_tokens": 5, "tokens": [1024]},
        {"max_tokens": 5, "tokens": [5] * 300}, {"state": "unknown"},
    ],
    ids=range(8),
)  # fmt: skip
def test_errors_of_model_inference(served: Served, body: dict[str, Any]) -> None:
    answer = served.post("/model_inference", body)
    assert answer.status_code in (400, 404)
    assert set(answer.json()) & {"Err", "error"}


def test_states_have_limits() -> None:
    states: States[int] = States(2, 60.0)
    ids = [states.keep(i, "me") for i in range(3)]
    assert len(states) == 2
    with pytest.raises(ApiError, match="does not exist"):
        states.take(ids[0], "me")
    with pytest.raises(ApiError):
        states.take(ids[1], "another key")
    assert states.take(ids[1], "me") == 1
    old: States[int] = States(2, -1.0)
    with pytest.raises(ApiError):
        old.take(old.keep(0, ""), "")


def test_a_client_that_hangs_up_leaves_no_state(served: Served) -> None:
    state = served.post(PATH, {**BODY, "max_tokens": 250, "budget": BUDGET}).json()["state"]
    served.start(PATH, {"state": state}).close()
    wait_until(lambda: served.gate.active == 0 and served.scheduler.idle)
    assert served.complete(max_tokens=2)
