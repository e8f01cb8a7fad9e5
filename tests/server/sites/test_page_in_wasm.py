"""The page of a static site: its JavaScript in Node.js, its model in WebAssembly, in Chromium."""

from __future__ import annotations

import hashlib
import random
import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from gptx import research
from gptx.generation.sampling import uniform
from gptx.generation.text_model import Model
from gptx.server.sites import writer as site
from gptx.tokenization.pipeline import PipelineTokenizer
from tests.support import node
from tests.support.static_server import serve

if TYPE_CHECKING:
    from tests.support.browser import Browser

pytestmark = pytest.mark.wasm

SHARED_GPT2 = Path(__file__).parents[4] / "shared" / "tokenizer" / "gpt2"
PROMPT = "To be, or not to be: that is the"
READ = (
    "!document.body.classList.contains('busy') && "
    "document.querySelectorAll('.bars .row').length > 10"
)


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site of the embedded model; npm fetches its runtime."""
    pytest.importorskip("ndonnx", reason="pip install '.[test]'")
    if shutil.which("npm") is None:
        pytest.skip("needs npm: apt-get install npm")
    folder = tmp_path_factory.mktemp("site") / "site"
    site.make_site("shakespeare", folder)
    return folder


def nasty_texts(seed: int, n: int) -> list[str]:
    """Return random texts: words, white space of all kinds, any script, marks, emoji, control.

    Letters that are newer than Python's Unicode are left out: Node.js may know them.
    """
    random_numbers = random.Random(seed)
    words = [
        "the",
        " King",
        "'s",
        "'ll",
        " 're",
        "don't",
        "ROMEO:",
        "\n\n",
        "  ",
        "...",
        "!?",
        "42",
    ]
    spaces = "\t\n\v\f\r \x1c\x85\xa0\u1680\u2003\u2028\u202f\u3000\ufeff\u200b\u180e"
    special = [
        "<|endoftext|>",
        "e\u0301",
        "👩‍👩‍👧",
        "🇩🇪",
        "½²",
        "٣४",
        "ß",
        "ﬁ",
        "\x00",
        "\U0010ffff",
    ]

    def part() -> str:
        kind = random_numbers.random()
        if kind < 0.4:
            return random_numbers.choice(words)
        if kind < 0.6:
            return random_numbers.choice(spaces) * random_numbers.randint(1, 3)
        if kind < 0.75:
            return random_numbers.choice(special)
        while True:
            letter = chr(random_numbers.randrange(0x110000 if kind < 0.9 else 0x3000))
            if unicodedata.category(letter) not in ("Cn", "Cs"):
                return letter * random_numbers.randint(1, 2)

    return ["".join(part() for _ in range(random_numbers.randint(0, 30))) for _ in range(n)]


@pytest.mark.parametrize("name", ["shakespeare", "gpt2"])
def test_the_tokenizer_is_that_of_gptx(name: str, shakespeare: Model) -> None:
    tokenizer = shakespeare.tokenizer
    if name == "gpt2":
        if not SHARED_GPT2.is_dir():
            pytest.skip(f"needs GPT-2's tokenizer in {SHARED_GPT2}")
        tokenizer = PipelineTokenizer.of_folder(SHARED_GPT2)
    assert isinstance(tokenizer, PipelineTokenizer)
    texts = ["", " ", "a" * 500, "'" * 9, *nasty_texts(1, 3000)]
    found = node.run(
        """
        const { Tokenizer } = await page("tokenizer.js");
        const tokenizer = new Tokenizer(input.definition);
        return input.texts.map((text) => {
          const ids = tokenizer.encode(text);
          const tail = ids.slice(1);
          return [ids, tokenizer.decode(ids), tokenizer.decode(tail), [...tokenizer.join(tail)]];
        });
        """,
        {"definition": tokenizer.definition(), "texts": texts},
    )
    for text, (ids, decoded, tail, tail_bytes) in zip(texts, found, strict=True):
        assert ids == tokenizer.encode(text), repr(text)
        assert decoded == text
        assert tail == tokenizer.decode(ids[1:])
        assert bytes(tail_bytes) == b"".join(map(tokenizer.token_bytes, ids[1:]))


def test_a_half_of_a_surrogate_pair_is_an_error(shakespeare: Model) -> None:
    tokenizer = shakespeare.tokenizer
    assert isinstance(tokenizer, PipelineTokenizer)
    body = """
    const { Tokenizer } = await page("tokenizer.js");
    try { new Tokenizer(input).encode("a\\ud800"); } catch (error) { return error.message; }
    """
    assert "half of a surrogate pair" in node.run(body, tokenizer.definition())


def test_random_numbers_are_those_of_gptx() -> None:
    numbers = [(seed, stream, step) for seed in (0, 1, 2**53 - 1) for stream in (0, 7)
               for step in (0, 1, 2, 1000)]  # fmt: skip
    found = node.run(
        'const { uniform } = await page("sampler.js"); return input.map((x) => uniform(...x));',
        numbers,
    )
    assert found == [uniform(*x) for x in numbers]


def test_the_most_probable_tokens_are_in_order() -> None:
    logits = np.random.default_rng(0).integers(-5, 5, 300).astype(np.float32)
    found = node.run(
        """
        const { topTokens } = await page("top_tokens.js");
        return topTokens(Float32Array.from(input), 40, 7);
        """,
        logits.tolist(),
    )
    expected = np.argsort(-logits, kind="stable")[:40]
    assert [id for id, _ in found] == expected.tolist()
    np.testing.assert_allclose([x for _, x in found], logits[expected] - 7.0, atol=1e-12)


def test_tokens_in_webassembly_are_those_of_gptx(embedded: Path, shakespeare: Model) -> None:
    texts = ["ROMEO:", PROMPT, "First Citizen:\nBefore we proceed any further,"]
    prompts = [shakespeare.encode(text) for text in texts]
    settings = [
        {"temperature": 0},
        {"temperature": 1, "seed": 5},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "seed": 12345},
    ]
    found = node.run_model(
        embedded,
        """
        const found = [];
        for (const ids of input.prompts)
          for (const { top_k = 0, top_p = 1, min_p = 0, seed = 0, temperature } of input.settings)
            found.push(await collect(model.generate({ ids, temperature, topK: top_k, topP: top_p,
              minP: min_p, seed, maxTokens: 60, top: 3, endIds: manifest.end_ids })));
        return found;
        """,
        {"prompts": prompts, "settings": settings},
    )
    expected = [
        shakespeare.generate(ids, max_tokens=60, logprobs=3, **options)
        for ids in prompts
        for options in settings
    ]
    for tokens, result in zip(found, expected, strict=True):
        assert [token["id"] for token in tokens] == result.tokens_with_end
        assert [token["end"] for token in tokens][:-1] == [False] * (len(tokens) - 1)
        assert tokens[-1]["end"] == (result.finish_reason == "stop")
        logprobs = [token["logprob"] for token in tokens]
        np.testing.assert_allclose(logprobs, result.logprobs, atol=2e-5)
        for token, top in zip(tokens, result.top_logprobs, strict=True):
            np.testing.assert_allclose([x for _, x in token["top"]], list(top.values()), atol=2e-5)


def test_a_common_prefix_is_read_once(embedded: Path, shakespeare: Model) -> None:
    first = shakespeare.encode(f"{PROMPT} question: whether 'tis nobler in the mind to suffer")
    second = [*first[:9], *shakespeare.encode(" king, and all the world's a stage")]
    found = node.run_model(
        embedded,
        """
        const counts = [];
        const pass = model.pass.bind(model);
        model.pass = (cache, ids, names) => {
          counts.push(ids.length);
          return pass(cache, ids, names);
        };
        const answers = [];
        for (const ids of input) answers.push(await model.logprobs(ids, { top: 5 }));
        return { counts, answers };
        """,
        [first, second, first[:4], first[:4], first],
    )
    # One token before another one is read again, for the probability of that one.
    assert found["counts"] == [len(first), len(second) - 8, 1, len(first) - 4]
    for answer, ids in zip(
        found["answers"], [first, second, first[:4], first[:4], first], strict=True
    ):
        score = shakespeare.score(ids, top_logprobs=5)
        places = answer["places"]
        assert [place["id"] for place in places] == ids
        assert places[0] == {"id": ids[0], "logprob": None, "top": []}
        np.testing.assert_allclose(
            [place["logprob"] for place in places[1:]], score.logprobs[1:], atol=2e-5
        )
        for place, top in zip(places[1:], score.top_logprobs[1:], strict=True):
            assert [id for id, _ in place["top"]] == list(top)
        after = shakespeare.logits(ids)[-1]
        assert [id for id, _ in answer["next"]] == np.argsort(-after)[:5].tolist()


def test_attention_and_lens_are_those_of_research(embedded: Path, shakespeare: Model) -> None:
    ids = shakespeare.encode(PROMPT * 20)[:150]  # more than one pass
    found = node.run_model(
        embedded,
        """
        return {
          attention: [...(await model.attention(input, 3))],
          lens: await collect(model.lens(input, { top: 4, first: 60, last: 130 })),
        };
        """,
        ids,
    )
    S, H = len(ids), shakespeare.config.n_head
    pattern = research.activations(shakespeare, ids, ["h.3.attn.pattern"])["h.3.attn.pattern"]
    np.testing.assert_allclose(
        np.reshape(found["attention"], (H, S, S)), np.reshape(pattern, (H, S, S)), atol=2e-6
    )
    lens = research.logit_lens(shakespeare, ids, k=4)
    assert [row["name"] for row in found["lens"]] == list(lens.names)[::-1]
    for row, logprobs in zip(found["lens"][::-1], lens.top_logprobs, strict=True):
        values = [[x for _, x in place] for place in row["top"]]
        np.testing.assert_allclose(values, logprobs[60:130], atol=5e-5)


def test_the_context_can_be_filled_and_no_more(embedded: Path, shakespeare: Model) -> None:
    ids = shakespeare.encode(PROMPT * 30)[:250]
    found = node.run_model(
        embedded,
        """
        const options = { temperature: 0, topK: 0, topP: 1, minP: 0, top: 1, endIds: [] };
        const tokens = await collect(model.generate({ ids: input, maxTokens: 99, ...options }));
        const errors = [];
        for (const ids of [[], [99999], [...input, ...input]])
          await model.logprobs(ids, { top: 1 }).catch((error) => errors.push(error.message));
        return { ids: tokens.map(({ id }) => id), errors };
        """,
        ids,
    )
    expected = shakespeare.generate(ids, max_tokens=6, temperature=0, ignore_eos=True)
    assert found["ids"] == expected.tokens
    empty, unknown, long = found["errors"]
    assert "empty" in empty
    assert "99999 is not in the vocabulary" in unknown
    assert "500 tokens, the context holds 256" in long


def test_a_signal_ends_a_call_between_two_passes(embedded: Path, shakespeare: Model) -> None:
    ids = shakespeare.encode(PROMPT * 30)[:240]
    found = node.run_model(
        embedded,
        """
        const [writing, reading] = [new AbortController(), new AbortController()];
        let tokens = 0;
        const options = { temperature: 0, topK: 0, topP: 1, minP: 0, top: 1, endIds: [] };
        for await (const _ of model.generate({ ids: input.slice(0, 9), maxTokens: 99,
            signal: writing.signal, ...options }))
          if (++tokens === 3) writing.abort();
        const failed = model.logprobs(input, { top: 1, signal: reading.signal })
          .then(() => "read", (error) => error.name);
        setTimeout(() => reading.abort());
        const name = await failed;
        const { places } = await model.logprobs(input, { top: 1 });
        return { tokens, name, last: places.at(-1).logprob };
        """,
        ids,
    )
    assert (found["tokens"], found["name"]) == (3, "AbortError")
    assert found["last"] == pytest.approx(shakespeare.score(ids).logprobs[-1], abs=2e-5)


def test_damaged_and_cut_downloads_are_fetched_again() -> None:
    data = bytes(range(256)) * 4
    digest = hashlib.sha256(data).hexdigest()
    found = node.run(
        """
        const data = Uint8Array.from(input.data);
        const damaged = data.map((x, i) => (i === 7 ? 0 : x));
        const answers = [data.slice(0, 100), damaged, new Uint8Array(2000), data];
        const kept = new Map();
        const puts = [];
        globalThis.caches = { open: async () => ({
          match: async (url) => kept.get(url)?.clone(),
          put: async (url, response) => { puts.push(url); kept.set(url, response); },
          keys: async () => [...kept.keys()].map((url) => ({ url })),
          delete: async (url) => kept.delete(url),
        }) };
        let fetches = 0;
        globalThis.fetch = async () => {
          fetches += 1;
          if (fetches === 1) return new Response("", { status: 500 });
          return new Response(answers[fetches - 2]);
        };
        globalThis.setTimeout = (f) => queueMicrotask(f);
        const { Downloads } = await page("download.js");
        let bytes = 0;
        const downloads = new Downloads(new URL("http://host/model/"), (n) => (bytes += n));
        const pieces = [{ name: input.name, bytes: data.length }];
        const first = await downloads.read(pieces);
        const counts = [fetches, bytes];
        const second = await downloads.read(pieces);
        kept.set("http://host/model/old.bin", new Response(""));
        kept.set("http://host/other/old.bin", new Response(""));
        await downloads.forgetOthers([pieces]);
        const left = [...kept.keys()];
        return { first: [...first], second: [...second], counts, fetches, puts, left };
        """,
        {"data": list(data), "name": f"{digest[:32]}.bin"},
    )
    url = f"http://host/model/{digest[:32]}.bin"
    assert bytes(found["first"]) == bytes(found["second"]) == data
    assert found["counts"] == [5, len(data)]
    assert found["fetches"] == 5
    assert found["puts"] == [url]
    assert found["left"] == [url, "http://host/other/old.bin"]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A window of Chromium, shared by the tests."""
    pytest.importorskip("selenium")
    from tests.support.browser import Browser

    window = Browser()
    yield window
    window.close()


@pytest.mark.parametrize("headers", [{}, site.HEADERS], ids=["one thread", "threads"])
def test_the_site_runs_in_chromium(
    headers: dict[str, str], embedded: Path, shakespeare: Model, chromium: Browser
) -> None:
    expected = shakespeare.generate(PROMPT, max_tokens=40, temperature=0)
    with serve(embedded, headers) as server:
        chromium.messages()
        chromium.open(server.url)
        chromium.wait(READ)
        assert chromium.run("return crossOriginIsolated") == bool(headers)
        chromium.slide("#setting-temperature", 0)
        chromium.find("#continue").click()
        chromium.wait(f"{READ} && document.querySelectorAll('.text .generated').length > 0")
        chromium.find("#tab-tokens").click()
        ids = [int(x) for x in chromium.texts(".tokens tbody td:nth-child(3)")]
        assert ids == [*shakespeare.encode(PROMPT), *expected.tokens]
        chromium.find("#tab-attention").click()
        chromium.wait("document.querySelectorAll('#panel-attention canvas').length > 6")
        chromium.find("#tab-lens").click()
        chromium.wait("document.querySelectorAll('#panel-lens tbody tr').length === 7")
        assert chromium.messages() == []

        seen = len(server.paths)
        chromium.open(server.url)
        chromium.wait(READ)
        again = [path for path in server.paths[seen:] if path.startswith("/model/")]
        assert again == ["/model/model.json"]  # the pieces are kept by the browser
