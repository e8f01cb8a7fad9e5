"""The server's application in this process: its answers are those of the model."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gptx.cluster.in_process import Response, Server
from gptx.generation.text_model import Model


def post(model: Model, *requests: tuple[str, Any]) -> list[Response]:
    async def run() -> list[Response]:
        async with Server(model, len(requests)) as server:
            return list(await asyncio.gather(*(server.post(*request) for request in requests)))

    return asyncio.run(run())


def test_answers_are_those_of_the_model(shakespeare: Model) -> None:
    prompts = ["ROMEO:", "JULIET:", "To be"]
    bodies = [{"prompt": p, "max_tokens": 12, "temperature": 0.8, "seed": 3} for p in prompts]
    answers = post(shakespeare, *(("/v1/completions", body) for body in bodies))
    for prompt, answer in zip(prompts, answers, strict=True):
        result = shakespeare.generate(prompt, max_tokens=12, temperature=0.8, seed=3)
        assert answer.status == 200
        assert answer.body["choices"][0]["text"] == result.text
        assert answer.body["usage"]["completion_tokens"] == len(result.tokens)


def test_a_refused_request(shakespeare: Model) -> None:
    [answer] = post(shakespeare, ("/v1/completions", {"prompt": "a", "max_tokenz": 1}))
    assert answer.status == 400
    assert answer.body["error"]["param"] == "max_tokenz"


def test_a_cancel_ends_the_request(shakespeare: Model) -> None:
    async def run() -> None:
        async with Server(shakespeare, 4) as server:
            long = {"prompt": "ROMEO:", "max_tokens": 200, "ignore_eos": True}
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await server.post("/v1/completions", long)
            answer = await server.post("/v1/completions", {"prompt": "a", "max_tokens": 1})
            assert answer.status == 200

    asyncio.run(run())
