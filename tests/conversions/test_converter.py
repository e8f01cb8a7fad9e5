"""gptx.conversions.converter: round trips, types and memory of every format; invalid options."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gptx.config import GPT2Config
from gptx.conversions import FORMATS, convert, detect, read
from gptx.conversions.containers import binary, gguf
from gptx.conversions.formats import onnx_folder
from gptx.conversions.verify import compare
from gptx.errors import ParameterError, StorageError
from gptx.random_weights import random_weights
from tests.support.conversions import BOTH_WAYS, WRITTEN, numbers, opened, source_of, to_format
from tests.support.random_models import CASES, write_model

Written = Callable[..., Path]

# Every format with two models; four sizes with the two cheapest formats.
MODELS = [(format, "355M") for format in BOTH_WAYS]
MODELS += [(format, "124M") for format in BOTH_WAYS if format != "json"]  # JSON is slow
MODELS += [(format, model) for format in ("safetensors", "llm.c") for model in ("774M", "1558M")]
MODELS += [(format, "shakespeare") for format in ("safetensors", "mlx", "gguf")]


@pytest.mark.parametrize(("format", "model"), MODELS)
def test_a_round_trip_keeps_every_bit(
    format: str, model: str, tmp_path: Path, source_model: Written, converted_model: Written
) -> None:
    source, output = source_model(model), converted_model(format, model)
    assert detect(output) == format
    before, after = opened(source, source), opened(output, source)
    a, b = numbers(before), numbers(after)
    assert list(a) == list(b)
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype == np.float32
        assert tensor.tobytes() == b[name].tobytes(), name
    back = convert(output, tmp_path / "back", "safetensors", config=source / "config.json")
    assert back.config.tensor_shapes() == before.config.tensor_shapes()
    result = compare(before, read(tmp_path / "back")[1])
    assert result.identical
    assert result.logits == 0


SMALL = GPT2Config(vocab_size=101, n_positions=32, n_embd=64, n_layer=2, n_head=2, eos_token_id=100)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("small") / "model", SMALL, random_weights(SMALL))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("format", BOTH_WAYS)
def test_the_type_is_the_requested_one(
    format: str, dtype: str, tmp_path: Path, small: Path
) -> None:
    source = small
    if dtype not in FORMATS[format].dtypes:
        with pytest.raises(ParameterError, match=f"{dtype}.*{format} supports"):
            to_format(format, source, tmp_path, dtype=dtype)
        return
    if (format, dtype) == ("json", "float32"):
        return  # the default, see the round trip
    output = to_format(format, source, tmp_path, dtype=dtype)
    result = compare(opened(source, source), opened(output, source))
    assert result.identical == (dtype == "float32")
    assert all(d.relative < 2**-8 for d in result.tensors.values())
    assert not result.config


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("format", BOTH_WAYS)
def test_quantized_output_is_near_the_source(
    format: str, quantize: str, tmp_path: Path, small: Path
) -> None:
    source = small
    if quantize not in FORMATS[format].quantize:
        with pytest.raises(ParameterError, match=f"{quantize}.*{format} supports none"):
            to_format(format, source, tmp_path, quantize=quantize)
        return
    output = to_format(format, source, tmp_path, quantize=quantize)
    result = compare(opened(source, source), read(output)[1])
    assert not result.identical
    assert all(d.relative < (0.01 if quantize == "int8" else 0.15) for d in result.tensors.values())
    files = [output] if output.is_file() else output.iterdir()
    size = sum(file.stat().st_size for file in files)
    assert size < (0.45 if quantize == "int8" else 0.3) * 4 * SMALL.n_parameters + 20_000


@pytest.mark.parametrize("format", [name for name in WRITTEN if name != "mlx"])
def test_a_quantized_source_is_written_as_dequantized_floats(
    format: str, tmp_path: Path, small: Path
) -> None:
    quantized = tmp_path / "quantized"
    convert(small, quantized, quantize="int8", group_size=64)
    output = to_format(format, quantized, tmp_path)
    if FORMATS[format].reads:
        floats = read(quantized)[1].as_floats()
        assert compare(floats, read(output, config=SMALL)[1]).identical


def test_mlx_keeps_quantized_values(tmp_path: Path, source_model: Written) -> None:
    convert(source_model("124M"), tmp_path / "a", quantize="int4", group_size=32)
    convert(tmp_path / "a", tmp_path / "b", "mlx")
    convert(tmp_path / "a", tmp_path / "c", quantize="int4", group_size=32)
    data = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert data[0] == data[1] == data[2]
    with pytest.raises(ParameterError, match="are already int4 in groups of 32"):
        convert(tmp_path / "a", tmp_path / "d", quantize="int8", group_size=32)


BIG = GPT2Config(
    vocab_size=3000, n_positions=64, n_embd=128, n_layer=8, n_head=2, eos_token_id=0
)  # 2.0 million parameters, 7.9 MB; the largest tensor has 1.5 MB
LARGEST_BYTES = 4 * 3000 * 128


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("big") / "model", BIG, random_weights(BIG))


@pytest.mark.parametrize(
    "format",
    [
        pytest.param(name, marks=pytest.mark.soak if name == "onnx" else ())
        for name in WRITTEN
        if name != "json"
    ],
)
def test_a_conversion_needs_the_memory_of_one_tensor(
    format: str, big: Path, tmp_path: Path, source_model: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON needs seconds for a million numbers, see test_gptx_json."""
    monkeypatch.setattr(binary, "CHUNK_NUMBERS", 2**16)
    monkeypatch.setattr(gguf, "CHUNK_NUMBERS", 2**16)
    (tmp_path / "warm-up").mkdir()
    to_format(format, source_model("tiny"), tmp_path / "warm-up")  # imports are not measured
    if format == "onnx":  # nor is the graph, which contains no tensor
        tracer = onnx_folder.import_tracer("gptx.conversions.formats.onnx_trace")
        graph = tracer.trace(BIG, (), "logits")
        traced = SimpleNamespace(trace=lambda *_: graph)
        monkeypatch.setattr(onnx_folder, "import_tracer", lambda _: traced)
    tracemalloc.start()
    try:
        output = to_format(format, big, tmp_path)
        if FORMATS[format].reads:
            back = opened(output, big)
            for name in back.tensors:
                assert back.tensors[name].shape
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.2 * LARGEST_BYTES + 1e6


def test_progress_reports_the_parameters_read(tmp_path: Path, source_model: Written) -> None:
    steps: list[tuple[str, int, int]] = []
    convert(source_model("tiny"), tmp_path / "x", progress=lambda *step: steps.append(step))
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
def test_a_destination_without_a_suffix_is_a_folder(
    name: str, quantize: str | None, format: str, tmp_path: Path, source_model: Written
) -> None:
    convert(source_model("355M"), tmp_path / name, quantize=quantize)
    assert detect(tmp_path / name) == format


@pytest.mark.parametrize("suffix", sorted({row.suffix for row in FORMATS.values()} - {"/"}))
def test_a_suffix_selects_one_format(suffix: str, tmp_path: Path, source_model: Written) -> None:
    rows = ((name, FORMATS[name]) for name in WRITTEN)
    selected = [name for name, row in rows if row.suffix == suffix and row.by_suffix]
    assert len(selected) == 1, f"{suffix} selects {selected}"
    convert(source_model("tiny"), tmp_path / f"out{suffix}")
    assert detect(tmp_path / f"out{suffix}") == selected[0]


def test_an_unknown_suffix_is_refused_with_the_formats(tmp_path: Path) -> None:
    with pytest.raises(
        ParameterError,
        match=r"out\.xyz has an unknown suffix: select the format by to, .*safetensors",
    ):
        convert("shakespeare", tmp_path / "out.xyz")


def test_an_unknown_format_or_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="to is 'x', expected one of"):
        convert("shakespeare", tmp_path / "out", "x")
    with pytest.raises(ParameterError, match="no option head: leave it out"):
        convert("shakespeare", tmp_path / "out", "safetensors", head="argmax")
    with pytest.raises(ParameterError, match="group_size is 32, but"):
        convert("shakespeare", tmp_path / "out", group_size=32)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_of_the_destination_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="its folder does not exist"):
        convert("shakespeare", tmp_path / "no" / "out")


def test_bfloat16_is_kept_bit_for_bit(tmp_path: Path) -> None:
    source = write_model(
        tmp_path / "s", CASES["tiny"], random_weights(CASES["tiny"]), dtype="bfloat16"
    )
    file = source / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-2:] = b"\x81\x7f"  # a signaling NaN, which arithmetic would change
    file.write_bytes(data)
    convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes()[-2:] == b"\x81\x7f"


def test_the_embedded_model_converts_to_folders_of_its_types(tmp_path: Path) -> None:
    source = source_of("shakespeare", tmp_path)
    assert detect(source) == "safetensors"
    assert {t.dtype for t in read(source)[1].stored.values()} == {np.dtype(np.float32)}
