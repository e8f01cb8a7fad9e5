"""`/v1/completions`: the answer, field by field, against the model called directly."""

from __future__ import annotations

import math
from typing import Any

import pytest

from gptx.generation.text_model import Model
from gptx.server.settings import Settings
from tests.support.serving import Served, serving

PROMPT = "ROMEO:\nWhat light"


def choices(served: Served, **fields: Any) -> list[dict[str, Any]]:
    return served.complete(PROMPT, **fields)["choices"]


def test_the_text_is_that_of_the_model(served: Served, shakespeare: Model) -> None:
    result = shakespeare.generate(PROMPT, max_tokens=12)
    answer = served.complete(PROMPT, max_tokens=12)
    assert answer["object"] == "text_completion"
    assert answer["model"] == "shakespeare"
    assert answer["id"].startswith("cmpl-")
    [choice] = answer["choices"]
    assert choice == {
        "index": 0,
        "text": result.text,
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }
    n = result.prompt_tokens
    assert answer["usage"] | {"prompt_tokens_details": None} == {
        "prompt_tokens": n,
        "completion_tokens": 12,
        "total_tokens": n + 12,
        "prompt_tokens_details": None,
    }


SAMPLED: list[dict[str, Any]] = [
    {"temperature": 0.8, "seed": 7},
    {"temperature": 1, "top_k": 5, "seed": 3},
    {"temperature": 1, "top_p": 0.7, "min_p": 0.02, "seed": 2**63},
    {"temperature": 1.2, "typical_p": 0.5, "seed": 0},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"no_repeat_ngram_size": 2},
    {"dry_multiplier": 0.8, "dry_base": 2, "dry_allowed_length": 1, "dry_range": 40},
    {"dry_multiplier": 0.8, "dry_sequence_breakers": ["\n"]},
    {"ban": ["the", "a"]},
    {"stop": ["e", "\n"]},
    {"stop": "th"},
    {"stop_token_ids": [199]},
    {"min_tokens": 3, "stop_token_ids": [199]},
    {"overflow": "truncate"},
]


@pytest.mark.parametrize("options", SAMPLED, ids=lambda one: "-".join(one))
def test_each_option_has_the_meaning_of_the_model(
    served: Served, shakespeare: Model, options: dict[str, Any]
) -> None:
    result = shakespeare.generate(PROMPT, max_tokens=16, **options)
    [choice] = choices(served, max_tokens=16, **options)
    assert choice["text"] == result.text
    assert choice["finish_reason"] == result.finish_reason
    assert choice["stop_reason"] == result.stopped_by


def test_logit_bias_has_ids_as_strings(served: Served, shakespeare: Model) -> None:
    [id] = shakespeare.encode("e")
    [choice] = choices(served, max_tokens=3, logit_bias={str(id): 100})
    assert choice["text"] == "eee"


def test_a_negative_seed_is_a_seed_too(served: Served, shakespeare: Model) -> None:
    fields: dict[str, Any] = {"max_tokens": 8, "temperature": 1, "seed": -5}
    expected = shakespeare.generate(PROMPT, max_tokens=8, temperature=1, seed=2**64 - 5)
    assert choices(served, **fields)[0]["text"] == expected.text


def test_without_a_seed_answers_differ(served: Served) -> None:
    texts = {choices(served, max_tokens=16, temperature=1.5)[0]["text"] for _ in range(3)}
    assert len(texts) > 1


def test_prompts_and_copies_are_in_order(served: Served, shakespeare: Model) -> None:
    prompts = ["ROMEO:", "First Citizen:", "ROMEO:"]
    options: dict[str, Any] = {"n": 2, "max_tokens": 6, "temperature": 1, "seed": 5}
    results = shakespeare.generate(prompts, **options)
    found = served.complete(prompts, **options)["choices"]
    assert [one["index"] for one in found] == list(range(6))
    assert [one["text"] for one in found] == [one.text for one in results]


def test_token_ids_are_prompts(served: Served, shakespeare: Model) -> None:
    ids = [shakespeare.encode("ROMEO:"), shakespeare.encode("What light")]
    texts = [one["text"] for one in served.complete(ids, max_tokens=5)["choices"]]
    assert texts == [shakespeare.generate(one, max_tokens=5).text for one in ids]
    assert served.complete(ids[0], max_tokens=5)["choices"][0]["text"] == texts[0]


def test_best_of_returns_the_most_probable_ones(served: Served, shakespeare: Model) -> None:
    options: dict[str, Any] = {
        "n": 2, "best_of": 5, "max_tokens": 6, "temperature": 1, "seed": 1,
    }  # fmt: skip
    results = shakespeare.generate("ROMEO:", **options)
    answer = served.complete("ROMEO:", **options)
    assert [one["text"] for one in answer["choices"]] == [one.text for one in results]
    assert [one["index"] for one in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 30


def test_logprobs_are_those_of_the_model(served: Served, shakespeare: Model) -> None:
    result = shakespeare.generate(PROMPT, max_tokens=6, logprobs=3)
    [choice] = choices(served, max_tokens=6, logprobs=3)
    found = choice["logprobs"]
    assert found["token_logprobs"] == pytest.approx(result.logprobs, abs=1e-5)
    assert "".join(found["tokens"]) == result.text
    for top, logprob, expected in zip(
        found["top_logprobs"], found["token_logprobs"], result.top_logprobs or [], strict=True
    ):
        assert list(top.values()) == pytest.approx(list(expected.values()), abs=1e-5)
        assert logprob == max(top.values())  # the same float: lm-eval compares them


def test_logprobs_0_has_the_token_alone(served: Served) -> None:
    [choice] = choices(served, max_tokens=2, logprobs=0)
    found = choice["logprobs"]
    for token, logprob, top in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert top == {token: logprob}


def test_a_token_outside_of_the_top_is_added(served: Served, shakespeare: Model) -> None:
    [id] = shakespeare.encode("e")
    [choice] = choices(served, max_tokens=1, logprobs=2, logit_bias={str(id): 100})
    [top] = choice["logprobs"]["top_logprobs"]
    assert len(top) == 3
    assert list(top)[-1] == "e"


def test_echo_and_logprobs_have_prompt_and_output(served: Served, shakespeare: Model) -> None:
    """llama.cpp #27174, lm-evaluation-harness #4158: the entries of the prompt were missing."""
    ids = shakespeare.encode(PROMPT)
    score = shakespeare.score(ids + shakespeare.generate(ids, max_tokens=4).tokens)
    [choice] = choices(served, max_tokens=4, logprobs=1, echo=True)
    found = choice["logprobs"]
    assert choice["text"].startswith(PROMPT)
    assert "".join(found["tokens"]) == choice["text"]
    assert len(found["token_logprobs"]) == len(ids) + 4
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(score.logprobs[1:], abs=1e-5)


def test_max_tokens_0_scores_the_prompt(served: Served, shakespeare: Model) -> None:
    score = shakespeare.score(PROMPT, top_logprobs=2)
    [choice] = choices(served, max_tokens=0, logprobs=2, echo=True)
    assert choice["text"] == PROMPT
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(score.logprobs, abs=1e-5)


def test_max_tokens_0_without_echo_is_empty(served: Served) -> None:
    [choice] = choices(served, max_tokens=0)
    assert (choice["text"], choice["finish_reason"]) == ("", "length")


def test_the_end_token_has_an_entry(served: Served) -> None:
    """SERVING.md: without it, lm-eval drops the last token of a continuation."""
    [choice] = choices(served, max_tokens=1, logprobs=1, echo=True, logit_bias={"0": 100})
    n = len(served.post("/tokenize", {"prompt": PROMPT}).json()["tokens"])
    assert len(choice["logprobs"]["token_logprobs"]) == n + 1
    assert choice["logprobs"]["tokens"][-1] == "<|endoftext|>"
    assert choice["text"] == PROMPT
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", 0)


@pytest.mark.parametrize("echo", [False, True])
def test_offsets_count_from_the_start_of_the_prompt(served: Served, echo: bool) -> None:
    """xorbitsai/inference PR #5245: they counted from the start of the output."""
    [choice] = choices(served, max_tokens=5, logprobs=0, echo=echo)
    whole = choice["text"] if echo else PROMPT + choice["text"]
    offsets, tokens = choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"]
    assert offsets[0] == (0 if echo else len(PROMPT))
    for offset, token in zip(offsets, tokens, strict=True):
        assert whole[offset : offset + len(token)] == token


def test_bytes_without_a_character_have_names_of_their_own(shakespeare: Model) -> None:
    """sglang #32290, vllm #44319: two of them had the same text, and one was lost."""
    half = shakespeare.encode("€")[:1]
    n = shakespeare.config.vocab_size
    with serving(shakespeare, Settings(max_logprobs=n)) as served:
        answer = served.complete(half, max_tokens=2, logprobs=n, echo=True)
    found = answer["choices"][0]["logprobs"]
    assert found["tokens"][0] == r"bytes:\xe2"
    for top, logprob in zip(found["top_logprobs"][1:], found["token_logprobs"][1:], strict=True):
        assert len(top) == n
        assert max(top.values()) == logprob
        assert r"bytes:\xe2" in top


def test_a_prompt_of_the_whole_context_has_a_next_token(served: Served, shakespeare: Model) -> None:
    """lm-evaluation-harness #2253, #3134: the limit was too small by one."""
    n = shakespeare.config.n_positions
    answer = served.complete([5] * n, max_tokens=1, echo=True, logprobs=1)
    assert answer["usage"]["completion_tokens"] == 1
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == n + 1
    assert served.error(prompt=[5] * (n + 1), max_tokens=1)["code"] == "context_length_exceeded"


def test_the_default_of_max_tokens_fits_a_long_prompt(served: Served, shakespeare: Model) -> None:
    n = shakespeare.config.n_positions
    assert served.complete([5] * 4)["usage"]["completion_tokens"] <= 16
    assert served.complete([5] * (n - 3), ignore_eos=True)["usage"]["completion_tokens"] == 4


def test_a_truncated_prompt_is_echoed_as_it_was_read(served: Served, shakespeare: Model) -> None:
    n = shakespeare.config.n_positions
    ids = [(5 + i) % 90 + 5 for i in range(n + 40)]
    answer = served.complete(
        ids, max_tokens=10, echo=True, logprobs=0, overflow="truncate", ignore_eos=True,
        return_token_ids=True,
    )  # fmt: skip
    [choice] = answer["choices"]
    used = choice["prompt_token_ids"]
    assert used == ids[-len(used) :]
    assert len(choice["logprobs"]["tokens"]) == len(used) + 10
    assert answer["usage"]["prompt_tokens"] == len(used)


def test_token_ids_are_returned_on_request(served: Served, shakespeare: Model) -> None:
    [choice] = choices(served, max_tokens=5, return_token_ids=True)
    assert choice["token_ids"] == shakespeare.generate(PROMPT, max_tokens=5).tokens
    assert choice["prompt_token_ids"] == shakespeare.encode(PROMPT)


def test_special_tokens_are_text_unless_allowed(served: Served, shakespeare: Model) -> None:
    for allow, n in ((False, len(shakespeare.encode("<|endoftext|>"))), (True, 1)):
        answer = served.complete("<|endoftext|>", max_tokens=1, allow_special=allow)
        assert answer["usage"]["prompt_tokens"] == n


def test_null_is_absent_and_some_fields_are_ignored(served: Served) -> None:
    expected = choices(served, max_tokens=5)
    fields = dict.fromkeys(("suffix", "logprobs", "seed", "stop", "logit_bias", "best_of", "user"))
    fields |= {"store": True, "metadata": {"a": 1}, "service_tier": "auto", "user": "x"}
    assert choices(served, max_completion_tokens=5, **fields) == expected


def test_log_probabilities_are_finite_in_json(served: Served, shakespeare: Model) -> None:
    from gptx.server.api.writing import finite

    assert finite(-math.inf) == -9999.0
    assert finite(-1.5) == -1.5
    assert finite(None) is None


def test_tokens_are_named_by_their_ids_on_request(served: Served, shakespeare: Model) -> None:
    result = shakespeare.generate(PROMPT, max_tokens=4, logprobs=3)
    assert result.top_logprobs is not None
    fields = {"max_tokens": 4, "logprobs": 3, "return_tokens_as_token_ids": True}
    logprobs = choices(served, **fields)[0]["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{id}" for id in result.tokens]
    for found, top in zip(logprobs["top_logprobs"], result.top_logprobs, strict=True):
        assert list(found) == [f"token_id:{id}" for id in top]
        assert list(found.values()) == pytest.approx(list(top.values()), abs=1e-5)
