"""The graphs of static sites, in onnxruntime: they compute what gptx computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptx
from gptx import research
from gptx.config import GPT2Config
from gptx.generation.text_model import Model
from gptx.random_weights import random_weights
from gptx.server.sites import writer as site
from tests.support.random_models import CASES, random_ids, write_model
from tests.support.sites import content

pytest.importorskip("ndonnx", reason="pip install '.[test]'")

PROMPT = "To be, or not to be: that is the"


def session(folder: Path, graph: str, place: Path) -> Any:
    """Return a session of onnxruntime of a site's graph; `place` is a folder for its files."""
    runtime = pytest.importorskip("onnxruntime", reason="pip install '.[test]'")
    for name in (graph, "head", "body"):
        (place / name).write_bytes(content(folder, name))
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    return runtime.InferenceSession(place / graph, options, providers=["CPUExecutionProvider"])


def feeds(
    config: GPT2Config, ids: list[int], past: dict[str, np.ndarray], padding: int = 0
) -> dict[str, np.ndarray]:
    """Return the inputs of the step graph, with `padding` rows of nonsense after the past."""
    shape = (1, config.n_head, 0, config.head_dim)
    names = [f"{i}.{part}" for i in range(config.n_layer) for part in ("keys", "values")]
    rows = {name: past.get(name, np.zeros(shape, np.float32)) for name in names}
    P = rows["0.keys"].shape[2]
    mask = np.array([[1] * P + [0] * padding + [1] * len(ids)])
    noise = np.full((1, config.n_head, padding, config.head_dim), 7, np.float32)
    return {
        "input_ids": np.array([ids]),
        "attention_mask": mask,
        **{f"past.{name}": np.concatenate([x, noise], axis=2) for name, x in rows.items()},
    }


class Steps:
    """The step graph of a site in onnxruntime, with the keys and values of one sequence."""

    def __init__(self, folder: Path, config: GPT2Config, place: Path) -> None:
        self.session, self.config = session(folder, "step", place), config
        self.outputs = [x.name for x in self.session.get_outputs()]
        self.past: dict[str, np.ndarray] = {}

    def __call__(self, ids: list[int], padding: int = 0) -> dict[str, np.ndarray]:
        """Add tokens; return all outputs of the graph by name."""
        values = self.session.run(None, feeds(self.config, ids, self.past, padding))
        found = dict(zip(self.outputs, values, strict=True))
        for name, x in found.items():
            if name.startswith("new."):
                key = name.removeprefix("new.")
                old = self.past.get(key)
                self.past[key] = x if old is None else np.concatenate([old, x], axis=2)
        return found


def test_greedy_tokens_of_the_graph_are_those_of_gptx(
    files_only: Path, shakespeare: Model, tmp_path: Path
) -> None:
    steps = Steps(files_only, shakespeare.config, tmp_path)
    ids = shakespeare.encode(PROMPT)
    expected = shakespeare.generate(ids, max_tokens=40, temperature=0).tokens
    found = []
    for padding in range(40):
        logits = steps(ids, padding)["logits"]
        ids = [int(logits[0, -1].argmax())]
        found += ids
    assert found == expected


@pytest.mark.parametrize("name", ["tiny", "untied", "layer-scaled", "relu"])
def test_outputs_of_the_graphs_are_those_of_the_hooks(
    name: str, tmp_path: Path, no_runtime: Path
) -> None:
    config = replace(CASES[name], n_layer=2)
    write_model(tmp_path / "model", config, random_weights(config))
    site.make_site(str(tmp_path / "model"), tmp_path / "site", ort=no_runtime)
    model = gptx.load(str(tmp_path / "model"), generic=True)
    ids = random_ids(config, 1, 9)[0].tolist()
    steps = Steps(tmp_path / "site", config, tmp_path)
    parts = [steps(ids[:5]), steps(ids[5:6], padding=3), steps(ids[6:])]
    streams = ["h.0.resid_pre", "h.0.resid_post", "h.1.resid_post"]
    expected = research.activations(model, ids, streams)
    for stream in streams:
        found = np.concatenate([part[stream][0] for part in parts])
        np.testing.assert_allclose(found, np.reshape(expected[stream], found.shape), atol=2e-5)
    logits = np.concatenate([part["logits"][0] for part in parts])
    np.testing.assert_allclose(logits, model.logits(ids), rtol=0, atol=2e-5)
    pattern = parts[2]["h.1.attn.pattern"][0]
    maps = research.activations(model, ids, ["h.1.attn.pattern"])["h.1.attn.pattern"]
    np.testing.assert_allclose(
        pattern, np.reshape(maps, (config.n_head, 9, 9))[:, 6:, :], atol=2e-6
    )

    lens = session(tmp_path / "site", "lens", tmp_path)
    found, total = lens.run(
        None, {"resid_post": np.concatenate([p["h.0.resid_post"] for p in parts], 1)}
    )
    rows = research.logit_lens(model, ids, ["h.0.resid_post"]).logits[0]
    np.testing.assert_allclose(found[0], rows, rtol=0, atol=2e-5)
    np.testing.assert_allclose(total[0], np.log(np.exp(rows).sum(-1)), rtol=0, atol=2e-5)


def test_float16_is_stored_and_float32_computed(
    tmp_path: Path, no_runtime: Path, files_only: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    for dtype, type in (("float32", onnx.TensorProto.FLOAT), (None, onnx.TensorProto.FLOAT16)):
        folder = files_only if dtype is None else tmp_path / "site"  # the source is float16
        if dtype is not None:
            site.make_site("shakespeare", folder, ort=no_runtime, dtype=dtype)
        graph = onnx.load_from_string(content(folder, "step")).graph
        assert {tensor.data_type for tensor in graph.initializer} == {type}
        assert {x.type.tensor_type.elem_type for x in graph.output} == {onnx.TensorProto.FLOAT}
    assert len(content(tmp_path / "site", "body")) > 1.9 * len(content(files_only, "body"))
