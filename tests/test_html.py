"""HTML of results: escaped, self-contained, without scripts."""

from __future__ import annotations

import base64
import re
import struct
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

import gptx
from gptx import html, research

TAGS = {"div", "span", "table", "tr", "td", "th", "img"}
TEXT = '<script>alert(1)</script> & "to be"\n\tor not'


class Reader(HTMLParser):
    """The tags, attributes and text of a fragment; each tag has to be closed."""

    def __init__(self, fragment: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(fragment)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def model() -> gptx.Model:
    return gptx.load("shakespeare", compile=False)


def check(fragment: str) -> Reader:
    """Read a fragment, which refers to nothing outside of it."""
    read = Reader(fragment)
    for name, value in read.attributes:
        assert name in {"style", "title", "alt", "src", "width", "height", "scope"}
        assert name != "src" or value.startswith("data:image/png;base64,")
        assert name != "style" or "url(" not in value
    return read


def titles(read: Reader) -> list[str]:
    return [value for name, value in read.attributes if name == "title"]


def test_text_is_escaped_and_controls_are_visible() -> None:
    read = check(html.fragment("<b>", html.text([html.Cell(TEXT, 0.5, "<i>'\"&")])))
    assert read.text == "<b>" + TEXT.replace("\n", html.SHOWN_END).replace("\t", "\u2409")
    assert titles(read) == ["<i>'\"&"]


def test_a_table_is_escaped() -> None:
    read = check(html.table(["<a>", "&"], [("<name>", [html.Cell("<x>"), html.Cell("\x1b")])]))
    assert read.text == "<a>&<name><x>\u241b"


@pytest.mark.parametrize(
    ("share", "color"),
    [
        (0.0, "rgba(66,133,244,0.00)"),
        (1.0, "rgba(66,133,244,0.65)"),
        (-0.5, "rgba(244,133,66,0.33)"),
        (7.0, "rgba(66,133,244,0.65)"),
        (float("nan"), "0.00"),
    ],
)
def test_a_share_is_a_color(share: float, color: str) -> None:
    assert color in html.text([html.Cell("x", share)])


def test_an_image_is_a_png_of_the_matrix() -> None:
    values = np.array([[0.0, 1.0, 0.5], [2.0, -1.0, 0.2]])
    [data] = re.findall(r'src="data:image/png;base64,([^"]+)"', html.image(values, "x", 60))
    png = base64.b64decode(data)
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    at, chunks = 8, {}
    while at < len(png):
        (size,) = struct.unpack_from(">I", png, at)
        kind, body = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        assert struct.unpack_from(">I", png, at + 8 + size) == (zlib.crc32(kind + body),)
        chunks[kind] = body
        at += size + 12
    assert struct.unpack_from(">II", chunks[b"IHDR"]) == (3, 2)
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(2, 13)
    assert not lines[:, 0].any()  # no filter
    np.testing.assert_array_equal(
        lines[:, 1:].reshape(2, 3, 4)[..., 3], [[0, 255, 128], [255, 0, 51]]
    )


def test_a_result_shows_its_tokens(model: gptx.Model) -> None:
    plain = model.generate("To be", max_tokens=5)
    assert str(plain).replace("\n", html.SHOWN_END) in check(plain._repr_html_()).text
    scored = model.generate("To be", max_tokens=5, logprobs=3, prompt_logprobs=2)
    read = check(scored._repr_html_())
    assert (f"To be{scored.text}".replace("\n", html.SHOWN_END)) in read.text
    assert len(titles(read)) == scored.prompt_tokens + len(scored.tokens)
    assert all(title.count("\n") == 3 for title in titles(read)[scored.prompt_tokens :])


def test_a_score_shows_its_tokens(model: gptx.Model) -> None:
    score = model.score(TEXT, top_logprobs=2)
    read = check(score._repr_html_())
    assert "&" in read.text
    assert f"perplexity {score.perplexity:,.4g}" in read.text
    assert len(titles(read)) == len(score.tokens)


def test_a_model_without_a_tokenizer_shows_ids(model: gptx.Model) -> None:
    score = model.score([5, 6, 7])
    bare = gptx.Score(score.tokens, score.logprobs)
    assert "5 6 7 " in check(bare._repr_html_()).text


def test_research_shows_itself(model: gptx.Model) -> None:
    maps = research.attention_maps(model, TEXT)
    assert len(titles(check(maps._repr_html_()))) == maps.patterns.shape[0] * maps.patterns.shape[1]
    lens = research.logit_lens(model, TEXT)
    read = check(lens._repr_html_())
    assert len(titles(read)) == len(lens.names) * len(lens.tokens)
    assert read.text.index("h.5.resid_post") < read.text.index("h.0.resid_pre")
    attribution = research.attribute(model, TEXT)
    assert "head 5MLP" in check(attribution._repr_html_()).text
    metric = research.logit_difference(model, 5, 6)
    for by in research.patching.TABLES:
        patched = research.patch(model, "To be", "To me", "h.0.attn.z", metric, by=by)
        assert "h.0.attn.z" in check(patched._repr_html_()).text
    parts = research.integrated_gradients(model, "To be, or")
    assert len(titles(check(parts._repr_html_()))) == len(parts.tokens)
