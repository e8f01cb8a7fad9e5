"""Streams: their events, and the same answer as without a stream."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from gptx.errors import NonFiniteError
from gptx.generation.text_model import Model
from gptx.server.settings import Settings
from tests.support.serving import ENDLESS, Served, held, is_near, read_events, serving

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Who is there?"}]


def joined(events: list[Any]) -> list[dict[str, Any]]:
    """The choices of a stream, put together as a client does."""
    assert events[-1] == "[DONE]"
    found: dict[int, dict[str, Any]] = {}
    for event in events[:-1]:
        for choice in event["choices"]:
            whole = found.setdefault(choice["index"], {"logprobs": None, "text": ""})
            assert whole.get("finish_reason") is None, "a part after the last one"
            part = choice.get("delta", choice)
            whole["text"] += part.get("content", "") if "delta" in choice else part["text"]
            whole["finish_reason"] = choice["finish_reason"]
            whole["stop_reason"] = choice.get("stop_reason")
            for name in ("token_ids", "prompt_token_ids"):
                if name in choice:
                    whole[name] = whole.get(name, []) + choice[name]
            if choice["logprobs"] is not None:
                whole["logprobs"] = whole["logprobs"] or {}
                for name, values in choice["logprobs"].items():
                    if values is not None:
                        whole["logprobs"][name] = whole["logprobs"].get(name, []) + values
    return [found[index] for index in sorted(found)]


REQUESTS: list[dict[str, Any]] = [
    {"prompt": "ROMEO:", "temperature": 0},
    {"prompt": "ROMEO:", "temperature": 1, "seed": 4, "n": 3, "logprobs": 2},
    {"prompt": ["ROMEO:", "First"], "n": 2, "seed": 4, "echo": True, "logprobs": 3},
    {"prompt": "ROMEO:", "temperature": 0, "echo": True},
    {"prompt": "ROMEO:", "temperature": 0, "echo": True, "logprobs": 0, "max_tokens": 0},
    {"prompt": "ROMEO:", "temperature": 0, "stop": ["e", "th"], "logprobs": 1, "max_tokens": 30},
    {"prompt": "ROMEO:", "temperature": 0, "logit_bias": {"0": 100}, "logprobs": 1},
    {"prompt": "ROMEO:", "seed": 9, "return_token_ids": True, "max_tokens": 5},
    {"prompt": "ROMEO:", "seed": 9, "temperature": 100, "max_tokens": 60, "logprobs": 5},
]


@pytest.mark.parametrize("request_", REQUESTS, ids=range(len(REQUESTS)))
def test_a_stream_equals_the_whole_answer(served: Served, request_: dict[str, Any]) -> None:
    """mlx-lm PR #1630: log-probabilities were accepted, and dropped when streaming."""
    whole = served.post(COMPLETIONS, request_).json()["choices"]
    streamed = joined(served.events(COMPLETIONS, **request_))
    assert is_near(streamed, [{k: v for k, v in one.items() if k != "index"} for one in whole])


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"n": 2, "seed": 3, "logprobs": True, "top_logprobs": 2},
        {"seed": 3, "stop": "e", "return_token_ids": True},
    ],
    ids=range(3),
)
def test_a_chat_stream_equals_the_whole_answer(served: Served, fields: dict[str, Any]) -> None:
    body = {"messages": MESSAGES, "max_tokens": 20, **fields}
    whole = served.post(CHAT, body).json()["choices"]
    streamed = joined(served.events(CHAT, **body))
    for one, other in zip(streamed, whole, strict=True):
        assert one["text"] == other["message"]["content"]
        assert one["finish_reason"] == other["finish_reason"]
        assert one["stop_reason"] == other["stop_reason"]
        expected = other["logprobs"]
        found = (one["logprobs"] or {}).get("content")
        assert is_near(found, expected and expected["content"])
        assert one.get("token_ids") == other.get("token_ids")


def test_the_role_comes_first_in_a_chat(served: Served) -> None:
    events = served.events(CHAT, messages=MESSAGES, max_tokens=3, temperature=0)
    assert events[0]["object"] == "chat.completion.chunk"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in one["choices"][0]["delta"] for one in events[1:-1])


def test_usage_comes_only_on_request(served: Served) -> None:
    """litellm PR #25410, ogx #1424: clients read choices[0] of each event."""
    body: dict[str, Any] = {"prompt": "ROMEO:", "max_tokens": 3, "temperature": 0}
    for options in ({}, {"stream_options": {"include_usage": False}}, {"stream_options": None}):
        events = served.events(COMPLETIONS, **body, **options)
        assert all(len(one["choices"]) == 1 and "usage" not in one for one in events[:-1])
    events = served.events(COMPLETIONS, **body, stream_options={"include_usage": True})
    assert all(one["usage"] is None for one in events[:-2])
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == 3


def test_only_the_last_part_has_a_finish_reason(served: Served) -> None:
    """text-generation-inference PR #2336: the last event had none."""
    events = served.events(COMPLETIONS, prompt="ROMEO:", max_tokens=4, temperature=0)
    reasons = [one["choices"][0]["finish_reason"] for one in events[:-1]]
    assert reasons[-1] == "length"
    assert set(reasons[:-1]) == {None}
    assert len({one["id"] for one in events[:-1]}) == 1


def test_a_character_of_several_tokens_comes_as_a_whole(served: Served, shakespeare: Model) -> None:
    """llama.cpp PR #28926: half a character was in a part."""
    ids = shakespeare.encode("🙂")
    assert len(ids) == 4
    texts = []
    for n in range(4):  # the rest of the character, by the bias of its tokens
        answer = served.complete(
            shakespeare.encode("a") + ids[:n], max_tokens=1, logit_bias={str(ids[n]): 100}
        )
        texts.append(answer["choices"][0]["text"])
    assert texts[:3] == ["\ufffd"] * 3  # alone, each is an incomplete character
    for seed in range(5):
        body = {"prompt": "a", "temperature": 50, "seed": seed, "max_tokens": 40}
        whole = served.post(COMPLETIONS, body).json()["choices"][0]["text"]
        events = served.events(COMPLETIONS, **body)
        parts = [one["choices"][0]["text"] for one in events[:-1]]
        assert "".join(parts) == whole


def test_a_stop_string_over_several_parts_never_leaks(served: Served, shakespeare: Model) -> None:
    """lucebox PR #641, aprender PR #2019: a stop string was in a stream, or ignored."""
    text = shakespeare.generate("ROMEO:", max_tokens=40).text or ""
    stop = text[10:24]
    assert len(shakespeare.encode(stop)) > 3
    events = served.events(
        COMPLETIONS, prompt="ROMEO:", temperature=0, max_tokens=40, stop=stop, logprobs=0
    )
    parts = [one["choices"][0]["text"] for one in events[:-1]]
    assert "".join(parts) == text[:10]
    last = events[-2]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", stop)


def test_an_error_before_the_first_token_has_its_status(served: Served) -> None:
    bans = {str(id): -100 for id in range(1024)}
    answer = served.post(
        COMPLETIONS, {"prompt": "a", "stream": True, "stop": "", "logit_bias": bans}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "stop"


def test_a_later_error_is_an_event(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise NonFiniteError("a NaN")

    body = {**ENDLESS, "stream": True}
    with served.client.stream("POST", COMPLETIONS, json=body) as answer:
        assert answer.status_code == 200
        parts = answer.iter_text()
        text = next(parts)
        with monkeypatch.context() as patch:
            patch.setattr(type(served.scheduler.model.backend), "read_tokens", fail)
            text += "".join(parts)
    events = read_events(text)
    assert events[-1]["error"]["code"] == "not_finite"
    assert events[-2]["choices"][0]["finish_reason"] is None
    assert served.complete(max_tokens=2)


def test_a_comment_is_sent_while_a_client_waits(shakespeare: Model) -> None:
    with serving(shakespeare, Settings(ping_seconds=0.02)) as served:
        body = {"prompt": "ROMEO:", "max_tokens": 3, "stream": True, "temperature": 0}
        with (
            held(served.scheduler),
            served.client.stream("POST", COMPLETIONS, json=body) as answer,
        ):
            first = next(answer.iter_text())
        assert first == ": ping\n\n"


def test_the_role_of_a_chat_comes_once_after_comments(shakespeare: Model) -> None:
    with serving(shakespeare, Settings(ping_seconds=0.02)) as served:
        body = {"messages": MESSAGES, "max_tokens": 3, "stream": True, "temperature": 0}
        with contextlib.ExitStack() as hold:
            hold.enter_context(held(served.scheduler))
            with served.client.stream("POST", CHAT, json=body) as answer:
                parts = answer.iter_text()
                text = "".join(next(parts) for _ in range(3))
                assert set(text.split("\n\n")) == {": ping", ""}
                hold.close()
                text += "".join(parts)
        roles = ["role" in one["choices"][0]["delta"] for one in read_events(text)[:-1]]
        assert roles == [True] + [False] * (len(roles) - 1)


def test_best_of_is_no_stream(served: Served) -> None:
    error = served.error(prompt="a", best_of=2, stream=True)
    assert (error["status"], error["param"]) == (400, "best_of")
