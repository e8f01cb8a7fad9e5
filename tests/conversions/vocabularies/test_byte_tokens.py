"""gptx.conversions.vocabularies.byte_tokens: merges recovered from the order of the tokens."""

from __future__ import annotations

import pytest

from gptx.conversions.vocabularies.byte_tokens import recover_merges, tokenizer_from_bytes
from gptx.embedded import EMBEDDED
from gptx.tokenization.pipeline import PipelineTokenizer
from tests.support.shared_files import shared

BYTES = [bytes([byte]) for byte in range(256)]
TOKENS = [*BYTES, b"th", b"the", b" the", b"<|endoftext|>"]


@pytest.mark.parametrize(
    ("model", "size"),
    [("shakespeare", 1024), ("gpt2", 8000), pytest.param("gpt2", 50257, marks=pytest.mark.soak)],
)
def test_merges_are_the_original_ones(model: str, size: int) -> None:
    folder = EMBEDDED["shakespeare"] if model == "shakespeare" else shared("tokenizer/gpt2")
    original = PipelineTokenizer({"tokenizer.json": folder / "tokenizer.json"})
    found = tokenizer_from_bytes([original.token_bytes(id) for id in range(size)])
    assert found is not None
    a, b = original.definition()["model"], found.definition()["model"]
    assert {token: id for token, id in a["vocab"].items() if id < size} == b["vocab"]
    pairs = [tuple(p.split(" ") if isinstance(p, str) else p) for p in a["merges"]]
    merges = [tuple(pair) for pair in b["merges"]]
    assert merges == pairs[: len(merges)]
    assert len(merges) >= size - 257
    if size == original.vocab_size:
        text = "Thou art 42 naïve <|endoftext|>\n\n  souls, isn't it?"
        for special in (False, True):
            expected = original.encode(text, allow_special=special)
            assert found.encode(text, allow_special=special) == expected


def test_a_merge_is_the_pair_that_earlier_merges_leave() -> None:
    tokens = [b"bc", b"ab", b"abc"]  # not ab + c: b and c are merged before
    assert recover_merges(tokens) == [(b"b", b"c"), (b"a", b"b"), (b"a", b"bc")]


def test_ids_without_a_token() -> None:
    found = tokenizer_from_bytes([b"", *BYTES, b"", b"th", b"the"])
    assert found is not None
    assert found.encode("the th") == [259, 1 + ord(" "), 258]
    assert found.vocab_size == 258
    assert found.decode([257, 259, 0]) == "the"


def test_tokens_without_end_of_text() -> None:
    found = tokenizer_from_bytes(TOKENS[:-1])
    assert found is not None
    assert found.end_of_text_id is None
    assert found.definition()["added_tokens"] == []
    assert tokenizer_from_bytes(BYTES) is not None


def test_a_merge_applies_to_all_its_places() -> None:
    tokens = [b"ab", b"abab", b"ababc", b"aab"]
    merges = [(b"a", b"b"), (b"ab", b"ab"), (b"abab", b"c"), (b"a", b"ab")]
    assert recover_merges(tokens) == merges
    assert recover_merges([b"aa", b"aaa", b"aaaa"]) == [(b"a", b"a"), (b"aa", b"a"), (b"aa", b"aa")]


@pytest.mark.parametrize(
    "tokens",
    [
        TOKENS[1:],  # a byte is missing
        [*TOKENS, b"the"],  # duplicate
        [*TOKENS, b"<|endoftext|>"],
        [*BYTES, b"the", b"th"],  # a token before its part
        [*BYTES, b"xyz"],
    ],
    ids=["no byte", "duplicate", "two ends", "order", "no merge"],
)
def test_other_tokens_have_no_tokenizer(tokens: list[bytes]) -> None:
    assert tokenizer_from_bytes(tokens) is None
