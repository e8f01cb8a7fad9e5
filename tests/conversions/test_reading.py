"""gptx.conversions.reading: models of any format, and their tokenizers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gptx.conversions import FORMATS, convert, read
from gptx.conversions.checkpoint import NO_TOKENIZER_NOTE
from gptx.embedded import EMBEDDED
from gptx.errors import NotFoundError, TokenizerError, WeightsError
from gptx.random_weights import random_weights
from tests.support.conversions import WRITTEN, source_of, to_format
from tests.support.embedded_tokenizer import copy_tokenizer
from tests.support.files.torch_files import nanogpt, zip_bytes
from tests.support.random_models import CASES, write_model


def test_a_missing_source_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        convert(tmp_path / "nowhere", tmp_path / "out")


def test_errors_name_the_file(tmp_path: Path) -> None:
    weights = random_weights(CASES["tiny"])
    del weights["ln_f.bias"]
    source = write_model(tmp_path / "s", CASES["tiny"], weights)
    with pytest.raises(WeightsError, match=f"^{source}.*: .*ln_f.bias is missing"):
        read(source)


def test_a_folder_precedes_the_alias_of_a_hub_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "124M", CASES["tiny"], random_weights(CASES["tiny"]))
    monkeypatch.chdir(tmp_path)
    assert read("124M")[1].config == CASES["tiny"]


@pytest.mark.parametrize("format", WRITTEN)
def test_the_tokenizer_round_trips_if_the_format_has_one(format: str, tmp_path: Path) -> None:
    # The embedded tokenizer with a small model.
    config = replace(CASES["tiny"], vocab_size=1024, bos_token_id=0, eos_token_id=0)
    model = write_model(tmp_path / "source", config, random_weights(config))
    copy_tokenizer(model)
    output = to_format(format, model, tmp_path)
    if not FORMATS[format].reads:
        assert (output / "tokenizer.json").is_file()
        return
    source = read(model)[1]
    found = read(output, config=model / "config.json")[1].tokenizer
    if found is None:
        assert format in ("llm.c", "json")  # these have no tokenizer
        return
    assert source.tokenizer is not None
    text = "ROMEO: It is the east, and Juliet is the sun! <|endoftext|> 12\u00e9\n\n"
    for special in (False, True):
        expected = source.tokenizer.encode(text, allow_special=special)
        assert found.encode(text, allow_special=special) == expected


def test_a_given_tokenizer_adds_the_end_of_a_text(tmp_path: Path) -> None:
    config = replace(CASES["tiny"], vocab_size=1030)  # padded
    source = write_model(tmp_path / "s", config, random_weights(config))
    assert read(source)[1].tokenizer is None
    checkpoint = read(source, tokenizer=EMBEDDED["shakespeare"])[1]
    assert checkpoint.tokenizer is not None
    assert checkpoint.tokenizer.vocab_size == 1024
    assert checkpoint.config == replace(config, bos_token_id=0, eos_token_id=0)


def test_a_note_asks_for_a_tokenizer_until_there_is_one(tmp_path: Path) -> None:
    config = replace(CASES["tiny"], vocab_size=1024)
    path = tmp_path / "ckpt.pt"
    path.write_bytes(zip_bytes(nanogpt(config, random_weights(config))))
    _, without = read(path)
    assert NO_TOKENIZER_NOTE in without.notes
    _, given = read(path, tokenizer="shakespeare")
    assert set(without.notes) - set(given.notes) == {NO_TOKENIZER_NOTE}
    copy_tokenizer(tmp_path, "tokenizer.json")
    _, beside = read(path)
    assert set(without.notes) - set(beside.notes) == {NO_TOKENIZER_NOTE}
    assert set(beside.notes) - set(without.notes) == {
        "the tokenizer in the folder of ckpt.pt is used"
    }


def test_a_missing_tokenizer_or_one_of_another_model_is_refused(tmp_path: Path) -> None:
    source = source_of("tiny", tmp_path)
    with pytest.raises(TokenizerError, match="has 1024 tokens, the model 101"):
        read(source, tokenizer=EMBEDDED["shakespeare"])
    with pytest.raises(NotFoundError, match=r"has no tokenizer: expected tokenizer\.json"):
        read(source, tokenizer=tmp_path)
