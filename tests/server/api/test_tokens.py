"""`/tokenize`, `/detokenize`, `/tokenizer_info`, `/v1/embeddings` and `/v1/models`."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from gptx.generation.text_model import Model
from gptx.research import embeddings
from tests.support.serving import Served

TEXT = "To be, or not to be €"


def test_tokens_and_text(served: Served, shakespeare: Model) -> None:
    ids = shakespeare.encode(TEXT)
    for name in ("prompt", "content"):
        answer = served.post("/tokenize", {name: TEXT, "return_token_strs": True}).json()
        assert answer["tokens"] == ids
        assert answer["count"] == len(ids)
        assert answer["max_model_len"] == 256
        assert answer["token_strs"][0] == "To"
        assert answer["token_strs"][-1].startswith("bytes:")
    answer = served.post("/detokenize", {"tokens": ids}).json()
    assert answer == {"prompt": TEXT, "content": TEXT}


def test_special_tokens_of_tokenize(served: Served) -> None:
    """lm-evaluation-harness reads the end-of-text token as one id."""
    body = {"prompt": "<|endoftext|>", "add_special_tokens": False}
    assert served.post("/tokenize", body).json()["tokens"] == [0]
    answer = served.post("/tokenize", body | {"allow_special": False}).json()
    assert len(answer["tokens"]) > 1
    info = served.client.get("/tokenizer_info").json()
    assert (info["eos_token"], info["eos_token_id"]) == ("<|endoftext|>", 0)


def test_the_empty_text_has_no_tokens(served: Served) -> None:
    assert served.post("/tokenize", {"prompt": ""}).json()["tokens"] == []
    assert served.post("/detokenize", {"tokens": []}).json()["prompt"] == ""


def test_messages_have_tokens(served: Served, shakespeare: Model) -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}
    expected = shakespeare.encode("User: Hi\nAssistant:")
    assert served.post("/tokenize", body).json()["tokens"] == expected


def test_errors_of_tokens(served: Served) -> None:
    assert served.error("/tokenize")["param"] == "prompt"
    assert served.error("/tokenize", prompt="a", content="b")["status"] == 400
    assert served.error("/detokenize", tokens=[1024])["param"] == "tokens"
    assert served.error("/detokenize", tokens=[-1])["param"] == "tokens"
    assert served.error("/detokenize")["param"] == "tokens"


@pytest.mark.parametrize("form", ["float", "base64", None])
def test_embeddings_are_those_of_the_model(
    served: Served, shakespeare: Model, form: str | None
) -> None:
    texts = ["To be", "or not"]
    expected = embeddings(shakespeare, texts)
    answer = served.post("/v1/embeddings", {"input": texts, "encoding_format": form}).json()
    assert [one["index"] for one in answer["data"]] == [0, 1]
    for one, vector in zip(answer["data"], expected, strict=True):
        found = one["embedding"]
        if form == "base64":
            found = np.frombuffer(base64.b64decode(found), "<f4")
        np.testing.assert_allclose(found, vector, atol=1e-6)
    n = sum(len(shakespeare.encode(text)) for text in texts)
    assert answer["usage"] == {"prompt_tokens": n, "total_tokens": n}


def test_embeddings_beside_a_generation(served: Served, shakespeare: Model) -> None:
    """The calls run between the steps of the batch."""
    expected = served.complete(max_tokens=30)["choices"]
    with served.start("/v1/completions", {"prompt": "ROMEO:", "max_tokens": 200}):
        served.post("/v1/embeddings", {"input": ["a", "b"]})
        assert served.complete(max_tokens=30)["choices"] == expected


def test_errors_of_embeddings(served: Served) -> None:
    path = "/v1/embeddings"
    assert served.error(path)["param"] == "input"
    assert served.error(path, input="a", dimensions=5)["param"] == "dimensions"
    assert served.error(path, input=[[5] * 257])["code"] == "context_length_exceeded"
    assert served.error(path, input=[[1024]])["status"] == 400
    assert served.error(path, input="a", encoding_format="int8")["param"] == "encoding_format"


def test_the_list_of_models(served: Served, shakespeare: Model) -> None:
    [one] = served.client.get("/v1/models").json()["data"]
    assert one["id"] == "shakespeare"
    assert one["loaded"] is True
    assert one["max_model_len"] == 256
    assert one["meta"]["n_params"] == shakespeare.config.n_parameters
    assert served.client.get("/v1/models/shakespeare").json() == one
    assert served.client.get("/v1/models/other").status_code == 404
