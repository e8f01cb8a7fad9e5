"""The PyTorch engines compute what gptx computes; needs PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.gpu.engines import GptxEngine
from benchmarks.gpu.times import PLAIN, TRANSFORMERS
from gptx.bench.sources import random_ids
from gptx.random_weights import random_weights
from tests.support.random_models import CASES


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within PyTorch
@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames a parameter
@pytest.mark.parametrize("name", [*PLAIN, *TRANSFORMERS])
def test_peers_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu.peers import pytorch_peer

    config = CASES["124M"]
    weights = random_weights(config)
    exact = GptxEngine("exact", config, weights, backend="numpy", generic=True)
    prompts = np.array(random_ids(config, 2, 7))
    if name in PLAIN:
        model = pytorch_peer.plain_model(config, weights, "float32", "cpu")
        engine: Any = pytorch_peer.PlainEngine(name, model, **PLAIN[name])
    else:
        model = pytorch_peer.transformers_model(config, weights, "float32", "cpu")
        engine = pytorch_peer.TransformersEngine(name, model, **TRANSFORMERS[name])
    if engine.compiled:  # tracing only: generating code takes a minute
        engine.compiled = "default"
        monkeypatch.setattr(pytorch_peer, "COMPILER", "aot_eager")
    engine.prepare(2, 7 + 12, 12)
    assert list(engine.tokens(prompts, 12)) == list(exact.tokens(prompts, 12))
    ids = prompts[0].tolist()
    np.testing.assert_allclose(engine.logits(ids), exact.logits(ids), atol=1e-4)
    assert min(engine.device_seconds(prompts, 4)) > 0
