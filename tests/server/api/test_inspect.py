"""`POST /inspect` against the model and `gptx.research`."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from gptx import research
from gptx.generation.text_model import Model
from gptx.server.api import inspect as page
from gptx.server.api.reading import CHUNK_TOKENS, Reading
from gptx.server.models import Models
from gptx.server.settings import Settings
from tests.support.serving import PATIENCE_SECONDS, Served, held, wait_until

TEXT = "To be, or nöt to be: that is the question. " * 8
TOLERANCE = 2e-5  # nats; the text is read in chunks


@pytest.fixture(scope="module")
def served(shakespeare: Model) -> Iterator[Served]:
    """The embedded model with the routes of the page, and with compiled kernels."""
    shakespeare.score("To be")
    settings = Settings()
    models = Models(settings=settings)
    models.add("shakespeare", shakespeare)
    server = Served(models, settings, page.routes(models))
    yield server
    server.close()


@pytest.fixture(scope="module")
def lens(shakespeare: Model) -> Any:
    """The logit lens of `TEXT`."""
    return research.logit_lens(shakespeare, TEXT, k=3)


def inspect(served: Served, **fields: Any) -> dict[str, Any]:
    answer = served.post("/inspect", fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def patterns(answer: dict[str, Any]) -> np.ndarray:
    found = answer["attention"]
    return np.frombuffer(base64.b64decode(found["data"]), "<f2").reshape(found["shape"])


def test_the_text_is_longer_than_a_chunk(shakespeare: Model) -> None:
    assert len(shakespeare.encode(TEXT)) > 2 * CHUNK_TOKENS


def test_tokens_have_ids_texts_and_bytes(served: Served, shakespeare: Model) -> None:
    tokens = inspect(served, prompt="nöt\n", what=["tokens"])["tokens"]
    assert [one["id"] for one in tokens] == shakespeare.encode("nöt\n")
    assert b"".join(bytes.fromhex(one["bytes"]) for one in tokens) == "nöt\n".encode()
    assert [one["text"] for one in tokens] == ["n", "\ufffd", "\ufffd", "t", "\n"]


def test_tokens_alone_may_be_more_than_the_context(served: Served) -> None:
    ids = list(range(1024))
    assert [one["id"] for one in inspect(served, tokens=ids, what=["tokens"])["tokens"]] == ids


def test_sizes_of_the_model(served: Served, shakespeare: Model) -> None:
    answer = inspect(served, what=["model"])
    config = shakespeare.config
    assert answer["model"] == {
        "vocab_size": config.vocab_size,
        "n_positions": config.n_positions,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "eos_token_ids": [0],
        "has_tokenizer": True,
        "max_top": 100,
    }


def test_logprobs_are_those_of_score(served: Served, shakespeare: Model) -> None:
    found = inspect(served, prompt=TEXT, what=["logprobs"], top=5)["logprobs"]
    score = shakespeare.score(TEXT, top_logprobs=5)
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    np.testing.assert_allclose(
        found["token_logprobs"][1:], score.logprobs[1:], atol=TOLERANCE, rtol=0
    )
    assert score.top_logprobs is not None
    for pairs, top in zip(found["top_logprobs"][1:], score.top_logprobs[1:], strict=True):
        assert top is not None
        assert [id for id, _ in pairs] == list(top)
        np.testing.assert_allclose(
            [x for _, x in pairs], list(top.values()), atol=TOLERANCE, rtol=0
        )


def test_next_is_what_generate_chooses_from(served: Served, shakespeare: Model) -> None:
    found = inspect(served, prompt=TEXT, what=["logprobs"], top=7)["logprobs"]["next"]
    result = shakespeare.generate(TEXT, max_tokens=1, logprobs=7)
    assert result.top_logprobs is not None
    assert [id for id, _ in found] == list(result.top_logprobs[0])
    np.testing.assert_allclose(
        [x for _, x in found], list(result.top_logprobs[0].values()), atol=TOLERANCE, rtol=0
    )


def test_a_text_of_one_token_has_what_comes_next(served: Served) -> None:
    found = inspect(served, tokens=[5], what=["logprobs"])["logprobs"]
    assert found["token_logprobs"] == found["top_logprobs"] == [None]
    assert len(found["next"]) == 10


@pytest.mark.parametrize("window", [None, (0, 3), (60, 70), (63, 64), (100, 150)])
def test_lens_is_that_of_research(
    served: Served, lens: Any, window: tuple[int, int] | None
) -> None:
    fields = {} if window is None else {"positions": list(window)}
    rows = inspect(served, prompt=TEXT, what=["lens"], top=3, **fields)["lens"]
    first, stop = window or (0, len(lens.ids))
    assert [row["name"] for row in rows] == list(lens.names)
    found = np.array([row["top"] for row in rows])
    np.testing.assert_array_equal(found[..., 0], lens.top_ids[:, first:stop])
    np.testing.assert_allclose(
        found[..., 1], lens.top_logprobs[:, first:stop], atol=TOLERANCE, rtol=0
    )


def test_lens_of_some_layers(served: Served) -> None:
    rows = inspect(served, prompt="To be", what=["lens"], layers=[4, 1])["lens"]
    assert [row["name"] for row in rows] == ["h.4.resid_post", "h.1.resid_post"]


def test_attention_is_that_of_research(served: Served, shakespeare: Model) -> None:
    found = inspect(served, prompt=TEXT, what=["attention"], layers=[3])["attention"]
    maps = research.attention_maps(shakespeare, TEXT, [3]).patterns[0]
    assert (found["layer"], found["dtype"], tuple(found["shape"])) == (3, "float16", maps.shape)
    np.testing.assert_allclose(patterns({"attention": found}), maps, atol=5e-4)


def test_parts_of_one_answer_are_those_of_each(served: Served) -> None:
    fields: dict[str, Any] = {"prompt": TEXT, "top": 4, "layers": [2]}
    parts = ["model", "tokens", "logprobs", "attention", "lens"]
    whole = inspect(served, what=parts, positions=[70, 80], **fields)
    alone = {part: inspect(served, what=[part], **fields)[part] for part in parts}
    assert whole["model"] == alone["model"]
    assert whole["tokens"] == alone["tokens"]
    np.testing.assert_allclose(patterns(whole), patterns(alone), atol=5e-4)
    close = {"atol": TOLERANCE, "rtol": 0}  # attention as three operations rounds differently
    np.testing.assert_allclose(whole["logprobs"]["next"], alone["logprobs"]["next"], **close)
    np.testing.assert_allclose(whole["lens"][0]["top"], alone["lens"][0]["top"][70:80], **close)


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({}, "tokens", "expected one of prompt and tokens"),
    ({"prompt": "a", "tokens": [1]}, "tokens", "expected one of prompt and tokens"),
    ({"prompt": ""}, "prompt", "at least one character"),
    ({"prompt": 3}, "prompt", "a string"),
    ({"tokens": []}, "tokens", "a list"),
    ({"tokens": ["a"]}, "tokens", "whole number"),
    ({"tokens": [1024]}, "tokens", "expected 0 to 1023"),
    ({"tokens": [-1]}, "tokens", "whole number"),
    ({"tokens": [1] * 257}, "tokens", "the context holds 256"),
    ({"prompt": "a " * 300}, "prompt", "the context holds 256"),
    ({"prompt": "a", "what": []}, "what", "a list"),
    ({"prompt": "a", "what": ["all"]}, "what", '"lens"'),
    ({"prompt": "a", "what": "lens"}, "what", "a list"),
    ({"prompt": "a", "what": ["attention"]}, "layers", "one layer"),
    ({"prompt": "a", "what": ["attention"], "layers": [0, 1]}, "layers", "one layer"),
    ({"prompt": "a", "what": ["lens"], "layers": [6]}, "layers", "expected 0 to 5"),
    ({"prompt": "a", "what": ["lens"], "positions": [0, 2]}, "positions", "from 0 to 1"),
    ({"prompt": "a b", "what": ["lens"], "positions": [1, 1]}, "positions", "rising"),
    ({"prompt": "a", "what": ["lens"], "positions": [1]}, "positions", "a list"),
    ({"tokens": [1] * 256, "what": ["lens"], "top": 100}, "positions", "fewer positions"),
    ({"prompt": "a", "top": 0}, "top", "from 1 to 100"),
    ({"prompt": "a", "top": 101}, "top", "from 1 to 100"),
    ({"prompt": "a", "layer": 1}, "layer", "do you mean layers?"),
    ({"prompt": "a", "model": "gpt5"}, "model", "does not exist"),
]


@pytest.mark.parametrize(("fields", "param", "message"), BAD)
def test_a_bad_field_is_named(
    served: Served, fields: dict[str, Any], param: str, message: str
) -> None:
    error = served.error("/inspect", **fields)
    assert error["status"] == (404 if param == "model" else 400)
    assert error["param"] == param
    assert message in error["message"]


def test_a_large_attention_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MAX_PATTERN_BYTES", 2 * 6 * 10**2)
    fields = {"what": ["attention"], "layers": [0]}
    assert "attention" in inspect(served, tokens=[1] * 10, **fields)
    assert "fewer" in served.error("/inspect", tokens=[1] * 11, **fields)["message"]


def test_a_client_that_hangs_up_ends_the_work(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []
    read = Reading.read

    def counted(self: Reading, model: Model, chunk: tuple[int, int]) -> None:
        calls.append(chunk)
        read(self, model, chunk)

    monkeypatch.setattr(Reading, "read", counted)
    with held(served.scheduler):
        connection = served.start("/inspect", {"tokens": [1] * 256, "what": ["logprobs"]})
        wait_until(lambda: bool(served.scheduler._calls))
        connection.close()
        wait_until(lambda: served.gate.active == 0)
    inspect(served, tokens=[1], what=["logprobs"])  # after the call that was canceled
    assert calls == [(0, 1)]


def test_other_requests_have_steps_in_between(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A completion that arrives while a long text is read ends before it."""
    ended: list[str] = []
    threads: list[threading.Thread] = []
    read = Reading.read

    def complete() -> None:
        served.complete(max_tokens=1)
        ended.append("completion")

    def interrupted(self: Reading, model: Model, chunk: tuple[int, int]) -> None:
        read(self, model, chunk)
        if not threads:
            threads.append(threading.Thread(target=complete))
            threads[0].start()
            wait_until(lambda: served.scheduler.waiting > 0)

    monkeypatch.setattr(Reading, "read", interrupted)
    inspect(served, tokens=[1] * 256, what=["logprobs", "lens"], top=1)
    ended.append("inspection")
    threads[0].join(PATIENCE_SECONDS)
    assert ended == ["completion", "inspection"]


def test_a_key_is_needed(shakespeare: Model) -> None:
    settings = Settings(keys=("secret",))
    models = Models(settings=settings)
    models.add("shakespeare", shakespeare)
    server = Served(models, settings, page.routes(models))
    try:
        body = {"prompt": "a", "what": ["tokens"]}
        assert server.post("/inspect", body).status_code == 200
        wrong = {"Authorization": "Bearer wrong"}
        assert server.post("/inspect", body, headers=wrong).status_code == 401
        assert server.client.get("/", headers=wrong).status_code == 200
        assert server.client.get("/page/main.js", headers=wrong).status_code == 200
    finally:
        server.close()


def test_every_backend_reads_the_same(small: Model) -> None:
    """Chunks with a KV cache, against the whole text in one pass."""
    size = small.config.n_positions
    ids = [(7 * i) % small.config.vocab_size for i in range(min(size, 70))]
    names = ["h.0.resid_pre", "h.1.resid_post"]
    reading = Reading(ids, top=2, streams=names, attention=1, first=3)
    for chunk in reading.chunks:
        reading.read(small, chunk)
    maps = research.attention_maps(small, ids, [1]).patterns[0]
    assert reading.patterns is not None
    np.testing.assert_allclose(reading.patterns, maps, atol=2e-3)
    lens = research.logit_lens(small, ids, names, k=1)
    np.testing.assert_allclose(
        reading.known.logprobs[:-1], small.score(ids).logprobs[1:], atol=1e-4
    )
    for row, name in enumerate(names):
        found = [
            max(top.values())
            for chunk in reading.kept
            for top in reading.top(small, name, chunk, 1).top_logprobs or []
        ]
        np.testing.assert_allclose(found, lens.top_logprobs[row, 3:, 0], atol=1e-4)


def test_the_endpoint_is_documented(served: Served) -> None:
    document = served.client.get("/openapi.json").json()
    assert "what" in str(document["paths"]["/inspect"])
