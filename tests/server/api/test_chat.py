"""`/v1/chat/completions`: the prompt that messages become, and its answer."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import gptx
from gptx.generation.text_model import Model
from gptx.server.api.chat import ENDS, chat_prompt, transcript
from gptx.server.errors import ApiError
from tests.support.serving import Served

PATH = "/v1/chat/completions"
MESSAGES = [
    {"role": "system", "content": "A play."},
    {"role": "user", "content": "Who is there?"},
    {"role": "assistant", "content": "Nay, answer me."},
    {"role": "user", "content": "Long live the king!"},
]
TRANSCRIPT = (
    "A play.\n\nUser: Who is there?\nAssistant: Nay, answer me.\nUser: Long live the king!\n"
    "Assistant:"
)


def copy_with(model: Model, folder: Path, name: str = "model", **settings: Any) -> Model:
    """Save the embedded model as a folder of another name, with settings of its tokenizer."""
    target = folder / name
    target.mkdir()
    for path in model.files.folder.iterdir():
        if path.suffix in (".json", ".safetensors"):
            (target / path.name).write_bytes(path.read_bytes())
    config = target / "tokenizer_config.json"
    before = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    config.write_text(json.dumps(before | settings), "utf-8")
    return gptx.load(target)


def test_messages_are_a_transcript(served: Served, shakespeare: Model) -> None:
    assert transcript(MESSAGES) == TRANSCRIPT
    result = shakespeare.generate(TRANSCRIPT, max_tokens=20, stop=ENDS)
    answer = served.post(PATH, {"messages": MESSAGES, "max_tokens": 20, "temperature": 0}).json()
    assert answer["object"] == "chat.completion"
    [choice] = answer["choices"]
    assert choice["message"]["content"] == str(result).lstrip()
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == result.finish_reason
    assert answer["usage"]["prompt_tokens"] == result.prompt_tokens


def test_an_answer_ends_where_the_next_turn_begins(served: Served, shakespeare: Model) -> None:
    [u] = shakespeare.encode("U")
    [line] = shakespeare.encode("\n")
    bias = {str(line): 100.0, str(u): 99.0}
    body = {"messages": MESSAGES, "max_tokens": 30, "temperature": 0, "logit_bias": bias}
    assert served.post(PATH, {**body, "stop": "\n\n"}).json()["choices"][0]["stop_reason"] == "\n\n"
    assert "\nUser:" in ENDS


def test_content_can_have_parts(served: Served) -> None:
    parts = [{"type": "text", "text": "Who is "}, {"type": "text", "text": "there?"}]
    bodies = [
        {"messages": [{"role": "user", "content": content}], "max_tokens": 5, "temperature": 0}
        for content in (parts, "Who is there?")
    ]
    first, second = (served.post(PATH, body).json()["choices"] for body in bodies)
    assert first == second


def test_without_a_limit_the_answer_fills_the_context(served: Served, shakespeare: Model) -> None:
    body = {"messages": MESSAGES, "ignore_eos": True, "temperature": 0, "logit_bias": {"5": 100}}
    usage = served.post(PATH, body).json()["usage"]
    assert usage["total_tokens"] == shakespeare.config.n_positions + 1


def test_logprobs_have_tokens_and_bytes(served: Served) -> None:
    body = {"messages": MESSAGES, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    content = served.post(PATH, body | {"temperature": 0}).json()["choices"][0]["logprobs"][
        "content"
    ]
    assert len(content) == 4
    for one in content:
        assert bytes(one["bytes"]).decode() == one["token"]
        assert one["logprob"] == one["top_logprobs"][0]["logprob"]
    error = served.error(PATH, messages=MESSAGES, top_logprobs=2)
    assert error["param"] == "top_logprobs"


@pytest.mark.parametrize(
    "messages",
    [
        [], "hello", [{"role": "user"}], [{"content": "a"}], [{"role": "tool", "content": "a"}],
        [{"role": "user", "content": 5}], [{"role": "user", "content": [{"type": "image"}]}],
        [{"role": "user", "content": "a", "tool_calls": []}], [None],
        [{"role": "user", "content": None}],
    ],
    ids=range(10),
)  # fmt: skip
def test_bad_messages_are_named(served: Served, messages: Any) -> None:
    error = served.error(PATH, messages=messages)
    assert error["status"] == 400
    assert error["param"].startswith("messages")


def test_tools_and_a_missing_list_are_errors(served: Served) -> None:
    assert served.error(PATH, messages=MESSAGES, tools=[{}])["param"] == "tools"
    assert served.error(PATH)["param"] == "messages"


def test_dialogpt_has_an_end_token_after_each_turn(shakespeare: Model, tmp_path: Path) -> None:
    model = copy_with(shakespeare, tmp_path, "DialoGPT-tiny")
    ids, is_transcript = chat_prompt(model.info, MESSAGES[1:])
    expected = []
    for one in MESSAGES[1:]:
        expected += [*model.encode(one["content"]), 0]
    assert (ids, is_transcript) == (expected, False)


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_template_of_the_tokenizer_is_used(shakespeare: Model, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    model = copy_with(shakespeare, tmp_path, chat_template=TEMPLATE)
    ids, is_transcript = chat_prompt(model.info, MESSAGES[1:2])
    text = "<user>Who is there?<|endoftext|><assistant>"
    assert (ids, is_transcript) == (model.encode(text, allow_special=True), False)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no') }}", "{% for %}", "{{ messages.__class__.__mro__ }}", "{{ 1 / 0 }}"],
    ids=range(4),
)
def test_a_template_that_fails_is_an_error(
    shakespeare: Model, tmp_path: Path, template: str
) -> None:
    pytest.importorskip("jinja2")
    model = copy_with(shakespeare, tmp_path, chat_template=template)
    with pytest.raises(ApiError, match="refuses the messages"):
        chat_prompt(model.info, MESSAGES)


ENDLESS = "{% for a in range(100000) %}{% for b in range(100000) %}BODY{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        ENDLESS.replace("BODY", ""),
        ENDLESS.replace("BODY", "a"),
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{% block a %}{% if 1 %}{{ self.a() }}{{ self.a() }}{% endif %}{% endblock %}",
        "{% for a in range(10**9) %}{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * [0] }}",
        "{{ 10**(10**10) }}",
        "{% set x = namespace(a='a') %}"
        "{% for _ in range(99) %}{% set x.a = x.a + x.a %}{% endfor %}",
        "{% for _ in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    ],
    ids=range(10),
)
def test_a_template_has_limits(
    shakespeare: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    """A template comes with an uploaded model, and runs in the process of the server."""
    templates = pytest.importorskip("gptx.server.api.templates")
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.1)
    model = copy_with(shakespeare, tmp_path, chat_template=template)
    start = time.monotonic()
    with pytest.raises(ApiError, match="refuses the messages: ") as caught:
        chat_prompt(model.info, MESSAGES)
    assert time.monotonic() - start < 5
    assert "\n" not in caught.value.message


def test_operators_of_a_template_have_their_results(shakespeare: Model, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    template = "{{ 2 ** 10 }}{{ 'a' * 3 }}{{ [1] + [2] }}{{ 1.5 + 2 }}{{ 'a' + 'b' }}{{ 2 * 2.5 }}"
    model = copy_with(shakespeare, tmp_path, chat_template=template)
    ids, _ = chat_prompt(model.info, MESSAGES)
    assert model.decode(ids) == "1024aaa[1, 2]3.5ab5.0"


def test_a_template_without_jinja2_names_it(
    shakespeare: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy_with(shakespeare, tmp_path, chat_template=TEMPLATE)
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    monkeypatch.delitem(sys.modules, "gptx.server.api.templates", raising=False)
    with pytest.raises(ApiError, match="pip install jinja2") as caught:
        chat_prompt(model.info, MESSAGES)
    assert caught.value.status == 501
