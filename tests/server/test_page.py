"""The page in headless Chromium, and its files."""

from __future__ import annotations

import importlib.util
import math
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import gptx
from gptx import research
from gptx.generation.filters import keep_min_p, keep_top_k, keep_top_p
from gptx.generation.params import SamplingParams
from gptx.generation.sampling import Sampler
from gptx.generation.text_model import Model
from gptx.server.api.inspect import routes
from gptx.server.models import Models
from gptx.server.page_files import TYPES, page_files
from gptx.server.settings import Settings
from tests.support.serving import PATIENCE_SECONDS, Served, held, wait_until

if TYPE_CHECKING:
    from tests.support.browser import Browser

PROMPT = "To be, or not to be: that is the"  # the example of the page
TABS = ("text", "tokens", "attention", "lens")
IDLE = "!document.body.classList.contains('busy')"
READ = f"{IDLE} && document.querySelectorAll('.bars .row').length > 10"
ROUNDED = 0.0006  # of a share with three digits, as the page writes it

browser_test = pytest.mark.browser


def serve(model: Model, settings: Settings | None = None) -> Served:
    settings = settings or Settings()
    models = Models(settings=settings)
    models.add("shakespeare", model)
    return Served(models, settings, routes(models))


@pytest.fixture(scope="module")
def served(shakespeare: Model) -> Iterator[Served]:
    """The embedded model with its page, and with compiled kernels."""
    shakespeare.score(PROMPT)
    server = serve(shakespeare)
    yield server
    server.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A window of Chromium, shared by the tests."""
    pytest.importorskip("selenium")
    from tests.support.browser import Browser

    window = Browser()
    yield window
    window.close()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """A window whose console has no warning and no error after a test."""
    chromium.messages()
    yield chromium
    assert chromium.messages() == []


@pytest.fixture
def page(browser: Browser, served: Served) -> Browser:
    """A window with the page, which has read its example."""
    browser.open(served.url)
    browser.wait(READ)
    return browser


def ids_of(page: Browser) -> list[int]:
    """Return the ids in the table of tokens; the page then shows the table."""
    page.find("#tab-tokens").click()
    return [int(x) for x in page.texts(".tokens tbody td:nth-child(3)")]


def shares_of(page: Browser) -> list[float]:
    """Return the probabilities that the detail shows."""
    values = page.texts(".bars button.row .value")
    return [float(re.sub("[^0-9.]", "", value)) / 100 for value in values]


def wait_for_note(page: Browser, start: str) -> None:
    """Wait until the note of the detail starts with some words."""
    page.wait(f"document.querySelector('aside .note').textContent.startsWith('{start}')")


def write(page: Browser, **settings: float) -> None:
    """Set the sampler, and press Continue."""
    for name, value in settings.items():
        page.slide(f"#setting-{name}", value)
    page.find("#continue").click()
    page.wait(f"{IDLE} && document.querySelectorAll('.text .generated').length > 0")


# The files


def test_files_are_sent_with_a_policy(served: Served) -> None:
    for name, data in page_files().items():
        answer = served.client.get("/" if name == "index.html" else f"/page/{name}")
        assert answer.status_code == 200
        assert answer.content == data
        assert answer.headers["content-type"] == TYPES[name[name.rindex(".") :]]
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cross-origin-opener-policy"] == "same-origin"
        again = {"If-None-Match": answer.headers["etag"]}
        assert served.client.get(answer.url.path, headers=again).status_code == 304


def test_files_outside_of_the_page_are_not_sent(served: Served) -> None:
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/page/", "/page/nothing.js"):
        assert served.client.get(path).status_code == 404


def test_files_refer_to_nothing_outside() -> None:
    for name, data in page_files().items():
        text = data.decode().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?:|//[a-z]+\.[a-z]", text), name


def test_imports_of_modules_exist() -> None:
    files = page_files()
    for name, data in files.items():
        for imported in re.findall(r'from "\./([\w.]+)"', data.decode()):
            assert imported in files, f"{name} imports {imported}"


# JavaScript against gptx's sampler

LOGITS = [
    np.random.default_rng(0).normal(0, 3, 64),
    np.round(np.random.default_rng(1).normal(0, 2, 200)),  # with many that are equal
    np.zeros(7),
    np.array([2.0]),
]


def backend64() -> Any:
    return gptx.get_backend("numpy", dtype="float64", generic=True)


@browser_test
@pytest.mark.parametrize("logits", LOGITS, ids=["random", "equal", "flat", "one"])
def test_filters_are_those_of_gptx(page: Browser, logits: np.ndarray) -> None:
    backend, x = backend64(), logits[None, :]
    cases: list[tuple[str, float, Any]] = [
        *(("keepTopK", k, keep_top_k(backend, x, k)) for k in (0, 1, 3, 64, 1000)),
        *(("keepTopP", p, keep_top_p(backend, x, p)) for p in (0.0, 0.05, 0.3, 0.9, 0.999, 1.0)),
        *(("keepMinP", p, keep_min_p(backend, x, p)) for p in (0.0, 0.01, 0.3, 1.0)),
    ]
    for name, value, wanted in cases:
        expression = f"[...m.{name}(Float64Array.from(a[0]), a[1])].map(v => v === -Infinity)"
        dropped = page.call("filters.js", expression, logits.tolist(), value)
        assert dropped == np.isneginf(wanted[0]).tolist(), (name, value)
    assert page.call("filters.js", "m.argmax(Float64Array.from(a[0]))", logits.tolist()) == int(
        np.argmax(logits)
    )


SETTINGS = [
    {"temperature": t, "topK": k, "topP": p, "minP": m}
    for t in (0.3, 1, 1.7)
    for k in (0, 4, 20)
    for p in (0.4, 0.95, 1)
    for m in (0, 0.05)
]


def filtered(logits: np.ndarray, settings: dict[str, float]) -> np.ndarray:
    """Return the probabilities [V] that gptx's sampler draws from."""
    params = SamplingParams(
        temperature=settings["temperature"],
        top_k=int(settings["topK"]),
        top_p=settings["topP"],
        min_p=settings["minP"],
    )
    backend = backend64()
    sampler = Sampler(params, backend, [[0]], [0], len(logits))
    x = sampler.filter(np.asarray(logits, np.float64)[None, :])
    return np.asarray(backend.softmax(x)[0])


@browser_test
def test_ranking_is_that_of_gptx(page: Browser, shakespeare: Model) -> None:
    """The 50 most probable tokens of 1,024, in float64; estimates are allowed where they say so."""
    logits = shakespeare.logits(shakespeare.encode(PROMPT))[-1].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    order = np.argsort(-logprobs, kind="stable")[:50]
    top = [[int(id), float(logprobs[id])] for id in order]
    expression = (
        "a[1].map(s => m.rank(a[0], 1024, s))"
        ".map(r => ({ probs: [...r.probs], others: r.others, exact: r.exact }))"
    )
    found = page.call("ranking.js", expression, top, SETTINGS)
    n_exact = 0
    for settings, ranked in zip(SETTINGS, found, strict=True):
        wanted = filtered(logits, settings)
        n_exact += ranked["exact"]
        assert math.fsum([*ranked["probs"], ranked["others"]]) == pytest.approx(1)
        error = np.abs(wanted[order] - ranked["probs"]).max()
        assert error < (1e-9 if ranked["exact"] else 0.05), settings
        if settings["topK"] or (settings["temperature"] == 1 and settings["minP"] == 0 and
                                settings["topP"] in (0.4, 1)):  # fmt: skip
            assert ranked["exact"], settings
    assert n_exact < len(SETTINGS)


@browser_test
def test_ranking_of_all_tokens_is_exact(page: Browser) -> None:
    logits = LOGITS[0]
    logprobs = logits - np.log(np.exp(logits).sum())
    order = np.argsort(-logprobs)
    top = [[int(id), float(logprobs[id])] for id in order]
    expression = "a[1].map(s => m.rank(a[0], 64, s)).map(r => [r.exact, ...r.probs])"
    for settings, ranked in zip(
        SETTINGS, page.call("ranking.js", expression, top, SETTINGS), strict=True
    ):
        assert ranked[0] is True
        np.testing.assert_allclose(ranked[1:], filtered(logits, settings)[order], atol=1e-12)


@browser_test
def test_temperature_0_takes_the_first(page: Browser) -> None:
    settings = {"temperature": 0, "topK": 3, "topP": 0.5, "minP": 0}
    ranked = page.call(
        "ranking.js", "[...m.rank(a[0], 9, a[1]).probs]", [[4, -1], [2, -2]], settings
    )
    assert ranked == [1, 0]


@browser_test
def test_half_floats_are_those_of_numpy(page: Browser) -> None:
    import base64

    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    data = base64.b64encode(halves.tobytes()).decode()
    expression = "[...m.fromFloat16(a[0])].map(x => Number.isFinite(x) ? x : String(x))"
    found = page.call("numbers.js", expression, data)
    finite = np.isfinite(halves)
    assert [x for x, ok in zip(found, finite, strict=True) if ok] == halves[finite].tolist()
    others = [float(str(x).replace("Infinity", "inf")) for x in np.array(found, object)[~finite]]
    np.testing.assert_array_equal(others, halves[~finite].astype(float))


@browser_test
def test_pieces_of_shared_characters(page: Browser) -> None:
    """The last token of a character shows it; bytes without a character show as bytes."""
    parts = [b"a", b"\xe6\x9d", b"\xb1", b"\xf0", b"\x9f", b"\x8e", b"\x89", b"\xff", b" b\n"]
    tokens = [{"id": i, "text": x.decode(errors="replace"), "bytes": list(x)}
              for i, x in enumerate(parts)]  # fmt: skip
    expression = (
        "m.piecesOf(a[0].map(t => ({ ...t, bytes: Uint8Array.from(t.bytes) })))"
        ".map(p => [p.text, p.fragment])"
    )
    assert page.call("pieces.js", expression, tokens) == [
        ["a", False], ["‹e6 9d›", True], ["東", False], ["‹f0›", True], ["‹9f›", True],
        ["‹8e›", True], ["🎉", False], ["‹ff›", True], [" b\n", False],
    ]  # fmt: skip


# The page


@browser_test
def test_the_example_is_read(page: Browser, shakespeare: Model) -> None:
    assert page.find("#prompt").get_attribute("value") == PROMPT
    assert "".join(page.texts(".text .token")) == PROMPT
    score = shakespeare.score(PROMPT)
    bits = score.loss / math.log(2)
    assert f"{bits:.2f} bits per token" in page.find(".summary").text
    assert ids_of(page) == score.tokens


@browser_test
def test_all_requests_go_to_the_server(page: Browser, served: Served) -> None:
    write(page, maxTokens=3)
    for tab in TABS:
        page.find(f"#tab-{tab}").click()
        page.wait(IDLE)
    urls = page.run("return performance.getEntriesByType('resource').map(x => x.name)")
    assert len(urls) > 20
    assert all(url.startswith(served.url) for url in urls)


@browser_test
def test_what_is_written_is_what_gptx_generates(page: Browser, shakespeare: Model) -> None:
    write(page, maxTokens=20, seed=7, temperature=0.8, topK=30, topP=0.9, minP=0.02)
    result = shakespeare.generate(
        PROMPT, max_tokens=20, seed=7, temperature=0.8, top_k=30, top_p=0.9, min_p=0.02
    )
    assert ids_of(page) == shakespeare.encode(PROMPT) + result.tokens


@browser_test
def test_a_text_that_is_typed_is_read_and_continued(page: Browser, shakespeare: Model) -> None:
    prompt = page.find("#prompt")
    prompt.clear()
    prompt.send_keys("JULIET:\nMy nöble")
    page.slide("#setting-maxTokens", 5)
    page.slide("#setting-temperature", 0)
    page.press("CONTROL+ENTER")
    page.wait(f"{IDLE} && document.querySelectorAll('.text .generated').length === 5")
    result = shakespeare.generate("JULIET:\nMy nöble", max_tokens=5)
    assert ids_of(page) == shakespeare.encode("JULIET:\nMy nöble") + result.tokens
    page.find("#edit").click()
    page.wait("document.activeElement.id === 'prompt'")
    assert prompt.get_attribute("value") == "JULIET:\nMy nöble" + str(result)


@browser_test
def test_alternatives_are_those_of_the_model(page: Browser, shakespeare: Model) -> None:
    score = shakespeare.score(PROMPT, top_logprobs=50)
    assert score.top_logprobs is not None
    for position in (1, 6):
        page.find_all(".text .token")[position].click()
        page.wait(
            f"document.querySelector('aside .note').textContent.startsWith('Token {position + 1},')"
        )
        top = score.top_logprobs[position]
        assert top is not None
        wanted = [math.exp(x) for x in list(top.values())[:10]]
        np.testing.assert_allclose(shares_of(page)[:10], wanted, atol=ROUNDED)
        texts = [shakespeare.decode([id]).replace(" ", "␣").replace("\n", "↵") for id in top]
        page.wait("!document.querySelector('.bars').textContent.includes('…')")
        assert [x.split(" ")[0] for x in page.texts(".bars button.row .label")][:10] == texts[:10]
    page.find("aside > button").click()
    assert len(page.find_all(".bars button.row")) >= 50


@browser_test
def test_a_pointer_on_a_token_shows_its_alternatives(page: Browser) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    token = page.find_all(".text .token")[3]
    ActionChains(page.driver).move_to_element(token).perform()
    wait_for_note(page, "Token 4,")


@browser_test
def test_an_alternative_continues_from_its_place(page: Browser, shakespeare: Model) -> None:
    page.slide("#setting-maxTokens", 6)
    page.slide("#setting-seed", 3)
    page.find_all(".text .token")[4].click()
    wait_for_note(page, "Token 5,")
    page.find_all(".bars button.row")[2].click()
    page.wait(f"{IDLE} && document.querySelectorAll('.text .generated').length === 6")
    score = shakespeare.score(PROMPT, top_logprobs=3)
    assert score.top_logprobs is not None
    assert score.top_logprobs[4] is not None
    prefix = [*shakespeare.encode(PROMPT)[:4], list(score.top_logprobs[4])[2]]
    result = shakespeare.generate(prefix, max_tokens=6, seed=3, temperature=1)
    assert ids_of(page) == prefix + result.tokens
    page.find("#back").click()
    page.wait(IDLE)
    page.find("#back").click()
    page.wait(IDLE)
    assert ids_of(page) == shakespeare.encode(PROMPT)
    page.find("#forward").click()
    page.find("#forward").click()
    page.wait(IDLE)
    assert ids_of(page) == prefix + result.tokens


@browser_test
def test_sliders_rank_again_without_a_request(page: Browser, shakespeare: Model) -> None:
    logits = shakespeare.logits(shakespeare.encode(PROMPT))[-1]
    count = "return performance.getEntriesByType('resource').length"
    before = page.run(count)
    for settings in [s for s in SETTINGS if s["topK"]]:
        for name, value in settings.items():
            page.slide(f"#setting-{name}", value)
        wanted = -np.sort(-filtered(logits, settings))[:10]
        np.testing.assert_allclose(shares_of(page)[:10], wanted, atol=ROUNDED)
    page.slide("#setting-temperature", 0)
    assert shares_of(page)[:2] == [1, 0]
    assert page.run(count) == before


@browser_test
def test_an_end_token_ends_the_text(browser: Browser, shakespeare: Model) -> None:
    config = replace(shakespeare.config, eos_token_id=199)  # the end of a line
    model = gptx.load("shakespeare", config=config)
    server = serve(model)
    try:
        browser.open(server.url)
        browser.wait(READ)
        write(browser, temperature=0, maxTokens=40)
        result = model.generate(PROMPT, max_tokens=40)
        assert result.stopped_by == 199
        assert not browser.find("#continue").is_enabled()
        assert not browser.find(".text .next").is_displayed()
        assert ids_of(browser) == model.encode(PROMPT) + result.tokens_with_end
    finally:
        server.close()


@browser_test
def test_attention_is_that_of_research(page: Browser, shakespeare: Model) -> None:
    page.find_all(".text .token")[8].click()
    page.find("#tab-attention").click()
    page.wait("document.querySelector('aside h2').textContent.endsWith('looks at')")
    head = page.find('.heads button[aria-label="Layer 2, head 4"]')
    head.click()
    wait_for_note(page, "Layer 2, head 4")
    weights = research.attention_maps(shakespeare, PROMPT, [2]).patterns[0, 4, 8]
    page.wait("document.querySelectorAll('.bars .row').length > 5")
    np.testing.assert_allclose(shares_of(page), -np.sort(-weights)[:9], atol=2 * ROUNDED)
    is_drawn = (
        "c => { const blank = document.createElement('canvas'); blank.width = c.width;"
        "blank.height = c.height; return c.toDataURL() !== blank.toDataURL(); }"
    )
    page.wait(
        f"[...document.querySelectorAll('.heads canvas, .map')].filter({is_drawn}).length === 37"
    )
    page.find('.heads button[aria-label="Layer 2, mean of its heads"]').click()
    mean = research.attention_maps(shakespeare, PROMPT, [2]).patterns[0, :, 8].mean(axis=0)
    np.testing.assert_allclose(shares_of(page), -np.sort(-mean)[:9], atol=2 * ROUNDED)


@browser_test
def test_lens_is_that_of_research(page: Browser, shakespeare: Model) -> None:
    page.find("#tab-lens").click()
    page.wait("document.querySelectorAll('.lens tbody tr').length === 7")
    lens = research.logit_lens(shakespeare, PROMPT, k=10)
    rows = page.run(
        "return [...document.querySelectorAll('.lens tbody tr')]"
        ".map(row => [...row.querySelectorAll('td')].map(cell => cell.textContent))"
    )
    wanted = [
        [cell[0].replace(" ", "␣").replace("\n", "↵") for cell in row] for row in lens.top_tokens
    ]
    assert rows[::-1] == wanted
    page.find_all(".lens tbody tr")[3].find_elements("css selector", "td")[5].click()
    shares = [float(re.sub("[^0-9.]", "", x)) / 100 for x in page.texts(".bars .row .value")]
    np.testing.assert_allclose(shares, np.exp(lens.top_logprobs[3, 5]), atol=ROUNDED)


@browser_test
def test_everything_works_by_keyboard(page: Browser, shakespeare: Model) -> None:
    def focused() -> str:
        return page.run("const x = document.activeElement; return x.id || x.className")

    def tab_to(name: str) -> None:
        for _ in range(12):
            page.press("TAB")
            if focused().startswith(name):
                return
        raise AssertionError(f"{name} is not in the tab order")

    page.slide("#setting-maxTokens", 4)
    page.slide("#setting-temperature", 0)
    tab_to("prompt")
    page.press("CONTROL+ENTER")
    page.wait(f"{IDLE} && document.querySelectorAll('.text .generated').length === 4")
    tab_to("continue")
    page.press("ENTER")
    page.wait(f"{IDLE} && document.querySelectorAll('.text .generated').length === 8")
    assert focused() == "continue"
    tab_to("tab-text")
    tab_to("token")
    page.press("HOME", "ARROW_RIGHT", "ARROW_RIGHT")
    wait_for_note(page, "Token 3,")
    page.press("ENTER")
    assert focused().startswith("row")
    page.press("ARROW_DOWN", "ARROW_DOWN", "ARROW_UP", "ESCAPE")
    assert "selected" in focused()
    page.press("ENTER", "ARROW_DOWN", "ENTER")
    page.wait(f"{IDLE} && document.querySelectorAll('.text .generated').length === 4")
    score = shakespeare.score(PROMPT, top_logprobs=2)
    assert score.top_logprobs is not None
    assert score.top_logprobs[2] is not None
    prefix = [*shakespeare.encode(PROMPT)[:2], list(score.top_logprobs[2])[1]]
    assert ids_of(page) == prefix + shakespeare.generate(prefix, max_tokens=4).tokens
    page.run("document.querySelector('#tab-tokens').focus()")
    page.press("ARROW_RIGHT")
    page.wait("document.querySelectorAll('.heads canvas').length === 36")
    tab_to("")
    page.press("ARROW_RIGHT", "ARROW_DOWN", "ENTER")
    wait_for_note(page, "Layer 1, head 0")
    page.run("document.querySelector('#tab-attention').focus()")
    page.press("ARROW_RIGHT")
    page.wait("document.querySelectorAll('.lens td').length > 0")
    title = page.find("#detail-title").text
    page.run("document.querySelector('.lens td[tabindex=\"0\"]').focus()")
    page.press("ARROW_DOWN", "ARROW_LEFT")
    assert page.find("#detail-title").text != title


@browser_test
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_rules_of_accessibility(page: Browser, scheme: str, width: int) -> None:
    assert importlib.util.find_spec("axe_playwright_python"), "its axe-core checks the page"
    page.show(width=width, scheme=scheme)
    prompt = page.find("#prompt")
    prompt.clear()
    prompt.send_keys("Café: what light\nROMEO:")
    write(page, maxTokens=8, seed=1)
    loaded = {
        "attention": "document.querySelectorAll('.heads canvas').length === 36",
        "lens": "document.querySelectorAll('.lens td').length > 0",
    }
    for tab in TABS:
        page.run("document.getElementById(arguments[0]).click()", f"tab-{tab}")
        page.wait(loaded.get(tab, IDLE))
        assert page.violations() == [], tab
        assert page.run("return document.documentElement.scrollWidth") <= width


@browser_test
def test_a_sheet_shows_alternatives_on_a_phone(page: Browser) -> None:
    page.show(width=390)
    page.find_all(".text .token")[3].click()
    sheet = page.find("aside.open")
    assert sheet.value_of_css_property("position") == "fixed"
    token = page.find_all(".text .token")[3].rect
    top = page.run("return document.querySelector('aside').getBoundingClientRect().top")
    assert token["y"] - page.run("return scrollY") < top
    page.find("aside .close").click()
    assert page.find("aside").value_of_css_property("position") == "static"


PLAIN_ENGINE = """
import { createEngine as createServerEngine } from "./server_engine.js";
export function createEngine(options) {
  const engine = createServerEngine(options);
  const can = { logprobs: false, attention: false, lens: false };
  return { ...engine, info: async () => ({ ...(await engine.info()), can }) };
}
"""


@browser_test
def test_an_engine_that_only_generates(browser: Browser, shakespeare: Model) -> None:
    """As in a static site without the graphs of attention and lens."""
    index = page_files()["index.html"].decode().replace("./server_engine.js", "./plain.js")

    async def send(request: Request) -> Response:
        if request.url.path == "/plain":
            return Response(index, media_type="text/html")
        return Response(PLAIN_ENGINE, media_type="text/javascript")

    settings = Settings()
    models = Models(settings=settings)
    models.add("shakespeare", shakespeare)
    extra = [Route("/plain", send), Route("/page/plain.js", send)]
    server = Served(models, settings, [*routes(models), *extra])
    try:
        browser.open(f"{server.url}/plain")
        browser.wait(READ)
        result = shakespeare.generate(PROMPT, max_tokens=1, logprobs=10)
        assert result.top_logprobs is not None
        wanted = np.exp(list(result.top_logprobs[0].values()))
        np.testing.assert_allclose(shares_of(browser), wanted, atol=ROUNDED)
        write(browser, temperature=0, maxTokens=4)
        for tab in ("attention", "lens"):
            browser.find(f"#tab-{tab}").click()
            assert "needs the server" in browser.find(f"#panel-{tab}").text
        assert (
            ids_of(browser)
            == shakespeare.encode(PROMPT) + shakespeare.generate(PROMPT, max_tokens=4).tokens
        )
    finally:
        server.close()


@browser_test
def test_stop_frees_the_place(page: Browser, served: Served) -> None:
    with held(served.scheduler):
        page.find("#continue").click()
        wait_until(lambda: served.scheduler.waiting > 0)
        page.find("#stop").click()
        page.wait("document.querySelector('#stop').hidden")
        assert page.find("#continue").is_displayed()
    wait_until(lambda: served.scheduler.waiting == 0)
    page.wait(IDLE)
    assert page.texts(".text .generated") == []


@browser_test
def test_a_key_is_asked_for(chromium: Browser, shakespeare: Model) -> None:
    server = serve(shakespeare, Settings(keys=("open sesame",)))
    try:
        chromium.open(server.url)
        for key in ("wrong", "open sesame"):
            chromium.wait("document.querySelector('dialog').open")
            assert chromium.violations() == []
            chromium.find("#key").send_keys(key)
            chromium.press("ENTER")
        chromium.wait(READ)
        assert chromium.run("return [...Object.values(sessionStorage)]") == ["open sesame"]
        assert chromium.run("return localStorage.length") == 0
    finally:
        server.close()
        messages = chromium.messages()
    assert all("401" in one for one in messages), messages


@browser_test
def test_a_model_that_is_being_loaded_is_waited_for(chromium: Browser, shakespeare: Model) -> None:
    loaded = threading.Event()

    def load() -> Model:
        loaded.wait(PATIENCE_SECONDS)
        return shakespeare

    settings = Settings()
    models = Models(settings=settings)
    models.add("shakespeare", load)
    server = Served(models, settings, routes(models), preload=True)
    try:
        chromium.open(server.url)
        chromium.wait("document.querySelector('#where').textContent.includes('not loaded yet')")
        loaded.set()
        chromium.wait(READ)
    finally:
        loaded.set()
        server.close()
        messages = chromium.messages()
    assert all("503" in one for one in messages), messages


@browser_test
def test_an_error_of_the_server_is_shown(chromium: Browser, shakespeare: Model) -> None:
    server = serve(shakespeare)
    try:
        chromium.open(server.url)
        chromium.wait(READ)
        chromium.slide("#prompt", "word " * 300)
        chromium.wait("!document.querySelector('#notice').hidden")
        assert "the model reads at most 256" in chromium.find("#notice").text
        chromium.find("#notice-close").click()
    finally:
        server.close()
    chromium.find("#continue").click()
    chromium.wait("!document.querySelector('#notice').hidden")
    assert "does not answer" in chromium.find("#notice").text
    assert chromium.find("#continue").is_displayed()
    messages = chromium.messages()
    assert all("ERR_CONNECTION" in one or "at most 256" in one for one in messages), messages
