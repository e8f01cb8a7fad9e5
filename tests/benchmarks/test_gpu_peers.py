"""PyTorch's ways in benchmarks/gpu_peers.py compute the same; where PyTorch is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import engines as gpu_engines
from benchmarks.gpu import times as gpu_times
from gptx.random_weights import random_weights
from tests.support.random_models import CASES


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within PyTorch
@pytest.mark.parametrize("name", [*gpu_times.PLAIN, *gpu_times.TRANSFORMERS])
def test_peers_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    if name in gpu_times.TRANSFORMERS:
        pytest.importorskip("transformers")
    from benchmarks.gpu.peers import pytorch as gpu_peers

    config = CASES["124M"]
    weights = random_weights(config)
    exact = gpu_engines.Gptx("exact", config, weights, backend="numpy", generic=True)
    prompts = gpu_times.random_ids(config, 2, 7)
    if name in gpu_times.PLAIN:
        model = gpu_peers.plain_model(config, weights, "float32", "cpu")
        engine: Any = gpu_peers.Plain(name, model, **gpu_times.PLAIN[name])
    else:
        model = gpu_peers.transformers_model(config, weights, "float32", "cpu")
        engine = gpu_peers.Transformers(name, model, **gpu_times.TRANSFORMERS[name])
    if engine.compiled:  # to a graph, without code for it: that would take a minute
        engine.compiled = "default"
        monkeypatch.setattr(gpu_peers, "COMPILER", "aot_eager")
    engine.prepare(2, 7 + 12, 12)
    assert list(engine.tokens(prompts, 12)) == list(exact.tokens(prompts, 12))
    ids = prompts[0].tolist()
    np.testing.assert_allclose(engine.logits(ids), exact.logits(ids), atol=1e-4)
    assert min(engine.device_seconds(prompts, 4)) > 0
