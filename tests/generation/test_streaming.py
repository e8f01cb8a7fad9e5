"""Text that grows from tokens: stop strings, incomplete characters, results and scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptx.generation.params import SamplingParams
from gptx.generation.results import Chunk, FinishReason, Score, Token
from gptx.generation.sequences import Sampling
from gptx.generation.sequences import Sequence as TokenSequence
from gptx.generation.streaming import Continuation, StopFinder

# Stop strings
from gptx.tokenization.decoder import Utf8Decoder


def until_stop(pieces: list[str], stop: list[str]) -> str:
    """Return the text before the first stop string that is complete; the definition."""
    text = ""
    for piece in pieces:
        text += piece
        if starts := [text.index(string) for string in stop if string in text]:
            return text[: min(starts)]
    return text


def feed_all(pieces: list[str], stop: list[str]) -> tuple[list[str], bool]:
    finder = StopFinder(stop)
    shown = [finder.feed(piece) for piece in pieces]
    return [*shown, finder.finish()], finder.found


FEW_LETTERS = st.text("abé", max_size=6)  # stop strings, and parts of them, are frequent
STOPS = st.lists(st.text("abé", min_size=1, max_size=4), max_size=3)


@given(pieces=st.lists(FEW_LETTERS, max_size=12), stop=STOPS)
@settings(max_examples=200, deadline=None)
def test_the_text_ends_before_the_stop(pieces: list[str], stop: list[str]) -> None:
    shown, found = feed_all(pieces, stop)
    assert "".join(shown) == until_stop(pieces, stop)
    assert (found is not None) == any(string in "".join(pieces) for string in stop)


@given(pieces=st.lists(FEW_LETTERS, max_size=12), stop=STOPS)
@settings(max_examples=150, deadline=None)
def test_only_the_possible_start_of_a_stop_string_is_held_back(
    pieces: list[str], stop: list[str]
) -> None:
    finder = StopFinder(stop)
    fed = shown = ""
    for piece in pieces:
        fed += piece
        shown += finder.feed(piece)
        if finder.found:
            break
        held = fed.removeprefix(shown)
        assert shown + held == fed
        assert not held or any(string.startswith(held) and string != held for string in stop), (
            f"{held!r} cannot become a stop string"
        )


@given(text=st.text("ab", max_size=20), stop=st.text("ab", min_size=1, max_size=5), data=st.data())
@settings(max_examples=150, deadline=None)
def test_the_split_into_pieces_does_not_matter(text: str, stop: str, data: st.DataObject) -> None:
    bounds = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *bounds], [*bounds, len(text)], strict=True)]
    shown, _ = feed_all(pieces, [stop])
    assert "".join(shown) == text.partition(stop)[0]


@pytest.mark.parametrize(
    ("pieces", "stop", "shown"),
    [
        (["aaab", "c"], ["aab"], ["a", "", ""]),
        (["a", "a", "a", "b"], ["aab"], ["", "", "a", "", ""]),  # not from the first a on
        (["aab", "aac"], ["aabaad"], ["", "aabaac", ""]),  # held back, then shown
        (["ab", "ab"], ["abc"], ["", "ab", "ab"]),  # shown at the end
        (["one\n", "\ntwo"], ["\n\n"], ["one", "", ""]),  # in two pieces
        (["one\n", "two"], ["\n\n"], ["one", "\ntwo", ""]),
        (["x END y"], ["END"], ["x ", ""]),
        (["END"], ["END"], ["", ""]),
        (["abcdef"], ["f", "cd", "def"], ["ab", ""]),  # the first of several
        (["abc", "d"], ["bcd", "c"], ["ab", "", ""]),  # the first that is complete
        (["abc"], [], ["abc", ""]),
        ([], ["a"], [""]),
        (["", "a", ""], ["b"], ["", "a", "", ""]),
    ],
)
def test_stop_strings(pieces: list[str], stop: list[str], shown: list[str]) -> None:
    assert feed_all(pieces, stop)[0] == shown


def test_a_complete_stop_string_wins_over_a_longer_one_that_started_before() -> None:
    # "b" is complete before "abc" is: the text before "b" is shown.
    assert feed_all(["a", "b", "c"], ["abc", "b"]) == (["", "a", "", ""], "b")


def test_no_text_is_shown_after_a_stop_string() -> None:
    finder = StopFinder(["."])
    assert [finder.feed("a.b"), finder.feed("c"), finder.finish()] == ["a", "", ""]
    assert finder.found == "."


# Continuations


class Words:
    """A tokenizer whose tokens are given byte strings."""

    def __init__(self, *words: bytes) -> None:
        self.words = words
        self.vocab_size = len(words)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        raise AssertionError("a continuation only decodes")

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.words[id] for id in ids).decode(errors="replace")

    def token_bytes(self, id: int) -> bytes:
        return self.words[id]

    def decoder(self, prompt: Sequence[int] = ()) -> Utf8Decoder:
        return Utf8Decoder(self.token_bytes)


def make_continuation(
    *words: bytes, stop: Sequence[str] = (), logprobs: bool = False
) -> Continuation:
    sampling = Sampling(SamplingParams(seed=7), logprobs=logprobs)
    sequence = TokenSequence([0] * 10, sampling, 100, prefill_seconds=0.5)
    backend: Any = SimpleNamespace(peak_memory=lambda: 1000)
    tokenizer = Words(*words) if words else None
    return Continuation(0, "prompt", sequence, tokenizer, list(stop), backend)


def add_all(
    continuation: Continuation, ids: Sequence[int | None], reason: FinishReason = "length"
) -> list[Chunk]:
    """Add tokens until one ends the continuation; the last id has the reason."""
    chunks = []
    for i, id in enumerate(ids, start=1):
        chunks.append(continuation.add(Token(0, id, None, reason if i == len(ids) else None)))
        if chunks[-1].finish_reason:
            break
    return chunks


def test_a_character_of_several_tokens_is_one_piece() -> None:
    chunks = add_all(
        make_continuation(b"na\xc3", b"\xafve ", b"\xf0\x9f", b"\x98\x80"), [0, 1, 2, 3]
    )
    assert [chunk.text for chunk in chunks] == ["na", "ïve ", "", "😀"]
    assert [chunk.token for chunk in chunks] == [0, 1, 2, 3]
    assert chunks[-1].result is not None
    assert chunks[-1].result.text == "naïve 😀"


def test_an_incomplete_character_at_the_end_is_a_replacement_character() -> None:
    chunks = add_all(make_continuation(b"a", b"\xf0\x9f"), [0, 1])
    assert [chunk.text for chunk in chunks] == ["a", "\ufffd"]


def test_a_stop_string_ends_the_text() -> None:
    continuation = make_continuation(b"To be", b" or n", b"ot to", b" be", stop=["not"])
    chunks = add_all(continuation, [0, 1, 2, 3])
    assert [chunk.text for chunk in chunks] == ["To be", " or ", ""]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, "stop"]
    result = chunks[-1].result
    assert result is not None
    assert (result.text, result.tokens) == ("To be or ", [0, 1, 2])


def test_a_stop_string_with_a_character_of_two_tokens() -> None:
    continuation = make_continuation(b"a", b"\xe2\x80", b"\x94b", b"c", stop=["—b"])
    assert [chunk.text for chunk in add_all(continuation, [0, 1, 2, 3])] == ["a", "", ""]


def test_text_held_back_is_shown_with_the_last_token() -> None:
    chunks = add_all(make_continuation(b"a", b"\n", b"b", stop=["\n\n"]), [0, 1])
    assert [chunk.text for chunk in chunks] == ["a", "\n"]
    assert chunks[-1].finish_reason == "length"


def test_text_held_back_is_shown_at_the_end_of_text() -> None:
    chunks = add_all(make_continuation(b"a\n", stop=["\n\n"]), [0, None], "stop")
    assert [chunk.text for chunk in chunks] == ["a", "\n"]
    assert [chunk.token for chunk in chunks] == [0, None]
    assert chunks[-1].result is not None
    assert chunks[-1].result.tokens == [0]


def test_a_stop_string_in_the_last_token_is_the_finish_reason() -> None:
    assert add_all(make_continuation(b"a", b".", stop=["."]), [0, 1])[-1].finish_reason == "stop"


def test_an_interrupted_continuation_has_its_text_so_far() -> None:
    continuation = make_continuation(b"a\n", b"b", stop=["\n\n"])
    assert continuation.add(Token(0, 0, None, None)).text == "a"
    result = continuation.result("interrupted")
    assert (result.text, result.tokens, result.finish_reason) == ("a\n", [0], "interrupted")


def test_a_continuation_interrupted_before_its_first_token() -> None:
    result = make_continuation(b"a").result("interrupted")
    assert (result.text, result.tokens, result.generation_tps) == ("", [], 0.0)


def test_without_a_tokenizer_there_is_no_text() -> None:
    chunks = add_all(make_continuation(), [5, 6])
    assert [(chunk.text, chunk.token) for chunk in chunks] == [("", 5), ("", 6)]
    result = chunks[-1].result
    assert result is not None
    assert (result.text, result.tokens, str(result)) == (None, [5, 6], "")


def test_only_the_last_chunk_has_a_result() -> None:
    chunks = add_all(make_continuation(b"a"), [0, 0, 0])
    assert [chunk.result is not None for chunk in chunks] == [False, False, True]
    assert "".join(map(str, chunks)) == str(chunks[-1].result) == "aaa"


@pytest.mark.parametrize("wanted", [True, False])
def test_logprobs_on_request(wanted: bool) -> None:
    continuation = make_continuation(b"a", logprobs=wanted)
    logprob = -1.5 if wanted else None
    continuation.add(Token(0, 0, logprob, None))
    chunk = continuation.add(Token(0, 0, logprob, "length"))
    assert chunk.logprob == logprob
    assert chunk.result is not None
    assert chunk.result.logprobs == ([-1.5, -1.5] if wanted else None)


def test_numbers_of_a_result() -> None:
    result = add_all(make_continuation(b"a"), [0, 0])[-1].result
    assert result is not None
    assert (result.prompt, result.prompt_tokens, result.seed) == ("prompt", 10, 7)
    assert (result.time_to_first_token, result.prompt_tps) == (0.5, 20.0)
    assert result.peak_memory == 1000


def test_tokens_per_second_count_from_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.25, 10.5, 10.75, 11.0])
    monkeypatch.setattr(
        "gptx.generation.streaming.time", SimpleNamespace(perf_counter=lambda: next(clock))
    )
    result = add_all(make_continuation(b"a"), [0] * 5)[-1].result
    assert result is not None
    assert result.generation_tps == 4.0  # 4 tokens in one second


# Scores


@pytest.mark.parametrize(
    ("logprobs", "n_scored", "loss"),
    [
        ([None, -1.0, -3.0], 2, 2.0),
        ([None, -0.25], 1, 0.25),
        ([None, 0.0, 0.0, 0.0], 3, 0.0),
        ([None, -math.log(8), -math.log(2)], 2, 2 * math.log(2)),
    ],
)
def test_loss_and_perplexity(logprobs: list[float | None], n_scored: int, loss: float) -> None:
    score = Score(list(range(len(logprobs))), logprobs)
    assert score.n_scored == n_scored
    assert score.loss == pytest.approx(loss)
    assert score.perplexity == pytest.approx(math.exp(loss))


def test_perplexity_of_the_uniform_distribution() -> None:
    score = Score([0] * 11, [None] + [-math.log(50257)] * 10)
    assert score.perplexity == pytest.approx(50257)


def test_loss_does_not_depend_on_the_order_of_summation() -> None:
    logprobs: list[float | None] = [-1e16, -1.0, -1.0, -1e-3] * 25
    ids = [0] * 101
    assert Score(ids, [None, *logprobs]).loss == Score(ids, [None, *logprobs[::-1]]).loss
