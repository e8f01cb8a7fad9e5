"""gptx.tokenization.plugged: objects of encode, decode and vocab_size in place of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gptx
from gptx.errors import ParameterError, TokenizerError
from gptx.tokenization.pipeline import PipelineTokenizer
from gptx.tokenization.plugged import PluggedTokenizer, plug
from gptx.tokenization.protocol import Tokenizer
from gptx.tokenization.saving import save_tokenizer
from gptx.training.api import train
from tests.support.golden_tokenizers import NAMES, TEXTS, load


class Bytes:
    """The smallest tokenizer: a token is a byte."""

    vocab_size = 256

    def encode(self, text: str) -> bytes:
        return text.encode()

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


class Minimal:
    """A tokenizer of gptx, without all that is no part of the protocol."""

    def __init__(self, tokenizer: PipelineTokenizer) -> None:
        self.encode, self.decode = tokenizer.encode, tokenizer.decode
        self.vocab_size = tokenizer.vocab_size


def pieces_of(tokenizer: Tokenizer, ids: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    decoder = plug(tokenizer).decoder(prompt)
    return [*map(decoder.feed, ids), decoder.finish()]


def test_the_public_protocol() -> None:
    assert gptx.Tokenizer is Tokenizer
    assert isinstance(Bytes(), gptx.Tokenizer)
    assert isinstance(load(NAMES[0]), gptx.Tokenizer)
    for other in ("gpt2", b"gpt2", Path("gpt2"), None, 3):
        assert not isinstance(other, gptx.Tokenizer)


def test_a_tokenizer_that_decodes_token_by_token_stays_as_it_is() -> None:
    tokenizer = load(NAMES[0])
    assert plug(tokenizer) is tokenizer


def test_an_attribute_named_decoder_is_no_method() -> None:
    tokenizer = Bytes()
    tokenizer.decoder = {1: "a"}  # type: ignore[attr-defined]  # as in GPT2Tokenizer
    assert isinstance(plug(tokenizer), PluggedTokenizer)


@given(text=st.text(), prompt=st.text())
@settings(max_examples=60, deadline=None)
def test_the_stream_of_a_text(text: str, prompt: str) -> None:
    pieces = pieces_of(Bytes(), text.encode(), prompt.encode())
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        ends = [i for i, piece in enumerate(pieces) if piece]
        lengths = [len(letter.encode()) for letter in text]
        assert ends == [end - 1 for end in np.cumsum(lengths)]  # each with its last byte


@given(ids=st.lists(st.integers(0, 255)))
@settings(max_examples=60, deadline=None)
def test_the_stream_of_any_tokens(ids: list[int]) -> None:
    assert "".join(pieces_of(Bytes(), ids)) == Bytes().decode(ids)


@pytest.mark.parametrize("name", NAMES)
def test_the_stream_of_each_kind_of_tokenizer(name: str) -> None:
    tokenizer = load(name)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert "".join(pieces_of(Minimal(tokenizer), ids)) == tokenizer.decode(ids)


def test_ids_beyond_the_vocabulary_have_no_text() -> None:
    assert plug(Bytes()).decode([65, 256, 66]) == "AB"
    assert pieces_of(Bytes(), [65, 300, 66]) == ["A", "", "B", ""]


class Words(Bytes):
    """A tokenizer whose ids are NumPy's, and which has special tokens."""

    def encode(self, text: str, allow_special: bool = False) -> np.ndarray:  # type: ignore[override]
        return np.array([int(allow_special)] * len(text))


def test_special_tokens_are_allowed_where_the_tokenizer_has_the_option() -> None:
    ids = plug(Words()).encode("ab", allow_special=True)
    assert ids == [1, 1]
    assert all(type(id) is int for id in ids)
    assert plug(Words()).encode("ab") == [0, 0]
    with pytest.raises(ParameterError, match=r"allow_special is True, but encode\(\) of Bytes"):
        plug(Bytes()).encode("ab", allow_special=True)


@pytest.mark.parametrize("found", [3, ["a"], "ab"])
def test_other_results_of_encode_are_named(found: object) -> None:
    tokenizer = Bytes()
    tokenizer.encode = lambda text: found  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(TokenizerError, match=r"encode\(\) of Bytes returns .*, expected a list"):
        plug(tokenizer).encode("ab")


def test_a_tokenizer_is_saved_by_its_own_method(tmp_path: Path) -> None:
    tokenizer = Bytes()
    save_tokenizer(tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []
    tokenizer.save = lambda folder: (folder / "mine").write_text("bytes")  # type: ignore[attr-defined]
    save_tokenizer(tokenizer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_model_is_trained_with_it(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("To be, or not to be: é\n" * 40)
    tokenizer = Bytes()
    tokenizer.save = lambda folder: (folder / "mine").write_text("bytes")  # type: ignore[attr-defined]
    small = {"n_layer": 1, "n_head": 1, "n_embd": 8, "context": 8, "steps": 2}
    backend = gptx.get_backend(generic=True)
    text, out = tmp_path / "text.txt", tmp_path / "out"
    train(text, output=out, tokenizer=tokenizer, backend=backend, **small)
    assert (out / "mine").is_file()
    model = gptx.load(out, tokenizer=tokenizer, compile=False)
    assert model.config.vocab_size == 256
    assert model.config.eos_token_id is None
    assert model.generate("To be", max_tokens=3, seed=1).text is not None


class TestModels:
    """Objects of the protocol in place of the tokenizer of a model."""

    def test_a_model_generates_with_it(self) -> None:
        model = gptx.load("shakespeare", tokenizer=Bytes(), compile=False)
        assert model.encode("aé") == [97, 195, 169]
        assert model.decode([97, 1000]) == "a"
        result = model.generate("ROMEO:", max_tokens=20, seed=1)
        assert result.prompt_tokens == 6
        assert result.text == Bytes().decode([id for id in result.tokens if id < 256])
        chunks = model.stream("ROMEO:", max_tokens=20, seed=1)
        assert "".join(chunk.text for chunk in chunks) == result.text

    def test_a_tokenizer_of_gptx_can_be_given(self) -> None:
        used = gptx.load("shakespeare", compile=False).tokenizer
        assert gptx.load("shakespeare", tokenizer=used, compile=False).tokenizer is used

    def test_a_tokenizer_of_a_larger_model(self) -> None:
        tokenizer = Bytes()
        tokenizer.vocab_size = 1025
        with pytest.raises(TokenizerError, match="tokenizer has 1025 tokens, the model 1024"):
            gptx.load("shakespeare", tokenizer=tokenizer)

    @pytest.mark.parametrize("other", [3, b"gpt2", {"a": 1}])
    def test_another_object(self, other: object) -> None:
        with pytest.raises(ParameterError, match="expected a folder, a model that has one, or an"):
            gptx.load("shakespeare", tokenizer=other)  # type: ignore[arg-type]
