"""What holds for every format: round trips, types, memory, what `convert` refuses."""

from __future__ import annotations

import os
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gptx.config import GPT2Config
from gptx.conversions import FORMATS, convert, detect, read
from gptx.conversions.verify import compare
from gptx.embedded import EMBEDDED
from gptx.errors import (
    ConfigError,
    NotFoundError,
    ParameterError,
    StorageError,
    TokenizerError,
    WeightsError,
)
from gptx.quantization import Quantization
from gptx.random_weights import random_weights
from tests.support.conversions import (
    BOTH_WAYS,
    SIZES,
    WRITTEN,
    numbers,
    opened,
    read_all,
    source_of,
    to_format,
)
from tests.support.random_models import CASES, write_model


@pytest.mark.parametrize("model", ["shakespeare", *SIZES])
@pytest.mark.parametrize("format", BOTH_WAYS)
def test_a_round_trip_keeps_every_bit(format: str, model: str, tmp_path: Path) -> None:
    source = source_of(model, tmp_path)
    there = to_format(format, source, tmp_path)
    assert detect(there) == format
    before, after = opened(source, source), opened(there, source)
    a, b = numbers(before), numbers(after)
    assert list(a) == list(b)
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype == np.float32
        assert tensor.tobytes() == b[name].tobytes(), name
    back = convert(there, tmp_path / "back", "safetensors", config=source / "config.json")
    assert back.config.tensor_shapes() == before.config.tensor_shapes()
    result = compare(before, read(tmp_path / "back")[1])
    assert result.identical
    assert result.logits == 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("format", BOTH_WAYS)
def test_each_type_is_what_was_asked_for_but_for_its_rounding(
    format: str, dtype: str, tmp_path: Path
) -> None:
    if dtype not in FORMATS[format].dtypes:
        with pytest.raises(ParameterError, match=f"{dtype}.*{format}"):
            to_format(format, source_of("124M", tmp_path), tmp_path, dtype=dtype)
        return
    source = source_of("124M", tmp_path)
    there = to_format(format, source, tmp_path, dtype=dtype)
    result = compare(opened(source, source), opened(there, source))
    assert result.identical == (dtype == "float32")
    assert all(d.relative < 2**-8 for d in result.tensors.values())
    assert not result.config


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("format", BOTH_WAYS)
def test_quantized_output_is_near_the_source(format: str, quantize: str, tmp_path: Path) -> None:
    config = GPT2Config(
        vocab_size=101, n_positions=32, n_embd=64, n_layer=2, n_head=2, eos_token_id=100
    )
    source = write_model(tmp_path / "source", config, random_weights(config))
    if quantize not in FORMATS[format].quantize:
        with pytest.raises(ParameterError, match=f"{quantize}.*{format}"):
            to_format(format, source, tmp_path, quantize=quantize)
        return
    there = to_format(format, source, tmp_path, quantize=quantize)
    result = compare(opened(source, source), read(there)[1])
    assert not result.identical
    assert all(d.relative < (0.01 if quantize == "int8" else 0.15) for d in result.tensors.values())
    size = sum(f.stat().st_size for f in ([there] if there.is_file() else there.iterdir()))
    assert size < (0.45 if quantize == "int8" else 0.3) * 4 * config.n_parameters + 20_000


@pytest.mark.parametrize("format", WRITTEN)
def test_a_quantized_source_is_written_as_the_floats_it_stands_for(
    format: str, tmp_path: Path
) -> None:
    if format == "mlx":
        pytest.skip("MLX keeps the codes: see test_mlx_keeps_codes")
    config = CASES["124M"]
    quantized = tmp_path / "quantized"
    convert(source_of("124M", tmp_path), quantized, quantize="int8", group_size=32)
    there = to_format(format, quantized, tmp_path)
    if FORMATS[format].reads:
        floats = read(quantized)[1].as_floats()
        after = read(there, config=config)[1]
        assert compare(floats, after).identical


def test_mlx_keeps_codes(tmp_path: Path) -> None:
    source = source_of("124M", tmp_path)
    convert(source, tmp_path / "a", quantize="int4", group_size=32)
    convert(tmp_path / "a", tmp_path / "b", "mlx")
    convert(tmp_path / "a", tmp_path / "c", quantize="int4", group_size=32)
    data = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert data[0] == data[1] == data[2]
    with pytest.raises(ParameterError, match="are int4 in groups of 32 already"):
        convert(tmp_path / "a", tmp_path / "d", quantize="int8", group_size=32)


BIG = GPT2Config(
    vocab_size=6000, n_positions=64, n_embd=256, n_layer=12, n_head=4, eos_token_id=0
)  # 11 million parameters, 44 MB; the largest tensor has 6 MB


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("big") / "model", BIG, random_weights(BIG))


@pytest.mark.parametrize("format", WRITTEN)
def test_a_model_passes_through_in_the_memory_of_a_tensor(
    format: str, big: Path, tmp_path: Path
) -> None:
    if format == "json":
        pytest.skip("text takes seconds a million numbers: see test_gptx_json")
    tracemalloc.start()
    try:
        there = to_format(format, big, tmp_path)
        if FORMATS[format].reads:
            back = opened(there, big)
            for name in back.tensors:
                assert back.tensors[name].shape
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.2 * 4 * 6000 * 256 + 20e6  # and the whole would be 44e6


def test_progress_tells_how_far_it_is(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    source = source_of("tiny", tmp_path)
    convert(source, tmp_path / "x", progress=lambda *step: steps.append(step))
    config = CASES["tiny"]
    assert [name for name, _, _ in steps] == list(config.tensor_shapes())
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)
    assert steps[0][1] == 0
    assert {total for _, _, total in steps} == {config.n_parameters}
    assert steps[-1][1] + 8 == config.n_parameters


@pytest.mark.parametrize(
    ("name", "quantize", "format"),
    [("out", None, "safetensors"), ("out-1.5", None, "safetensors"), ("out", "int8", "mlx")],
)
def test_the_format_is_the_one_that_the_destination_means(
    name: str, quantize: str | None, format: str, tmp_path: Path
) -> None:
    source = write_model(tmp_path / "s", BIG_ENOUGH, random_weights(BIG_ENOUGH))
    convert(source, tmp_path / name, quantize=quantize)
    assert detect(tmp_path / name) == format


BIG_ENOUGH = CASES["355M"]  # 64 wide: a whole group


@pytest.mark.parametrize("format", [name for name in WRITTEN if FORMATS[name].suffix != "/"])
def test_a_suffix_that_is_one_format_s_alone_means_it(format: str, tmp_path: Path) -> None:
    suffix = FORMATS[format].suffix
    same = [n for n in WRITTEN if FORMATS[n].suffix == suffix and FORMATS[n].by_suffix]
    assert len(same) == 1, f"{suffix} means {same}"
    source = source_of("tiny", tmp_path)
    convert(source, tmp_path / f"out{suffix}")
    assert detect(tmp_path / f"out{suffix}") == same[0]


def test_a_strange_suffix_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"out\.xyz does not say.*--to.*safetensors"):
        convert("shakespeare", tmp_path / "out.xyz")


def test_an_unknown_format_or_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="to is 'x', expected one of"):
        convert("shakespeare", tmp_path / "out", "x")
    with pytest.raises(ParameterError, match="no option 'head'"):
        convert("shakespeare", tmp_path / "out", "safetensors", head="argmax")
    with pytest.raises(ParameterError, match="group_size is 32, but nothing is quantized"):
        convert("shakespeare", tmp_path / "out", group_size=32)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(StorageError, match="no such folder"):
        convert("shakespeare", tmp_path / "no" / "out")


@pytest.mark.parametrize("data", [b"", b"\0", b"hello", b"{}", b"[1]", bytes(5000)])
def test_a_file_of_no_format_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises((WeightsError, ConfigError), match="file"):
        read_all(tmp_path / "file")()


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="none of the formats"):
        detect(tmp_path)


@pytest.mark.parametrize("format", WRITTEN)
def test_the_embedded_model_keeps_its_tokenizer_where_the_format_has_one(
    format: str, tmp_path: Path
) -> None:
    there = to_format(format, EMBEDDED["shakespeare"], tmp_path)
    if not FORMATS[format].reads:
        return
    source = read("shakespeare")[1]
    found = read(there, config=EMBEDDED["shakespeare"] / "config.json")[1].tokenizer
    if found is None:
        assert format in ("llm.c", "json")  # which have none
        return
    assert source.tokenizer is not None
    text = "ROMEO: It is the east, and Juliet is the sun! <|endoftext|> 12\u00e9\n\n"
    assert found.encode(text) == source.tokenizer.encode(text)
    assert found.encode(text, allow_special=True) == source.tokenizer.encode(
        text, allow_special=True
    )


def test_a_tokenizer_can_be_given_and_names_the_end_of_a_text(tmp_path: Path) -> None:
    config = replace(CASES["tiny"], vocab_size=1030)  # padded
    source = write_model(tmp_path / "s", config, random_weights(config))
    assert read(source)[1].tokenizer is None
    checkpoint = read(source, tokenizer=EMBEDDED["shakespeare"])[1]
    assert checkpoint.tokenizer is not None
    assert checkpoint.tokenizer.vocab_size == 1024
    assert checkpoint.config == replace(config, bos_token_id=0, eos_token_id=0)


def test_a_tokenizer_that_does_not_fit_or_is_not_there_is_refused(tmp_path: Path) -> None:
    source = source_of("tiny", tmp_path)
    with pytest.raises(TokenizerError, match="has 1024 tokens, the model 101"):
        read(source, tokenizer=EMBEDDED["shakespeare"])
    with pytest.raises(NotFoundError, match=r"has no tokenizer\.json"):
        read(source, tokenizer=tmp_path)


def test_a_folder_is_meant_before_the_short_name_of_a_hub_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "124M", CASES["tiny"], random_weights(CASES["tiny"]))
    monkeypatch.chdir(tmp_path)
    assert read("124M")[1].config == CASES["tiny"]


def test_what_is_neither_a_file_nor_a_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WeightsError, match="neither a file nor a folder"):
        detect(tmp_path / "pipe")


def test_errors_name_the_file(tmp_path: Path) -> None:
    weights = random_weights(CASES["tiny"])
    del weights["ln_f.bias"]
    source = write_model(tmp_path / "s", CASES["tiny"], weights)
    with pytest.raises(WeightsError, match=f"^{source}: tensor ln_f.bias is missing"):
        read(source)


def test_a_config_that_says_quantized_does_not_make_it_so(tmp_path: Path) -> None:
    config = replace(CASES["355M"], quantization=Quantization(64, 8))
    source = write_model(tmp_path / "s", config, random_weights(config))
    convert(source, tmp_path / "out", quantize="int8")
    assert read(tmp_path / "out")[1].stored["wte.weight"].quantization == Quantization(64, 8)


def test_bfloat16_stays_as_it_is_bit_for_bit(tmp_path: Path) -> None:
    source = write_model(
        tmp_path / "s", CASES["tiny"], random_weights(CASES["tiny"]), dtype="bfloat16"
    )
    file = source / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-2:] = b"\x81\x7f"  # a NaN that arithmetic would quiet
    file.write_bytes(data)
    convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes()[-2:] == b"\x81\x7f"
