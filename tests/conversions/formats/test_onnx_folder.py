"""ONNX: onnxruntime and tract compute the logits of gptx from the graph."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptx
from gptx.config import GPT2Config
from gptx.conversions import convert
from gptx.conversions.formats import onnx_folder
from gptx.errors import BackendError, ParameterError, WeightsError
from gptx.random_weights import random_weights
from tests.backends.test_base import cases
from tests.support.backends import make_backend
from tests.support.models import EXACT, make_model
from tests.support.random_models import CASES, random_ids, write_model

INSTALL = "pip install '.[test]'"
pytest.importorskip("ndonnx", reason=INSTALL)
onnx = pytest.importorskip("onnx", reason=INSTALL)

Case = Callable[..., tuple[Path, GPT2Config]]
Run = Callable[[np.ndarray, np.ndarray, np.ndarray], list[np.ndarray]]


def onnxruntime_run(folder: Path) -> Run:
    """Return a function of ids, mask and past that runs the graph in onnxruntime."""
    runtime = pytest.importorskip("onnxruntime", reason=INSTALL)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(
        folder / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    names = ("input_ids", "attention_mask", "past_key_values")
    return lambda *inputs: session.run(None, dict(zip(names, inputs, strict=True)))


def tract_run(folder: Path) -> Run:
    """Return the same for tract, with unknown B, S and P."""
    tract = pytest.importorskip("tract", reason=INSTALL)
    model = tract.onnx().load(folder / "model.onnx").into_model().into_runnable()
    return lambda *inputs: [
        x.to_numpy() for x in model.run(list(map(np.ascontiguousarray, inputs)))
    ]


RUNTIMES = [onnxruntime_run, tract_run]


@pytest.fixture(params=RUNTIMES, ids=lambda f: f.__name__.removesuffix("_run"))
def runtime(request: pytest.FixtureRequest) -> Callable[[Path], Run]:
    """Each runtime, or a skip that names its package."""
    return request.param


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as ONNX."""
    folder = tmp_path_factory.mktemp("onnx") / "embedded"
    convert("shakespeare", folder, "onnx")
    return folder


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Return a function that writes a random model as ONNX, once: `case("124M", head="argmax")`."""

    @functools.cache
    def make(name: str, **options: Any) -> tuple[Path, GPT2Config]:
        folder, config = tmp_path_factory.mktemp(name), replace(CASES[name], n_layer=2)
        write_model(folder / "source", config, random_weights(config))
        convert(folder / "source", folder / "onnx", "onnx", **options)
        return folder / "onnx", config

    return make


def padded(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Pad prompts on the left; return ids and mask [B, S]."""
    S = max(map(len, prompts))
    ids = np.array([[0] * (S - len(p)) + p for p in prompts])
    mask = np.array([[0] * (S - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def empty_past(config: GPT2Config, batch: int) -> np.ndarray:
    """Return keys and values of no tokens."""
    return np.zeros((2 * config.n_layer, batch, config.n_head, 0, config.head_dim), np.float32)


def greedy(run: Run, config: GPT2Config, prompts: list[list[int]], n: int) -> list[list[int]]:
    """Return the best n tokens after each prompt, from logits or from ids."""
    ids, mask = padded(prompts)
    past, steps = empty_past(config, len(prompts)), []
    for _ in range(n):
        result, past = run(ids, mask, past)
        ids = result if result.dtype == np.int64 else result[:, -1:, :].argmax(axis=-1)
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        steps.append(ids[:, 0])
    return np.stack(steps, axis=1).tolist()


# onnxruntime with every setting, tract with those that change the ops of the graph.
LOGITS = [(name, onnxruntime_run) for name in CASES if name not in ("774M", "1558M")]
LOGITS += [(name, tract_run) for name in ("tiny", "untied", "layer-scaled", "gelu-erf", "relu")]


FAST = ("tiny", "untied", "gelu-erf")  # the others are soak tests


@pytest.mark.parametrize(
    ("name", "runtime"),
    [pytest.param(*x, marks=() if x[0] in FAST else pytest.mark.soak) for x in LOGITS],
)
def test_logits_are_those_of_gptx(name: str, runtime: Callable[[Path], Run], case: Case) -> None:
    folder, config = case(name)
    run = runtime(folder)
    model = make_model(config, make_backend("numpy", compile=False))
    prompts = [ids.tolist() for ids in (random_ids(config, 1, n, n)[0] for n in (9, 4, 1))]
    ids, mask = padded(prompts)
    past, results = empty_past(config, len(prompts)), []
    for begin, end in ((0, 5), (5, 6), (6, 9)):  # one row of the first call is padding only
        result, past = run(ids[:, begin:end], mask[:, :end], past)
        results.append(result)
    logits = np.concatenate(results, axis=1)
    assert logits.dtype == past.dtype == np.float32
    assert logits.shape == (*ids.shape, config.vocab_size)
    assert past.shape == (*empty_past(config, 3).shape[:3], 9, config.head_dim)
    for row, prompt in zip(logits, prompts, strict=True):
        np.testing.assert_allclose(row[-len(prompt) :], model.logits(prompt), rtol=0, atol=2e-5)


def test_greedy_tokens_are_those_of_gptx(runtime: Callable[[Path], Run], embedded: Path) -> None:
    shakespeare = gptx.load("shakespeare", compile=False)
    config = shakespeare.gpt2.config
    texts = ["ROMEO:", "To be, or not to be", "First Citizen:\nBefore we proceed any further,"]
    prompts = [shakespeare.tokenizer.encode(text) for text in texts]
    expected = [r.tokens for r in shakespeare.generate(prompts, max_tokens=40, temperature=0)]
    run = runtime(embedded)
    assert greedy(run, config, prompts[:1], 40) == expected[:1]
    assert greedy(run, config, prompts, 40) == expected


def test_the_argmax_head_returns_the_best_token_of_each_sequence(
    runtime: Callable[[Path], Run], case: Case
) -> None:
    folder, config = case("355M", head="argmax")
    prompts = random_ids(config, 3, 7).tolist()
    run = runtime(folder)
    ids, present = run(*padded(prompts), empty_past(config, 3))
    assert (ids.shape, ids.dtype) == ((3, 1), np.int64)
    assert present.shape[3] == 7
    model = make_model(config, make_backend("numpy", compile=False))
    results = model.generate(prompts, max_tokens=10, temperature=0, ignore_eos=True)
    assert greedy(run, config, prompts, 10) == [r.tokens for r in results]


def parts(folder: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Return the graph, and the offset and length of each tensor in the data."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    places = {}
    for tensor in graph.initializer:
        assert tensor.data_location == tensor.EXTERNAL
        entry = {e.key: e.value for e in tensor.external_data}
        assert entry["location"] == "model.onnx.data"
        places[tensor.name] = (int(entry["offset"]), int(entry["length"]))
    return graph, places


@pytest.mark.parametrize("name", ["124M", "untied"])
def test_the_graph_refers_to_every_tensor_once_and_contains_none(name: str, case: Case) -> None:
    folder, config = case(name)
    graph, places = parts(folder)
    assert list(places) == list(config.tensor_shapes())  # without a tied head
    assert [tuple(tensor.dims) for tensor in graph.initializer] == [
        *config.tensor_shapes().values()
    ]
    data = (folder / "model.onnx.data").read_bytes()
    for tensor, (name, weight) in zip(
        graph.initializer, random_weights(config).items(), strict=True
    ):
        begin, length = places[tensor.name]
        assert tensor.name == name
        assert data[begin : begin + length] == weight.tobytes()
    end = max(begin + length for begin, length in places.values())
    assert end == len(data)
    constants = (a.t.ByteSize() for n in graph.node for a in n.attribute if a.HasField("t"))
    assert max(constants) < 100


def test_large_tensors_are_aligned_to_pages(tmp_path: Path) -> None:
    config = replace(
        CASES["untied"], vocab_size=2**13, n_layer=1
    )  # its head has one MiB, after small tensors
    write_model(tmp_path / "source", config, random_weights(config))
    convert(tmp_path / "source", tmp_path / "onnx", "onnx")
    begins = {name: begin for name, (begin, _) in parts(tmp_path / "onnx")[1].items()}
    assert all(begin % 64 == 0 for begin in begins.values())
    assert begins["lm_head.weight"] % 2**16 == 0
    assert begins["ln_f.weight"] % 2**16 != 0


def test_the_graph_has_names_shapes_and_a_version(case: Case) -> None:
    folder, config = case("124M")
    model = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert (model.producer_name, model.ir_version) == ("gptx", 8)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
    assert "past_key_values" in model.graph.doc_string

    def shape(value: Any) -> list[Any]:
        dims = value.type.tensor_type.shape.dim
        return [dim.dim_param or dim.dim_value for dim in dims]

    cache = [2 * config.n_layer, "B", config.n_head, "P", config.head_dim]
    assert {value.name: shape(value) for value in model.graph.input} == {
        "input_ids": ["B", "S"],
        "attention_mask": ["B", "P+S"],
        "past_key_values": cache,
    }
    assert {value.name: shape(value) for value in model.graph.output} == {
        "logits": ["B", "S", config.vocab_size],
        "present_key_values": [*cache[:3], "P+S", config.head_dim],
    }


def test_the_folder_has_config_and_tokenizer(embedded: Path) -> None:
    names = {path.name for path in embedded.iterdir()}
    assert {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json"} <= names
    assert GPT2Config.from_file(embedded / "config.json").n_layer > 0


@pytest.mark.parametrize(
    ("name", "runtime"),
    [
        pytest.param("124M", onnxruntime_run, marks=pytest.mark.soak),
        ("untied", onnxruntime_run),
        ("untied", tract_run),
    ],
)
def test_int8_is_near_the_floats(name: str, runtime: Callable[[Path], Run], case: Case) -> None:
    folder, config = case(name, quantize="int8")
    ids = random_ids(config, 2, 12)
    run = runtime(folder)
    first, past = run(ids[:, :11], np.ones((2, 11), np.int64), empty_past(config, 2))
    second, _ = run(ids[:, 11:], np.ones((2, 12), np.int64), past)
    model = make_model(config, make_backend("numpy", compile=False))
    expected = np.stack([model.logits(row) for row in ids.tolist()])
    error = np.concatenate([first, second], axis=1) - expected
    assert 0 < np.sqrt(np.mean(error**2)) < 0.03 * expected.std()


@pytest.mark.parametrize("name", ["124M", "untied"])
def test_int8_values_are_within_half_a_step(name: str, case: Case) -> None:
    folder, config = case(name, quantize="int8")
    tensors = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(folder / "model.onnx").graph.initializer
    }
    quantized = {name for name, tensor in tensors.items() if tensor.dtype == np.int8}
    heads = set() if config.tie_word_embeddings else {"lm_head.weight"}
    assert len(quantized) == 4 * config.n_layer + 1 + len(heads)
    assert {"wte.weight", *heads} <= quantized
    for name, weight in random_weights(config).items():
        if name not in quantized:
            assert tensors[name].tobytes() == weight.tobytes()
            continue
        scale = tensors[f"{name}_scale"]
        scale = scale[:, None] if name in ("wte.weight", "lm_head.weight") else scale
        error = abs(tensors[name] * scale - weight)
        assert (error <= scale * 0.5001).all()
        assert abs(tensors[name]).max() == 127


@pytest.mark.parametrize("name", ["h.0.mlp.c_fc.weight", "wte.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scales_of_numbers_that_are_not_finite_are_refused(name: str, value: float) -> None:
    floats = np.ones((2, 3), np.float32)
    floats[1, 2] = value
    with pytest.raises(WeightsError, match=f"tensor {name} has a NaN or an infinity"):
        onnx_folder._scales(name, floats)


def test_int8_of_numbers_that_are_not_finite_leaves_no_folder(tmp_path: Path) -> None:
    weights = random_weights(CASES["tiny"])
    weights["h.0.mlp.c_fc.weight"][3, 5] = np.nan
    write_model(tmp_path / "source", CASES["tiny"], weights)
    with pytest.raises(WeightsError, match=r"h\.0\.mlp\.c_fc\.weight has a NaN"):
        convert(tmp_path / "source", tmp_path / "onnx", "onnx", quantize="int8")
    assert not (tmp_path / "onnx").exists()


def test_int8_of_zeros_is_zeros() -> None:
    floats = np.zeros((2, 3), np.float32)
    scales = onnx_folder._scales("wte.weight", floats)
    assert not np.concatenate([*onnx_folder._quantize_rows(floats, scales)]).any()
    assert np.isfinite(scales).all()


def test_an_unknown_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="head is 'best', expected one of logits, argmax"):
        convert("shakespeare", tmp_path / "onnx", "onnx", head="best")


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ndonnx", None)
    monkeypatch.delitem(sys.modules, "gptx.conversions.formats.onnx_trace", raising=False)
    with pytest.raises(BackendError, match=r"ndonnx.*`pip install '\.\[onnx\]'`"):
        convert("shakespeare", tmp_path / "onnx", "onnx")
    assert not list(tmp_path.iterdir())


def test_each_override_computes_what_the_generic_op_defines(random: np.random.Generator) -> None:
    from gptx.conversions.formats.onnx_trace import OnnxBackend

    backend = OnnxBackend()  # ndonnx computes with constants at once
    arguments = cases(random)
    for op in ("embed", "linear", "unembed", "layer_norm", "softmax", "split_heads"):
        for args in arguments[op]:
            wide = [EXACT.asarray(x) if isinstance(x, np.ndarray) else x for x in args]
            narrow = [backend.asarray(x) if isinstance(x, np.ndarray) else x for x in args]
            expected, found = (getattr(b, op)(*x) for b, x in ((EXACT, wide), (backend, narrow)))
            if op != "split_heads":
                expected, found = [expected], [found]
            for a, b in zip(expected, found, strict=True):
                np.testing.assert_allclose(b.unwrap_numpy(), a, rtol=2e-5, atol=2e-5, err_msg=op)
