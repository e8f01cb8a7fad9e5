"""Requests that join and leave: each gets the answer of the request alone."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gptx.generation.text_model import Model
from gptx.server.settings import Settings
from tests.support.serving import Served, serving, wait_until

PROMPTS = ["ROMEO:", "ROMEO:\nWhat", "First Citizen:\nBefore we proceed", "a", "KING " * 20]
N_REQUESTS = 40


def random_fields(numbers: random.Random) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "temperature": numbers.choice([0.0, 0.7, 1.0, 1.5]),
        "seed": numbers.randrange(2**40),
        "max_tokens": numbers.randrange(1, 25),
    }
    choices = {"top_k": 5, "top_p": 0.8, "n": 2, "presence_penalty": 0.7, "stop": "e",
               "repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_p": 0.05}  # fmt: skip
    for name in numbers.sample(sorted(choices), 2):
        fields[name] = choices[name]
    return fields


def test_requests_of_any_mix_have_the_answer_of_each_alone(
    served: Served, shakespeare: Model
) -> None:
    """mlx-lm #983, #754; vllm #40896, sglang #34683, llama.cpp PR #6950."""
    numbers = random.Random(0)
    requests = [(numbers.choice(PROMPTS), random_fields(numbers)) for _ in range(N_REQUESTS)]
    wait_until(lambda: served.scheduler.idle)  # the engine thread does not compute meanwhile
    expected = [
        [one.text for one in shakespeare.generate(prompt, **{"n": 1, **fields})]
        for prompt, fields in requests
    ]
    # Some clients hang up in between, so that places become free at any step.
    gone = [served.start("/v1/completions", {"prompt": one, "max_tokens": 50}) for one in PROMPTS]

    def ask(request: tuple[str, dict[str, Any]]) -> list[str]:
        prompt, fields = request
        return [one["text"] for one in served.complete(prompt, **fields)["choices"]]

    with ThreadPoolExecutor(8) as threads:
        answers = threads.map(ask, requests)
        for connection in gone:
            connection.close()
        assert list(answers) == expected


def test_a_prefix_is_shared_up_to_the_first_difference(shakespeare: Model) -> None:
    """llama.cpp #27148: a cache served another conversation. A, B, A, in this order."""
    first, second = list(range(5, 105)), list(range(5, 65)) + list(range(200, 240))
    settings = Settings(keys=("one", "two"))
    with serving(shakespeare, settings) as served:

        def ask(ids: list[int], key: str = "one") -> tuple[int, str]:
            headers = {"Authorization": f"Bearer {key}"}
            body = {"prompt": ids, "max_tokens": 6, "temperature": 0}
            answer = served.post("/v1/completions", body, headers=headers).json()
            cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            return cached, answer["choices"][0]["text"]

        cold = {str(ids): shakespeare.generate(ids, max_tokens=6).text for ids in (first, second)}
        for ids, cached in ((first, 0), (second, 60), (first, 99), (second, 99)):
            assert ask(ids) == (cached, cold[str(ids)])
        assert ask(first, "two") == (0, cold[str(first)])  # the prompts of a key are its own
        assert ask(first, "two") == (99, cold[str(first)])
