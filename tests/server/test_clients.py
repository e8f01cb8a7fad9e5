"""Public clients: openai, and lm-evaluation-harness with tasks from files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gptx.generation.text_model import Model
from gptx.server.settings import Settings
from tests.support.serving import NAME, PATIENCE_SECONDS, Served, held, serving, wait_until

pytestmark = pytest.mark.clients
TASKS = Path(__file__).parents[3] / "shared" / "cases" / "lm_eval_tasks"


@pytest.fixture
def client(served: Served) -> Iterator[Any]:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as one:
        yield one


def test_openai_completions(client: Any, shakespeare: Model) -> None:
    answer = client.completions.create(
        model=NAME, prompt="ROMEO:", max_tokens=8, temperature=0, logprobs=2, n=1,
        extra_body={"top_k": 0, "min_tokens": 1},
    )  # fmt: skip
    result = shakespeare.generate("ROMEO:", max_tokens=8, logprobs=2)
    assert answer.choices[0].text == result.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs.token_logprobs == pytest.approx(result.logprobs, abs=1e-5)
    assert answer.usage.total_tokens == result.prompt_tokens + 8


def test_openai_prompts_of_token_ids(client: Any, shakespeare: Model) -> None:
    ids = [shakespeare.encode("ROMEO:"), shakespeare.encode("What")]
    answer = client.completions.create(model=NAME, prompt=ids, max_tokens=4, temperature=0)
    assert [one.text for one in answer.choices] == [
        shakespeare.generate(one, max_tokens=4).text for one in ids
    ]


def test_openai_stream(client: Any, shakespeare: Model) -> None:
    stream = client.completions.create(
        model=NAME, prompt="ROMEO:", max_tokens=8, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(one.choices[0].text for one in chunks if one.choices)
    assert text == shakespeare.generate("ROMEO:", max_tokens=8).text
    assert chunks[-1].usage.completion_tokens == 8


def test_openai_chat(client: Any) -> None:
    messages = [{"role": "system", "content": "A play."}, {"role": "user", "content": "Speak!"}]
    options = {"model": NAME, "messages": messages, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    choice = whole.choices[0]
    assert choice.message.role == "assistant"
    assert len(choice.logprobs.content) <= 12
    assert all(len(one.top_logprobs) == 3 for one in choice.logprobs.content)
    parts = client.chat.completions.create(**options, stream=True)
    text = "".join(one.choices[0].delta.content or "" for one in parts)
    assert text == choice.message.content


def test_openai_embeddings(client: Any, shakespeare: Model) -> None:
    """The client asks for base64 by default."""
    from gptx.research import embeddings

    texts = ["To be", "or not to be"]
    expected = embeddings(shakespeare, texts)
    for options in ({}, {"encoding_format": "float"}):
        answer = client.embeddings.create(model=NAME, input=texts, **options)
        for one, vector in zip(answer.data, expected, strict=True):
            assert one.embedding == pytest.approx(vector.tolist(), abs=1e-6)


def test_openai_models_and_errors(client: Any, shakespeare: Model) -> None:
    import openai

    assert [one.id for one in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=NAME, prompt="a", max_tokens=10_000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=NAME, prompt="a", temperature=-1)
    assert caught.value.param == "temperature"
    with serving(shakespeare, Settings(keys=("right",))) as locked:
        wrong = openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong", max_retries=0)
        with wrong, pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        right = openai.OpenAI(base_url=f"{locked.url}/v1", api_key="right")
        with right:
            assert right.completions.create(model=NAME, prompt="a", max_tokens=1).choices


def test_openai_retries_when_the_queue_is_full(shakespeare: Model) -> None:
    import openai

    with (
        serving(shakespeare, Settings(max_queue=1)) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=2) as client,
        ThreadPoolExecutor(1) as threads,
    ):
        with held(served.scheduler):
            waiting = served.start("/v1/completions", {"prompt": "a", "max_tokens": 1})
            wait_until(lambda: served.scheduler.waiting == 1)
            with pytest.raises(openai.RateLimitError):
                client.with_options(max_retries=0).completions.create(model=NAME, prompt="a")
            retried = threads.submit(
                client.completions.create, model=NAME, prompt="a", max_tokens=1
            )
            wait_until(lambda: 'status="429"} 2.0' in served.client.get("/metrics").text)
        assert retried.result(PATIENCE_SECONDS).choices
        waiting.close()


def test_lm_eval_sums_are_those_of_the_model(
    served: Served, shakespeare: Model, tmp_path: Path
) -> None:
    """lm-evaluation-harness #4158, #1949, #2982: scores were those of chance, without an error."""
    pytest.importorskip("lm_eval")
    shutil.copytree(TASKS, tmp_path / "lm_eval_tasks")
    command = [
        sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args",
        f"model={NAME},base_url={served.url}/v1/completions,num_concurrent=2,max_length=256,"
        f"tokenizer_backend=remote,tokenized_requests=True",
        "--include_path", "lm_eval_tasks", "--tasks", "shk_mc,shk_ppl,shk_gen",
        "--log_samples", "--output_path", "out",
    ]  # fmt: skip
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **offline}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    samples = {
        name: [json.loads(line) for path in (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
               for line in path.read_text("utf-8").splitlines()]
        for name in ("shk_mc", "shk_ppl", "shk_gen")
    }  # fmt: skip
    assert all(samples.values())
    for sample in samples["shk_mc"]:
        context, choices = sample["doc"]["ctx"], sample["doc"]["choices"]
        expected = shakespeare.score_choices(context, choices)
        for [[found, _]], one in zip(sample["resps"], expected, strict=True):
            assert float(found) == pytest.approx(one.total, rel=1e-6)
    for sample in samples["shk_ppl"]:
        text = sample["doc"]["text"]
        found = float(sample["resps"][0][0] if isinstance(sample["resps"][0], list)
                      else sample["resps"][0])  # fmt: skip
        ids = [0, *shakespeare.encode(text)]
        assert found == pytest.approx(shakespeare.score(ids).total, rel=1e-6)
    for sample in samples["shk_gen"]:
        greedy = shakespeare.generate(sample["doc"]["ctx"], max_tokens=8, stop="\n")
        assert sample["resps"][0][0].strip() == str(greedy).strip()
