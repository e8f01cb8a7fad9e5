"""Bodies that nobody would send: no 500, no hang, nothing that leaks between requests."""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptx.generation.text_model import Model
from gptx.server.settings import Settings
from tests.support.serving import Served, serving, wait_until

N_BODIES = 5000
N_EXAMPLES = 40
# Limits under which each request is short.
SETTINGS = Settings(
    max_tokens=8, max_n=2, max_prompts=3, max_choices=4, max_logprobs=5, request_seconds=30,
    max_queue=1000,
)  # fmt: skip
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {
        "prompt": "ROMEO:", "max_tokens": 3, "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 3,
        "logit_bias": {"5": 1}, "stop": ["a", "b"], "logprobs": 2, "echo": True, "seed": 1,
        "stream": False, "stop_token_ids": [5], "min_tokens": 1, "budget": 5.0,
    }),
    ("/v1/completions", {
        "prompt": [[1, 2], [3]], "max_completion_tokens": 2, "stream": True,
        "stream_options": {"include_usage": True}, "best_of": 1, "overflow": "truncate",
        "ban": ["the"], "dry_multiplier": 1.0, "dry_sequence_breakers": ["a"], "user": "u",
    }),
    ("/v1/chat/completions", {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "max_tokens": 2, "logprobs": True, "top_logprobs": 2, "metadata": {"a": [1]},
    }),
    ("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64", "dimensions": 192}),
    ("/tokenize", {"prompt": "some text", "return_token_strs": True, "allow_special": False}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
    ("/model_inference", {"tokens": [1, 2], "max_tokens": 2}),
]  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 1.5, -0.0, 1e308, 5e-324, "", "a",
    "\x00", "\ud800", "é" * 50, "🙂", "<|endoftext|>", [], [[]], [None], [1, "a"], [[1], [2]], {},
    {"a": 1}, {"": None}, {"include_usage": 2}, [[[[1]]]], "1", "NaN", [True], [-1], [10**9],
]  # fmt: skip

pytestmark = pytest.mark.fuzz


@pytest.fixture(scope="module")
def small(shakespeare: Model) -> Iterator[Served]:
    with serving(shakespeare, SETTINGS) as served:
        yield served


def places(value: Any) -> list[tuple[Any, Any]]:
    """Each container of a value, with each of its keys."""
    found: list[tuple[Any, Any]] = []
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        found.append((value, key))
        if isinstance(value[key], dict | list):
            found += places(value[key])
    return found


def mutated(numbers: random.Random, body: dict[str, Any], marker: str) -> bytes:
    """Some changes of a body, as JSON, which can also be damaged."""
    body = copy.deepcopy(body)
    for _ in range(numbers.randrange(1, 4)):
        options = places(body)
        if not options:
            break
        container, key = numbers.choice(options)
        kind = numbers.randrange(5)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[numbers.choice([marker, f"{key}s", f"_{key}"])] = container[key]
        elif kind == 2:
            container[key] = marker
        elif kind == 3:
            container[key] = [container[key]] * numbers.choice([1, 2, 500])
        else:
            container[key] = copy.deepcopy(numbers.choice(ODD))
    data = bytearray(json.dumps(body).encode())
    if numbers.random() < 0.2 and data:
        for _ in range(numbers.randrange(1, 4)):
            data[numbers.randrange(len(data))] = numbers.randrange(256)
    if numbers.random() < 0.05:
        del data[numbers.randrange(len(data) + 1) :]
    return bytes(data)


def test_mutated_bodies(small: Served) -> None:
    numbers = random.Random(1)
    expected = small.complete(max_tokens=8)["choices"]
    statuses: dict[int, int] = {}
    for i in range(N_BODIES):
        path, body = numbers.choice(BODIES)
        marker = f"marker{i}x"
        data = mutated(numbers, body, marker)
        answer = small.client.post(path, content=data, headers={"Content-Type": "application/json"})
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        assert answer.status_code in (200, 400, 404, 413), (data, answer.text)
        assert set(re.findall(r"marker\d+x", answer.text)) <= {marker}
        if answer.status_code != 200 and path != "/model_inference":
            assert answer.json()["error"]["message"]
        if i % 100 == 0:
            assert small.complete(max_tokens=8)["choices"] == expected
    assert min(statuses[200], statuses[400]) > N_BODIES / 20
    wait_until(lambda: small.scheduler.idle and small.gate.active == 0)
    assert small.client.get("/health").status_code == 200


@pytest.mark.clients
def test_schemathesis_finds_nothing(small: Served, tmp_path: Path) -> None:
    """Bodies of the OpenAPI document, valid and invalid ones."""
    program = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.importorskip("schemathesis")
    command = [
        str(program), "run", f"{small.url}/openapi.json", "--max-examples", str(N_EXAMPLES),
        "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,"
        "response_schema_conformance,negative_data_rejection",
        "--phases", "examples,coverage,fuzzing", "--seed", "1", "--request-timeout", "60",
        "--suppress-health-check", "all",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    wait_until(lambda: small.scheduler.idle and small.gate.active == 0)
    assert small.complete(max_tokens=2)
